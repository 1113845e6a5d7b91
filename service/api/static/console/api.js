// Talks to the server: every request of the page goes through here. Knows keys and errors, nothing of what is drawn.

const STORED = "adapterd-key";

let prompt = async () => null;
let asking = null;
let declined = false; // a person who gives no key is not asked again at every poll, only at what they do

export const hasKey = () => sessionStorage.getItem(STORED) !== null;
export const forgetKey = () => sessionStorage.removeItem(STORED);

/** `ask(reason)` is called when the server wants a key; it resolves to the key, or to null when nobody gives one. */
export function onKeyWanted(ask) {
  prompt = ask;
}

/** Asks for a key once, however many requests want one; true when there is a new one. Kept in this tab only. */
async function askForKey(reason) {
  if (declined) return false;
  asking ??= prompt(reason).finally(() => (asking = null));
  const key = await asking;
  declined = !key;
  if (key) sessionStorage.setItem(STORED, key);
  return Boolean(key);
}

/** Lets the next request that needs a key ask for it again. */
export const askAgain = () => (declined = false);

/** What the server refused, in either dialect's envelope. */
export class ApiError extends Error {
  constructor(status, body) {
    const told = body?.error?.message ? body.error : { message: body?.error, code: body?.error_type };
    super(told.message ?? `The server answered ${status}.`);
    this.status = status;
    this.type = told.code ?? told.type ?? "";
    this.details = body?.details ?? {};
    this.problems = this.details.problems ?? [];
  }
}

const authorization = () => (hasKey() ? { authorization: `Bearer ${sessionStorage.getItem(STORED)}` } : {});

const wrongKey = () => (hasKey() ? "The server did not take this key." : "This server asks for a key.");

/** The response, whatever its kind. Paths are relative, so the page works behind a prefix. Raises ApiError. */
export async function send(method, path, { json, accept = "application/json", signal } = {}) {
  if (method !== "GET") askAgain();
  const headers = { accept, ...authorization() };
  if (json !== undefined) headers["content-type"] = "application/json";
  const sent = headers.authorization;
  const response = await fetch(path, { method, headers, signal, cache: "no-store", body: json && JSON.stringify(json) });
  if (response.ok) return response;
  if (response.status === 401) {
    const changed = sent !== authorization().authorization;
    if (changed || (await askForKey(wrongKey()))) return send(method, path, { json, accept, signal });
  }
  throw new ApiError(response.status, await response.json().catch(() => null));
}

export const get = async (path, options) => (await send("GET", path, options)).json();
export const text = async (path, options) => (await send("GET", path, { accept: "text/plain", ...options })).text();
export const post = async (path, json) => (await send("POST", path, { json })).json();
export const put = async (path, json) => (await send("PUT", path, { json })).json();
export const patch = async (path, json) => (await send("PATCH", path, { json })).json();
export const remove = async (path) => (await send("DELETE", path)).json();

/** `adapters/<id>`, with `rest` behind it; a slash in the id stays one. */
export const adapterPath = (id, rest = "") => `adapters/${id.split("/").map(encodeURIComponent).join("/")}${rest}`;

/** Sends files as a form whose fields are the given names; `onProgress` gets 0 to 1. Raises ApiError. */
export async function upload(path, files, onProgress) {
  askAgain();
  const answer = await new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    request.setRequestHeader("accept", "application/json");
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onerror = () => reject(new Error("The connection broke during the upload."));
    request.onload = () => resolve({ status: request.status, body: parsed(request.responseText) });
    const form = new FormData();
    for (const [name, file] of files) form.append(name, file, file.name);
    request.send(form);
  });
  if (answer.status < 300) return answer.body;
  if (answer.status === 401 && (await askForKey(wrongKey()))) return upload(path, files, onProgress);
  throw new ApiError(answer.status, answer.body);
}

function parsed(body) {
  try {
    return JSON.parse(body);
  } catch {
    return null;
  }
}

/** Server-sent events as they come: `onStart(headers)`, then yields each event's object. An error event raises ApiError. */
export async function* stream(path, json, { signal, onStart }) {
  const response = await send("POST", path, { json, accept: "text/event-stream", signal });
  onStart(response.headers);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:") || line.endsWith("[DONE]")) continue;
      const event = JSON.parse(line.slice(5));
      if (event.error) throw new ApiError(response.status, event);
      yield event;
    }
  }
}
