// Colours: one per adapter, the same everywhere on the page, and the theme's own for canvases.

const HUES = 12;
const seen = new Map(); // adapter id → its turn

/** A class name for this adapter's colour: the first twelve seen differ. style.css has the colours; the base is grey. */
export function tint(id) {
  if (!id) return "tint-base";
  if (!seen.has(id)) seen.set(id, seen.size % HUES);
  return `tint-${seen.get(id)}`;
}

/** The colour a custom property has now, resolved; canvases cannot read var(). */
export function resolved(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}
