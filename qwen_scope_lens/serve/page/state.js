// What the page shows, in one place: parts of the page listen to it, and the address behind the # has it.

export const DEFAULTS = {
  tab: "read", layer: null, feature: null, text: null, a: null, b: null, leave: "first",
  say: "", form: null, temperature: 0, top_p: 1, tokens: 60, seed: 0,
};
const NUMBERS = ["layer", "temperature", "top_p", "tokens", "seed"];
const LONGEST = 4000; // characters of a text in the address: servers and chats cut longer ones off

export const state = { ...DEFAULTS, edits: [], editTexts: [], hover: null, unknown: null, info: null };

const listeners = new Set();
export const listen = (listener) => listeners.add(listener);

// Change some of the state and tell everyone which names changed.
export function set(changes) {
  const names = Object.keys(changes).filter((name) => state[name] !== changes[name]);
  if (!names.length) return;
  Object.assign(state, changes);
  const changed = new Set(names);
  for (const listener of listeners) listener(changed);
}

// The texts of features' labels, and of the tokens they promote, from whatever the server has told.
export const labels = new Map();
export const promotes = new Map();

export function learn(firing) {
  if (firing.label !== undefined) labels.set(firing.feature, firing.label || "");
  if (firing.promotes?.length) promotes.set(firing.feature, firing.promotes);
}

// Whether an address is of a feature that is served.
export function isFeature(address) {
  const { group, layers, d_sae: size } = state.info;
  const [, layer, number] = address.match(/\/(\d{1,5})\/(\d{1,9})$/) || [];
  return number !== undefined && address === `${group}/${layer}/${number}` && layers.includes(Number(layer)) && Number(number) < size;
}

export const layerOf = (address) => Number(address.split("/").at(-2));
export const numberOf = (address) => Number(address.split("/").at(-1));
export const layerRef = (address) => address.slice(0, address.lastIndexOf("/"));
export const short = (address) => address.split("/").slice(-2).join("/");

// The state as an address, without what is as it was at the start.
export function toHash() {
  const query = new URLSearchParams();
  for (const [name, standard] of Object.entries(DEFAULTS)) {
    const value = state[name];
    if (value === null || value === standard || value === state.start?.[name]) continue;
    if (typeof value !== "string" || value.length <= LONGEST) query.set(name, String(value));
  }
  for (const text of state.editTexts) query.append("edit", text);
  return `#${query}`;
}

export const fitsAddress = () => ["text", "a", "b", "say"].every((name) => (state[name] || "").length <= LONGEST);

// {changes, edits, token} of an address; a feature's address alone chooses the feature.
export function fromHash(hash) {
  const inside = hash.replace(/^#/, "");
  if (inside && !inside.includes("=")) {
    let feature = inside;
    try {
      feature = decodeURIComponent(inside);
    } catch {
      /* not encoded: as it is */
    }
    return { changes: { feature }, edits: null, token: null };
  }
  const query = new URLSearchParams(inside);
  const changes = {};
  for (const name of Object.keys(DEFAULTS)) {
    if (!query.has(name)) continue;
    const value = query.get(name);
    const number = Number(value);
    if (!NUMBERS.includes(name)) changes[name] = value;
    else if (value.trim() && Number.isFinite(number)) changes[name] = number;
  }
  return { changes, edits: query.has("edit") ? query.getAll("edit") : null, token: query.get("token") };
}
