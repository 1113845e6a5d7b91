// The service at work, once a second: requests, speed, waiting times, the pool of rank rows, what is where.

import * as api from "../api.js";
import { cell, useCell, useEvery } from "../cell.js";
import { Chart } from "../chart.js";
import { tint } from "../colours.js";
import { bytes, count, digest, fixed, megabytes, milliseconds, percent } from "../format.js";
import { byLabel, parse, quantile, total } from "../metrics.js";
import { Dot, Loading, State } from "../parts.js";
import { base, cards, health, loadCards, reach, settings } from "../shelf.js";
import { html } from "../vendor/preact.js";

const EVERY_MS = 1000;
const KEPT = 120; // moments: two minutes
const WINDOW = 10; // moments that waiting times are taken over

const moments = cell([]); // stays while other views are looked at

export function Live() {
  useEvery(EVERY_MS, () => Promise.all([loadCards(), reach("live", look)]));
  const seen = useCell(moments);
  const now = seen.at(-1);
  if (!now) return html`<h1>Live</h1><${Loading} what="metrics" />`;
  const whole = (value) => fixed(value, 0);
  const time = seen.map((moment) => moment.time);
  const over = (pick) => seen.map(pick);
  return html`
    <h1>Live</h1>
    <${Tiles} now=${now} />
    <div class="charts">
      <${Chart} title="Requests" least=${4} data=${[time, over((m) => m.running), over((m) => m.waiting)]}
        lines=${[{ name: "running", colour: "--blue", show: whole }, { name: "waiting", colour: "--orange", show: whole }]} />
      <${Chart} title="Tokens/s" least=${20} data=${[time, over((m) => m.generated), over((m) => m.prompt)]}
        lines=${[{ name: "generated", colour: "--blue", show: whole }, { name: "prompt", colour: "--orange", show: whole }]} />
      <${Chart} title="First token" least=${0.1} data=${[time, over((m) => m.ttft50), over((m) => m.ttft95)]}
        lines=${[{ name: "median", colour: "--blue", show: milliseconds }, { name: "95 %", colour: "--orange", show: milliseconds }]} />
    </div>
    <${Pool} pool=${now.base.pool} />
  `;
}

/** Adds this moment: gauges as they are, rates since the last moment, quantiles over the last ten. */
async function look() {
  const [metrics, found] = await Promise.all([api.text("metrics"), api.get("base")]);
  base.set(found);
  const samples = parse(metrics);
  const time = Date.now() / 1000;
  const last = moments.value.at(-1);
  const past = moments.value.at(-WINDOW) ?? moments.value[0];
  const rate = (name) => (last ? Math.max(0, total(samples, name) - total(last.samples, name)) / (time - last.time) : null);
  const ttft = (q) => (past ? quantile(past.samples, samples, "time_to_first_token_seconds", q) : null);
  const moment = {
    time, samples, base: found,
    running: total(samples, "num_requests_running"),
    waiting: total(samples, "num_requests_waiting"),
    generated: rate("generation_tokens_total"),
    prompt: rate("prompt_tokens_total"),
    ttft50: ttft(0.5),
    ttft95: ttft(0.95),
  };
  // Only the last few moments are compared with; older ones keep their numbers, not their samples.
  const kept = moments.value.slice(-KEPT + 1).map((one, index, all) => (index < all.length - WINDOW ? { ...one, samples: [] } : one));
  moments.set([...kept, moment]);
}

function Tiles({ now }) {
  const { state } = useCell(health);
  const tiers = byLabel(now.samples, "adapters", "tier");
  const tiles = [
    ["Running", count(now.running)],
    ["Waiting", count(now.waiting)],
    ["Tokens/s", fixed(now.generated, 0)],
    ["KV blocks", kvBlocks(now)],
    ["On the device", count(tiers.get("device") ?? 0)],
    ["In host memory", count(tiers.get("host") ?? 0)],
    ["Host cache", hostCache(now.base)],
    ["Worker", html`<${State} value=${state} /> <span class="muted">${count(total(now.samples, "worker_restarts_total"))} restarts</span>`],
  ];
  return html`<dl class="tiles">${tiles.map(([name, value]) => html`<div class="tile"><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;
}

const kvBlocks = ({ samples }) => {
  const states = byLabel(samples, "kv_blocks", "state");
  const [used, cached, empty] = ["used", "cached", "empty"].map((state) => states.get(state) ?? 0);
  const all = used + cached + empty;
  const preempted = count(total(samples, "preemptions_total"));
  return html`${percent(all ? used / all : 0)} <span class="muted">used, ${percent(all ? cached / all : 0)} cached, ${preempted} preemptions</span>`;
};

const hostCache = ({ host_bytes: used }) => html`${bytes(used)} <span class="muted">of ${megabytes(settings.value?.host_cache_mb)}</span>`;

/** Which adapter holds which rows of the pool, and the same as a list. */
function Pool({ pool }) {
  const ids = new Map(useCell(cards)?.map((card) => [card.digest, card.id]));
  const held = pool.placements.map((one) => ({ ...one, id: ids.get(one.digest) })).sort((a, b) => a.start - b.start);
  const told = `${pool.rank_used} of ${pool.rank_total} rank rows held by ${held.length} adapters`;
  return html`<section class="card" aria-labelledby="pool">
    <h2 id="pool">Pool of rank rows <span class="muted">${pool.rank_used} of ${pool.rank_total} held</span></h2>
    <svg class="pool" role="img" aria-label=${told} viewBox=${`0 0 ${pool.rank_total} 1`} preserveAspectRatio="none" width="100%" height="44">
      <rect class="pool-free" width=${pool.rank_total} height="1" />
      ${held.map((one) => html`<rect class=${tint(one.id)} x=${one.start} width=${Math.max(one.rank - 0.4, 0.6)} height="1"><title>${nameOf(one)}: rows ${one.start} to ${one.start + one.rank - 1}</title></rect>`)}
    </svg>
    <ul class="held">
      ${held.map((one) => html`<li><${Dot} id=${one.id} />${one.id ? html`<a href=${`#/adapters/${one.id}`}>${one.id}</a>` : nameOf(one)} <span class="muted">rows ${one.start}–${one.start + one.rank - 1}</span></li>`)}
    </ul>
  </section>`;
}

const nameOf = (one) => one.id ?? `${digest(one.digest)}, no longer registered`;
