// The style sheet's colours and patterns, for canvases.

const NAMES = ["ink", "muted", "line", "surface", "raised", "accent", "bad", "warn"];
const STATES = ["online", "joining", "draining", "unasked", "unreachable", "offline"];

/** Colours of the theme in force, as canvases take them. */
export function readPalette() {
  const probe = document.body.appendChild(document.createElement("span"));
  const colours = {};
  for (const name of [...NAMES, ...STATES]) {
    probe.style.color = `var(--${name})`;
    colours[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  return colours;
}

/** How each state is filled: solid, hatched one way or the other, dotted, or hollow. */
const FILLS = {
  online: "solid",
  joining: "rising",
  draining: "falling",
  unasked: "dots",
  unreachable: "cross",
  offline: "hollow",
};

/** Fill a rectangle as its state wants it. strength: 0 to 1, of a server that is online. */
export function fillState(context, palette, status, x, y, width, height, strength = 1) {
  const colour = palette[status];
  const kind = FILLS[status];
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.fillStyle = colour;
  context.strokeStyle = colour;
  context.globalAlpha = kind === "solid" ? 0.25 + 0.75 * strength : 0.14;
  if (kind !== "hollow") context.fillRect(x, y, width, height);
  context.globalAlpha = 1;
  context.lineWidth = 1.5;
  if (kind === "rising" || kind === "cross") hatch(context, x, y, width, height, 1);
  if (kind === "falling" || kind === "cross") hatch(context, x, y, width, height, -1);
  if (kind === "dots") {
    for (let at = x + 3; at < x + width; at += 6) context.fillRect(at, y + height / 2 - 1, 2, 2);
  }
  context.restore();
  if (kind === "solid") return;
  context.strokeStyle = colour;
  context.lineWidth = 1;
  context.strokeRect(x + 0.5, y + 0.5, Math.max(0, width - 1), Math.max(0, height - 1));
}

function hatch(context, x, y, width, height, slope) {
  const step = 7;
  context.beginPath();
  const start = Math.floor((x - height) / step) * step; // the same lines wherever a rectangle begins
  for (let at = start; at < x + width + height; at += step) {
    context.moveTo(at, slope > 0 ? y + height : y);
    context.lineTo(at + height, slope > 0 ? y : y + height);
  }
  context.stroke();
}
