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
export const health = cell({ state: "", reason: "" }); // the worker's state, and why a request would not be served now
export const troubles = cell(new Map()); // what could not be fetched last time → why
export const notice = cell(null); // {text, bad} shown for a while

const AT_ONCE = 6;

export const say = (text) => notice.set({ text, bad: false });
export const complain = (error) => notice.set({ text: error.message, bad: true });

/** Runs `work`, which fetches `what` for the page's own sake; remembers why it failed until it goes well again. */
export async function reach(what, work) {
  const now = new Map(troubles.value);
  try {
    await work();
    now.delete(what);
  } catch (error) {
    now.set(what, error.status ? error.message : "The server does not answer. Trying again.");
  }
  if (now.get(what) !== troubles.value.get(what)) troubles.set(now);
}

export async function loadHealth() {
  const told = await api.get("health").catch((error) => ({ state: error.details?.state ?? "lost", reason: error.message }));
  if (told.state !== health.value.state || told.reason !== health.value.reason) health.set(told);
}

export const loadBase = () =>
  reach("base", async () => {
    settings.set((await api.get("info")).settings);
    base.set(await api.get("base"));
  });

export const loadCards = () =>
  reach("adapters", async () => {
    cards.set((await api.get("adapters")).adapters);
    for (const card of cards.value) tint(card.id); // in the list's order, whichever view comes first
    await loadSummaries();
  });

export const loadServed = () =>
  reach("metrics", async () => served.set(byLabel(parse(await api.text("metrics")), "adapter_generation_tokens_total", "adapter")));

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
