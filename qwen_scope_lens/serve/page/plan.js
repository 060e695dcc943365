// The plan: a slider per feature. The server says what it means, and keeps plans by name; the browser
// reads and writes plan files, as `qsl steer --plan` takes them.

import { call } from "/api.js";
import { addEdit, featureButton, measureTypical, typicalOf } from "/names.js";
import { fitsAddress, listen, set, short, state, toHash } from "/state.js";

const $ = (id) => document.getElementById(id);
const FORMAT = "qsl-plan", VERSION = 2;
const LARGEST_FILE = 500_000;
const PATIENCE = 200; // milliseconds after a slider moved
// The ends and the step of a slider by unit; raw ones reach as far as 5 typical activations.
const SLIDER = { typical: [-5, 5, 0.1], norm: [-1, 1, 0.01], raw: [-20, 20, 0.1] };
const NO_LESS = ["set", "clamp", "floor", "cap", "scale"];

let names = [];
let checked = []; // the edits with what the server adds: typical activations, strengths in raw activations

const operation = (name) => state.info.operations.find((one) => one.name === name);
const bare = ({ text, value, ...edit }) => edit;
const planJSON = () => `${JSON.stringify({ format: FORMAT, version: VERSION, edits: checked.map(bare) }, null, 1)}\n`;

function says(text, kind = "quiet") {
  $("plan-says").replaceChildren(QSL.make("p", kind === "refused" ? { class: kind, role: "alert" } : { class: kind, role: "status" }, text));
}

// What the server says against the plan as it is now.
const objection = (text) => $("plan-refused").replaceChildren(...(text ? [QSL.make("p", { class: "refused", role: "alert" }, text)] : []));

// Ask what the plan means. A plan that contradicts itself is refused in words, and not put into the address.
let asked = 0;
async function check() {
  const mine = (asked += 1);
  const { edits } = state;
  checked = [];
  if (!edits.length) {
    objection("");
    set({ editTexts: [] });
    return showValues();
  }
  try {
    const found = await call("POST", "/api/plans/check", { plan: { edits } });
    if (mine !== asked) return undefined;
    checked = found.edits;
    objection("");
    set({ editTexts: found.edits.map((edit) => edit.text) });
  } catch (error) {
    if (mine !== asked) return undefined;
    objection(error.message);
  }
  return showValues();
}

function showValues() {
  document.querySelectorAll("#edits .means").forEach((element, i) => {
    const edit = state.edits[i], value = checked[i]?.value;
    element.textContent = value === undefined || value === null || edit?.unit === "raw" ? "" : `= ${QSL.value(value)} raw`;
  });
  for (const id of ["plan-export", "plan-save"]) $(id).disabled = !checked.length; // what was refused is not kept
}

let soon = 0;
function change(edits) {
  set({ edits });
  says("");
  asked += 1; // an answer that is under way is about another plan
  checked = [];
  showValues();
  clearTimeout(soon);
  soon = setTimeout(check, PATIENCE);
}

const replaced = (i, changes) => state.edits.map((edit, at) => (at === i ? { ...edit, ...changes } : edit));

function picker(name, options, value, changed) {
  const select = QSL.make("select", { "aria-label": name });
  for (const [option, text] of options) select.append(new Option(text, option, false, option === value));
  select.addEventListener("change", () => changed(select.value));
  return select;
}

// The operation, the unit or the place decides what else there is: the row is drawn anew.
function redraw(i, changes) {
  const edit = { ...state.edits[i], ...changes };
  const { units, takes_strength: takes, neutral } = operation(edit.op);
  if (!units.includes(edit.unit)) edit.unit = units.includes("typical") ? "typical" : units[0];
  if (!takes) delete edit.strength, delete edit.unit;
  else if (edit.strength === undefined || changes.unit || changes.op) edit.strength = edit.op === "scale" ? 2 : edit.unit === "norm" ? 0.1 : neutral === undefined ? 0 : 1;
  change(state.edits.map((one, at) => (at === i ? edit : one)));
  draw();
  document.querySelectorAll("#edits > li")[i]?.querySelector("select")?.focus();
}

function slider(edit, i) {
  const { takes_strength: takes } = operation(edit.op);
  if (!takes) return [];
  const [low, high, step] = SLIDER[edit.unit];
  const name = `Strength of ${short(edit.ref)}${edit.unit === "raw" ? "" : edit.unit === "typical" ? " in typical activations" : " as a share of the residual's norm"}`;
  const reach = edit.unit === "raw" && edit.op !== "scale" ? Math.max(high, Math.ceil(5 * (typicalOf(edit.ref) || 0))) : high;
  const range = QSL.make("input", { type: "range", "aria-label": name });
  const exact = QSL.make("input", { type: "number", "aria-label": `${name}, exactly` });
  Object.assign(range, { min: NO_LESS.includes(edit.op) ? 0 : edit.unit === "raw" ? -reach : low, max: edit.op === "scale" ? 5 : reach, step, value: edit.strength });
  Object.assign(exact, { step: "any", value: edit.strength });
  const take = (from, to) => () => {
    const strength = Number(from.value);
    if (from.value === "" || !Number.isFinite(strength)) return;
    to.value = from.value;
    change(replaced(i, { strength }));
  };
  range.addEventListener("input", take(range, exact));
  exact.addEventListener("input", take(exact, range));
  return [QSL.make("div", { class: "strength" }, range, exact)];
}

function row(edit, i) {
  const where = QSL.make("input", { "aria-label": `Where ${short(edit.ref)} acts`, dir: "ltr" });
  where.setAttribute("list", "places");
  Object.assign(where, { value: edit.where || "both", spellcheck: false, autocomplete: "off" });
  where.addEventListener("change", () => change(replaced(i, { where: where.value.trim() || "both" })));
  const { units, change: formula, silent, takes_strength: takes } = operation(edit.op);
  const ops = picker(`Operation on ${short(edit.ref)}`, state.info.operations.map((one) => [one.name, one.name]), edit.op, (op) => redraw(i, { op }));
  ops.title = `${formula}; where the feature is silent: ${silent}`;
  return QSL.make("li", {}, QSL.make("div", { class: "edit-head" }, featureButton(edit.ref),
    QSL.button("×", () => {
      change(state.edits.filter((_, at) => at !== i));
      draw();
      $("plan").focus();
    }, { class: "small", "aria-label": `Remove ${short(edit.ref)} from the plan` })),
  slider(edit, i),
  QSL.make("div", { class: "edit-how" }, ops,
    takes && units.length > 1 ? picker(`Unit of ${short(edit.ref)}`, units.map((unit) => [unit, unit]), edit.unit, (unit) => redraw(i, { unit })) : null,
    QSL.make("label", { class: "quiet" }, "where", where), QSL.make("span", { class: "means quiet" })));
}

function draw() {
  $("edits").replaceChildren(...state.edits.map(row));
  $("no-edits").hidden = state.edits.length > 0;
  $("plan-clear").disabled = !state.edits.length;
  showValues();
}

// Take edits from elsewhere (an address, a file, a saved plan): all of them or, where they are refused, none.
export async function takePlan(plan, from) {
  try {
    const found = await call("POST", "/api/plans/check", { plan });
    set({ edits: found.edits.map(bare) });
    says("");
    draw();
    return await check();
  } catch (error) {
    return says(`${from}: ${error.message}`, "refused");
  }
}

function importFile() {
  const input = QSL.make("input", { type: "file" });
  input.accept = ".json,application/json";
  input.addEventListener("change", async () => {
    const [given] = input.files;
    if (!given) return undefined;
    if (given.size > LARGEST_FILE) return says(`${given.name} is too long for a plan.`, "refused");
    let plan;
    try {
      plan = JSON.parse(await given.text());
    } catch {
      return says(`${given.name} is not JSON.`, "refused");
    }
    if (plan?.format !== FORMAT || !(plan.version >= 1 && plan.version <= VERSION))
      return says(`${given.name}: expected a plan of version 1 or 2, found ${String(plan?.format).slice(0, 40)} of version`
        + ` ${String(plan?.version).slice(0, 20)}.`, "refused");
    return takePlan(plan, given.name);
  });
  input.click();
}

async function listPlans(chosen = "") {
  const found = await call("GET", "/api/plans");
  names = found.plans;
  $("plans").replaceChildren(new Option(names.length ? "Saved plans …" : "No saved plan", ""), ...names.map((one) =>
    new Option(one.name === found.default ? `${one.name} (the server's)` : one.name, one.name, false, one.name === chosen)));
  $("plan-delete").disabled = !$("plans").value;
  return found;
}

async function kept(work, done) {
  try {
    await work();
    says(done);
  } catch (error) {
    says(error.message, "refused");
  }
}

// Add a feature to the plan at its typical activation; where that is not known, as a share of the norm.
addEdit.with = async (address) => {
  if (state.edits.some((edit) => edit.ref === address)) return says(`${short(address)} is in the plan already: move its slider.`);
  const typical = await measureTypical(address).catch(() => null); // the plan's check says why
  const strength = typical ? { strength: 2, unit: "typical" } : { strength: 0.1, unit: "norm" };
  const where = state.info.engine.engine === "llama.cpp" ? "both,first" : "both"; // a control vector leaves out no token
  change([...state.edits, { ref: address, op: "add", ...strength, where }]);
  draw();
  set({ feature: address });
  $("edits").lastElementChild.querySelector("input[type=range]").focus({ preventScroll: true });
  return undefined;
};

export async function startPlan(texts) {
  const { info } = state;
  $("places").append(...[...info.phases, ...info.think.map((one) => `generation,think=${one}`),
    ...Object.keys(info.token_classes).map((one) => `both,class=${one}`), "both,first"].map((text) => new Option(text, text)));
  $("plan-clear").addEventListener("click", () => {
    change([]);
    draw();
  });
  $("plan-export").addEventListener("click", () => QSL.save("plan.json", "application/json", planJSON()));
  $("plan-import").addEventListener("click", importFile);
  $("plan-link").addEventListener("click", async () => {
    await check();
    history.replaceState(history.state, "", toHash());
    const copier = QSL.copier("", location.href.replace(/#$/, ""), $("plan-says"), fitsAddress() ? "Copied: the address of all that is chosen here."
      : "Copied. A text that is too long for an address is not in it.");
    copier.click();
  });
  $("plans").addEventListener("change", async () => {
    const name = $("plans").value;
    $("plan-delete").disabled = !name;
    const plan = names.find((one) => one.name === name);
    if (plan) $("plan-name").value = name;
    if (plan) await takePlan({ edits: plan.edits }, name);
  });
  $("plan-save").addEventListener("click", () => {
    const name = $("plan-name").value.trim();
    if (!name) return $("plan-name").focus();
    return kept(async () => {
      await call("PUT", `/api/plans/${encodeURIComponent(name)}`, { edits: checked.map(bare) });
      await listPlans(name);
    }, `Saved as ${name}${info.plans_saved ? "." : ", for as long as the server runs."}`);
  });
  $("plan-delete").addEventListener("click", () => {
    const name = $("plans").value;
    return kept(async () => {
      await call("DELETE", `/api/plans/${encodeURIComponent(name)}`);
      await listPlans();
    }, `Deleted ${name}.`);
  });
  listen((changed) => {
    if (changed.has("labels")) draw();
  });
  draw();
  try {
    const found = await listPlans();
    const standard = found.plans.find((one) => one.name === found.default);
    if (texts) await takePlan(texts, "The plan of this address");
    else if (standard) await takePlan({ edits: standard.edits }, standard.name);
  } catch (error) {
    says(error.message, "refused");
  }
}

