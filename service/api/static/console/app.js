// The frame: navigation, the view for the address, the worker's state, the theme, the key dialog, notices.

import * as api from "./api.js";
import { cell, useCell, useEvery } from "./cell.js";
import { megabytes } from "./format.js";
import { Dialog, State } from "./parts.js";
import { base, baseMegabytes, health, loadBase, loadHealth, notice, troubles } from "./shelf.js";
import { theme, toggleTheme } from "./theme.js";
import { html, render, useEffect, useRef } from "./vendor/preact.js";
import { Adapter } from "./views/adapter.js";
import { Adapters } from "./views/adapters.js";
import { Aliases } from "./views/aliases.js";
import { Compare } from "./views/compare.js";
import { Forecast } from "./views/forecast.js";
import { Live } from "./views/live.js";
import { Usage } from "./views/usage.js";

const VIEWS = { adapters: ["Adapters", Adapters], aliases: ["Aliases", Aliases], compare: ["Compare", Compare], live: ["Live", Live], forecast: ["Forecast", Forecast], usage: ["Usage", Usage] };
const NOTICE_MS = 6000;

const address = cell(location.hash);
addEventListener("hashchange", () => address.set(location.hash));

/** `#/adapters/org/name` → ["adapters", "org/name"]; of what may be written with a %, an id has only the slash. */
function route() {
  const [view, ...rest] = useCell(address).replace(/^#\//, "").split("/");
  return [view in VIEWS ? view : "adapters", rest.join("/").replace(/%2f/gi, "/")];
}

function App() {
  const [view, id] = route();
  const [title, View] = id && view === "adapters" ? [id, Adapter] : VIEWS[view];
  const main = useRef(null);
  const first = useRef(true);
  useEffect(() => {
    document.title = `${title} · adapterd`;
    if (!first.current) main.current.focus();
    scrollTo(0, 0);
    first.current = false;
  }, [title]);
  return html`
    <a class="skip" href="#main" onClick=${(event) => (event.preventDefault(), main.current.focus())}>Skip to the content</a>
    <${Header} view=${view} />
    <${Lost} />
    <main id="main" tabindex="-1" ref=${main} key=${title}><${View} id=${id} /></main>
    <${Notice} />
    <${KeyDialog} />
  `;
}

function Header({ view }) {
  return html`<header>
    <a class="brand" href="#/adapters"><img src="console/icon.svg" alt="" width="24" height="24" />adapterd</a>
    <nav aria-label="Views">
      ${Object.entries(VIEWS).map(
        ([name, [title]]) => html`<a href=${`#/${name}`} aria-current=${name === view ? "page" : undefined}>${title}</a>`,
      )}
    </nav>
    <div class="header-end"><${Served} /><${KeyButton} /><${ThemeButton} /></div>
  </header>`;
}

/** The base in one line, and the state of the worker behind it. */
function Served() {
  const { state } = useCell(health);
  const found = useCell(base);
  useEvery(2000, async () => {
    await loadHealth();
    if (health.value.state === "ready" && !base.value) await loadBase();
  });
  return html`<span class="served">
    ${found && html`<span class="served-base">${found.id} · ${found.quantization === "none" ? found.dtype : found.quantization} · ${megabytes(baseMegabytes(found))}</span>`}
    ${state && html`<${State} value=${state} />`}
  </span>`;
}

function ThemeButton() {
  const dark = useCell(theme) === "dark";
  return html`<button type="button" class="quiet" aria-pressed=${dark} aria-label="Dark theme" title="Dark theme" onClick=${toggleTheme}>
    ${dark ? "☾" : "☀"}
  </button>`;
}

const key = cell(api.hasKey() ? "held" : ""); // or "declined"

function KeyButton() {
  const state = useCell(key);
  const forget = () => {
    api.forgetKey();
    location.reload();
  };
  if (state === "declined") return html`<button type="button" class="quiet" onClick=${api.askAgain}>Give a key</button>`;
  return state === "held" && html`<button type="button" class="quiet" title="Forget the key and ask again" onClick=${forget}>Forget key</button>`;
}

const wanted = cell(null); // {reason, give} while a key is asked for
api.onKeyWanted((reason) => new Promise((give) => wanted.set({ reason, give })));

function KeyDialog() {
  const asked = useCell(wanted);
  if (!asked) return null;
  const answer = (given) => {
    if (!wanted.value) return;
    wanted.set(null);
    asked.give(given);
    key.set(given ? "held" : "declined");
  };
  const submit = (event) => {
    event.preventDefault();
    answer(new FormData(event.target).get("key").trim());
  };
  return html`<${Dialog} title="Key" onClose=${() => answer(null)}>
    <form onSubmit=${submit}>
      <p>${asked.reason} It stays in this tab and is forgotten when the tab closes.</p>
      <label>Key <input name="key" type="password" autocomplete="off" required /></label>
      <div class="actions">
        <button type="submit">Use this key</button>
        <button type="button" class="quiet" onClick=${() => answer(null)}>Cancel</button>
      </div>
    </form>
  <//>`;
}

function Lost() {
  const [trouble] = useCell(troubles).values();
  const reason = useCell(health).reason || trouble;
  return html`<div role="status" class="lost-place">${reason && html`<p class="lost">${reason}</p>`}</div>`;
}

function Notice() {
  const said = useCell(notice);
  useEffect(() => {
    const timer = setTimeout(() => notice.set(null), NOTICE_MS);
    return () => clearTimeout(timer);
  }, [said]);
  return html`<div role="status" class="notice-place">${said && html`<p class=${said.bad ? "notice bad" : "notice"}>${said.text}</p>`}</div>`;
}

render(html`<${App} />`, document.body);
