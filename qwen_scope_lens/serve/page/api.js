// Requests to the server. What it refuses is thrown in its own words.

const KEY = "qsl-token";
let token = "";
try {
  token = sessionStorage.getItem(KEY) || "";
} catch {
  /* storage is off: the token lasts until the page is closed */
}

export class Refusal extends Error {
  constructor(error, status = 0, wait = null) {
    super(error.message || "The server refused and did not say why.");
    Object.assign(this, { status, code: error.code || "", wait });
  }
}

export function useToken(text) {
  token = text;
  try {
    sessionStorage.setItem(KEY, text);
  } catch {
    /* as above */
  }
}

async function refusal(answer) {
  let error = { message: `The server answered ${answer.status}.` };
  try {
    error = (await answer.json()).error || error;
  } catch {
    /* not JSON: a proxy's page */
  }
  return new Refusal(error, answer.status, answer.headers.get("Retry-After"));
}

async function send(method, path, body, signal) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal({ message: "The server does not answer. Is it still running?", code: "no_answer" });
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

// The answer's JSON, or null where it has none.
export async function call(method, path, body, signal) {
  const answer = await send(method, path, body, signal);
  return answer.status === 204 ? null : answer.json();
}

// The token of the fragment (`/#token=...`) is taken out of the address.
const given = /^#(.*&)?token=/.test(location.hash) && new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  useToken(given);
  history.replaceState(null, "", location.hash.replace(/([#&])token=[^&]*&?/, "$1").replace(/[#&]$/, "") || location.pathname);
}

// What a server without a token has put into the page: what is served, and the example as it was read.
const inside = document.getElementById("begin");
const begin = inside ? JSON.parse(inside.textContent) : {};

// What is served: where it is not in the page, asked for before the other modules are there.
export const served = begin.info ? Promise.resolve(begin.info) : call("GET", "/api/info");
served.catch(() => {}); // whoever waits for it says so

// The example's reading, once, where exactly that is asked for.
export function begun(asked) {
  const { read } = begin;
  delete begin.read; // labels may change later
  return read && JSON.stringify(asked) === JSON.stringify(read.asked) ? read.answer : null;
}

export const file = async (path) => (await send("GET", path)).text();

// The chunks of an answer that comes as server-sent events.
export async function* stream(path, body, signal) {
  const answer = await send("POST", path, { ...body, stream: true }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Refusal({ message: "The connection ended before the answer did.", code: "cut_off" });
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data:")) continue; // a comment that keeps the connection open
        const data = event.slice(5).trim();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refusal(chunk.error);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the server frees the row
  }
}

export const featurePath = (address) => `/api/feature/${address.split("/").map(encodeURIComponent).join("/")}`;

// The site's data come by script elements, which send no header: a cookie opens it where there is a token.
export const openSite = () => (token ? call("POST", "/api/session") : Promise.resolve());
