// The block map: every block by every server, on a canvas as large as what can be seen of it. Scrolling draws anew, so
// a thousand servers cost as much as thirty.

import { byId, make, setText, whenSeen } from "./dom.js";
import { count, duration, nameOf, number, span } from "./format.js";
import { drawMap } from "./map_drawing.js";
import { blockRate, HEAD_HEIGHT, hopsByPeer, layout, orderRows, rateScale } from "./map_layout.js";
import { fillState, readPalette } from "./palette.js";
import { departureOf, STATUSES, statusOf } from "./status.js";

export class BlockMap {
  /** open(peerId): show a server in full. */
  constructor({ open }) {
    this._open = open;
    this._model = null;
    this._focus = null; // peer id of the row that the keyboard is on
    this._hover = null;
    this._frame = 0;
    this._palette = null;
    this._canvas = make("canvas", { role: "img" });
    this._tip = make("div", { class: "tip", hidden: true, "aria-hidden": "true" });
    this._sizer = make("div", { class: "map-sizer" }, this._canvas);
    this._scroller = make("div", { class: "map-scroll", tabindex: "0", role: "group" }, this._sizer);
    byId("map-frame").append(this._scroller, this._tip);
    this._redraw = whenSeen(byId("map"), () => this._show());
    this._listen();
  }

  update(model) {
    if (model.fingerprint !== this._model?.fingerprint) {
      this._focus = null;
      this._scroller.scrollTo(0, 0);
    }
    this._model = model;
    this._changed();
  }

  _changed() {
    if (!this._model) return;
    this._hops = hopsByPeer(this._model);
    this._rows = orderRows(this._model, this._hops, byId("map-order").value);
    this._scale = rateScale(this._model.servers);
    this._redraw();
  }

  _listen() {
    const later = () => {
      cancelAnimationFrame(this._frame);
      this._frame = requestAnimationFrame(() => this._palette && this._draw());
    };
    this._scroller.addEventListener("scroll", later, { passive: true });
    new ResizeObserver(later).observe(this._scroller);
    window.addEventListener("themechange", () => this._model && this._redraw());
    byId("map-order").addEventListener("change", () => this._changed());
    byId("map-dense").addEventListener("change", () => this._changed());
    this._canvas.addEventListener("pointermove", (event) => this._point(event));
    this._canvas.addEventListener("pointerleave", () => this._point(null));
    this._canvas.addEventListener("click", (event) => {
      const server = this._at(event)?.server;
      if (server) this._open(server.peer_id);
    });
    this._scroller.addEventListener("keydown", (event) => this._key(event));
  }

  // All that other data or another theme changes.
  _show() {
    this._palette = readPalette();
    this._draw();
    this._describe();
    this._legend();
  }

  _draw() {
    const { clientWidth } = this._scroller;
    if (!clientWidth) return;
    const dense = byId("map-dense").checked;
    const sizes = layout(clientWidth, this._model.num_blocks, this._rows.length, dense);
    this._sizes = sizes;
    this._sizer.style.width = `${Math.max(sizes.width, clientWidth)}px`;
    this._sizer.style.height = `${sizes.height}px`;
    const height = Math.min(sizes.height, this._scroller.clientHeight || sizes.height);
    const ratio = window.devicePixelRatio || 1;
    this._canvas.style.width = `${clientWidth}px`;
    this._canvas.style.height = `${height}px`;
    this._canvas.width = Math.round(clientWidth * ratio);
    this._canvas.height = Math.round(height * ratio);
    const context = this._canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    drawMap(context, {
      model: this._model,
      rows: this._rows,
      hops: this._hops,
      strength: this._scale.strength,
      sizes,
      palette: this._palette,
      view: { left: this._scroller.scrollLeft, top: this._scroller.scrollTop, width: clientWidth, height },
      marked: this._hover ?? this._focus,
      dense,
    });
  }

  _describe() {
    const { num_blocks: blocks, complete } = this._model;
    const servers = count(this._rows.length, "server");
    const text = `Block map: ${count(blocks, "block")} by ${servers}, ${complete ? "complete" : "incomplete"}`;
    this._canvas.setAttribute("aria-label", text);
    this._scroller.setAttribute("aria-label", `${text}. Arrow keys choose a server, Enter opens it.`);
  }

  _legend() {
    const present = new Set(["online", ...this._rows.map(statusOf)]);
    const shown = Object.keys(STATUSES).filter((status) => present.has(status));
    const entries = shown.map((status) =>
      legendEntry(STATUSES[status].label, (context) => {
        fillState(context, this._palette, status, 0, 0, 26, 14, 0.5);
      }),
    );
    const { slowest, fastest } = this._scale;
    if (slowest !== null) {
      const ends = `${number(slowest)} or less to ${number(fastest)} or more tokens/s through one block`;
      entries.push(
        legendEntry(ends, (context) => {
          for (let at = 0; at < 26; at++) fillState(context, this._palette, "online", at, 0, 1, 14, at / 25);
        }),
      );
    }
    if (this._model.best_chain) {
      entries.push(
        legendEntry("fastest chain", (context) => {
          context.strokeStyle = this._palette.ink;
          context.lineWidth = 2;
          context.strokeRect(1, 1, 24, 12);
        }),
      );
    }
    if (this._model.complete && !everywhere(this._model)) {
      entries.push(make("li", {}, make("span", { class: "weak", "aria-hidden": "true" }, "▼"), " fewest replicas"));
    }
    if (!this._model.complete) {
      entries.push(make("li", {}, make("span", { class: "grave", "aria-hidden": "true" }, "✕"), " nobody serves it"));
    }
    byId("map-legend").replaceChildren(...entries);
  }

  /** What is under a pointer: {server, block}, either null; or null. */
  _at(event) {
    const { left, top } = this._canvas.getBoundingClientRect();
    const x = event.clientX - left + this._scroller.scrollLeft;
    const y = event.clientY - top;
    const block = Math.floor((x - this._sizes.label) / this._sizes.block);
    const inHead = y < HEAD_HEIGHT;
    const row = inHead ? -1 : Math.floor((y - HEAD_HEIGHT + this._scroller.scrollTop) / this._sizes.row);
    const server = this._rows[row] ?? null;
    const known = block >= 0 && block < this._model.num_blocks;
    return server || (inHead && known) ? { server, block: known ? block : null } : null;
  }

  _point(event) {
    const at = event && this._sizes ? this._at(event) : null;
    const hover = at?.server?.peer_id ?? null;
    if (hover !== this._hover) {
      this._hover = hover;
      this._draw();
    }
    this._canvas.style.cursor = hover ? "pointer" : "default";
    this._tip.hidden = !at;
    if (!at) return;
    setText(this._tip, at.server ? this._sentence(at.server) : this._blockSentence(at.block));
    const frame = byId("map-frame").getBoundingClientRect();
    const room = frame.width - this._tip.offsetWidth - 4;
    this._tip.style.left = `${Math.max(0, Math.min(event.clientX - frame.left + 12, room))}px`;
    this._tip.style.top = `${event.clientY - frame.top + 16}px`;
  }

  _key(event) {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Enter" && this._focus) {
      event.preventDefault(); // else it would press what has the focus next: the button that closes
      this._open(this._focus);
    }
    if (step === undefined || !this._rows?.length) return;
    event.preventDefault();
    const now = this._rows.findIndex((server) => server.peer_id === this._focus);
    const next = Math.min(this._rows.length - 1, Math.max(0, now + step));
    this._focus = this._rows[next].peer_id;
    const top = next * this._sizes.row;
    const room = this._scroller.clientHeight - HEAD_HEIGHT - this._sizes.row;
    const { scrollTop } = this._scroller;
    this._scroller.scrollTop = Math.max(top - room, Math.min(scrollTop, top));
    this._scrollTo(this._rows[next].span[0]);
    setText(byId("map-readout"), this._sentence(this._rows[next]));
    this._draw();
  }

  // Sideways, if that block is out of sight.
  _scrollTo(block) {
    const left = block * this._sizes.block;
    const room = this._scroller.clientWidth - this._sizes.label;
    const { scrollLeft } = this._scroller;
    if (left < scrollLeft || left > scrollLeft + room - 20) this._scroller.scrollLeft = left;
  }

  _sentence(server) {
    const parts = [`${nameOf(server)}: blocks ${span(server.span)}`, STATUSES[statusOf(server)].label];
    if (server.throughput > 0) {
      parts.push(`${number(server.throughput)} tokens/s (${number(blockRate(server))} through one block)`);
    }
    if (server.round_trip !== null) parts.push(`${duration(server.round_trip)} away`);
    const hops = this._hops.get(server.peer_id) ?? [];
    if (hops.length) parts.push(`${hops.map((hop) => `hop ${hop.number}`).join(" and ")} of the fastest chain`);
    parts.push(`if it leaves: ${departureOf(server, this._model.best_chain?.step_time ?? null).text}`);
    return parts.join(", ");
  }

  _blockSentence(block) {
    const weak = this._model.weakest_blocks.includes(block) && !everywhere(this._model);
    return `Block ${block}: ${count(this._model.replicas[block], "replica")}${weak ? ", the fewest" : ""}`;
  }
}

/** Whether all blocks have as many replicas. */
const everywhere = (model) => model.weakest_blocks.length === model.num_blocks;

function legendEntry(label, draw) {
  const canvas = make("canvas", { class: "swatch", width: 52, height: 28, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  draw(context);
  return make("li", {}, canvas, ` ${label}`);
}
