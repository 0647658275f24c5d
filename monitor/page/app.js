// Puts the parts together: what the monitor reports and what the address chooses goes to every panel.

import { showBanners, showStatus } from "./banners.js";
import { BlockMap } from "./block_map.js";
import { Details } from "./details.js";
import { byId, make, replaceChildren, setText } from "./dom.js";
import { count } from "./format.js";
import { LinksPanel } from "./links.js";
import { Live } from "./live.js";
import { showOverview } from "./overview.js";
import { ReachPanel, runCheck } from "./reach.js";
import { chosenModel, go, isCalled, linkTo, readRoute } from "./route.js";
import { ServersPanel } from "./servers.js";
import { TracePanel } from "./trace.js";

const TICK = 5_000; // milliseconds between updates of ages

const live = new Live(update);
const now = () => live.now();
const open = (peerId) => go({ model: readRoute().model, server: peerId });
const close = () => go({ model: readRoute().model, server: null });
const details = new Details({ close, check: runCheck, now });
const openAndCheck = (peerId) => {
  open(peerId);
  details.check();
};
const map = new BlockMap({ open });
const servers = new ServersPanel({ open, check: openAndCheck, now });
const links = new LinksPanel({ open });
const trace = new TracePanel();
new ReachPanel();

function update() {
  showStatus(live);
  showBanners(live);
  if (!live.report) return;
  const route = readRoute();
  const model = chosenModel(live.report, route);
  byId("waiting").hidden = Boolean(model);
  byId("swarm").hidden = !model;
  byId("sections").hidden = !model;
  if (!model) {
    byId("waiting").textContent = live.report.revision
      ? "No server of this swarm serves any model. Start one: run-server MODEL --initial-peers ADDRESS"
      : "The monitor looks at the swarm for the first time…";
    details.update(null, null);
    return;
  }
  showModels(live.report.models, model);
  byId("notice").hidden = !route.model || isCalled(model, route.model);
  setText(byId("notice"), `▲ No server serves ${route.model}, which this link asks for. Shown is ${model.name}.`);
  showOverview(model);
  map.update(model);
  servers.update(model, route.server);
  links.update(model);
  trace.update(model);
  details.update(model, route.server);
}

function showModels(models, chosen) {
  byId("models").hidden = models.length < 2;
  const entries = models.map((model) => {
    const current = model === chosen ? "page" : null;
    const state = model.complete ? "✓ complete" : "✕ incomplete";
    return make(
      "a",
      { href: linkTo({ model: model.fingerprint.slice(0, 12) }), "aria-current": current },
      make("strong", {}, model.name),
      make("span", { class: model.complete ? "muted" : "grave" }, `${state}, ${count(model.servers.length, "server")}`),
    );
  });
  replaceChildren(byId("models"), ...(models.length < 2 ? [] : entries));
}

byId("sections").addEventListener("click", ({ target }) => {
  if (target.dataset.section) byId(target.dataset.section).scrollIntoView({ behavior: "smooth" });
});
window.addEventListener("hashchange", update);
setInterval(() => {
  showStatus(live);
  showBanners(live);
  servers.tick();
  details.tick();
}, TICK);
live.start();
