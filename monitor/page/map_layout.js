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
  throughput: (one, other) => other.throughput - one.throughput,
};
const rank = (hops, server) => hops.get(server.peer_id)?.number ?? Infinity;
const NAMES = Object.keys(STATUSES);
const statusRank = (server) => NAMES.indexOf(statusOf(server));

/** A model's servers in the order of their rows. They come sorted by span, and stay so where the order says nothing. */
export function orderRows(model, hops, order) {
  const compare = ORDERS[order];
  return [...model.servers].sort((one, other) => compare(one, other, hops) || 0);
}

/** The hops of the best chain, by peer id: {number, blocks}. */
export function hopsByPeer(model) {
  const hops = model.best_chain?.hops ?? [];
  return new Map(hops.map((hop, index) => [hop.peer_id, { number: index + 1, blocks: hop.blocks }]));
}

/**
 * 0 to 1 for a throughput, between the slowest and the fastest that are online; on a logarithmic scale, as machines
 * differ by factors.
 */
export function throughputScale(servers) {
  const rates = servers.filter((server) => server.serving && server.throughput > 0).map((server) => server.throughput);
  const slowest = Math.min(...rates);
  const fastest = Math.max(...rates);
  const range = Math.log(fastest / slowest);
  const strength = (rate) => (range > 0.01 ? Math.min(1, Math.max(0, Math.log(rate / slowest) / range)) : 0.8);
  return { slowest, fastest, strength };
}
