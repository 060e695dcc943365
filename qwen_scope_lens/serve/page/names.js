// What the server knows of features, asked once each, and the button that stands for a feature everywhere.

import { call, featurePath } from "/api.js";
import { labels, learn, listen, promotes, set, short, state } from "/state.js";

const known = new Map(); // address -> promise of what the server knows
const typical = new Map(); // address -> its typical activation, null where it never fires
const MOST_KNOWN = 400, MOST_NAMED = 64;

export const addEdit = { with: () => {} }; // the plan's, so that a list can add to it

export function ask(address) {
  if (!known.has(address)) {
    const promise = call("GET", featurePath(address)).then((found) => {
      learn({ feature: address, label: found.label?.text || "", promotes: found.promoted.map(([token]) => token) });
      found.nearest.forEach(([feature, , label]) => label && labels.set(feature, label));
      if (found.typical !== null) typical.set(address, found.typical);
      return found;
    });
    promise.catch(() => known.delete(address));
    known.set(address, promise);
    if (known.size > MOST_KNOWN) known.delete(known.keys().next().value);
  }
  return known.get(address);
}

export const forget = (address) => known.delete(address);

// {address: number or null}: undefined where it was not measured yet.
export const typicalOf = (address) => typical.get(address);

export async function measureTypical(address) {
  if (!typical.has(address)) typical.set(address, (await call("GET", `${featurePath(address)}?typical=1`)).typical);
  set({ typicals: Symbol("one more") });
  return typical.get(address);
}

// Features without a label and without known tokens are asked for together, the newest first.
const nameless = new Set();
let naming = false;
const buttonsOf = (addresses) => [...document.querySelectorAll(".feature-button")].filter((press) => addresses.has(press.dataset.feature));
async function nameAll() {
  naming = true;
  while (nameless.size) {
    const some = [...nameless].slice(-MOST_NAMED);
    some.forEach((address) => nameless.delete(address));
    const shown = new Set(buttonsOf(new Set(some)).map((press) => press.dataset.feature));
    if (!shown.size) continue;
    const found = await call("POST", "/api/promoted", { features: [...shown], top: 3 }).catch(() => ({ features: [] }));
    for (const one of found.features) learn({ ...one, promotes: one.promoted.map(([token]) => token) });
    for (const press of buttonsOf(shown)) press.querySelector(".about").replaceChildren(...about(press.dataset.feature));
  }
  naming = false;
}

const about = (address) => (labels.get(address) ? [QSL.make("bdi", {}, labels.get(address))]
  : (promotes.get(address) || []).slice(0, 3).map((token) => QSL.token(token, { title: "a token that it promotes" })));

// A button that chooses a feature; where it rests, texts are coloured by it.
export function featureButton(address, attributes = {}) {
  const press = QSL.button("", () => set({ feature: address, hover: null }), { class: "feature-button", title: address, ...attributes,
    "aria-pressed": String(state.feature === address), "data-feature": address });
  press.append(QSL.make("span", { class: "name" }, short(address)), " ", QSL.make("span", { class: "about" }, about(address)));
  for (const [event, to] of [["pointerenter", address], ["focus", address], ["pointerleave", null], ["blur", null]])
    press.addEventListener(event, () => set({ hover: to }));
  if (!labels.get(address) && !promotes.has(address)) {
    nameless.add(address);
    if (!naming) setTimeout(nameAll); // after the button is on the page
  }
  return press;
}

listen((changed) => {
  if (!changed.has("feature") && !changed.has("labels")) return;
  for (const press of document.querySelectorAll(".feature-button")) {
    press.setAttribute("aria-pressed", String(press.dataset.feature === state.feature));
    if (changed.has("labels")) press.querySelector(".about").replaceChildren(...about(press.dataset.feature));
  }
});
