// Where the time of a step went: each hop's parts one after the other, and the same as figures.

import { figure, make } from "./dom.js";
import { duration, number, percent, shortId, span } from "./format.js";

/** In the order in which a step goes through them: what each is called, and what that means. */
const PARTS = [
  ["network", "network", "on its way"],
  ["queued", "queue", "waiting for the device"],
  ["computed", "compute", "on the device"],
  ["codec", "codec", "packing and unpacking"],
  ["other", "other", "the rest, inside the server"],
];

const spent = (hop) => PARTS.reduce((sum, [part]) => sum + hop[part], 0);

/** Seconds of a step that its parts explain: all but what clocks got wrong. */
const known = (traced) => traced.hops.reduce((sum, hop) => sum + spent(hop), traced.codec);

/** A TraceReport as elements. */
export function showTrace(report) {
  return make(
    "div",
    { class: "trace" },
    summary(report),
    legend(),
    step("The prompt", `${number(report.prompt_tokens)} tokens in one step`, report.prompt),
    step("A token after it", `mean of ${report.step_times.length}`, report.token),
    steps(report.step_times),
  );
}

function summary(report) {
  const shown = [
    [
      "To the first token",
      duration(report.time_to_first_token),
      `${duration(report.connect_time)} of it to open the session`,
    ],
    [
      "A token after it",
      duration(report.time_per_output_token),
      `median; ${number(1 / report.time_per_output_token)} tokens/s`,
    ],
  ];
  const predicted = report.predicted_step_time;
  if (predicted !== null) {
    const factor = report.time_per_output_token / predicted;
    shown.push(["Predicted", duration(predicted), `it took ${number(factor)} times as long`]);
  }
  return make(
    "dl",
    { class: "figures" },
    shown.map((one) => figure(...one)),
  );
}

function legend() {
  const entries = PARTS.map(([part, label, about]) =>
    make("li", {}, make("span", { class: `part ${part}`, "aria-hidden": "true" }), ` ${label}: ${about}`),
  );
  return make("ul", { class: "legend" }, entries);
}

const nameOfHop = (hop) => hop.public_name || shortId(hop.peer_id);

function step(title, detail, traced) {
  const whole = Math.max(traced.total, known(traced)) || 1;
  let at = 0;
  const bar = (part, seconds) => {
    const element = make("span", { class: `part ${part}`, title: `${label(part)} ${duration(seconds)}` });
    element.style.left = `${(100 * at) / whole}%`;
    element.style.width = `${(100 * Math.max(0, seconds)) / whole}%`;
    at += Math.max(0, seconds);
    return element;
  };
  const rows = [
    row("this monitor", "", [bar("codec", traced.codec)], traced.codec),
    ...traced.hops.map((hop) => {
      const bars = PARTS.map(([part]) => bar(part, hop[part]));
      return row(nameOfHop(hop), span(hop.blocks), bars, spent(hop));
    }),
  ];
  return make(
    "figure",
    { class: "waterfall" },
    make(
      "figcaption",
      {},
      make("strong", {}, title),
      ` ${duration(traced.total)}`,
      make("span", { class: "muted" }, ` ${detail}`),
    ),
    make("div", { class: "lanes", "aria-hidden": "true" }, rows),
    make("details", {}, make("summary", {}, "In figures"), figures(title, traced)),
  );
}

const label = (part) => PARTS.find(([name]) => name === part)[1];

function row(name, blocks, bars, seconds) {
  return make(
    "div",
    { class: "lane" },
    make("span", { class: "lane-name" }, name, make("span", { class: "muted" }, blocks && ` ${blocks}`)),
    make("span", { class: "lane-track" }, bars),
    make("span", { class: "lane-time" }, duration(seconds)),
  );
}

function figures(title, traced) {
  const heads = ["Server", "Blocks", "Input from", ...PARTS.map(([, name]) => name)];
  const rows = traced.hops.map((hop) => [
    nameOfHop(hop),
    span(hop.blocks),
    hop.pushed ? "the server before" : "the monitor",
    ...PARTS.map(([part]) => duration(hop[part])),
  ]);
  rows.push(["this monitor", "", "", "", "", "", duration(traced.codec), ""]);
  const table = make(
    "table",
    {},
    make("caption", { class: "unseen" }, `${title}, in figures`),
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        heads.map((head, index) => make("th", { scope: "col", class: index > 2 ? "numeric" : null }, head)),
      ),
    ),
    make(
      "tbody",
      {},
      rows.map((cells) =>
        make(
          "tr",
          {},
          cells.map((text, index) =>
            index ? make("td", { class: index > 2 ? "numeric" : null }, text) : make("th", { scope: "row" }, text),
          ),
        ),
      ),
    ),
  );
  const notes = [];
  if (traced.total) notes.push(`These explain ${percent(known(traced) / traced.total)} of ${duration(traced.total)}.`);
  if (traced.hops.some((hop) => hop.network < 0)) {
    notes.push("Network below 0: the servers' clocks are compared to within half a round trip.");
  }
  return make(
    "div",
    {},
    make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": title }, table),
    make("p", { class: "hint" }, notes.join(" ")),
  );
}

function steps(times) {
  const longest = Math.max(...times, 1e-9);
  const bars = times.map((seconds, index) => {
    const bar = make("span", { title: `token ${index + 1}: ${duration(seconds)}` });
    bar.style.height = `${Math.max(4, (100 * seconds) / longest)}%`;
    return bar;
  });
  const text = `Each token: ${times.map(duration).join(", ")}`;
  return make(
    "figure",
    { class: "steps" },
    make("figcaption", {}, "Each token, in order"),
    make("div", { class: "columns", role: "img", "aria-label": text }, bars),
  );
}
