// Asks the monitor to call a peer, and says at which step that failed.

import { checkReachable, sentence } from "./api.js";
import { byId, make } from "./dom.js";
import { duration, shortId } from "./format.js";

const STEPS = {
  find: "find its addresses",
  relay: "reach a relay of it",
  dial: "connect",
  handshake: "make sure that it is who it should be",
  answer: "get an answer",
};

export class ReachPanel {
  constructor() {
    const form = byId("reach-form");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const peerId = byId("reach-peer").value.trim();
      runCheck(peerId, byId("reach-result"), form.querySelector("button"));
    });
  }
}

/** Call a peer; place: where to say how it went. button: stays disabled meanwhile. */
export async function runCheck(peerId, place, button) {
  const shown = make("p", { class: "message", role: "status" }, `Calling ${shortId(peerId)}…`);
  place.replaceChildren(shown);
  button.disabled = true;
  try {
    const report = await checkReachable(peerId);
    if (place.contains(shown)) place.replaceChildren(describe(report)); // else another server is shown by now
  } catch (error) {
    shown.textContent = `▲ ${error.message}`;
    shown.classList.add("grave");
  }
  button.disabled = false;
}

function describe(report) {
  if (report.reachable) {
    const way = report.way === "relay" ? "through a relay" : "directly";
    const text = `✓ ${shortId(report.peer_id)} can be reached ${way}, round trip ${duration(report.round_trip)}.`;
    return make("p", { class: "message good", role: "status" }, text);
  }
  const names = Object.keys(STEPS);
  const failed = names.indexOf(report.step);
  const steps = names
    .filter((name) => name !== "relay" || report.step === "relay" || report.way === "relay")
    .map((name) => {
      const at = names.indexOf(name);
      const [sign, outcome] = at < failed ? ["✓", "done"] : at === failed ? ["✕", "failed"] : ["·", "not tried"];
      return make(
        "li",
        { "data-outcome": outcome },
        make("span", { "aria-hidden": "true" }, sign),
        ` ${STEPS[name]}: ${outcome}`,
      );
    });
  const reason = sentence(report.reason ?? "the monitor does not say why");
  return make(
    "div",
    { role: "status" },
    make("p", { class: "message grave" }, `✕ ${shortId(report.peer_id)} cannot be reached: ${reason}`),
    failed >= 0 && make("ul", { class: "steps-list" }, steps),
  );
}
