// The start of the page: what is served, the tabs, the address behind the #, the keyboard.

import { Refusal, served, useToken } from "/api.js";
import { startChat } from "/chat.js";
import { startChosen } from "/chosen.js";
import { startFind } from "/find.js";
import { startPlan, takePlan } from "/plan.js";
import { startReading } from "/read.js";
import { fromHash, isFeature, layerOf, listen, set, state, toHash } from "/state.js";

const $ = (id) => document.getElementById(id);
const TABS = ["read", "chat", "compare", "feature"];
const COMPARED = ["The package manager installs programs.", "软件包管理器安装程序。"];

function showTab() {
  for (const name of TABS) {
    const chosen = name === state.tab;
    $(`tab-${name}`).setAttribute("aria-selected", String(chosen));
    $(`tab-${name}`).tabIndex = chosen ? 0 : -1;
    $(`view-${name}`).hidden = !chosen;
  }
}

// What may not be as an address says, because the address is somebody else's text.
function allowed(changes) {
  if (!TABS.includes(changes.tab)) delete changes.tab;
  if (!state.info.layers.includes(changes.layer)) delete changes.layer;
  for (const [name, low, high] of [["temperature", 0, 2], ["top_p", 0.01, 1], ["tokens", 1, state.info.context], ["seed", 0, 2 ** 31 - 1]])
    if (name in changes && !(changes[name] >= low && changes[name] <= high)) delete changes[name];
  if (changes.feature && !isFeature(changes.feature)) Object.assign(changes, { unknown: changes.feature, feature: null });
  if (changes.feature && changes.layer === undefined && state.info.layers.includes(layerOf(changes.feature))
    && !state.feature) changes.layer = layerOf(changes.feature);
  return changes;
}

let soon = 0;
function keepAddress(changed) {
  clearTimeout(soon);
  // A tab and a feature's page are places that one goes back from; the rest replaces the address.
  const place = changed.has("tab") || (changed.has("feature") && state.tab === "feature");
  if (place) return history.pushState(null, "", toHash());
  soon = setTimeout(() => history.replaceState(null, "", toHash()), 250);
  return undefined;
}

let following = false;
async function followAddress() {
  clearTimeout(soon);
  const { changes, edits, token } = fromHash(location.hash);
  if (token) return location.reload();
  following = true;
  set(allowed({ ...(location.hash.includes("=") ? { tab: "read" } : {}), ...changes }));
  following = false;
  if (!location.hash.includes("=") && location.hash.length > 1) history.replaceState(null, "", toHash());
  if (edits && JSON.stringify(edits) !== JSON.stringify(state.editTexts)) await takePlan(edits, "The plan of this address");
  return undefined;
}

function step(by) {
  const { layers } = state.info;
  const next = layers[layers.indexOf(state.layer) + by];
  if (next !== undefined) set({ layer: next });
}

const KEYS = {
  "/": ["find a feature", () => $("search").focus()],
  1: ["read", () => set({ tab: "read" })],
  2: ["chat", () => set({ tab: "chat" })],
  3: ["compare", () => set({ tab: "compare" })],
  4: ["the chosen feature's page", () => set({ tab: "feature" })],
  "]": ["next layer", () => step(1)],
  "[": ["layer before", () => step(-1)],
  s: ["steer with the chosen feature", () => $("steer-it")?.click()],
  t: ["light or dark", QSL.theme],
  "?": ["this list", () => $("keys").showModal()],
};
const MORE = { "← →": "in a text: the token before or after", Enter: "on a token: what fires there; in the chat: send",
  Escape: "let a token or the search go" };

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  if (event.target.closest("select, textarea, input:not([type=range]):not([type=checkbox])") || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key][1]();
}

function tabKeys(event) {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!by) return;
  set({ tab: TABS[(TABS.indexOf(state.tab) + by + TABS.length) % TABS.length] });
  $(`tab-${state.tab}`).focus();
}

// Where the server wants a token and has got none, or a wrong one.
function askToken(error) {
  const field = QSL.make("input", { type: "password", id: "token", "aria-label": "Token of the server" });
  field.autocomplete = "off";
  const go = () => {
    useToken(field.value.trim());
    location.reload();
  };
  field.addEventListener("keydown", (event) => event.key === "Enter" && go());
  $("main").replaceChildren(QSL.make("section", { class: "card" }, QSL.make("h1", {}, "This server wants its token"),
    QSL.make("p", { class: "quiet" }, error.message), QSL.make("p", { class: "buttons" }, field, QSL.button("Open", go))));
  field.focus();
}

async function start() {
  QSL.themeAsChosen();
  $("theme").addEventListener("click", QSL.theme);
  const { changes, edits } = fromHash(location.hash);
  const info = await served;
  const standard = { layer: info.chosen[0] ?? info.layers[0], text: info.example, a: COMPARED[0], b: COMPARED[1],
    form: info.has_chat ? "chat" : "text" };
  set({ info, start: standard });
  set({ ...standard, ...allowed(changes) });
  document.title = `${info.model} · qwen-scope-lens`;
  $("brand").textContent = info.model;
  $("notice").textContent = info.notice || "";
  $("about").textContent = `${info.group}: ${QSL.number(info.d_sae)} features per layer, ${info.k} active per token`;
  for (const layer of info.layers) $("layers").append(new Option(`layer ${layer}`, String(layer)));
  $("layers").value = String(state.layer);
  $("layers").addEventListener("change", () => set({ layer: Number($("layers").value) }));
  for (const name of TABS) $(`tab-${name}`).addEventListener("click", () => set({ tab: name }));
  $("to-plan").addEventListener("click", () => $("plan").scrollIntoView());
  $("tabs").addEventListener("keydown", tabKeys);
  $("help").addEventListener("click", () => $("keys").showModal());
  $("keys").append(QSL.make("h2", {}, "Keyboard"), QSL.make("dl", {},
    [...Object.entries(KEYS).map(([key, [what]]) => [key, what]), ...Object.entries(MORE)].map(([key, what]) =>
      [QSL.make("dt", {}, QSL.make("kbd", {}, key)), QSL.make("dd", {}, what)])), QSL.button("Close", () => $("keys").close()));
  showTab();
  $("loading").hidden = true;
  $("page").hidden = false;
  startFind();
  const plan = startPlan(edits);
  startChat(plan);
  const reading = startReading();
  startChosen();
  listen((changed) => {
    if (changed.has("layer")) $("layers").value = String(state.layer);
    if (changed.has("tab")) showTab();
    if (!following && [...changed].some((name) => !["hover", "labels", "edits", "unknown", "typicals"].includes(name))) keepAddress(changed);
  });
  addEventListener("hashchange", followAddress);
  addEventListener("keydown", pressed);
  await Promise.all([reading, plan]);
}

start().catch((error) => {
  if (error instanceof Refusal && error.status === 401) return askToken(error);
  return $("main").replaceChildren(QSL.make("h1", {}, "This page cannot start"), QSL.make("p", { role: "alert" }, error.message));
});
