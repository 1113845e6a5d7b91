// The ways to add an adapter: drop its files, or name a folder or hub repository; each can be checked first.

import * as api from "../api.js";
import { megabytes, percent, range, short } from "../format.js";
import { Facts, Problems } from "../parts.js";
import { loadCards, say } from "../shelf.js";
import { html, useRef, useState } from "../vendor/preact.js";

const ID = "[A-Za-z0-9][A-Za-z0-9._\\-]*(/[A-Za-z0-9][A-Za-z0-9._\\-]*)?";
const ID_HELP = "Letters, digits, dot, dash, underscore; at most one slash";
const PARTS = ["adapter_config.json", "adapter_model.safetensors"];
const TEXTS = /^(added_tokens\.json|chat_template\.(jinja|json)|generation_config\.json|merges\.txt|special_tokens_map\.json|tokenizer(_config)?\.json|tokenizer\.model|vocab\.[\w.-]+)$/;
const shapesAnswers = ({ name }) => PARTS.includes(name) || TEXTS.test(name);
const rank = ({ name }) => (PARTS.includes(name) ? PARTS.indexOf(name) : PARTS.length);

export const Add = () => html`<section class="two">
  <${Upload} />
  <${Register} />
</section>`;

const IdField = ({ value, onInput }) => html`<label>Id
  <input name="id" required maxlength="128" pattern=${ID} title=${ID_HELP} value=${value} onInput=${onInput} placeholder="support-bot" autocomplete="off" spellcheck="false" />
</label>`;

function Upload() {
  const [files, setFiles] = useState([]);
  const [id, setId] = useState("");
  const [progress, setProgress] = useState(null);
  const [error, setError] = useState(null);
  const take = ({ chosen, name }) => {
    setFiles(chosen);
    setError(null);
    if (!id && name) setId(name.replace(/\.(zip|tar)$/, "").replace(/[^A-Za-z0-9._-]+/g, "-"));
  };
  const submit = async (event) => {
    event.preventDefault();
    setError(null);
    setProgress(0);
    try {
      const card = await api.upload(api.adapterPath(id, "/upload"), fieldsOf(files), setProgress);
      say(`${card.id} is registered`);
      setFiles([]);
      setId("");
      await loadCards();
    } catch (refused) {
      setError(refused);
    }
    setProgress(null);
  };
  return html`<form class="card" onSubmit=${submit} aria-label="Upload an adapter">
    <h2>Upload</h2>
    <${DropZone} files=${files} onFiles=${take} />
    <${IdField} value=${id} onInput=${(event) => setId(event.target.value)} />
    <div class="actions">
      <button type="submit" disabled=${!files.length || progress !== null}>Upload</button>
      ${progress !== null && html`<${Progress} value=${progress} />`}
    </div>
    <${Problems} error=${error} />
  </form>`;
}

const Progress = ({ value }) => html`<label class="progress">${value < 1 ? `${Math.round(value * 100)} % sent` : "Checking …"}
  <progress value=${value < 1 ? value : undefined} max="1"></progress>
</label>`;

/** Field name → file: the adapter's files under their own names, an archive as `file`. */
function fieldsOf(files) {
  return files.map((file) => [shapesAnswers(file) ? file.name : "file", file]);
}

function DropZone({ files, onFiles }) {
  const [over, setOver] = useState(false);
  const input = useRef(null);
  const drop = async (event) => {
    event.preventDefault();
    setOver(false);
    onFiles(await dropped(event.dataTransfer));
  };
  const choose = (event) => onFiles(useful([...event.target.files]));
  return html`<div class=${over ? "drop over" : "drop"}
    onDragOver=${(event) => (event.preventDefault(), setOver(true))} onDragLeave=${() => setOver(false)} onDrop=${drop}>
    <input id="files" class="hidden" type="file" multiple ref=${input} onChange=${choose} accept=".json,.safetensors,.jinja,.txt,.model,.zip,.tar" />
    <label for="files">${files.length ? files.map((file) => html`<span class="file">${file.name} <span class="muted">${megabytes(file.size / 1e6)}</span></span>`) : html`<strong>Drop an adapter's folder or files here</strong><span class="muted">or choose ${PARTS.join(" and ")}, or one .zip or .tar of them</span>`}</label>
  </div>`;
}

/** Of a folder's files only those that shape its answers are sent; an archive is sent as it is. */
function useful(files) {
  const own = files.some((file) => PARTS.includes(file.name)) ? files.filter(shapesAnswers) : [];
  const parts = own.filter((file, place) => own.findIndex((other) => other.name === file.name) === place).sort((one, other) => rank(one) - rank(other));
  const archive = files.find((file) => /\.(zip|tar)$/.test(file.name));
  return { chosen: parts.length ? parts : archive ? [archive] : files, name: parts.length ? folderOf(parts[0]) : archive?.name };
}

const folderOf = (file) => file.webkitRelativePath?.split("/").at(-2) ?? "";

/** What was dropped: files, or one folder's files. */
async function dropped(transfer) {
  const folder = [...transfer.items].map((item) => item.webkitGetAsEntry()).find((entry) => entry?.isDirectory);
  if (!folder) return useful([...transfer.files]);
  const reader = folder.createReader();
  const entries = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
  const files = await Promise.all(
    entries.filter((entry) => entry.isFile).map((entry) => new Promise((resolve, reject) => entry.file(resolve, reject))),
  );
  return { ...useful(files), name: folder.name };
}

function Register() {
  const [error, setError] = useState(null);
  const [checked, setChecked] = useState(null);
  const [busy, setBusy] = useState(false);
  const form = useRef(null);
  const run = async (work) => {
    if (!form.current.reportValidity()) return;
    setError(null);
    setChecked(null);
    setBusy(true);
    await work(bodyOf(form.current)).catch(setError);
    setBusy(false);
  };
  const done = async (card, how) => {
    say(`${card.id} is ${how}`);
    form.current.reset();
    await loadCards();
  };
  const check = async (body) => setChecked(await api.post("adapters/check", body));
  const register = async (body) => done(await api.post("adapters", body), "registered");
  const replace = async ({ id, ...body }) => done(await api.put(api.adapterPath(id), { id, ...body }), "replaced");
  return html`<form class="card" ref=${form} aria-label="Register an adapter" onSubmit=${(event) => (event.preventDefault(), run(register))}>
    <h2>Register</h2>
    <${IdField} />
    <label>Source <input name="source" required placeholder="folder, or hub:org/name" autocomplete="off" spellcheck="false" /></label>
    <details>
      <summary>Subfolder and revision</summary>
      <label>Subfolder <input name="subfolder" autocomplete="off" /></label>
      <label>Revision <input name="revision" autocomplete="off" /></label>
    </details>
    <label class="check"><input type="checkbox" name="pinned" /> Keep it on the device</label>
    <label class="check"><input type="checkbox" name="preload" defaultChecked /> Load it now</label>
    <div class="actions">
      <button type="submit" disabled=${busy}>Register</button>
      <button type="button" class="quiet" disabled=${busy} onClick=${() => run(check)}>Check only</button>
      ${error?.status === 409 && html`<button type="button" class="quiet" disabled=${busy} onClick=${() => run(replace)}>Replace it</button>`}
    </div>
    <${Problems} error=${error} />
    ${checked && html`<${Checked} of=${checked} />`}
  </form>`;
}

function bodyOf(form) {
  const data = new FormData(form);
  const body = { id: data.get("id"), source: data.get("source"), pinned: data.has("pinned"), preload: data.has("preload") };
  for (const name of ["subfolder", "revision"]) if (data.get(name)) body[name] = data.get(name);
  return body;
}

function Checked({ of: { ok, summary, problems } }) {
  if (!ok) return html`<${Problems} error=${{ type: "would be refused", message: `${problems.length} found, nothing registered`, problems }} />`;
  return html`<div class="checked" role="status">
    <p><strong>It would be served.</strong> Nothing was registered.</p>
    <${Facts} of=${[
      ["Rank", range(summary.rank)],
      ["Targets", summary.target_modules.join(" ")],
      ["Parameters", short(summary.parameters)],
      ["Size", `${megabytes(summary.size.megabytes)}, ${percent(summary.parameters / summary.base.parameters)} of the base's parameters`],
    ]} />
  </div>`;
}
