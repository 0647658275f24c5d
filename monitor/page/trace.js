// The panel that sends a test request, through the fastest chain or servers of one's choice.

import { trace } from "./api.js";
import { ChainChooser } from "./chooser.js";
import { byId, setText } from "./dom.js";
import { showTrace } from "./waterfall.js";

export class TracePanel {
  constructor() {
    this._model = null;
    this._stop = null;
    this._chooser = new ChainChooser(byId("trace-chooser"), () => this._enable());
    const form = byId("trace-form");
    form.addEventListener("change", () => this._enable());
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this._send();
    });
    byId("trace-cancel").addEventListener("click", () => this._stop?.abort());
  }

  update(model) {
    if (this._model && model.fingerprint !== this._model.fingerprint) this._show("", null);
    this._model = model;
    this._chooser.update(model);
    this._enable();
  }

  get _chosen() {
    return byId("trace-form").elements.chain.value === "chosen";
  }

  _enable() {
    byId("trace-chooser").hidden = !this._chosen;
    const ready = this._chosen ? this._chooser.complete : this._model?.best_chain;
    byId("trace-start").disabled = Boolean(this._stop) || !ready;
    byId("trace-start").title = ready ? "" : this._chosen ? "First choose servers for all blocks" : "There is no chain";
    byId("trace-cancel").hidden = !this._stop;
  }

  async _send() {
    const request = {
      model: this._model.fingerprint,
      peers: this._chosen ? this._chooser.peers : null,
      prompt_tokens: byId("trace-prompt").valueAsNumber,
      new_tokens: byId("trace-tokens").valueAsNumber,
    };
    this._stop = new AbortController();
    this._enable();
    this._show("Waiting for the answer…", null);
    try {
      const report = await trace(request, this._stop.signal);
      if (report.fingerprint === this._model.fingerprint) this._show("", report);
    } catch (error) {
      this._show(`▲ ${error.message}`, null, true);
    }
    this._stop = null;
    this._enable();
  }

  _show(message, report, failed = false) {
    setText(byId("trace-message"), message);
    byId("trace-message").classList.toggle("grave", failed);
    byId("trace-result").replaceChildren(...(report ? [showTrace(report)] : []));
  }
}
