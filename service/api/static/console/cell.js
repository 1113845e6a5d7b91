// A value that views can watch, and repeated fetching while a view is shown. Knows nothing of adapters.

import { useEffect, useState } from "./vendor/preact.js";

export function cell(value) {
  const watchers = new Set();
  return {
    get value() {
      return value;
    },
    set(next) {
      value = next;
      for (const watcher of watchers) watcher();
    },
    watch(watcher) {
      watchers.add(watcher);
      return () => watchers.delete(watcher);
    },
  };
}

/** The cell's value; the component is drawn again whenever it changes. */
export function useCell(watched) {
  const [, redraw] = useState(0);
  useEffect(() => watched.watch(() => redraw((n) => n + 1)), [watched]);
  return watched.value;
}

/** Calls `work` at once and then every `ms`, never twice at a time, not while the tab is hidden. */
export function useEvery(ms, work, inputs = []) {
  useEffect(() => {
    let timer = 0;
    let stopped = false;
    const turn = async () => {
      if (!document.hidden) await work();
      if (!stopped) timer = setTimeout(turn, ms);
    };
    turn();
    return () => {
      stopped = true;
      clearTimeout(timer);
    };
  }, inputs);
}
