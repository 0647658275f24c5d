// The monitor's JSON API. Whatever goes wrong becomes an Error with a sentence for people.

const ROOT = "api/v1/";
const STATE_TIMEOUT = 15_000; // milliseconds
const REACH_TIMEOUT = 90_000;
const TRACE_TIMEOUT = 180_000;

async function ask(path, options, timeout, stop = null) {
  const signals = [AbortSignal.timeout(timeout), ...(stop ? [stop] : [])];
  try {
    return await fetch(ROOT + path, { cache: "no-store", ...options, signal: AbortSignal.any(signals) });
  } catch (error) {
    if (stop?.aborted) throw new Error("You stopped waiting for it.");
    if (error.name === "TimeoutError") throw new Error(`The monitor did not answer within ${timeout / 1000} s.`);
    throw new Error("The monitor does not answer: is `swarm health` still running?");
  }
}

async function answerOf(response) {
  const answer = await response.json().catch(() => null);
  if (response.ok && answer !== null) return answer;
  let reason = describe(answer?.detail) || `The monitor answered with ${response.status} and no explanation.`;
  const wait = response.headers.get("Retry-After");
  if (response.status === 429 && wait && !/try again in/i.test(reason)) reason += ` Try again in ${wait} s.`;
  throw new Error(reason);
}

// Invalid input is described as a list, one entry a field.
function describe(detail) {
  if (!Array.isArray(detail)) return typeof detail === "string" ? sentence(detail) : "";
  return detail.map((one) => sentence(`${(one.loc ?? []).slice(1).join(" ")}: ${one.msg}`)).join(" ");
}

export function sentence(text) {
  const trimmed = text.trim();
  return /[.!?]$/.test(trimmed) ? trimmed : `${trimmed}.`;
}

/** The swarm's report, or null if it is still the one tagged `tag`. Also its tag, and the monitor's time in seconds. */
export async function fetchState(tag) {
  const response = await ask("state", { headers: tag ? { "If-None-Match": tag } : {} }, STATE_TIMEOUT);
  const date = Date.parse(response.headers.get("Date") ?? "");
  const time = Number.isNaN(date) ? null : date / 1000;
  if (response.status === 304) return { report: null, tag, time };
  return { report: await answerOf(response), tag: response.headers.get("ETag"), time };
}

/** A TraceReport. request: a TraceRequest. stop: an AbortSignal. */
export async function trace(request, stop) {
  const headers = { "Content-Type": "application/json" };
  const response = await ask("trace", { method: "POST", headers, body: JSON.stringify(request) }, TRACE_TIMEOUT, stop);
  return answerOf(response);
}

/** A ReachabilityReport. */
export async function checkReachable(peerId) {
  return answerOf(await ask(`is_reachable/${encodeURIComponent(peerId)}`, {}, REACH_TIMEOUT));
}

export const openEvents = () => new EventSource(`${ROOT}events`);
