// Where things are on a block map, and in which order: figures alone, no drawing.

import { STATUSES, statusOf } from "./status.js";

const NARROWEST = 3; // pixels of a block
const TALL_ROWS = 30; // up to so many servers have tall rows

export const HEAD = { numbers: 16, replicas: 20, chain: 20, gap: 4 };
export const HEAD_HEIGHT = HEAD.numbers + HEAD.replicas + HEAD.chain + 2 * HEAD.gap;

/** Sizes in pixels. width: of what can be seen. */
export function layout(width, numBlocks, numRows, dense) {
  const label = dense && width < 500 ? 40 : Math.min(170, Math.max(84, Math.round(width * 0.17)));
  const block = Math.max(NARROWEST, (width - label - 1) / numBlocks);
  const row = dense ? 4 : numRows <= TALL_ROWS ? 24 : 17;
  return { label, block, row, width: Math.ceil(label + block * numBlocks), height: HEAD_HEIGHT + row * numRows + 1 };
}

const ORDERS = {
  blocks: () => 0,
  chain: (one, other, hops) => rank(hops, one) - rank(hops, other),
  status: (one, other) => statusRank(one) - statusRank(other),
  throughput: (one, other) => blockRate(other) - blockRate(one),
};
const rank = (hops, server) => hops.get(server.peer_id)?.[0].number ?? Infinity;
const NAMES = Object.keys(STATUSES);
const statusRank = (server) => NAMES.indexOf(statusOf(server));

/** A model's servers in the order of their rows. They come sorted by span, and stay so where the order says nothing. */
export function orderRows(model, hops, order) {
  const compare = ORDERS[order];
  return [...model.servers].sort((one, other) => compare(one, other, hops) || 0);
}

/** The hops of the best chain, by peer id: a list of {number, blocks}, as a chain may come back to a server. */
export function hopsByPeer(model) {
  const hops = (model.best_chain?.hops ?? []).map((hop, index) => ({ ...hop, number: index + 1 }));
  return Map.groupBy(hops, (hop) => hop.peer_id);
}

/** Tokens/s through one block alone: a server is not slower for holding more of them. */
export const blockRate = ({ throughput, span: [start, end] }) => throughput * (end - start);

const SHADES = 4; // up to so many times as fast as the one in the middle is told apart, and as slow

/**
 * How strong the colour of a server is, 0 to 1, by the rate of its blocks beside that of the middle one of those that
 * serve; on a logarithmic scale, as machines differ by factors. So the same factor always looks the same, equal
 * servers look equal, and one that boasts does not make the others pale. slowest, fastest: the ends of the scale in
 * tokens/s, null if nobody says how fast it is.
 */
export function rateScale(servers) {
  const told = servers.filter((server) => server.serving && server.throughput > 0).map(blockRate);
  const middle = told.sort((one, other) => one - other)[told.length >> 1] ?? null;
  const part = (rate) => (1 + Math.log(rate / middle) / Math.log(SHADES)) / 2;
  return {
    slowest: middle && middle / SHADES,
    fastest: middle && middle * SHADES,
    strength: (server) => (middle ? Math.min(1, Math.max(0, part(blockRate(server)))) : 0.5),
  };
}
