// The chosen feature: what it is, its label to be edited, and its page as in the static site.

import { call, file, openSite } from "/api.js";
import { addEdit, ask, featureButton, forget, measureTypical, typicalOf } from "/names.js";
import { relabelled } from "/read.js";
import { labels, layerRef, listen, numberOf, set, short, state } from "/state.js";

const $ = (id) => document.getElementById(id);
const tokens = (title, list) => [QSL.make("h3", {}, title),
  QSL.make("div", { class: "tokens" }, list.map(([token, logit]) => QSL.token(token, { title: `logit ${QSL.value(logit)}` })))];

function labelForm(address, found) {
  const field = QSL.make("input", { id: "label-text", dir: "auto", "aria-label": `Label of ${short(address)}` });
  Object.assign(field, { value: found.label?.text || "", placeholder: "No label yet", autocomplete: "off" });
  const says = QSL.make("span", { class: "quiet", role: "status" });
  const keep = async () => {
    try {
      const label = await call("PUT", `/api/labels/${address.split("/").map(encodeURIComponent).join("/")}`, { text: field.value });
      forget(address);
      relabelled(address, label?.text || "");
      says.textContent = `${label ? "Saved" : "Deleted"}${state.info.labels_saved ? "." : ", for as long as the server runs: download the labels to keep them."}`;
    } catch (error) {
      says.replaceChildren(QSL.make("span", { class: "refused", role: "alert" }, error.message));
    }
  };
  field.addEventListener("keydown", (event) => event.key === "Enter" && keep());
  return [QSL.make("div", { class: "label-form" }, field, QSL.button("Save label", keep, { id: "label-save" })), says];
}

function showTypical() {
  const address = state.feature, value = typicalOf(address), place = $("typical");
  const failed = (error) => place.replaceChildren(QSL.make("span", { class: "refused", role: "alert" }, error.message));
  place?.replaceChildren(value === undefined ? QSL.button("measure", () => measureTypical(address).catch(failed), { class: "small" })
    : value === null ? "not known: it fires on none of the sample texts" : QSL.value(value));
}

async function show() {
  const address = state.feature;
  const card = $("chosen");
  if (!address && state.unknown) return card.replaceChildren(QSL.make("p", { class: "refused", role: "alert" },
    "There is no feature ", QSL.make("bdi", { class: "address" }, state.unknown), " here. The features are ",
    `${state.info.group}/LAYER/NUMBER.`));
  if (!address) return card.replaceChildren(QSL.make("p", { class: "quiet" }, "Choose a feature: in a list, or by a token's click."));
  card.replaceChildren(QSL.make("p", { class: "address" }, address), QSL.make("p", { class: "quiet" }, "Asking …"));
  let found;
  try {
    found = await ask(address);
  } catch (error) {
    if (state.feature === address) card.lastChild.replaceWith(QSL.make("p", { class: "refused", role: "alert" }, error.message));
    return undefined;
  }
  if (state.feature !== address) return undefined; // another one was chosen meanwhile
  const source = found.label ? [found.label.score === null || found.label.score === undefined ? null : `score ${QSL.value(found.label.score)}`,
    ...Object.entries(found.label.provenance || {}).map(([name, value]) => `${name}: ${typeof value === "string" ? value : JSON.stringify(value)}`)].filter(Boolean).join(" · ") : "";
  const taken = QSL.make("div", { id: "chosen-taken" });
  card.replaceChildren(
    QSL.make("p", { class: "address", id: "chosen-address" }, address), ...labelForm(address, found),
    source ? QSL.make("p", { class: "note-line" }, QSL.make("bdi", {}, source)) : "",
    QSL.make("p", {}, "Typical activation: ", QSL.make("span", { id: "typical" })),
    QSL.make("div", { class: "buttons" },
      QSL.button("Steer with it", () => addEdit.with(address), { id: "steer-it" }),
      QSL.button("Open its page", () => set({ tab: "feature" }), { id: "open-page" }),
      QSL.copier("Copy address", address, taken, "Copied.")),
    taken,
    ...tokens("Promotes", found.promoted), ...tokens("Suppresses", found.suppressed),
    ...(found.nearest.length ? [QSL.make("h3", {}, "Similar"), QSL.make("div", { class: "similar" },
      found.nearest.slice(0, 6).map(([feature, cosine]) => QSL.make("div", {}, featureButton(feature), QSL.make("span", { class: "number quiet" }, cosine.toFixed(2)))))] : []));
  return showTypical();
}

// Its page, drawn by the parts of the static site; without a site only what the weights say.
async function showPage() {
  const address = state.feature;
  const box = $("feature-page");
  if (!address) return box.replaceChildren(QSL.make("p", { class: "quiet" }, "Choose a feature first."));
  box.replaceChildren(QSL.make("p", { class: "quiet" }, "Loading …"));
  let parts;
  try {
    const found = await ask(address);
    parts = (await ofSite(address)) || ofWeights(address, found);
  } catch (error) {
    parts = [QSL.make("p", { class: "refused", role: "alert" }, error.message)];
  }
  if (state.feature !== address) return undefined;
  const label = labels.get(address);
  return box.replaceChildren(QSL.make("p", { class: "address", id: "address" }, address),
    QSL.make("h1", { id: "label" }, `${numberOf(address)} · `, label ? QSL.make("bdi", {}, label) : QSL.make("span", { class: "quiet" }, "No label yet")),
    ...parts);
}

let opened = null;
async function ofSite(address) {
  // The toy model's site is made while the server answers already.
  state.info.site ||= (await call("GET", "/api/info")).site;
  if (!state.info.site) return null;
  opened ||= openSite().then(() => QSL.load("site"));
  QSL.base = state.info.site.slice(0, state.info.site.lastIndexOf("/") + 1);
  opened.catch(() => (opened = null));
  QSL.site = await opened;
  const layer = QSL.site.layers.find((one) => one.ref === layerRef(address));
  if (!layer || numberOf(address) >= layer.d_sae) return null;
  const index = await QSL.load(`${layer.folder}/index`);
  const page = await QSL.loadFeature(layer, numberOf(address));
  const now = { ...index.labels };
  for (const [one, text] of labels) if (layerRef(one) === layer.ref && text) now[numberOf(one)] = text;
  const link = QSL.make("a", { id: "site-link" }, "The same page in the site");
  link.href = `${state.info.site}#${encodeURI(address)}`;
  Object.assign(link, { target: "_blank", rel: "noopener" });
  return [QSL.make("p", { class: "quiet" }, link), ...QSL.featureBody(layer, { ...index, labels: now }, page)];
}

function ofWeights(address, found) {
  const layer = { ref: layerRef(address) };
  const nearest = found.nearest.map(([feature, cosine]) => [numberOf(feature), cosine]);
  const index = { labels: Object.fromEntries(found.nearest.map(([feature, , label]) => [numberOf(feature), label])),
    peaks: Object.fromEntries(nearest.map(([feature]) => [feature, []])), words: [] };
  return [QSL.make("p", { class: "note" }, "The server has no site of this layer, so its examples and statistics are not known: start it with ",
    QSL.make("code", {}, "--site"), ", a folder that ", QSL.make("code", {}, "qsl dash build"), " wrote."),
  QSL.make("div", { class: "weights" }, QSL.featureCards(layer, index, { ...found, nearest, across: [], together: [] }))];
}

export function startChosen() {
  $("labels-export").addEventListener("click", async () => {
    QSL.save("labels.jsonl", "application/jsonl", await file("/api/labels?format=jsonl"));
  });
  listen((changed) => {
    if (changed.has("feature") || changed.has("unknown")) show();
    if (changed.has("typicals")) showTypical();
    if ((changed.has("feature") || changed.has("tab") || changed.has("labels")) && state.tab === "feature") showPage();
  });
  show();
  if (state.tab === "feature") showPage();
}
