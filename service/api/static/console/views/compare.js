// One prompt, answered side by side by the base and up to four adapters, all streaming at once.

import * as api from "../api.js";
import { WAYS } from "../asking.js";
import { useCell, useEvery } from "../cell.js";
import { DEMO_BASE, EXAMPLES } from "../examples.js";
import { count, fixed, milliseconds, NONE } from "../format.js";
import { Digest, Dot, Problems, useCopy } from "../parts.js";
import { base, cards, loadCards } from "../shelf.js";
import { html, useEffect, useRef, useState } from "../vendor/preact.js";

const MOST_ADAPTERS = 4;
const BASE = ""; // the choice that is no adapter
const FIELDS = [
  { name: "max_new_tokens", label: "New tokens", initial: "64", min: 1, step: 1 },
  { name: "temperature", label: "Temperature", initial: "0", min: 0, step: 0.1 },
  { name: "top_p", label: "Top-p", initial: "", min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", label: "Top-k", initial: "", min: 1, step: 1 },
  { name: "repetition_penalty", label: "Repetition penalty", initial: "", min: 0.1, step: 0.05 },
  { name: "seed", label: "Seed", initial: "", min: 0, step: 1 },
];

// What was typed and answered stays while other views are looked at.
const kept = { prompt: "", way: "plain", chosen: [BASE], values: Object.fromEntries(FIELDS.map(({ name, initial }) => [name, initial])), runs: [] };

export function Compare({ id }) {
  const [, redraw] = useState(0);
  const running = useRef(null);
  const keep = (change) => (Object.assign(kept, change), redraw((n) => n + 1));
  useEvery(5000, loadCards);
  useEffect(() => {
    if (id && !kept.chosen.includes(id)) keep({ chosen: [BASE, id] });
    return () => running.current?.abort();
  }, [id]);
  const [busy, setBusy] = useState(false);
  const [said, setSaid] = useState("");
  const start = async (event) => {
    event.preventDefault();
    running.current = new AbortController();
    const { signal } = running.current;
    setBusy(true);
    setSaid("");
    const runs = kept.chosen.map(newRun);
    keep({ runs });
    await Promise.all(runs.map((run) => follow(run, signal, () => keep({}))));
    setSaid(runs.map((run) => `${nameOf(run.id)}: ${run.error ? run.error.message : `${run.tokens} tokens`}`).join("; "));
    setBusy(false);
  };
  return html`
    <h1>Compare</h1>
    <form class="card" onSubmit=${start} aria-label="Prompt and settings">
      <label>Prompt <textarea required rows="3" value=${kept.prompt} onInput=${(event) => keep({ prompt: event.target.value })}></textarea></label>
      <${Examples} onChange=${keep} />
      <${Choices} onChange=${(chosen) => keep({ chosen })} />
      <${Settings} onChange=${keep} />
      <div class="actions">
        <button type="submit" disabled=${busy || !kept.chosen.length}>Run</button>
        <button type="button" class="quiet" disabled=${!busy} onClick=${() => running.current.abort()}>Stop</button>
      </div>
    </form>
    <p class="hidden" role="status">${said}</p>
    <div class="runs">${kept.runs.map((run) => html`<${Run} key=${run.id} run=${run} />`)}</div>
  `;
}

const nameOf = (id) => id || base.value?.id || "base";

/** An answer that is yet to come: when it started, its first and last token's times, and what is known of it. */
function newRun(id) {
  const given = Object.entries(kept.values).filter(([, value]) => value !== "");
  const values = Object.fromEntries(given.map(([name, value]) => [name, Number(value)]));
  const way = WAYS[kept.way];
  const began = { text: "", tokens: 0, started: performance.now(), first: null, last: null, digest: "", finish: "", error: null };
  return { id, read: way.read, ...way.request(kept.prompt, id, values), ...began };
}

/** Fills `run` as its tokens come; `changed` is called after each. */
async function follow(run, signal, changed) {
  try {
    const onStart = (headers) => (run.digest = headers.get("x-adapter-digest") ?? "");
    for await (const event of api.stream(run.path, run.body, { signal, onStart })) {
      take(run, run.read(event));
      changed();
    }
  } catch (error) {
    if (error.name === "AbortError") run.finish = "stopped";
    else run.error = error;
  }
  run.finish ||= "ended";
  changed();
}

function take(run, { more, text, finish, tokens, digest }) {
  if (more) {
    run.last = performance.now();
    run.first ??= run.last;
    run.tokens += 1;
  }
  run.text = text ?? run.text + (more ?? "");
  run.tokens = tokens ?? run.tokens;
  run.finish = finish ?? run.finish;
  run.digest = digest ?? run.digest;
}

/** With the demo's base: a prompt for each of the demo's adapters that is there. */
function Examples({ onChange }) {
  const found = useCell(cards) ?? [];
  const shown = useCell(base)?.id === DEMO_BASE ? found.filter((card) => card.id in EXAMPLES) : [];
  const take = (id) => onChange({ prompt: EXAMPLES[id], way: "plain", chosen: kept.chosen.includes(id) ? kept.chosen : [BASE, id] });
  return shown.length > 0 && html`<div class="chips examples" role="group" aria-label="Examples"><span class="muted">Try an example for</span>
    ${shown.map(({ id }) => html`<button type="button" class="quiet" onClick=${() => take(id)}><span class="hidden">an example for </span>${id}</button>`)}
  </div>`;
}

/** The base and the adapters as buttons that stay down; at most four adapters. */
function Choices({ onChange }) {
  const found = useCell(cards) ?? [];
  const [words, setWords] = useState("");
  const full = kept.chosen.filter((one) => one !== BASE).length >= MOST_ADAPTERS;
  const ready = found.filter((card) => card.state === "ready").map((card) => card.id);
  const shown = [BASE, ...ready].filter((one) => kept.chosen.includes(one) || nameOf(one).toLowerCase().includes(words.toLowerCase()));
  const toggle = (one) => onChange(kept.chosen.includes(one) ? kept.chosen.filter((other) => other !== one) : [...kept.chosen, one]);
  return html`<fieldset>
    <legend>The base and up to ${MOST_ADAPTERS} adapters</legend>
    ${ready.length > 12 && html`<label class="hidden" for="choice-filter">Filter adapters</label>
      <input id="choice-filter" class="choice-filter" type="search" placeholder="filter" value=${words} onInput=${(event) => setWords(event.target.value)} />`}
    <div class="chips">
      ${shown.map((one) => html`<button type="button" class="chip" aria-pressed=${kept.chosen.includes(one)}
        disabled=${one !== BASE && full && !kept.chosen.includes(one)} onClick=${() => toggle(one)}><${Dot} id=${one} />${one === BASE ? "base" : one}</button>`)}
    </div>
  </fieldset>`;
}

const Settings = ({ onChange }) => html`<div class="settings">
  <label>Send as
    <select value=${kept.way} onChange=${(event) => onChange({ way: event.target.value })}>
      ${Object.entries(WAYS).map(([name, { title }]) => html`<option value=${name}>${title}</option>`)}
    </select>
  </label>
  ${FIELDS.map(({ name, label, min, max, step }) => html`<label>${label}
    <input type="number" name=${name} min=${min} max=${max} step=${step} value=${kept.values[name]} placeholder="off"
      onInput=${(event) => onChange({ values: { ...kept.values, [name]: event.target.value } })} />
  </label>`)}
</div>`;

function Run({ run }) {
  const [copied, copy] = useCopy();
  const speed = run.last > run.first ? ((run.tokens - 1) * 1000) / (run.last - run.first) : null;
  return html`<article class="run" aria-label=${nameOf(run.id)} aria-busy=${!run.finish}>
    <h2><${Dot} id=${run.id} />${nameOf(run.id)}</h2>
    <p class="run-text">${run.text || (run.finish && !run.error && html`<span class="muted">Nothing: it ended at once.</span>`)}${!run.finish && html`<span class="caret" aria-hidden="true"></span>`}</p>
    <${Problems} error=${run.error} />
    <dl class="run-facts">
      <div><dt>tokens/s</dt><dd class="speed">${speed === null ? NONE : fixed(speed)}</dd></div>
      <div><dt>tokens</dt><dd>${count(run.tokens)}</dd></div>
      <div><dt>first</dt><dd>${milliseconds(run.first && (run.first - run.started) / 1000)}</dd></div>
      <div><dt>end</dt><dd>${run.error ? "error" : run.finish || "…"}</dd></div>
      <div><dt>digest</dt><dd>${run.id ? html`<${Digest} value=${run.digest} />` : "none: the base"}</dd></div>
    </dl>
    <button type="button" class="quiet" onClick=${() => copy(curl(run))}>
      ${copied ? "Copied" : "Copy as curl"}<span class="hidden">, what ${nameOf(run.id)} was asked</span>
    </button>
  </article>`;
}

/** The request as a command; the key is left for the shell to fill in. */
function curl({ path, body }) {
  const key = api.hasKey() ? ` -H "authorization: Bearer $ADAPTERD_KEY"` : "";
  const quoted = JSON.stringify(body).replaceAll("'", `'\\''`);
  return `curl -N ${new URL(path, document.baseURI)} -H 'content-type: application/json'${key} -d '${quoted}'`;
}
