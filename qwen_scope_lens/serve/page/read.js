// Read a text, and compare two. A text that was changed is read again; until then nothing of the old
// one is shown.

import { begun, call } from "/api.js";
import { addEdit, featureButton } from "/names.js";
import { Panel, Scale } from "/panel.js";
import { Reading } from "/reading.js";
import { labels, learn, listen, set, short, state } from "/state.js";

const PATIENCE = 300; // milliseconds after a key
const TOP = 50; // features per token: what the server gives at most
const NAMED = 6; // of the text, with the tokens that they promote: as many as are listed
const COMPARED = 15; // features
const $ = (id) => document.getElementById(id);

const refused = (error) => QSL.make("span", { class: "refused", role: "alert" }, error.message);

// Work that a newer call makes void: the former one is stopped, and its answer is never used.
function latest(work) {
  let now = new AbortController();
  const run = async () => {
    now.abort();
    const mine = (now = new AbortController());
    try {
      await work(mine.signal);
    } catch (error) {
      if (!mine.signal.aborted) throw error;
    }
  };
  run.stop = () => now.abort();
  return run;
}

let panel; // of the text
const sides = []; // of the two that are compared
let choosesStrongest = false; // the next reading chooses its strongest feature

const read = latest(async (signal) => {
  const { text, layer, feature } = state;
  panel.clear(text ? "Reading …" : "Type a text above to read it.");
  if (!text) return;
  if (document.activeElement === $("text")) await new Promise((done) => setTimeout(done, PATIENCE));
  signal.throwIfAborted();
  try {
    const asked = { text, layers: [layer], top: NAMED, top_tokens: TOP, monitor: feature ? [feature] : [] };
    const answer = begun(asked) || await call("POST", "/api/read", asked, signal);
    panel.show([Reading.ofAnswer(answer, layer, TOP, state.info.k)]);
  } catch (error) {
    if (signal.aborted) throw error;
    panel.caption.replaceChildren(refused(error));
    return;
  }
  const [best] = panel.reading.strongest(1);
  if (choosesStrongest && best) set({ feature: best[0] });
  choosesStrongest = false;
  await follow();
});

// The activations of the chosen feature where a reading does not have them.
const follow = latest(async (signal) => {
  const { text, a, b, feature, layer } = state;
  for (const [one, given] of [[panel, text], [sides[0], a], [sides[1], b]]) {
    const { reading } = one;
    if (!reading || !feature || reading.track(feature)) continue;
    let answer;
    try {
      answer = await call("POST", "/api/read", { text: given, layers: [layer], top: 1, monitor: [feature] }, signal);
    } catch (error) {
      if (signal.aborted) throw error;
      return; // the caption says that it was not computed
    }
    const found = answer.monitor.find((firing) => firing.feature === feature);
    if (one.reading !== reading || !found) continue;
    learn(found);
    reading.tracks.set(feature, found.track);
    one.scale.panels.forEach((other) => other.paint());
  }
});

const LEAVE = { first: "the first token", shared_tokens: "tokens that both have", shared_prefix: "the prefix that both have" };

const compare = latest(async (signal) => {
  const { a, b, layer, leave, feature } = state;
  clearComparison("Comparing …");
  try {
    const answer = await call("POST", "/api/compare", { a, b, layers: [layer], top: COMPARED, leave_out: leave.split(",").filter(Boolean) }, signal);
    sides.forEach((side, i) => side.show([Reading.ofAnswer(answer[i ? "b" : "a"], layer, COMPARED, state.info.k)]));
    answer.features.forEach(learn);
    $("compare-says").replaceChildren(answer.features.length
      ? "Score: |rate A − rate B|. A rate is the share of the kept tokens on which the feature fires. Two texts are a first look;"
        + " qsl rank compares groups of documents, with controls." : "No feature tells these two texts apart.");
    $("compare-table").hidden = !answer.features.length;
    $("compare-table").tBodies[0].replaceChildren(...answer.features.map((row) => QSL.make("tr", {},
      QSL.make("td", {}, featureButton(row.feature)),
      ["score", "rate_a", "rate_b", "mean"].map((name) => QSL.make("td", { class: "number" }, QSL.value(row[name]))),
      QSL.make("td", {}, QSL.button("Steer", () => addEdit.with(row.feature), { class: "small", "aria-label": `Steer ${short(row.feature)}` })))));
    const compared = answer.features.map((row) => row.feature);
    if (compared.length && !compared.includes(feature)) set({ feature: compared[0] });
  } catch (error) {
    if (signal.aborted) throw error;
    $("compare-says").replaceChildren(refused(error));
  }
});

function clearComparison(says) {
  $("compare-table").hidden = true;
  $("compare-says").replaceChildren(says);
  sides.forEach((side) => side.clear(""));
}

const CHANGED = "The texts, the layer or what is left out has changed: press Compare.";

export function startReading() {
  panel = new Panel(["Text"]);
  $("read-result").append(...panel.elements);
  const scale = new Scale();
  for (const name of ["a", "b"]) {
    const side = new Panel([`Text ${name.toUpperCase()}`], { scale, most: 0 });
    $(`result-${name}`).append(...side.elements);
    sides.push(side);
    $(`text-${name}`).addEventListener("input", (event) => set({ [name]: event.target.value }));
  }
  $("leave").append(...Object.entries(LEAVE).map(([name, text]) => {
    const box = QSL.make("input", { type: "checkbox" });
    box.checked = state.leave.split(",").includes(name);
    box.addEventListener("change", () => {
      const now = new Set(state.leave.split(",").filter(Boolean));
      now[box.checked ? "add" : "delete"](name);
      set({ leave: [...now].join(",") });
    });
    return QSL.make("label", {}, box, text);
  }));
  $("text").addEventListener("input", (event) => set({ text: event.target.value }));
  $("compare-go").addEventListener("click", () => compare());
  clearComparison("");
  listen((changed) => {
    for (const [name, id] of [["text", "text"], ["a", "text-a"], ["b", "text-b"]])
      if (changed.has(name) && $(id).value !== state[name]) $(id).value = state[name];
    if (changed.has("layer") && !changed.has("feature")) choosesStrongest = true;
    if (changed.has("layer") || changed.has("text")) read();
    else if (changed.has("feature")) follow();
    if (["layer", "a", "b", "leave"].some((name) => changed.has(name))) {
      compare.stop();
      clearComparison(CHANGED);
    }
  });
  for (const [name, id] of [["text", "text"], ["a", "text-a"], ["b", "text-b"]]) $(id).value = state[name];
  choosesStrongest = !state.feature && !state.unknown;
  return read();
}

export const relabelled = (address, text) => {
  labels.set(address, text);
  set({ labels: Symbol("changed") });
};
