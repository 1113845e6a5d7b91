// What an adapter would weigh before anyone trains it: rank and targets in, size against the base out.

import * as api from "../api.js";
import { useCell } from "../cell.js";
import { count, megabytes, percent } from "../format.js";
import { Facts, Loading, Problems } from "../parts.js";
import { Footprint } from "../pictures.js";
import { base, baseMegabytes, loadBase, settings } from "../shelf.js";
import { html, useEffect, useState } from "../vendor/preact.js";
import { ByModule } from "./adapter.js";

const PAUSE_MS = 120; // a slider moves faster than anyone reads
const HEAD = /^(lm_head|embed_out|output|score)$/; // what PEFT leaves out of "all-linear"
const ATTENTION = /attn|^[qkvo]_proj$|query|key|value|qkv/;

export function Forecast() {
  const found = useCell(base);
  useEffect(() => {
    if (!found) loadBase();
  }, []);
  return html`<h1>Forecast</h1>${found ? html`<${Form} base=${found} />` : html`<${Loading} what="the base" />`}`;
}

function Form({ base: found }) {
  const names = [...new Set(found.modules.map((module) => module.name))];
  const most = settings.value.max_rank;
  const [rank, setRank] = useState(Math.min(16, most));
  const [targets, setTargets] = useState(names.filter((name) => ATTENTION.test(name)));
  const [dtype, setDtype] = useState("float32");
  const [forecast, setForecast] = useState(null);
  const [error, setError] = useState(null);
  useEffect(() => {
    if (!targets.length) return;
    const ask = () => api.get(`forecast?${new URLSearchParams({ r: rank, target_modules: targets.join(","), dtype })}`).then((answer) => (setForecast(answer), setError(null)), setError);
    const timer = setTimeout(ask, PAUSE_MS);
    return () => clearTimeout(timer);
  }, [rank, targets.join(","), dtype]);
  const toggle = (name) => setTargets(targets.includes(name) ? targets.filter((other) => other !== name) : names.filter((other) => other === name || targets.includes(other)));
  return html`
    <form class="card" aria-label="Shape of the adapter" onSubmit=${(event) => event.preventDefault()}>
      <label class="slider">Rank <b>${rank}</b>
        <input type="range" min="1" max=${most} value=${rank} onInput=${(event) => setRank(Number(event.target.value))} />
      </label>
      <fieldset>
        <legend>Targets</legend>
        <div class="chips">
          ${names.map((name) => html`<button type="button" class="chip" aria-pressed=${targets.includes(name)} onClick=${() => toggle(name)}>${name}</button>`)}
        </div>
        <div class="chips presets">
          <button type="button" class="quiet" onClick=${() => setTargets(names.filter((name) => ATTENTION.test(name)))}>Attention</button>
          <button type="button" class="quiet" onClick=${() => setTargets(names.filter((name) => !HEAD.test(name)))}>Every linear layer</button>
        </div>
      </fieldset>
      <label class="narrow">Saved as <select value=${dtype} onChange=${(event) => setDtype(event.target.value)}>${["float32", "bfloat16", "float16"].map((name) => html`<option value=${name}>${name}</option>`)}</select></label>
    </form>
    <${Problems} error=${error} />
    ${!targets.length && html`<p class="muted">Choose at least one target.</p>`}
    ${targets.length > 0 && forecast && html`<${Answer} forecast=${forecast} base=${found} rank=${rank} />`}
  `;
}

function Answer({ forecast, base: found, rank }) {
  return html`
    <section class="card" aria-labelledby="answer">
      <h2 id="answer">It would weigh <span class="speed">${megabytes(forecast.megabytes)}</span></h2>
      <${Footprint} base=${baseMegabytes(found)} adapter=${forecast.megabytes} rows=${forecast.by_module} parameters=${forecast.parameters} name="the adapter" baseName=${found.id} />
      <${Facts} of=${[
        ["Parameters", count(forecast.parameters)],
        ["Of the base's", percent(forecast.parameters / forecast.base.parameters)],
        ["The pool holds at once", `${count(Math.floor(found.pool.rank_total / rank))} of this rank`],
      ]} />
    </section>
    <${ByModule} rows=${forecast.by_module} caption="Modules of the adapter" />
  `;
}
