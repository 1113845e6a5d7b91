// Numbers, sizes, times and digests as a person reads them.

const plain = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });

export const NONE = "–";

export const count = (n) => (n === null || n === undefined ? NONE : plain.format(n));
export const short = (n) => (n === null || n === undefined ? NONE : compact.format(n));
export const fixed = (n, digits = 1) => (n === null || n === undefined ? NONE : n.toFixed(digits));

/** Megabytes (10^6 bytes) with as many digits as say something. */
export function megabytes(mb) {
  if (mb === null || mb === undefined) return NONE;
  if (mb >= 1000) return `${(mb / 1000).toFixed(2)} GB`;
  return `${mb >= 100 ? Math.round(mb) : mb.toFixed(2)} MB`;
}

export const bytes = (n) => (n === null || n === undefined ? NONE : megabytes(n / 1e6));

export function percent(fraction) {
  const value = fraction * 100;
  if (value === 0) return "0 %";
  return value < 0.01 ? "< 0.01 %" : `${value.toPrecision(value < 1 ? 2 : 3)} %`;
}

export function milliseconds(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(2)} s`;
}

/** `3 minutes ago`, from an ISO time. */
export function ago(iso) {
  if (!iso) return "never";
  const seconds = (new Date(iso) - Date.now()) / 1000;
  for (const [unit, size] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    if (Math.abs(seconds) >= size) return relative.format(Math.round(seconds / size), unit);
  }
  return relative.format(Math.round(seconds), "second");
}

/** `sha256:1f3a…` as its first twelve digits. */
export const digest = (full) => (full ? full.replace(/^sha256:/, "").slice(0, 12) : NONE);

export const rounded = (n) => `${+n.toPrecision(3)}`;

/** One number, or `4–16` when an adapter mixes them. */
export function range(span) {
  if (!span) return NONE;
  const [low, high] = [+span.min.toPrecision(4), +span.max.toPrecision(4)];
  return low === high ? `${low}` : `${low}–${high}`;
}
