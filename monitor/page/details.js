// One server in full, in a dialog that stays up to date while it is open.

import { byId, entry, make, setText } from "./dom.js";
import { age, bandwidth, count, duration, MISSING, nameOf, number, percent, ranges, shortId, span } from "./format.js";
import { cacheShare } from "./servers.js";
import { STATUSES, statusOf } from "./status.js";

export class Details {
  /** close(): show none. check(peerId, place): call a peer, and say there how that went. now(): Unix time. */
  constructor({ close, check, now }) {
    this._dialog = byId("server");
    this._check = check;
    this._now = now;
    this._model = null;
    this._peerId = null;
    this._list = make("dl", { class: "details" });
    this._result = make("div");
    this._button = make(
      "button",
      { type: "button", class: "primary", onclick: () => this.check() },
      "Check reachability",
    );
    byId("server-body").append(this._list, this._button, this._result);
    byId("server-close").addEventListener("click", () => this._dialog.close());
    this._dialog.addEventListener("close", close);
    let pressedOutside = false; // selecting a text may end there, and must not close it
    this._dialog.addEventListener("pointerdown", (event) => (pressedOutside = this._isOutside(event)));
    this._dialog.addEventListener("click", (event) => {
      if (pressedOutside && this._isOutside(event)) this._dialog.close();
    });
  }

  /** Show this server of the model; null: none. */
  update(model, peerId) {
    const other = peerId !== this._peerId;
    if (other) this._result.replaceChildren();
    this._peerId = peerId;
    this._model = model;
    if (!peerId) {
      if (this._dialog.open) this._dialog.close();
      return;
    }
    if (other || !this._holdsSelection()) this._draw();
    if (!this._dialog.open) this._dialog.showModal();
  }

  /** Ages grow without news. */
  tick() {
    if (this._peerId && !this._holdsSelection()) this._draw();
  }

  _draw() {
    const server = this._model.servers.find((one) => one.peer_id === this._peerId);
    setText(byId("server-name"), server ? nameOf(server) : shortId(this._peerId));
    this._list.replaceChildren(...(server ? this._entries(this._model, server) : gone(this._peerId)));
  }

  // Somebody is about to copy what he selected, and it would be lost.
  _holdsSelection() {
    const selection = getSelection();
    return !selection.isCollapsed && this._list.contains(selection.anchorNode);
  }

  _isOutside({ target, clientX: x, clientY: y }) {
    const { left, right, top, bottom } = this._dialog.getBoundingClientRect();
    return target === this._dialog && (x < left || x > right || y < top || y > bottom);
  }

  check() {
    if (this._peerId) this._check(this._peerId, this._result, this._button);
  }

  _entries(model, server) {
    const since = (moment) => (moment === null ? MISSING : `${age(this._now() - moment)} ago`);
    const { sign, label, about } = STATUSES[statusOf(server)];
    const share = cacheShare(server);
    const cache = share === null ? "" : ` of ${number(server.cache_tokens)} (${percent(share)})`;
    return [
      entry("Peer id", make("code", {}, server.peer_id)),
      entry("State", `${sign} ${label}: ${about}`),
      entry("Blocks", `${span(server.span)} of ${model.num_blocks}${server.fixed ? ", chosen by its owner" : ""}`),
      entry("If it leaves", leaving(model, server)),
      entry("Throughput", speed(server)),
      server.forward_rate !== null && entry("Prompts", `${number(server.forward_rate)} tokens/s`),
      entry("Load", load(server)),
      entry("Cache", `room for ${number(server.cache_tokens_left)} tokens${cache}`),
      entry(
        "Reached",
        server.relayed ? `by relay: ${server.relays.map(shortId).join(", ") || "none at the moment"}` : "directly",
      ),
      entry("Round trip", duration(server.round_trip)),
      server.network_rate !== null && entry("Its network", bandwidth(server.network_rate)),
      entry(
        "Computes in",
        server.dtype ? `${server.dtype}, quantised: ${server.quantization}, on ${server.device}` : MISSING,
      ),
      entry("Numerics", make("code", {}, server.numerics)),
      entry("Version", server.software || MISSING),
      entry("Started", since(server.started_at)),
      entry("Last heartbeat", since(server.announced_at)),
      entry("Record ends", `in ${age(server.expires_at - this._now())}`),
      entry("Adapters", adapters(server)),
      server.addresses && entry("Addresses", list(server.addresses.map((address) => make("code", {}, address)))),
    ].filter(Boolean);
  }
}

function load(server) {
  const { running_rows: running, waiting_rows: waiting, session_rows: open } = server;
  return `${count(running, "row")} at work, ${number(waiting)} waiting, ${number(open)} in sessions`;
}

function gone(peerId) {
  return [
    entry("Peer id", make("code", {}, peerId)),
    entry("State", "No record of it: it has left, or never was here."),
  ];
}

function leaving(model, server) {
  const departure = server.departure;
  if (!departure) {
    return server.serving ? "not worked out, as this model is so large" : "it serves nobody now, so nothing changes";
  }
  if (departure.lost_blocks.length)
    return `▲ nobody else holds ${ranges(departure.lost_blocks)}: the model becomes incomplete`;
  if (departure.step_time === null) {
    return model.best_chain ? "▲ the others have no room for a chain" : "no block is lost; there is no chain even now";
  }
  const now = model.best_chain?.step_time;
  return `no block is lost; a token takes ${duration(departure.step_time)}, now ${duration(now)}`;
}

function speed(server) {
  const steps = Object.entries(server.decode_times);
  const times = steps.map(([rows, seconds]) => `${duration(seconds)} for ${count(Number(rows), "row")}`);
  return `${number(server.throughput)} tokens/s${times.length ? `; a step takes ${times.join(", ")}` : ""}`;
}

function adapters(server) {
  const fetches = server.fetches_adapters ? "fetches others from the hub when asked" : "";
  if (!server.adapters.length) return fetches || "none";
  return make("div", {}, list(server.adapters.map((one) => `${one.name} (${one.kind}, ${one.digest})`)), fetches);
}

function list(items) {
  return items.length
    ? make(
        "ul",
        {},
        items.map((item) => make("li", {}, item)),
      )
    : "none known";
}
