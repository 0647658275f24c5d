// The table of a model's servers.

import { byId, make, setText, whenSeen } from "./dom.js";
import { age, count, duration, MISSING, nameOf, number, percent, shortId, span } from "./format.js";
import { departureOf, STATUSES, statusOf } from "./status.js";
import { PagedTable } from "./table.js";

export class ServersPanel {
  /** open(peerId): show one in full. check(peerId): and call it. now(): Unix time. */
  constructor({ open, check, now }) {
    this._now = now;
    this._open = open;
    this._check = check;
    this._model = null;
    this._selected = null;
    this._table = new PagedTable(byId("servers-table"), {
      caption: "Servers of this model",
      columns: this._columns(),
      key: (server) => server.peer_id,
      sort: "blocks",
      empty: "No server is like that.",
    });
    const every = make("option", { value: "" }, "any");
    byId("servers-status").append(every, ...Object.entries(STATUSES).map(optionOf));
    this._redraw = whenSeen(byId("servers"), () => this._draw());
    byId("servers-find").addEventListener("input", this._redraw);
    byId("servers-status").addEventListener("change", this._redraw);
  }

  update(model, selected) {
    this._model = model;
    this._selected = selected;
    this._redraw();
  }

  /** Ages grow without news. */
  tick() {
    if (this._model) this._redraw();
  }

  _draw() {
    const wanted = byId("servers-status").value;
    const words = byId("servers-find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (server) => (!wanted || statusOf(server) === wanted) && words.every((word) => matches(server, word));
    this._table.update(this._model.servers.filter(fits), this._selected);
  }

  _columns() {
    const step = () => this._model.best_chain?.step_time ?? null;
    const since = (moment) => (moment === null ? null : this._now() - moment);
    return [
      { id: "name", title: "Server", head: true, value: nameOf, fill: (cell, one) => this._fillName(cell, one) },
      { id: "status", title: "State", value: (one) => Object.keys(STATUSES).indexOf(statusOf(one)), fill: fillStatus },
      {
        id: "blocks",
        title: "Blocks",
        about: "From the first to before the last",
        value: (one) => one.span[0] + one.span[1] / 1e4,
        text: (one) => span(one.span),
        numeric: true,
      },
      {
        id: "throughput",
        title: "Tokens/s",
        about: "Of one session, through all blocks of this server",
        value: (one) => one.throughput,
        text: (one) => number(one.throughput),
        numeric: true,
      },
      {
        id: "load",
        title: "Load",
        about: "Rows that its device works on, and rows that wait",
        value: (one) => one.running_rows + one.waiting_rows,
        text: (one) => `${number(one.running_rows)} + ${number(one.waiting_rows)}`,
        numeric: true,
      },
      {
        id: "cache",
        title: "Cache free",
        about: "Room for tokens of new sessions",
        value: cacheShare,
        text: (one) => (cacheShare(one) === null ? number(one.cache_tokens_left) : percent(cacheShare(one))),
        numeric: true,
      },
      {
        id: "round-trip",
        title: "Round trip",
        about: "From the monitor and back",
        value: (one) => one.round_trip,
        text: (one) => duration(one.round_trip),
        numeric: true,
      },
      {
        id: "departure",
        title: "If it leaves",
        about: "Blocks that nobody else holds, or what a token would take by the best chain of the others",
        value: (one) => departureOf(one, step()).order,
        fill: (cell, one) => fillDeparture(cell, departureOf(one, step())),
      },
      {
        id: "way",
        title: "Reached",
        value: (one) => (one.relayed ? "relay" : "direct"),
        fill: (cell, one) => this._fillWay(cell, one),
      },
      { id: "dtype", title: "Type", about: "Of what it computes in", value: (one) => one.dtype },
      {
        id: "quantization",
        title: "Quantised",
        value: (one) => (one.quantization === "none" ? null : one.quantization),
        text: (one) => (one.quantization === "none" ? "no" : (one.quantization ?? MISSING)),
      },
      {
        id: "adapters",
        title: "Adapters",
        value: (one) => one.adapters.length,
        fill: (cell, one) => fillAdapters(cell, one),
        numeric: true,
      },
      { id: "software", title: "Version", value: (one) => one.software, text: (one) => one.software || MISSING },
      {
        id: "uptime",
        title: "Up",
        about: "Since its process started",
        value: (one) => since(one.started_at),
        text: (one) => age(since(one.started_at)),
        numeric: true,
      },
      {
        id: "heartbeat",
        title: "Heard",
        about: "Since it last announced itself, by its own clock",
        value: (one) => since(one.announced_at),
        text: (one) => age(since(one.announced_at)),
        numeric: true,
      },
    ];
  }

  _fillName(cell, server) {
    if (!cell.firstChild) {
      const open = () => this._open(cell.dataset.peer);
      const button = make("button", { type: "button", class: "link", onclick: open });
      cell.append(button, " ", make("code", { class: "muted" }));
    }
    cell.dataset.peer = server.peer_id;
    const [button, id] = cell.children;
    setText(button, nameOf(server));
    setText(id, server.public_name ? shortId(server.peer_id) : "");
    button.title = server.peer_id;
  }

  _fillWay(cell, server) {
    if (!cell.firstChild) {
      const check = () => this._check(cell.dataset.peer);
      cell.append(make("span"), " ", make("button", { type: "button", class: "small", onclick: check }, "check"));
    }
    cell.dataset.peer = server.peer_id;
    setText(cell.firstChild, server.relayed ? "by relay" : "directly");
    cell.lastChild.setAttribute("aria-label", `Check whether ${nameOf(server)} can be reached`);
  }
}

function optionOf([value, { label }]) {
  return make("option", { value }, label);
}

/** Part of the cache that is free, or null if the server does not say how much it has. */
export function cacheShare(server) {
  return server.cache_tokens ? Math.min(1, server.cache_tokens_left / server.cache_tokens) : null;
}

export function fillStatus(cell, server) {
  const status = statusOf(server);
  if (cell.dataset.status === status) return;
  cell.dataset.status = status;
  const { sign, label, about } = STATUSES[status];
  cell.title = about;
  cell.replaceChildren(make("span", { class: "sign", "aria-hidden": "true" }, sign), ` ${label}`);
}

function fillDeparture(cell, { text, grave }) {
  setText(cell, grave ? `▲ ${text}` : text);
  cell.classList.toggle("grave", grave);
}

function fillAdapters(cell, server) {
  setText(cell, number(server.adapters.length));
  cell.title = server.adapters.length
    ? server.adapters.map((adapter) => `${adapter.name} (${adapter.kind})`).join("\n")
    : count(0, "adapter");
}

// A number is a block, anything else a part of what describes the server.
function matches(server, word) {
  if (/^\d+$/.test(word) && Number(word) >= server.span[0] && Number(word) < server.span[1]) return true;
  const texts = [server.public_name, server.peer_id, server.software, server.numerics, span(server.span)];
  texts.push(server.relayed ? "relay" : "direct", ...server.adapters.map((adapter) => adapter.name));
  return texts.some((text) => text.toLowerCase().includes(word));
}
