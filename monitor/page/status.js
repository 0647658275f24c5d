// What a server is doing, in one word and one sign: never by colour alone.

import { duration, ranges } from "./format.js";

export const STATUSES = {
  online: { sign: "●", label: "online", about: "serves new sessions" },
  joining: { sign: "◔", label: "joining", about: "loads its weights" },
  draining: { sign: "◑", label: "draining", about: "ends its sessions and takes no new ones" },
  unasked: { sign: "◌", label: "not asked yet", about: "announces that it is online" },
  unreachable: { sign: "✕", label: "no answer", about: "announces itself but does not answer the monitor" },
  offline: { sign: "○", label: "offline", about: "has left" },
};

/** A key of STATUSES. A server that still loads may not answer, so silence says nothing about it. */
export function statusOf(server) {
  if (server.state === "joining" || server.state === "offline") return server.state;
  if (server.answers === false) return "unreachable";
  if (server.answers === null && server.state === "online") return "unasked";
  return server.state in STATUSES ? server.state : "offline";
}

/** What happens if it leaves, in a few words; `step` is what a token takes now, in seconds. */
export function departureOf(server, step) {
  const departure = server.departure;
  if (!departure) return { text: server.serving ? "not worked out" : "serves nobody", grave: false, order: -1 };
  if (departure.lost_blocks.length) {
    return { text: `loses ${ranges(departure.lost_blocks)}`, grave: true, order: 1e9 + departure.lost_blocks.length };
  }
  if (departure.step_time === null) {
    // without a chain now its leaving is not what takes it
    const grave = step !== null;
    return { text: grave ? "no chain is left" : "no chain even now", grave, order: grave ? 1e9 : 0 };
  }
  const change = step === null ? 0 : departure.step_time - step;
  if (step !== null && Math.abs(change) < 1e-3 * step) return { text: "no change", grave: false, order: 0 };
  return { text: `${duration(departure.step_time)} a token`, grave: false, order: change };
}
