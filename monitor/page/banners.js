// What is wrong, above everything else.

import { sentence } from "./api.js";
import { byId, make, setText } from "./dom.js";
import { clockTime } from "./format.js";

const MOST = 4;

export function showBanners(live) {
  const shown = [];
  const read = live.report?.read_at ? ` What is shown is of ${clockTime(live.report.read_at)}.` : "";
  if (live.link === "gone") shown.push(["gone", live.reason + read]);
  else if (live.stale) shown.push(["trouble", `Not up to date: ${sentence(live.stale)}${read}`]);
  const problems = live.report?.revision ? live.report.problems : [];
  for (const problem of problems.slice(0, MOST)) shown.push(["problem", sentence(problem)]);
  if (problems.length > MOST) shown.push(["problem", `And ${problems.length - MOST} problems more.`]);

  const place = byId("banners");
  while (place.children.length > shown.length) place.lastChild.remove();
  shown.forEach(([kind, text], index) => {
    const banner = place.children[index] ?? place.appendChild(make("p", {}));
    banner.dataset.kind = kind;
    setText(banner, `${kind === "problem" ? "▲" : "◌"} ${text}`);
  });
}

export function showStatus(live) {
  const stale = live.link === "live" && live.stale;
  byId("status").dataset.link = stale ? "stale" : live.link;
  setText(byId("status-text"), statusText(live, stale));
  const problems = live.report?.problems.length ?? 0;
  document.title = live.link === "gone" ? "(gone) Petswarm" : problems ? `▲ ${problems} Petswarm` : "Petswarm";
}

function statusText(live, stale) {
  if (live.link === "connecting") return "connecting";
  if (live.link === "gone") return "monitor gone";
  return stale ? "not up to date" : "live";
}
