// Draws what can be seen of a block map.

import { nameOf, number } from "./format.js";
import { HEAD, HEAD_HEIGHT } from "./map_layout.js";
import { fillState } from "./palette.js";
import { statusOf } from "./status.js";

const FONT = "system-ui, sans-serif";

/**
 * scene: model, rows (servers in order), hops (of the best chain, by peer id), strength (of a server), sizes,
 * palette, view ({left, top, width, height} in pixels of the whole map), marked (a peer id), dense.
 */
export function drawMap(context, scene) {
  const { sizes, view, palette } = scene;
  context.clearRect(0, 0, view.width, view.height);
  const right = Math.min(view.width, sizes.label + sizes.block * scene.model.num_blocks - view.left);
  const span = (start, end) => [sizes.label + start * sizes.block - view.left, (end - start) * sizes.block];

  context.save();
  context.beginPath();
  context.rect(0, HEAD_HEIGHT, view.width, view.height - HEAD_HEIGHT);
  context.clip();
  eachVisible(scene, (server, y) => drawBar(context, scene, server, y, span));
  drawGrid(context, scene, HEAD_HEIGHT, view.height, span);
  eachVisible(scene, (server, y) => drawHop(context, scene, server, y, span));
  context.fillStyle = palette.surface;
  context.fillRect(0, HEAD_HEIGHT, sizes.label, view.height); // blocks that were scrolled under the names
  eachVisible(scene, (server, y) => drawName(context, scene, server, y));
  context.restore();

  drawHead(context, scene, span);
  context.fillStyle = palette.line;
  context.fillRect(0, HEAD_HEIGHT - 1, right, 1);
}

function eachVisible({ rows, sizes, view }, draw) {
  const first = Math.max(0, Math.floor(view.top / sizes.row));
  const last = Math.min(rows.length, Math.ceil((view.top + view.height - HEAD_HEIGHT) / sizes.row) + 1);
  for (let index = first; index < last; index++) draw(rows[index], HEAD_HEIGHT + index * sizes.row - view.top);
}

function drawBar(context, scene, server, y, span) {
  const { sizes, palette, view, marked, strength, dense, model } = scene;
  if (server.peer_id === marked) {
    context.fillStyle = palette.raised;
    context.fillRect(0, y, view.width, sizes.row);
  }
  const gap = dense ? 0.5 : 2;
  const [x, width] = span(...server.span.map((block) => Math.min(block, model.num_blocks)));
  fillState(context, palette, statusOf(server), x, y + gap, width, sizes.row - 2 * gap, strength(server));
}

function drawHop(context, scene, server, y, span) {
  context.strokeStyle = scene.palette.ink;
  context.lineWidth = scene.dense ? 1.5 : 2;
  for (const { blocks } of scene.hops.get(server.peer_id) ?? []) {
    const [x, width] = span(...blocks);
    context.strokeRect(x + 1, y + 1, width - 2, scene.sizes.row - 2);
  }
}

function drawName(context, scene, server, y) {
  const { sizes, palette, hops, dense } = scene;
  if (dense) return;
  const numbers = (hops.get(server.peer_id) ?? []).map((hop) => hop.number);
  const middle = y + sizes.row / 2;
  let left = 2;
  for (const hop of numbers) {
    drawNumber(context, palette, left + 8, middle, hop);
    left += 20;
  }
  context.font = `${sizes.row > 20 ? 12.5 : 11}px ${FONT}`;
  context.textBaseline = "middle";
  context.textAlign = "left";
  context.fillStyle = numbers.length || server.serving ? palette.ink : palette.muted;
  context.fillText(shortened(context, nameOf(server), sizes.label - left - 8), left, middle + 0.5);
}

function drawNumber(context, palette, x, y, text) {
  context.beginPath();
  context.arc(x, y, 7.5, 0, 2 * Math.PI);
  context.fillStyle = palette.ink;
  context.fill();
  context.fillStyle = palette.surface;
  context.font = `600 9.5px ${FONT}`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(String(text), x, y + 0.5);
}

const widths = new Map(); // of texts that were shortened before

function shortened(context, text, room) {
  const key = `${context.font} ${room} ${text}`;
  if (widths.size > 5000) widths.clear();
  if (!widths.has(key)) {
    const letters = [...text];
    let shown = text;
    while (letters.length && context.measureText(shown).width > room) {
      letters.pop();
      shown = `${letters.join("").trimEnd()}…`;
    }
    widths.set(key, shown);
  }
  return widths.get(key);
}

function drawGrid(context, { sizes, palette, model, view }, top, bottom, span) {
  if (sizes.block < 6) return;
  context.fillStyle = palette.surface;
  context.globalAlpha = sizes.block < 12 ? 0.5 : 1;
  for (let block = 1; block < model.num_blocks; block++) {
    const [x] = span(block, block);
    if (x > sizes.label && x < view.width) context.fillRect(Math.round(x), top, 1, bottom - top);
  }
  context.globalAlpha = 1;
}

function drawHead(context, scene, span) {
  const { sizes, palette, view } = scene;
  context.save();
  context.fillStyle = palette.surface;
  context.fillRect(0, 0, view.width, HEAD_HEIGHT);
  context.beginPath();
  context.rect(sizes.label, 0, view.width - sizes.label, HEAD_HEIGHT);
  context.clip();
  drawNumbers(context, scene, span);
  drawReplicas(context, scene, span);
  drawChain(context, scene, span);
  context.restore();
  context.font = `11px ${FONT}`;
  context.textAlign = "left";
  context.textBaseline = "middle";
  context.fillStyle = palette.muted;
  const labels = ["block", "replicas", "chain"];
  const heights = [
    HEAD.numbers / 2,
    HEAD.numbers + HEAD.replicas / 2,
    HEAD.numbers + HEAD.replicas + HEAD.gap + HEAD.chain / 2,
  ];
  labels.forEach((label, index) => context.fillText(label, 2, heights[index] + 0.5));
}

function drawNumbers(context, { sizes, palette, model }, span) {
  const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((blocks) => blocks * sizes.block >= 24) ?? 1000;
  context.font = `10px ${FONT}`;
  context.textBaseline = "middle";
  context.textAlign = "center";
  context.fillStyle = palette.muted;
  for (let block = 0; block < model.num_blocks; block += step) {
    const [x, width] = span(block, block + 1);
    if (x < sizes.label - 1) continue; // scrolled under the labels
    context.fillText(String(block), Math.max(x + width / 2, sizes.label + 4), HEAD.numbers / 2 + 0.5);
  }
}

/** In figures, or where these have no room in taller bars for more; the fewest and blocks without any are marked. */
function drawReplicas(context, { sizes, palette, model, view }, span) {
  const most = Math.max(1, ...model.replicas);
  const fewest = Math.min(...model.replicas);
  const bottom = HEAD.numbers + HEAD.replicas;
  const roomy = sizes.block >= 7 * String(most).length + 5;
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  model.replicas.forEach((replicas, block) => {
    const [x, width] = span(block, block + 1);
    if (x + width < sizes.label || x > view.width) return;
    const weak = replicas === fewest && fewest < most;
    const height = replicas && !roomy ? Math.max(2, ((HEAD.replicas - 5) * replicas) / most) : HEAD.replicas;
    context.globalAlpha = replicas ? (weak ? (roomy ? 0.45 : 0.75) : roomy ? 0.16 : 0.28) : 0.3;
    context.fillStyle = replicas ? (weak ? palette.warn : palette.muted) : palette.bad;
    context.fillRect(x, bottom - height, Math.max(1, width - (sizes.block >= 6 ? 1 : 0)), height);
    context.globalAlpha = 1;
    if (roomy) {
      context.fillStyle = replicas ? palette.ink : palette.bad;
      context.font = `${weak || !replicas ? "600 " : ""}11px ${FONT}`;
      context.fillText(replicas ? (replicas < 1000 ? number(replicas) : "…") : "✕", x + width / 2, bottom - 5);
    }
  });
  if (fewest < most && !(roomy && fewest === 0)) drawWeakMarks(context, { palette, model, fewest }, span);
}

// A run of weak blocks has one mark, in its middle.
function drawWeakMarks(context, { palette, model, fewest }, span) {
  context.font = `600 10px ${FONT}`;
  let start = null;
  for (let block = 0; block <= model.num_blocks; block++) {
    const weak = model.replicas[block] === fewest;
    if (weak && start === null) start = block;
    if (weak || start === null) continue;
    const [x, width] = span(start, block);
    context.fillStyle = fewest ? palette.warn : palette.bad;
    if (fewest) drawTriangle(context, x + width / 2, HEAD.numbers - 2);
    else context.fillText("✕", x + width / 2, HEAD.numbers + 4);
    start = null;
  }
}

function drawTriangle(context, x, y) {
  context.beginPath();
  context.moveTo(x - 5, y);
  context.lineTo(x + 5, y);
  context.lineTo(x, y + 7);
  context.fill();
}

function drawChain(context, { palette, model, hops }, span) {
  const top = HEAD.numbers + HEAD.replicas + HEAD.gap;
  if (!model.best_chain) {
    context.fillStyle = palette.bad;
    context.textAlign = "left";
    context.font = `11px ${FONT}`;
    context.fillText("none: some blocks have no server with room", span(0, 0)[0] + 4, top + 14);
  }
  for (const { number: hop, blocks } of [...hops.values()].flat()) {
    const [x, width] = span(...blocks);
    context.fillStyle = palette.raised;
    context.fillRect(x + 1, top, width - 2, HEAD.chain);
    context.strokeStyle = palette.ink;
    context.lineWidth = 2;
    context.strokeRect(x + 1, top + 1, width - 2, HEAD.chain - 2);
    if (width > 18) drawNumber(context, palette, x + width / 2, top + HEAD.chain / 2, hop);
  }
}
