// Figures and names, as people read them.

const whole = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 0 });
const digits = new Intl.NumberFormat("en-GB", { maximumSignificantDigits: 3 });

export const MISSING = "–";

/** A number with three digits that matter, or a whole one: 0.123, 1.23, 12.3, 123, 1,234. */
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return MISSING;
  return Math.abs(value) >= 1000 ? whole.format(value) : digits.format(value);
}

/** Of a short time in seconds: "0.21 ms", "12.3 ms", "1.2 s". */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return MISSING;
  return seconds < 1 ? `${number(1000 * seconds)} ms` : `${number(seconds)} s`;
}

/** Of a long time in seconds: "8 s", "5 min", "2 h 10 min", "3 d 4 h". Clocks differ, so less than none is none. */
export function age(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return MISSING;
  const past = Math.max(0, Math.floor(seconds));
  if (past < 120) return `${past} s`;
  const minutes = Math.floor(past / 60);
  if (minutes < 120) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return hours % 24 ? `${Math.floor(hours / 24)} d ${hours % 24} h` : `${Math.floor(hours / 24)} d`;
}

const clock = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

/** Unix time as a time of day here: "14:03:22". */
export const clockTime = (moment) => clock.format(new Date(1000 * moment));

/** Bytes/s. */
export function bandwidth(rate) {
  if (rate === null || rate === undefined) return MISSING;
  return rate < 1e6 ? `${number(rate / 1e3)} kB/s` : `${number(rate / 1e6)} MB/s`;
}

export const percent = (part) => `${Math.round(100 * part)}%`;

/** "1 server", "3 servers". */
export function count(value, noun) {
  return `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
}

/** Half-open, as everywhere in Petswarm: "0:20". */
export const span = ([start, end]) => `${start}:${end}`;

/** Blocks, in order, as spans: "0:4, 7, 10:12"; a block that stands alone is just its number. */
export function ranges(blocks) {
  const runs = [];
  for (const block of blocks) {
    const last = runs.at(-1);
    if (last && last[1] === block) last[1] = block + 1;
    else runs.push([block, block + 1]);
  }
  return runs.map(([start, end]) => (end - start === 1 ? `${start}` : `${start}:${end}`)).join(", ");
}

export const shortId = (peerId) => `…${peerId.slice(-6)}`;

/** What to call a server: by the name that its owner gave it, else by the end of its peer id. */
export const nameOf = (server) => server.public_name || shortId(server.peer_id);
