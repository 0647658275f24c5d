// Keeps the latest report. The monitor says when there is a new one; a look now and then finds out if it falls silent.

import { fetchState, openEvents } from "./api.js";

const LOOK_PERIOD = 15_000; // milliseconds
const LOOK_PERIOD_ALONE = 4_000; // while the monitor cannot say that there is something new
const SHORTEST_GAP = 1_000; // between two fetches
const SHARE = 5; // of the time, one part in so many may go into fetching and showing
const FIRST_RETRY = 1_000;
const LAST_RETRY = 15_000;
const OLD = 600; // seconds since the records were read; normally the monitor says itself if it cannot

export class Live {
  /** onChange: called after each new report, and when the link to the monitor changes. */
  constructor(onChange) {
    this.report = null;
    this.link = "connecting"; // then "live" or "gone"
    this.reason = null; // why it is gone
    this._onChange = onChange;
    this._tag = null;
    this._ahead = 0; // seconds that the monitor's clock is ahead of ours
    this._events = null;
    this._retry = FIRST_RETRY;
    this._fetching = false;
    this._again = false;
    this._fetchedAt = -Infinity;
    this._took = 0; // milliseconds, the last time
    this._timer = null;
    this._listening = null;
  }

  start() {
    this._listen();
    this._look();
    document.addEventListener("visibilitychange", () => this._listen());
    window.addEventListener("online", () => this._schedule(0));
  }

  /** Unix time by the monitor's clock. */
  now() {
    return Date.now() / 1000 + this._ahead;
  }

  /** Why the report may not be how things are, in a sentence, or null. */
  get stale() {
    if (!this.report) return null;
    if (this.report.trouble) return this.report.trouble;
    const since = this.now() - this.report.read_at;
    return this.report.read_at && since > OLD ? "the monitor has read no records for more than ten minutes" : null;
  }

  // A page in the background only looks now and then: browsers have few connections for all pages of a site.
  _listen() {
    this._events?.close();
    if (document.hidden) return;
    this._events = openEvents();
    this._events.addEventListener("revision", (event) => {
      if (Number(event.data) !== this.report?.revision) this._schedule(0);
    });
    this._events.addEventListener("error", () => {
      this._schedule(0); // tells whether only this stream ended, or the monitor
      if (this._events.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
      this._retry = Math.min(2 * this._retry, LAST_RETRY);
      clearTimeout(this._listening);
      this._listening = setTimeout(() => this._listen(), this._retry);
    });
    this._events.addEventListener("open", () => {
      this._retry = FIRST_RETRY;
      this._schedule(0);
    });
  }

  _schedule(delay) {
    if (this._fetching) {
      this._again = true;
      return;
    }
    clearTimeout(this._timer);
    const gap = Math.max(SHORTEST_GAP, SHARE * this._took);
    const wait = this._fetchedAt + gap - performance.now();
    this._timer = setTimeout(() => this._look(), Math.max(delay, wait, 0));
  }

  async _look() {
    clearTimeout(this._timer);
    this._fetching = true;
    this._fetchedAt = performance.now();
    const before = this.link;
    let fresh = false;
    try {
      const { report, tag, time } = await fetchState(this._tag);
      // The header counts whole seconds: half of one is its likeliest error.
      if (time !== null && Math.abs(time + 0.5 - this.now()) > 1.5) this._ahead = time + 0.5 - Date.now() / 1000;
      if (report) {
        this.report = report;
        fresh = true;
      }
      this._tag = tag;
      this.link = "live";
      this.reason = null;
    } catch (error) {
      this.link = "gone";
      this.reason = error.message;
    }
    this._fetching = false;
    if (fresh || this.link !== before) this._onChange();
    this._took = performance.now() - this._fetchedAt;
    const again = this._again;
    this._again = false;
    const alone = !document.hidden && this._events?.readyState !== EventSource.OPEN;
    this._schedule(again ? 0 : alone ? LOOK_PERIOD_ALONE : LOOK_PERIOD);
  }
}
