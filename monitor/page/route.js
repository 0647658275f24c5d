// What the address says is shown: #model=FINGERPRINT&server=PEER. Links to it can be passed on.

export function readRoute() {
  const parts = new URLSearchParams(location.hash.slice(1));
  return { model: parts.get("model"), server: parts.get("server") };
}

export function linkTo({ model, server }) {
  const parts = new URLSearchParams();
  if (model) parts.set("model", model);
  if (server) parts.set("server", server);
  return `#${parts}`;
}

/** Show something else. Opening and closing are steps of the browser's history. */
export function go(route) {
  const target = linkTo(route);
  if (target === location.hash || (target === "#" && !location.hash)) return;
  history.pushState(null, "", target === "#" ? location.pathname + location.search : target);
  window.dispatchEvent(new HashChangeEvent("hashchange"));
}

/** The model that the route names, by name or the start of its fingerprint; else that of its server; else the first. */
export function chosenModel(report, { model: name, server }) {
  const called = (model) => isCalled(model, name);
  const served = (model) => server && model.servers.some((one) => one.peer_id === server);
  return report.models.find(called) ?? report.models.find(served) ?? report.models[0] ?? null;
}

/** Whether it has this name, or a fingerprint that starts so. */
export const isCalled = (model, name) => Boolean(name) && (model.name === name || model.fingerprint.startsWith(name));
