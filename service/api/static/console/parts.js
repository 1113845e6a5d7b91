// Small pieces that several views use: problems, dialogs, digests, bars, facts.

import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import { digest as shortDigest, percent } from "./format.js";
import { tint } from "./colours.js";

/** An error as the API gives it: the sentence, then each problem. */
export function Problems({ error }) {
  if (!error) return null;
  const listed = error.problems ?? [];
  return html`<div class="problems" role="alert">
    <p><strong>${error.type || "problem"}</strong>${error.status ? ` (${error.status})` : ""}: ${error.message}</p>
    ${listed.length > 0 && html`<ul>${listed.map((problem) => html`<li>${problem}</li>`)}</ul>`}
  </div>`;
}

/** A modal dialog; Escape and the close button call onClose. */
export function Dialog({ title, onClose, children }) {
  const ref = useRef(null);
  useEffect(() => {
    ref.current.showModal();
  }, []);
  return html`<dialog ref=${ref} aria-labelledby="dialog-title" onClose=${onClose}>
    <h2 id="dialog-title">${title}</h2>
    ${children}
  </dialog>`;
}

/** The digest's first digits; a click copies all of it. */
export function Digest({ value }) {
  const [copied, copy] = useCopy();
  if (!value) return html`<span class="muted">–</span>`;
  return html`<button type="button" class="digest" title=${`Copy ${value}`} onClick=${() => copy(value)}>
    ${copied ? "copied" : shortDigest(value)}
  </button>`;
}

/** [whether it was copied a moment ago, copy(text)] */
export function useCopy() {
  const [copied, setCopied] = useState(false);
  const copy = async (text) => {
    await navigator.clipboard.writeText(text);
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  };
  return [copied, copy];
}

/** How much `part` is of `whole`, to scale; what is too thin to see is drawn two pixels wide. */
export function Bar({ part, whole, label }) {
  const share = whole ? part / whole : 0;
  return html`<svg class="bar" role="img" aria-label=${`${percent(share)} of ${label}`} width="100%" height="6">
    <title>${percent(share)} of ${label}</title>
    <rect class="bar-whole" width="100%" height="6" rx="3" />
    <rect class="bar-part" height="6" rx="3" style=${{ width: `max(2px, ${Math.min(share, 1) * 100}%)` }} />
  </svg>`;
}

export const Dot = ({ id }) => html`<span class=${`dot ${tint(id)}`} aria-hidden="true"></span>`;

/** A list of [name, value]; names and values line up. */
export const Facts = ({ of }) => html`<dl class="facts">
  ${of.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}
</dl>`;

export const State = ({ value }) => html`<span class=${`state state-${value}`}>${value}</span>`;

export const Loading = ({ what }) => html`<p class="muted" aria-busy="true">Loading ${what} …</p>`;
