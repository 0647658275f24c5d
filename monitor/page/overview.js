// A model in a few figures, and its fastest chain.

import { byId, figure, make, replaceChildren } from "./dom.js";
import { count, duration, MISSING, nameOf, number, percent, ranges, shortId, span } from "./format.js";
import { linkTo } from "./route.js";
import { STATUSES, statusOf } from "./status.js";

export function showOverview(model) {
  byId("model-name").textContent = model.name;
  byId("model-fingerprint").textContent = model.fingerprint.slice(0, 12);
  byId("figures").replaceChildren(
    completeness(model),
    replicas(model),
    speed(model),
    servers(model),
    load(model),
    cache(model),
  );
  replaceChildren(byId("chain"), chain(model));
}

function completeness(model) {
  if (model.complete) return figure("Complete", "✓ yes", `all ${count(model.num_blocks, "block")} are served`, "good");
  const missing = `nobody serves ${ranges(model.missing_blocks)} of ${model.num_blocks}`;
  return figure("Complete", "✕ no", missing, "bad");
}

function replicas(model) {
  const fewest = Math.min(...model.replicas);
  const most = Math.max(...model.replicas);
  const weakest = model.weakest_blocks;
  const some = weakest.length === 1 ? `block ${weakest[0]} has` : `blocks ${ranges(weakest)} have`;
  const detail = fewest === most ? "the same for every block" : `${some} fewest`;
  return figure(
    "Replicas",
    fewest === most ? number(fewest) : `${fewest} to ${most}`,
    detail,
    fewest === 0 ? "bad" : fewest === 1 ? "thin" : null,
  );
}

function speed(model) {
  const best = model.best_chain;
  if (!best) return figure("Best chain from here", MISSING, "there is none", "bad");
  return figure(
    "Best chain from here",
    `${number(best.tokens_per_second)} tokens/s`,
    best.correction === null
      ? `${duration(best.step_time)} a token, predicted`
      : `${duration(best.step_time)} a token, as test requests suggest`,
  );
}

function servers(model) {
  const counts = new Map();
  for (const server of model.servers) {
    const status = statusOf(server);
    counts.set(status, (counts.get(status) ?? 0) + 1);
  }
  const shown = Object.keys(STATUSES).filter((status) => counts.has(status));
  const others = shown.map((status) => `${number(counts.get(status))} ${STATUSES[status].label}`);
  return figure("Servers", number(model.servers.length), others.join(", "));
}

function load(model) {
  const sum = (name) => model.servers.reduce((total, server) => total + (server.serving ? server[name] : 0), 0);
  return figure("Rows at work", number(sum("running_rows")), `${number(sum("waiting_rows"))} waiting`);
}

function cache(model) {
  const told = model.servers.filter((server) => server.serving && server.cache_tokens);
  const all = told.reduce((total, server) => total + server.cache_tokens, 0);
  if (!all) return figure("Cache free", MISSING, "nobody says");
  const left = told.reduce((total, server) => total + Math.min(server.cache_tokens, server.cache_tokens_left), 0);
  return figure("Cache free", percent(left / all), "of all servers together");
}

/** Why there is no chain. */
export function whyNone(model) {
  if (!model.complete) return "No chain of servers covers all blocks, so nobody can generate.";
  return "Every block is served, but some only by servers whose caches are full: nobody can start to generate.";
}

function chain(model) {
  const best = model.best_chain;
  if (!best) return make("p", { class: "muted" }, whyNone(model));
  const longest = Math.max(...best.hops.map((hop) => hop.seconds));
  const byPeer = new Map(model.servers.map((server) => [server.peer_id, server]));
  const hops = best.hops.map((hop, index) => {
    const server = byPeer.get(hop.peer_id);
    const bar = make("span", { class: "hop-bar", "aria-hidden": "true" });
    bar.style.width = `${(100 * hop.seconds) / longest}%`;
    return make(
      "li",
      {},
      make("span", { class: "hop-number", "aria-hidden": "true" }, String(index + 1)),
      make(
        "a",
        { class: "hop-name", href: linkTo({ model: model.fingerprint.slice(0, 12), server: hop.peer_id }) },
        server ? nameOf(server) : shortId(hop.peer_id),
      ),
      make("span", { class: "hop-span" }, span(hop.blocks)),
      make("span", { class: "hop-track" }, bar),
      make("span", { class: "hop-time" }, duration(hop.seconds)),
    );
  });
  return make("ol", { class: "chain" }, hops);
}
