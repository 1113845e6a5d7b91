// What adapters and keys have used: requests and tokens over whole hours, as /usage tells them.

import * as api from "../api.js";
import { useEvery } from "../cell.js";
import { count } from "../format.js";
import { Dot, Loading } from "../parts.js";
import { reach } from "../shelf.js";
import { html, useState } from "../vendor/preact.js";

const EVERY_MS = 5000;
const HOUR_MS = 3600_000;
const GROUPINGS = { "adapter,key": "adapter and key", adapter: "adapter", key: "key" };
const SPANS = { day: "24 hours", week: "7 days", month: "30 days", ever: "400 days" };
const HOURS = { day: 24, week: 168, month: 720 };
const NAMES = { adapter: "Adapter", key: "Key" };
const NUMBERS = {
  requests: "Requests",
  prompt_tokens: "Prompt tokens",
  cached_tokens: "Of them cached",
  generated_tokens: "Generated tokens",
  failures: "Failures",
};

export function Usage() {
  const [by, setBy] = useState("adapter,key");
  const [span, setSpan] = useState("day");
  const [found, setFound] = useState(null); // {asked, rows}
  const asked = `${by} ${span}`;
  const look = async () => setFound({ asked, rows: (await api.get(`usage?${query(by, span)}`)).usage });
  useEvery(EVERY_MS, () => reach("usage", look), [asked]);
  return html`
    <h1>Usage</h1>
    <div class="filters">
      <label>By <${Choice} of=${GROUPINGS} value=${by} onChange=${setBy} /></label>
      <label>Over the last <${Choice} of=${SPANS} value=${span} onChange=${setSpan} /></label>
    </div>
    ${found?.asked === asked ? html`<${Table} by=${by.split(",")} rows=${found.rows} />` : html`<${Loading} what="usage" />`}
  `;
}

function query(by, span) {
  const since = span in HOURS && { since: new Date(Date.now() - HOURS[span] * HOUR_MS).toISOString() };
  return new URLSearchParams({ by, ...since });
}

const Choice = ({ of, value, onChange }) => html`<select value=${value} onChange=${(event) => onChange(event.target.value)}>
  ${Object.entries(of).map(([name, title]) => html`<option value=${name} selected=${name === value}>${title}</option>`)}
</select>`;

function Table({ by, rows }) {
  if (!rows.length) return html`<p class="muted">Nothing was used.</p>`;
  const sorted = [...rows].sort((a, b) => b.generated_tokens - a.generated_tokens);
  return html`<div class="scroll">
    <table class="shelf" role="table" aria-label="Usage">
      <thead role="rowgroup">
        <tr role="row">
          ${by.map((name) => html`<th scope="col" role="columnheader">${NAMES[name]}</th>`)}
          ${Object.values(NUMBERS).map((title) => html`<th scope="col" role="columnheader" class="number">${title}</th>`)}
        </tr>
      </thead>
      <tbody role="rowgroup">
        ${sorted.map((row) => html`<${Row} key=${by.map((name) => row[name]).join(" ")} by=${by} row=${row} />`)}
      </tbody>
    </table>
  </div>`;
}

function Row({ by, row }) {
  return html`<tr role="row">
    ${by.map((name) => html`<td role="cell" data-label=${NAMES[name]}>${name === "adapter" ? html`<${Adapter} id=${row.adapter} />` : (row.key ?? html`<span class="muted">no key</span>`)}</td>`)}
    ${Object.entries(NUMBERS).map(([name, title]) => html`<td role="cell" class="number" data-label=${title}>${count(row[name])}</td>`)}
  </tr>`;
}

/** The base, an adapter, or several that one request has added up. */
function Adapter({ id }) {
  if (id === null) return html`<span class="muted">the base</span>`;
  if (id.includes("+")) return id.split("+").join(" + ");
  return html`<a href=${`#/adapters/${id}`}><${Dot} id=${id} />${id}</a>`;
}
