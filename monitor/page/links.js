// Links between servers with their latency: a matrix while it fits, and a list of any length.

import { byId, make, setText, whenSeen } from "./dom.js";
import { duration, MISSING, nameOf, shortId, span } from "./format.js";
import { PagedTable } from "./table.js";

const LARGEST_MATRIX = 12;

export class LinksPanel {
  constructor({ open }) {
    this._open = open;
    this._model = null;
    this._table = new PagedTable(byId("links-table"), {
      caption: "Links between servers",
      columns: [
        { id: "from", title: "From", head: true, value: (one) => one.fromName, fill: this._fill("from") },
        {
          id: "from-blocks",
          title: "Blocks",
          value: (one) => one.from.span[0],
          text: (one) => span(one.from.span),
          numeric: true,
        },
        { id: "to", title: "To", value: (one) => one.toName, fill: this._fill("to") },
        {
          id: "to-blocks",
          title: "Blocks",
          value: (one) => one.to?.span[0],
          text: (one) => (one.to ? span(one.to.span) : MISSING),
          numeric: true,
        },
        {
          id: "seconds",
          title: "Round trip",
          value: (one) => one.seconds,
          text: (one) => duration(one.seconds),
          numeric: true,
        },
        {
          id: "bar",
          title: "Compared",
          about: "Beside the slowest link",
          value: (one) => one.seconds,
          fill: (cell, one) => this._fillBar(cell, one),
        },
      ],
      key: (one) => one.key,
      sort: "seconds",
      descending: true,
      pageSize: 25,
      empty: "No server has measured a link yet: they do so once another holds the block after theirs.",
    });
    this._redraw = whenSeen(byId("links"), () => this._draw());
    byId("links-find").addEventListener("input", this._redraw);
  }

  update(model) {
    this._model = model;
    this._redraw();
  }

  _draw() {
    const links = linksOf(this._model);
    this._slowest = links.reduce((most, one) => Math.max(most, one.seconds), 0);
    const words = byId("links-find").value.toLowerCase().split(/\s+/).filter(Boolean);
    this._table.update(words.length ? links.filter((one) => words.every((word) => one.text.includes(word))) : links);
    const ends = endsOf(links);
    const fits = links.length && ends.length <= LARGEST_MATRIX;
    byId("links-matrix").replaceChildren(...(fits ? [matrix(ends, links, this._slowest)] : []));
  }

  _fill(end) {
    return (cell, one) => {
      if (!cell.firstChild) {
        cell.append(make("button", { type: "button", class: "link", onclick: () => this._open(cell.dataset.peer) }));
      }
      cell.dataset.peer = end === "from" ? one.from.peer_id : one.toId;
      setText(cell.firstChild, end === "from" ? one.fromName : one.toName);
    };
  }

  _fillBar(cell, one) {
    if (!cell.firstChild) cell.append(make("span", { class: "track" }, make("span", { class: "fill" })));
    cell.firstChild.firstChild.style.width = `${this._slowest ? (100 * one.seconds) / this._slowest : 0}%`;
  }
}

function linksOf(model) {
  const byPeer = new Map(model.servers.map((server) => [server.peer_id, server]));
  const links = [];
  for (const from of model.servers) {
    for (const [toId, seconds] of Object.entries(from.links)) {
      const to = byPeer.get(toId) ?? null;
      const [fromName, toName] = [nameOf(from), to ? nameOf(to) : shortId(toId)];
      const text = `${fromName} ${from.peer_id} ${toName} ${toId}`.toLowerCase();
      links.push({ key: `${from.peer_id} ${toId}`, from, to, toId, fromName, toName, seconds, text });
    }
  }
  return links;
}

/** Everybody at either end of a link: {peerId, name, server}, by block. */
function endsOf(links) {
  const ends = new Map();
  for (const { from, to, toId, fromName, toName } of links) {
    ends.set(from.peer_id, { peerId: from.peer_id, name: fromName, server: from });
    ends.set(toId, { peerId: toId, name: toName, server: to });
  }
  return [...ends.values()].sort((one, other) => (one.server?.span[0] ?? 0) - (other.server?.span[0] ?? 0));
}

function matrix(ends, links, slowest) {
  const measured = new Map(links.map((one) => [one.key, one.seconds]));
  const sources = ends.filter((one) => links.some((link) => link.from.peer_id === one.peerId));
  const targets = ends.filter((one) => links.some((link) => link.toId === one.peerId));
  const head = make(
    "tr",
    {},
    make("td", { class: "muted" }, "from ↓ to →"),
    targets.map((to) => make("th", { scope: "col" }, to.name)),
  );
  const rows = sources.map((from) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, from.name),
      targets.map((to) => cell(measured.get(`${from.peerId} ${to.peerId}`), slowest)),
    ),
  );
  const caption = "Round trips between servers";
  const table = make(
    "table",
    { class: "matrix" },
    make("caption", { class: "unseen" }, caption),
    make("thead", {}, head),
    make("tbody", {}, rows),
  );
  return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption }, table);
}

function cell(seconds, slowest) {
  const element = make("td", { class: "numeric" }, seconds === undefined ? "" : duration(seconds));
  if (seconds !== undefined) element.style.setProperty("--part", slowest ? seconds / slowest : 0);
  return element;
}
