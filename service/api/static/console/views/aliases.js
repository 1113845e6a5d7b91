// Aliases: where the requests for each name go, and what each of its targets has served, side by side.

import * as api from "../api.js";
import { useCell, useEvery } from "../cell.js";
import { count, milliseconds, percent } from "../format.js";
import { parse } from "../metrics.js";
import { Bar, Digest, Dot, Loading, Problems } from "../parts.js";
import { cards, complain, loadCards, say } from "../shelf.js";
import { html, useState } from "../vendor/preact.js";

const WHOLE = 100;
const COLUMNS = ["Target", "Digest", "Weight", "Share", "Requests", "Tokens", "Mean time"];

export function Aliases() {
  const [found, setFound] = useState(null);
  const [error, setError] = useState(null);
  const look = async () => {
    try {
      const [{ aliases }, metrics] = await Promise.all([api.get("aliases"), api.text("metrics"), loadCards()]);
      setFound({ aliases, samples: parse(metrics) });
      setError(null);
    } catch (refused) {
      setError(refused);
    }
  };
  useEvery(2000, look);
  const current = new Map(useCell(cards)?.map((card) => [card.id, card.digest]));
  return html`
    <h1>Aliases ${found && html`<span class="muted">${found.aliases.length}</span>`}</h1>
    <${Problems} error=${error} />
    ${!found && !error && html`<${Loading} what="aliases" />`}
    ${found?.aliases.length === 0 && html`<p class="muted">There is none. PUT aliases/NAME makes one: a name that sends each request to one of several adapters.</p>`}
    ${found?.aliases.map((alias) => html`<${Alias} key=${alias.name} alias=${alias} rows=${rowsOf(alias, found.samples, current)} onChange=${look} />`)}
  `;
}

/** Each target with its share of the weights and what it has served as the alias: of the version that answers now. */
function rowsOf(alias, samples, current) {
  const all = alias.targets.reduce((sum, target) => sum + target.weight, 0);
  return alias.targets.map((target) => {
    const digest = target.digest ?? current.get(target.id) ?? null;
    const mine = ({ labels }) => labels.alias === alias.name && labels.adapter === target.id && labels.digest === digest;
    const of = (name) => samples.find((sample) => sample.name === `alias_${name}` && mine(sample))?.value ?? 0;
    const [requests, seconds] = [of("requests_total"), of("e2e_request_latency_seconds_sum")];
    return { target, digest, share: target.weight / all, requests, tokens: of("generation_tokens_total"), mean: requests ? seconds / requests : null };
  });
}

function Alias({ alias, rows, onChange }) {
  const change = (weights, what) =>
    api.put(aliasPath(alias.name), { targets: alias.targets.map((target, index) => ({ ...target, weight: weights[index] })), sticky: alias.sticky }).then(() => {
      say(what);
      return onChange();
    }, complain);
  const save = (event) => {
    event.preventDefault();
    change(new FormData(event.target).getAll("weight").map(Number), `${alias.name} has other weights`);
  };
  const promote = (chosen) => change(alias.targets.map((_, index) => (index === chosen ? WHOLE : 0)), `All of ${alias.name} goes to ${alias.targets[chosen].id}`);
  const withdraw = (chosen) => change(alias.targets.map(({ weight }, index) => (index === chosen ? 0 : weight)), `None of ${alias.name} goes to ${alias.targets[chosen].id}`);
  const busy = alias.targets.filter((target) => target.weight).length;
  return html`<form class="card" aria-label=${`Alias ${alias.name}`} onSubmit=${save}>
    <div class="heading">
      <h2>${alias.name} <span class="muted">${alias.sticky ? `the same ${alias.sticky}, the same target` : "each request is drawn"}</span></h2>
      <button type="submit" class="quiet">Save the weights<span class="hidden"> of ${alias.name}</span></button>
    </div>
    <div class="scroll">
      <table class="shelf" role="table" aria-label=${`Targets of ${alias.name}`}>
        <thead role="rowgroup"><tr role="row">
          ${COLUMNS.map((name, index) => html`<th scope="col" role="columnheader" class=${index > 1 ? "number" : ""}>${name}</th>`)}
          <th scope="col" role="columnheader"><span class="hidden">Actions</span></th>
        </tr></thead>
        <tbody role="rowgroup">
          ${rows.map((row, index) => html`<${Row} key=${row.target.id + row.target.digest} row=${row} alias=${alias.name}
            onPromote=${row.share < 1 && (() => promote(index))} onWithdraw=${row.target.weight > 0 && busy > 1 && (() => withdraw(index))} />`)}
        </tbody>
      </table>
    </div>
  </form>`;
}

function Row({ row, alias, onPromote, onWithdraw }) {
  const { target, digest, share, requests, tokens, mean } = row;
  const cells = [
    html`<a href=${`#/adapters/${target.id}`}><${Dot} id=${target.id} />${target.id}</a>${!target.digest && html` <span class="muted">current</span>`}`,
    html`<${Digest} value=${digest} />`,
    html`<input class="weight" type="number" name="weight" min="0" max="1000000" step="any" required key=${target.weight} defaultValue=${target.weight} aria-label=${`Weight of ${target.id} in ${alias}`} />`,
    html`<span class="size">${percent(share)}<${Bar} part=${share} whole=${1} label=${alias} /></span>`,
    count(requests),
    count(tokens),
    milliseconds(mean),
  ];
  return html`<tr role="row">
    ${cells.map((content, index) => html`<td role="cell" data-label=${COLUMNS[index]} class=${index > 1 ? "number" : ""}>${content}</td>`)}
    <td role="cell" class="row-actions">
      <button type="button" class="quiet" disabled=${!onPromote} onClick=${onPromote}>Promote<span class="hidden"> ${target.id} in ${alias}</span></button>
      <button type="button" class="quiet danger" disabled=${!onWithdraw} onClick=${onWithdraw}>Roll back<span class="hidden"> ${target.id} in ${alias}</span></button>
    </td>
  </tr>`;
}

const aliasPath = (name) => `aliases/${name.split("/").map(encodeURIComponent).join("/")}`;
