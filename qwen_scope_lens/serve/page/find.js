// Find features by address or number, by words of their labels, by a token that they promote, and by a
// sentence, which is read.

import { call } from "/api.js";
import { featureButton } from "/names.js";
import { Reading } from "/reading.js";
import { labels, set, state } from "/state.js";

const $ = (id) => document.getElementById(id);
const PATIENCE = 200; // milliseconds after a key
const MOST = 20, FIRING = 10, TOP = 50;
const WHY = { address: "By number", label: "By label", token: "By token that it promotes" };

let asked = 0;

function close() {
  asked += 1;
  $("found").hidden = true;
  $("found-says").textContent = "";
  set({ hover: null });
}

function group(title, rows) {
  if (!rows.length) return [];
  const name = QSL.make("h3", {}, title);
  return [name, QSL.make("ul", { "aria-label": title }, rows.map(([feature, more]) => {
    const press = featureButton(feature);
    press.addEventListener("click", () => {
      $("search").value = "";
      close();
      $("search").blur();
    });
    return QSL.make("li", {}, press, more ? QSL.make("span", { class: "quiet" }, more) : null);
  }))];
}

async function look() {
  const mine = (asked += 1);
  const q = $("search").value.trim();
  if (!q) return close();
  await new Promise((done) => setTimeout(done, PATIENCE));
  if (mine !== asked) return undefined;
  const box = $("found");
  const query = new URLSearchParams({ q, layers: String(state.layer), limit: String(MOST) });
  const sentence = /\S\s+\S/u.test(q) || q.length > 12;
  const parts = [];
  const show = () => {
    box.hidden = false;
    box.replaceChildren(...parts);
    $("found-says").textContent = `${box.querySelectorAll(".feature-button").length} features found; arrow keys reach them`;
  };
  try {
    const [found, read] = await Promise.all([call("GET", `/api/search?${query}`),
      sentence ? call("POST", "/api/read", { text: q, layers: [state.layer], top: 1, top_tokens: TOP }) : null]);
    if (mine !== asked) return undefined;
    for (const one of found.features) if (one.label) labels.set(one.feature, one.label);
    for (const [why, title] of Object.entries(WHY)) {
      const rows = found.features.filter((one) => one.why === why);
      parts.push(...group(`${title}, layer ${state.layer}`, rows.map((one) => [one.feature, why === "token" ? [QSL.token(one.found)] : null])));
    }
    if (read) {
      const rows = Reading.ofAnswer(read, read.layers[0], TOP, state.info.k).strongest(FIRING);
      parts.push(...group(`Fires on this sentence, layer ${read.layers[0]}`, rows.map(([feature, value]) => [feature, QSL.value(value)])));
    }
    if (!parts.length) parts.push(QSL.make("p", { class: "quiet", role: "status" }, `Nothing found in layer ${state.layer}: `
      + "neither a label nor a token that a feature promotes. Type a sentence to see what fires on it."));
  } catch (error) {
    if (mine !== asked) return undefined;
    parts.push(QSL.make("p", { class: "refused", role: "alert" }, error.message));
  }
  return show();
}

export function startFind() {
  const field = $("search"), box = $("found");
  field.addEventListener("input", look);
  field.addEventListener("focus", () => field.value && box.hidden && look());
  const move = (event, by) => {
    const buttons = [...box.querySelectorAll(".feature-button")];
    const at = buttons.indexOf(document.activeElement) + by;
    if (at < 0) field.focus();
    else buttons[Math.min(at, buttons.length - 1)]?.focus();
    event.preventDefault();
  };
  document.querySelector(".find").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") move(event, 1);
    else if (event.key === "ArrowUp") move(event, -1);
    else if (event.key === "Enter" && event.target === field) box.querySelector(".feature-button")?.click();
    else if (event.key === "Escape") {
      close();
      field.blur();
    } else return;
    event.stopPropagation();
  });
  addEventListener("pointerdown", (event) => event.target.closest(".find") || box.hidden || close());
  document.querySelector(".find").addEventListener("focusout", (event) =>
    event.relatedTarget && !event.relatedTarget.closest(".find") && close());
}
