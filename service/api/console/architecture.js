// Reads the architecture text of an adapter: which layer adapts which module with which rank. Draws nothing.

const ENTRY = /^(\s*)\(([^)]+)\): ?(.*)/;
const LAYERS = /^\d+(-\d+)?(, \d+(-\d+)?)*$/;
const RANK = /rank=(\d+)/;

export const UNTOLD = -1; // the text folds this layer away without saying its ranks

/** Module name → rank by layer: null where the layer is left alone, UNTOLD where the text does not say. Empty without adapted layers. */
export function ranksByLayer(text) {
  const found = new Map();
  const untold = new Set();
  const path = []; // the entries around the current line, outermost first
  let layers = 0;
  for (const line of text.split("\n")) {
    const [, indent, name, told] = ENTRY.exec(line) ?? [];
    if (!name) continue;
    while (path.length && path.at(-1).indent >= indent.length) path.pop();
    path.push({ indent: indent.length, name });
    const block = numbers(path.find((entry) => LAYERS.test(entry.name))?.name);
    layers = Math.max(layers, ...block.map((layer) => layer + 1));
    if (told.startsWith("as above")) block.forEach((layer) => untold.add(layer));
    const rank = RANK.exec(told);
    if (!rank || !block.length) continue;
    const ranks = found.get(name) ?? new Map();
    for (const layer of block) ranks.set(layer, Number(rank[1]));
    found.set(name, ranks);
  }
  const strip = (ranks) => Array.from({ length: layers }, (_, layer) => (untold.has(layer) ? UNTOLD : ranks.get(layer) ?? null));
  return new Map([...found].map(([name, ranks]) => [name, strip(ranks)]));
}

/** `0-3, 5` → [0, 1, 2, 3, 5] */
function numbers(runs = "") {
  return runs.split(", ").filter(Boolean).flatMap((run) => {
    const [first, last = first] = run.split("-").map(Number);
    return Array.from({ length: last - first + 1 }, (_, n) => first + n);
  });
}
