// A line chart over time, drawn by uPlot in the theme's colours. Knows no metric.

import { useCell } from "./cell.js";
import { resolved } from "./colours.js";
import { NONE } from "./format.js";
import { theme } from "./theme.js";
import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import uPlot from "./vendor/uplot.js";

const TALL = 170;
const SHOWN_S = 120; // seconds; fewer while there is less to show, but not under
const LEAST_S = 30;
const STEPS = [-3, -2, -1, 0, 1, 2, 3, 4, 5].flatMap((power) => [1, 2, 5].map((step) => step * 10 ** power)); // no halves between whole numbers

const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");

/** `lines`: [{name, colour (a custom property), show(value)}]; `data`: [seconds, ...values of each line], null for a gap.
 * The y axis goes from 0 to `least` or more. */
export function Chart({ title, lines, data, least }) {
  const place = useRef(null);
  const plot = useRef(null);
  const [at, setAt] = useState(null);
  const dark = useCell(theme);
  useEffect(() => {
    const made = new uPlot(options(lines, least, place.current.clientWidth, setAt), data, place.current);
    const watch = new ResizeObserver(([entry]) => made.setSize({ width: entry.contentRect.width, height: TALL }));
    watch.observe(place.current);
    plot.current = made;
    return () => (watch.disconnect(), made.destroy());
  }, [dark]);
  useEffect(() => plot.current.setData(data), [data]);
  const values = lines.map((line, index) => line.show(data[index + 1][at ?? data[0].length - 1] ?? null));
  const told = `${title}: ${lines.map((line, index) => `${line.name} ${values[index]}`).join(", ")}`;
  return html`<figure class="chart card">
    <figcaption><h2>${title}</h2>
      <span class="keys">${lines.map((line, index) => html`<span class="key"><i style=${{ background: `var(${line.colour})` }}></i>${line.name} <b>${values[index] ?? NONE}</b></span>`)}</span>
    </figcaption>
    <div ref=${place} role="img" aria-label=${told}></div>
  </figure>`;
}

function options(lines, least, width, onPoint) {
  const ink = resolved("--muted");
  const grid = { stroke: resolved("--line"), width: 1 };
  const font = "12px system-ui, sans-serif";
  const axis = { stroke: ink, font, grid, ticks: grid };
  return {
    width,
    height: TALL,
    legend: { show: false },
    cursor: { y: false, points: { size: 7 } },
    padding: [8, 28, 0, 0], // a time at the right edge has room for its second half
    scales: { x: { range: (_, first, last) => [last - Math.min(SHOWN_S, Math.max(LEAST_S, last - first)), last] }, y: { range: (_, low, high) => [0, Math.max((high ?? 0) * 1.1, least)] } },
    axes: [{ ...axis, size: 30, space: 90, values: (_, ticks) => ticks.map(clock) }, { ...axis, size: 66, space: 36, incrs: STEPS, values: (_, ticks) => ticks.map((tick) => lines[0].show(tick)) }],
    series: [{}, ...lines.map((line) => ({ label: line.name, stroke: resolved(line.colour), width: 2, points: { show: false }, spanGaps: false }))],
    hooks: { setCursor: [(self) => onPoint(self.cursor.idx ?? null)] },
  };
}
