// What the page knows of the server, shared by the views: the base, the adapters' cards and summaries, tokens served.

import * as api from "./api.js";
import { cell } from "./cell.js";
import { tint } from "./colours.js";
import { byLabel, parse } from "./metrics.js";

export const base = cell(null);
export const settings = cell(null); // the server's, without secrets
export const cards = cell(null);
export const summaries = cell(new Map()); // digest → summary: content never changes under its digest
export const served = cell(new Map()); // adapter id → tokens generated
export const lost = cell(""); // why the server did not answer last time; empty when it did
export const notice = cell(null); // {text, bad} shown for a while

const AT_ONCE = 6;

export const say = (text) => notice.set({ text, bad: false });
export const complain = (error) => notice.set({ text: error.message, bad: true });

/** Runs `work`; remembers whether the server answered. What the server refused is for the caller to show. */
export async function reach(work) {
  try {
    const result = await work();
    if (lost.value) lost.set("");
    return result;
  } catch (error) {
    if (error.name !== "AbortError") lost.set(error.status ? error.message : "The server does not answer. Trying again.");
    return null;
  }
}

export const loadBase = () =>
  reach(async () => {
    settings.set((await api.get("info")).settings);
    base.set(await api.get("base"));
  });

export const loadCards = () =>
  reach(async () => {
    cards.set((await api.get("adapters")).adapters);
    for (const card of cards.value) tint(card.id); // in the list's order, whichever view comes first
    await loadSummaries();
  });

export const loadServed = () =>
  reach(async () => served.set(byLabel(parse(await api.text("metrics")), "adapter_generation_tokens_total", "adapter")));

async function loadSummaries() {
  const wanted = cards.value.filter((card) => card.state === "ready" && !summaries.value.has(card.digest));
  while (wanted.length) {
    const some = wanted.splice(0, AT_ONCE);
    const found = await Promise.all(some.map((card) => api.get(api.adapterPath(card.id, "/summary")).catch(() => null)));
    const known = new Map(summaries.value);
    for (const summary of found) if (summary) known.set(summary.digest, summary);
    summaries.set(known);
  }
}

/** Resident bytes of the base, in megabytes. */
export const baseMegabytes = (found) => found?.resident_megabytes ?? null;
