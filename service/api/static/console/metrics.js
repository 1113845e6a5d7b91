// Reads the Prometheus text of /metrics into numbers. Knows the format, not what is drawn.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** A list of {name, labels, value}; the common prefix `adapterd_` is left out of the names. */
export function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] ?? "").matchAll(LABEL)].map(([, key, value]) => [key, value.replace(/\\(.)/g, "$1")]));
    samples.push({ name: match[1].replace(/^adapterd_/, ""), labels, value: Number(match[3]) });
  }
  return samples;
}

/** The sum over all labels; 0 when there is none. */
export const total = (samples, name) => samples.reduce((sum, sample) => (sample.name === name ? sum + sample.value : sum), 0);

/** value of the label → value of the sample. */
export function byLabel(samples, name, label) {
  return new Map(samples.filter((sample) => sample.name === name).map((sample) => [sample.labels[label], sample.value]));
}

/** The q-quantile of what a histogram took in between two moments, or null when that is nothing. Linear inside a bucket. */
export function quantile(before, after, name, q) {
  const old = byLabel(before, `${name}_bucket`, "le");
  const grown = [...byLabel(after, `${name}_bucket`, "le")]
    .map(([bound, count]) => [bound === "+Inf" ? Infinity : Number(bound), count - (old.get(bound) ?? 0)])
    .sort((a, b) => a[0] - b[0]);
  const all = grown.at(-1)?.[1] ?? 0;
  if (all <= 0) return null;
  const at = grown.findIndex(([, count]) => count >= q * all);
  const [low, below] = at > 0 ? grown[at - 1] : [0, 0];
  const [high, upto] = grown[at];
  return high === Infinity ? low : low + ((high - low) * (q * all - below)) / Math.max(upto - below, 1);
}
