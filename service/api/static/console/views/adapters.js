// All adapters in one table: sort, filter, pin, delete; beneath it, the ways to add one.

import * as api from "../api.js";
import { useCell, useEvery } from "../cell.js";
import { bytes, count, megabytes, range, short } from "../format.js";
import { Bar, Dialog, Dot, Loading, State } from "../parts.js";
import { base, baseMegabytes, cards, complain, loadCards, loadServed, say, served, summaries } from "../shelf.js";
import { html, useState } from "../vendor/preact.js";
import { Add } from "./add.js";

const COLUMNS = [
  { name: "Adapter", of: (row) => row.card.id.toLowerCase() },
  { name: "Rank", of: (row) => row.rank?.max ?? 0, number: true },
  { name: "Targets", of: (row) => row.targets.join(" ") },
  { name: "Parameters", of: (row) => row.card.parameters ?? 0, number: true },
  { name: "Size", of: (row) => row.card.megabytes ?? 0, number: true },
  { name: "Type", of: (row) => row.dtypes },
  { name: "Residency", of: (row) => row.card.residency },
  { name: "Pinned", of: (row) => Number(row.card.pinned), number: true },
  { name: "In flight", of: (row) => row.card.in_flight, number: true },
  { name: "Tokens served", of: (row) => row.tokens, number: true },
];

export function Adapters() {
  useEvery(2000, () => Promise.all([loadCards(), loadServed()]));
  const found = useCell(cards);
  const known = useCell(summaries);
  const tokens = useCell(served);
  const [leaving, setLeaving] = useState(null);
  if (!found) return html`<h1>Adapters</h1><${Loading} what="adapters" />`;
  const rows = found.map((card) => rowOf(card, known.get(card.digest), tokens.get(card.id) ?? 0));
  return html`
    <h1>Adapters <span class="muted">${found.length}</span></h1>
    <${Shelf} rows=${rows} onDelete=${setLeaving} />
    <${Add} />
    ${leaving && html`<${Delete} card=${leaving} onClose=${() => setLeaving(null)} />`}
  `;
}

function rowOf(card, summary, tokens) {
  return {
    card,
    tokens,
    rank: summary ? summary.rank : card.rank && { min: card.rank, max: card.rank },
    targets: summary?.target_modules ?? [],
    dtypes: Object.keys(summary?.size.dtypes ?? {}).join(" "),
    text: [card.id, card.state, card.pinned ? "pinned" : "", ...(summary?.target_modules ?? [])].join(" ").toLowerCase(),
  };
}

function Shelf({ rows, onDelete }) {
  const [sort, setSort] = useState({ column: COLUMNS[0], down: false });
  const [words, setWords] = useState("");
  const [tier, setTier] = useState("");
  const shown = sorted(rows.filter((row) => row.text.includes(words.toLowerCase()) && (!tier || row.card.residency === tier)), sort);
  return html`
    <div class="filters">
      <label>Filter <input type="search" value=${words} placeholder="id, target, state, pinned" onInput=${(event) => setWords(event.target.value)} /></label>
      <label>Residency
        <select value=${tier} onChange=${(event) => setTier(event.target.value)}>
          <option value="">any</option>
          ${["device", "host", "disk"].map((name) => html`<option value=${name}>${name}</option>`)}
        </select>
      </label>
    </div>
    <div class="scroll">
      <table class="shelf" role="table" aria-label="Adapters">
        <thead role="rowgroup">
          <tr role="row">
            ${COLUMNS.map((column) => html`<${Head} column=${column} sort=${sort} onSort=${setSort} />`)}
            <th scope="col" role="columnheader"><span class="hidden">Actions</span></th>
          </tr>
        </thead>
        <tbody role="rowgroup">
          ${shown.map((row) => html`<${Row} key=${row.card.id} row=${row} onDelete=${onDelete} />`)}
        </tbody>
      </table>
    </div>
    ${shown.length === 0 && html`<p class="muted">${rows.length ? "No adapter matches." : "No adapter is registered yet: add one below."}</p>`}
  `;
}

function sorted(rows, { column, down }) {
  const order = (a, b) => (column.of(a) < column.of(b) ? -1 : column.of(a) > column.of(b) ? 1 : 0);
  return rows.sort((a, b) => (down ? order(b, a) : order(a, b)));
}

function Head({ column, sort, onSort }) {
  const mine = sort.column === column;
  const turn = () => onSort({ column, down: mine ? !sort.down : Boolean(column.number) });
  return html`<th scope="col" role="columnheader" class=${column.number ? "number" : ""} aria-sort=${mine ? (sort.down ? "descending" : "ascending") : undefined}>
    <button type="button" class="sort" onClick=${turn}>${column.name}<span aria-hidden="true">${mine ? (sort.down ? " ↓" : " ↑") : ""}</span></button>
  </th>`;
}

const Cell = ({ column, children }) => html`<td role="cell" data-label=${column.name} class=${column.number ? "number" : ""}>${children}</td>`;

function Row({ row, onDelete }) {
  const { card, rank, targets, dtypes, tokens } = row;
  const whole = baseMegabytes(useCell(base));
  const cells = [
    html`<a href=${`#/adapters/${card.id}`}><${Dot} id=${card.id} />${card.id}</a>
      ${card.state !== "ready" && html`<span class="failure"><${State} value=${card.state} /> ${card.reason}</span>`}`,
    range(rank),
    html`<span class="targets">${targets.join(" ")}</span>`,
    short(card.parameters),
    html`<span class="size">${megabytes(card.megabytes)}${whole && card.megabytes !== null && html`<${Bar} part=${card.megabytes} whole=${whole} label="the base's resident size" />`}</span>`,
    dtypes,
    html`<span class=${`tier tier-${card.residency}`}>${card.residency}</span>`,
    html`<${Pin} card=${card} />`,
    card.in_flight,
    count(tokens),
  ];
  return html`<tr role="row">
    ${cells.map((content, index) => html`<${Cell} column=${COLUMNS[index]}>${content}<//>`)}
    <td role="cell" class="row-actions">
      <button type="button" class="quiet danger" onClick=${() => onDelete(card)}>Delete<span class="hidden"> ${card.id}</span></button>
    </td>
  </tr>`;
}

/** Keeps an adapter on the device, or lets it go. */
export function Pin({ card }) {
  const toggle = () =>
    api.patch(api.adapterPath(card.id), { pinned: !card.pinned }).then(() => {
      say(card.pinned ? `${card.id} is no longer pinned` : `${card.id} stays on the device`);
      return loadCards();
    }, complain);
  if (!card.digest) return null; // what could not be read cannot be kept anywhere
  return html`<button type="button" class="quiet pin" aria-pressed=${card.pinned} onClick=${toggle}>Pin<span class="hidden"> ${card.id}</span></button>`;
}

/** Asks before it deletes. */
export function Delete({ card, onClose, onDone = () => {} }) {
  const [purge, setPurge] = useState(false);
  const [busy, setBusy] = useState(false);
  const go = async (event) => {
    event.preventDefault();
    setBusy(true);
    try {
      const gone = await api.remove(api.adapterPath(card.id, purge ? "?purge=true" : ""));
      say(`Deleted ${card.id}: ${gone.drained_requests} requests finished first, ${bytes(gone.freed_bytes)} freed`);
      onDone();
    } catch (error) {
      complain(error);
    }
    await loadCards();
    onClose();
  };
  return html`<${Dialog} title=${`Delete ${card.id}?`} onClose=${onClose}>
    <form onSubmit=${go}>
      <p>New requests for it get 404 at once. ${card.in_flight > 0 ? `The ${card.in_flight} in flight finish first.` : "None is in flight."}</p>
      <label class="check"><input type="checkbox" checked=${purge} onChange=${(event) => setPurge(event.target.checked)} /> Delete its uploaded files too</label>
      <div class="actions">
        <button type="submit" class="danger" disabled=${busy}>${busy ? "Draining …" : "Delete"}</button>
        <button type="button" class="quiet" onClick=${onClose}>Keep it</button>
      </div>
    </form>
  <//>`;
}
