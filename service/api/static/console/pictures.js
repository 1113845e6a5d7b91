// Pictures of sizes, to scale: an adapter beside its base, magnified below; where in the layers it acts.

import { count, megabytes, percent, rounded } from "./format.js";
import { html } from "./vendor/preact.js";

const TALL = 34;
const FLARE = 30;

/** The base and the adapter as one bar; the adapter's slice again below, split by module. `rows` are by_module entries, of all `parameters`. */
export function Footprint({ base, adapter, rows, parameters, name, baseName }) {
  const share = adapter / (base + adapter);
  const start = 100 * (1 - share);
  const parts = slices(rows, parameters).map((part) => ({ ...part, megabytes: part.share * adapter }));
  const told = `${name} adds ${megabytes(adapter)} to the ${megabytes(base)} of ${baseName}: ${percent(share)} of the two`;
  return html`<figure class="footprint">
    <div class="footprint-head"><span>${baseName}, ${megabytes(base)}</span><strong>+ ${megabytes(adapter)}</strong></div>
    <svg role="img" aria-label=${told} width="100%" height=${2 * TALL + FLARE}>
      <rect class="base-part" width="100%" height=${TALL} />
      <rect class="adapter-part" x=${`${Math.min(start, 99.6)}%`} width=${`${Math.max(100 * share, 0.4)}%`} height=${TALL} />
      <svg y=${TALL} width="100%" height=${FLARE} viewBox="0 0 100 1" preserveAspectRatio="none">
        <polygon class="flare" points=${`${Math.min(start, 99.6)},0 100,0 100,1 0,1`} />
      </svg>
      ${parts.map((part, index) => html`<rect class=${`slice slice-${index % 7}`} x=${`${part.from * 100}%`} y=${TALL + FLARE} width=${`${part.share * 100}%`} height=${TALL}>
        <title>${part.name}: ${megabytes(part.megabytes)}</title>
      </rect>`)}
    </svg>
    <figcaption>
      <span>${name}, magnified ${count(Math.round(1 / share))} times:</span>
      ${parts.map((part, index) => html`<span class="key"><i class=${`slice-${index % 7}`}></i>${part.name} ${megabytes(part.megabytes)}</span>`)}
    </figcaption>
  </figure>`;
}

function slices(rows, parameters) {
  const sizes = new Map();
  for (const row of rows) sizes.set(row.name, (sizes.get(row.name) ?? 0) + row.parameters);
  const rest = parameters - [...sizes.values()].reduce((sum, size) => sum + size, 0);
  if (rest > 0) sizes.set(sizes.size ? "the rest" : "all of it", rest);
  let from = 0;
  return [...sizes].map(([name, size]) => {
    const part = { name, share: size / parameters, from };
    from += part.share;
    return part;
  });
}

/** One strip a module, one cell a layer; the darker, the more. `values`: module → number by layer, null where it is left alone. */
export function HeatStrips({ values, what }) {
  const most = Math.max(...[...values.values()].flat());
  const layers = [...values.values()][0].length;
  return html`<div class="heat">
    ${[...values].map(([name, strip]) => html`<span class="heat-name">${name}</span><${Strip} name=${name} strip=${strip} most=${most} what=${what} />`)}
    <span></span><span class="heat-scale muted"><span>layer 0</span><span>${what}, at most ${rounded(most)}</span><span>layer ${layers - 1}</span></span>
  </div>`;
}

function Strip({ name, strip, most, what }) {
  const used = strip.filter((value) => value !== null);
  const [low, high] = [Math.min(...used), Math.max(...used)];
  const where = low < high ? `, most in layer ${strip.indexOf(high)}` : "";
  const told = `${name}: ${what} ${rounded(low)} to ${rounded(high)} in ${used.length} of ${strip.length} layers${where}`;
  return html`<svg role="img" aria-label=${told} viewBox=${`0 0 ${strip.length} 1`} preserveAspectRatio="none" width="100%" height="22">
    ${strip.map((value, layer) => html`<${Cell} layer=${layer} value=${value} most=${most} told=${`layer ${layer}, ${name}`} what=${what} />`)}
  </svg>`;
}

function Cell({ layer, value, most, told, what }) {
  const says = value === null ? "left alone" : `${what} ${rounded(value)}`;
  const opacity = value === null ? 1 : 0.1 + (0.8 * value) / (most || 1);
  return html`<rect class=${value === null ? "cell-none" : "cell"} x=${layer} width="0.92" height="1" fill-opacity=${opacity}><title>${told}: ${says}</title></rect>`;
}
