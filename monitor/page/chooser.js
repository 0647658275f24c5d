// Choosing a chain, server by server: each must hold the block after the one before it ends.

import { make, setText } from "./dom.js";
import { nameOf, number, shortId, span } from "./format.js";

export class ChainChooser {
  /** onChange: called when another chain is chosen. */
  constructor(place, onChange) {
    this.peers = [];
    this._model = null;
    this._onChange = onChange;
    this._list = make("ol");
    this._select = make("select", { "aria-label": "Next server", onchange: () => this._add() });
    const button = (text, act) => make("button", { type: "button", class: "small", onclick: act }, text);
    this._fastest = button("Those of the fastest chain", () => this._set(this._best()));
    this._undo = button("Remove the last", () => this._set(this.peers.slice(0, -1)));
    this._hint = make("p", { class: "hint", role: "status" });
    place.append(this._list, make("div", { class: "row" }, this._select, this._undo, this._fastest), this._hint);
  }

  /** Whether the chosen servers hold all blocks. */
  get complete() {
    return Boolean(this._model) && this._end() === this._model.num_blocks;
  }

  update(model) {
    const other = this._model?.fingerprint !== model.fingerprint;
    if (other) this.peers = [];
    this._model = model;
    if (other || document.activeElement !== this._select) this._draw(); // an open list would close
  }

  _best() {
    return (this._model.best_chain?.hops ?? []).map((hop) => hop.peer_id);
  }

  _add() {
    if (this._select.value) this._set([...this.peers, this._select.value]);
  }

  _set(peers) {
    this.peers = peers;
    this._draw();
    this._onChange();
  }

  _server(peerId) {
    return this._model.servers.find((server) => server.peer_id === peerId);
  }

  // The first block that the chosen servers do not hold; a server that moved or left ends the chain.
  _end() {
    let end = 0;
    for (const peerId of this.peers) {
      const server = this._server(peerId);
      if (!server || server.span[0] > end || server.span[1] <= end) return end;
      end = server.span[1];
    }
    return end;
  }

  _draw() {
    const end = this._end();
    const items = this.peers.map((peerId) => {
      const server = this._server(peerId);
      return make("li", {}, server ? `${nameOf(server)} ${span(server.span)}` : `${shortId(peerId)} has left`);
    });
    this._list.replaceChildren(...items);
    const fits = this._model.servers.filter(
      (server) =>
        server.serving && !this.peers.includes(server.peer_id) && server.span[0] <= end && end < server.span[1],
    );
    const options = fits.map((server) =>
      make(
        "option",
        { value: server.peer_id },
        `${nameOf(server)} ${span(server.span)}, ${number(server.throughput)} tokens/s`,
      ),
    );
    this._select.replaceChildren(make("option", { value: "" }, "next server…"), ...options);
    this._select.disabled = !fits.length;
    this._undo.disabled = !this.peers.length;
    const best = this._best();
    this._fastest.disabled = !best.length || new Set(best).size < best.length; // each server is named once
    setText(this._hint, this._advice(end, fits.length));
  }

  _advice(end, fits) {
    if (end === this._model.num_blocks) return "These hold all blocks.";
    return fits ? `The next one must hold block ${end}.` : `No further server that answers holds block ${end}.`;
  }
}
