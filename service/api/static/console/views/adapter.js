// One adapter: what it is, where it acts in the base, and what it adds to the base's size.

import * as api from "../api.js";
import { useCell, useEvery } from "../cell.js";
import { ago, bytes, count, digest as shortDigest, megabytes, NONE, percent, range, rounded } from "../format.js";
import { Digest, Dot, Facts, Loading, Problems, State } from "../parts.js";
import { Footprint, HeatStrips } from "../pictures.js";
import { base, cards, complain, loadCards, say } from "../shelf.js";
import { html, useEffect, useState } from "../vendor/preact.js";
import { Delete, Pin } from "./adapters.js";

export function Adapter({ id }) {
  const [summary, setSummary] = useState(null);
  const [error, setError] = useState(null);
  const [leaving, setLeaving] = useState(false);
  const look = () => api.get(api.adapterPath(id, "/summary")).then(setSummary, (refused) => (setError(refused), refused.status === 404 && setSummary(null)));
  useEvery(3000, () => Promise.all([loadCards(), look()]), [id]);
  const card = useCell(cards)?.find((one) => one.id === id);
  const title = html`<nav aria-label="Breadcrumb" class="muted"><a href="#/adapters">Adapters</a> /</nav>`;
  if (!summary) return html`${title}<h1>${id}</h1>${error ? html`<${Problems} error=${error} />` : html`<${Loading} what="the summary" />`}`;
  return html`
    ${title}
    <div class="title">
      <h1><${Dot} id=${id} />${id}</h1>
      <${State} value=${summary.state} /> ${summary.digest && html`<${Digest} value=${summary.digest} />`}
      <span class="title-end">
        ${summary.state === "ready" && html`<a class="button quiet" href=${`#/compare/${id}`}>Compare</a>`}
        ${card && html`<${Pin} card=${card} /><button type="button" class="quiet danger" onClick=${() => setLeaving(true)}>Delete</button>`}
      </span>
    </div>
    ${summary.reason && html`<${Problems} error=${{ type: summary.state, message: summary.reason }} />`}
    ${summary.warnings.length > 0 && html`<ul class="warnings">${summary.warnings.map((warning) => html`<li>${warning}</li>`)}</ul>`}
    <${Versions} id=${id} />
    ${summary.digest ? html`<${Known} id=${id} summary=${summary} />` : html`<p class="muted">Source: ${summary.source}, registered ${ago(summary.registered_at)}.</p>`}
    ${leaving && card && html`<${Delete} card=${card} onClose=${() => setLeaving(false)} onDone=${() => (location.hash = "#/adapters")} />`}
  `;
}

/** What is known of an adapter that could be read. */
const Known = ({ id, summary }) => html`
  <${Overview} summary=${summary} />
  <${Size} summary=${summary} />
  ${summary.by_module.length > 0 && html`<${ByModule} rows=${summary.by_module} caption=${`Modules of ${id}`} />`}
  ${summary.by_module.length > 0 && html`<${Where} id=${id} summary=${summary} />`}
  <${Tree} id=${id} summary=${summary} />
`;

const Overview = ({ summary }) => html`<section class="card" aria-labelledby="overview">
  <h2 id="overview">Summary</h2>
  <${Facts} of=${[
    ["Rank", range(summary.rank)],
    ["Alpha", summary.alpha ?? NONE],
    ["Scaling", range(summary.scaling)],
    ["Dropout", summary.dropout],
    ["Targets", summary.target_modules.join(" ") || NONE],
    ["Layers", summary.layers],
    ["Modules", summary.modules],
    ["Parameters", `${count(summary.parameters)} (${percent(summary.parameters / summary.base.parameters)} of the base)`],
    ["File", `${bytes(summary.size.file_bytes)}, ${Object.entries(summary.size.dtypes).map(([type, n]) => `${n} × ${type}`).join(", ")}`],
    ["Arithmetic", summary.size.matches_file ? "matches the file" : `${bytes(summary.size.arithmetic_bytes)} expected`],
    ["On the device", megabytes(summary.size.device_megabytes)],
    ["Residency", `${summary.residency}${summary.pinned ? ", pinned" : ""}`],
    ["In flight", summary.in_flight],
    ["Last used", ago(summary.last_used)],
    ["Registered", ago(summary.registered_at)],
    ["Source", summary.source],
    ["Trained on", `${summary.base_model.claimed ?? "not said"}${summary.base_model.match ? "" : ", which is not the served base's name"}`],
    ["Kind", `${summary.peft_type}${summary.use_rslora ? ", rsLoRA" : ""}${summary.use_dora ? ", DoRA" : ""}; ${summary.task_type ?? "no task type"}`],
    ["PEFT", summary.peft_version],
  ]} />
</section>`;

/** What answers under the id by a digest beside the current content; shown where there is any. */
function Versions({ id }) {
  const [versions, setVersions] = useState([]);
  const look = () => api.get(api.adapterPath(id, "/versions")).then((found) => setVersions(found.versions), () => setVersions([]));
  useEvery(3000, look, [id]);
  const rollBack = ({ digest }) =>
    api.post(api.adapterPath(id, "/rollback"), { digest }).then(() => {
      say(`${id} is ${shortDigest(digest)} again`);
      return look();
    }, complain);
  if (versions.length < 2) return null;
  return html`<section class="card" aria-labelledby="versions">
    <h2 id="versions">Versions</h2>
    <div class="scroll" tabindex="0" role="region" aria-label=${`Versions of ${id}`}>
      <table>
        <thead><tr>${VERSION_COLUMNS.map((name) => html`<th scope="col">${name}</th>`)}<th scope="col"><span class="hidden">Actions</span></th></tr></thead>
        <tbody>
          ${versions.map((version, index) => html`<tr key=${version.digest}>
            <td><${Digest} value=${version.digest} /></td>
            <td>${ago(version.registered_at)}</td>
            <td>${version.residency}</td>
            <td>${version.in_flight}</td>
            <td class="row-actions">${index ? html`<button type="button" class="quiet" onClick=${() => rollBack(version)}>Roll back<span class="hidden"> to ${shortDigest(version.digest)}</span></button>` : "current"}</td>
          </tr>`)}
        </tbody>
      </table>
    </div>
  </section>`;
}

const Size = ({ summary }) => html`<section class="card" aria-labelledby="size">
  <h2 id="size">Against the base</h2>
  <${Footprint} base=${summary.footprint.base_megabytes} adapter=${summary.size.device_megabytes} rows=${summary.by_module}
    parameters=${summary.parameters} name=${summary.id} baseName=${summary.base_model.served} />
  <p class="muted">Together ${megabytes(summary.footprint.with_adapter_megabytes)} on the device. The base has ${count(summary.base.parameters)} parameters,
    would be ${megabytes(summary.base.float32_megabytes)} as float32, and is held ${summary.base.quantization === "none" ? "unquantized" : `as ${summary.base.quantization}`}.</p>
</section>`;

const VERSION_COLUMNS = ["Digest", "Registered", "Residency", "In flight"];

const COLUMNS = [
  ["Layers", (row) => row.count],
  ["In", (row) => count(row.in_features)],
  ["Out", (row) => count(row.out_features)],
  ["Rank", (row) => row.rank],
  ["Scaling", (row) => row.scaling && +row.scaling.toPrecision(4)],
  ["A", (row) => row.lora_A?.join(" × ")],
  ["B", (row) => row.lora_B?.join(" × ")],
  ["Parameters", (row) => count(row.parameters)],
  ["Size", (row) => megabytes(row.megabytes)],
];

/** One line per name, shape, rank and scaling; what no row has gets no column. */
export function ByModule({ rows, caption }) {
  const columns = COLUMNS.filter(([, of]) => rows.some((row) => of(row) !== undefined));
  return html`<section class="card" aria-label="By module">
  <h2>By module</h2>
  <div class="scroll" tabindex="0" role="region" aria-label=${caption}>
    <table>
      <thead><tr><th scope="col">Module</th>${columns.map(([name]) => html`<th scope="col" class="number">${name}</th>`)}</tr></thead>
      <tbody>
        ${rows.map((row) => html`<tr>
          <th scope="row">${row.name}</th>
          ${columns.map(([, of]) => html`<td class="number">${of(row)}</td>`)}
        </tr>`)}
      </tbody>
    </table>
  </div>
</section>`;
}

const MODES = [["norm", "norms", "Norm of the change"], ["rank", "ranks", "Rank"]];

/** Where it acts: the norm of what each layer adds to the base's, or its rank. */
function Where({ id, summary: { digest, use_dora: dora } }) {
  const [found, setFound] = useState(null);
  const [error, setError] = useState(null);
  const [[what, field], setMode] = useState(MODES[0]);
  useEffect(() => {
    setError(null);
    api.get(api.adapterPath(id, "/architecture/norms")).then(setFound, setError);
  }, [id, digest]);
  const values = new Map(found?.modules.map((module) => [module.name, module[field]]));
  const outside = found?.outside.map((one) => `${one.name} ${rounded(one[what])}`).join(", ");
  return html`<section class="card" aria-labelledby="where">
    <div class="heading">
      <h2 id="where">Where it acts</h2>
      <div class="chips" role="group" aria-label="Shown by layer">
        ${MODES.map((mode) => html`<button type="button" class="chip" aria-pressed=${mode[0] === what} onClick=${() => setMode(mode)}>${mode[2]}</button>`)}
      </div>
    </div>
    <${Problems} error=${error} />
    ${!found && !error && html`<${Loading} what="the norms" />`}
    ${values.size > 0 && html`<${HeatStrips} values=${values} what=${what} />`}
    ${outside && html`<p class="muted">Outside the layers: ${outside}.</p>`}
    ${what === "norm" && html`<p class="muted">The Frobenius norm of scaling · B · A${dora ? "; of DoRA this is the change of direction, its trained magnitudes are not in it" : ""}.</p>`}
  </section>`;
}

function Tree({ id, summary }) {
  const [tree, setTree] = useState("");
  useEffect(() => {
    api.text(api.adapterPath(id, "/architecture")).then(setTree, () => setTree(""));
  }, [id, summary.digest]);
  return tree && html`<section class="card" aria-labelledby="architecture">
    <h2 id="architecture">Architecture</h2>
    <pre tabindex="0" role="region" aria-label="Module tree with the adapter in place">${tree}</pre>
  </section>`;
}
