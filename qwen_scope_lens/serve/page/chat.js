// Talk to the model: every turn is answered twice, without and with the plan, side by side. Both replies
// are asked for at once with the same seed; what differs is marked.

import { call, stream } from "/api.js";
import { Panel, Scale } from "/panel.js";
import { Reading, differing } from "/reading.js";
import { layerOf, listen, set, state } from "/state.js";

const $ = (id) => document.getElementById(id);
const TOP = 50; // features per token: what the server gives at most
const ALTERNATIVES = 5;
const CALM = 500; // milliseconds between two lists of a reply that grows
const MOST_MARKED = 600; // tokens up to which differences are marked while a reply still grows
const FORMS = { chat: "chat", think: "chat, thinking", text: "plain text" };
const turns = []; // {text, form, sides: {plain, steered}}
let planIsThere = null;
let running = null; // the AbortController of the turn that is being answered

export const busy = () => running !== null;

// The messages before a turn as one side has seen them: where it has no reply, the other side's.
function history(name, before) {
  return turns.slice(0, before).filter((turn) => turn.form !== "text").flatMap((turn) => {
    const side = turn.sides[name] || turn.sides.plain;
    return [{ role: "user", content: turn.text }, ...(side.said ? [{ role: "assistant", content: side.said }] : [])];
  });
}

function body(turn, name, place) {
  const watched = [...new Set([state.feature, ...turn.edits.map((edit) => edit.ref)].filter(Boolean))];
  const asked = {
    model: state.info.model, temperature: state.temperature, top_p: state.top_p, seed: state.seed, max_tokens: state.tokens,
    plan: name === "steered" ? { edits: turn.edits } : null,
  };
  const { engine, reads } = state.info;
  if (reads) Object.assign(asked, { explain: { top: Math.min(TOP, state.info.k), layers: [state.layer] },
    monitor: watched.filter((ref) => state.info.layers.includes(layerOf(ref))).slice(0, state.info.limits.monitor) });
  if (turn.form === "text") return ["/v1/completions", { ...asked, prompt: turn.text, ...(engine.logprobs && { logprobs: ALTERNATIVES }) }];
  return ["/v1/chat/completions", { ...asked, messages: [...history(name, place), { role: "user", content: turn.text }],
    enable_thinking: turn.form === "think", ...(engine.logprobs && { logprobs: true, top_logprobs: ALTERNATIVES }) }];
}

// The most probable tokens at each place, from either form of logprobs: [[[text, share], ...], ...].
function alternatives(choice) {
  const chat = choice.logprobs?.content?.map((one) => one.top_logprobs.map((other) => [other.token, Math.exp(other.logprob)]));
  return chat || choice.logprobs?.top_logprobs?.map((one) => Object.entries(one || {}).map(([text, logprob]) => [text, Math.exp(logprob)])) || [];
}

class Side {
  constructor(name, scale) {
    const title = name === "plain" ? "Unsteered" : "Steered";
    this.name = name;
    this.status = QSL.make("span", { class: "quiet" });
    this.panel = new Panel([`${title}, prompt`, `${title}, reply`], { scale, most: 6, open: innerWidth > 700 });
    this.report = QSL.make("div", { class: "note-line report" });
    const [prompt, reply, ...rest] = this.panel.elements;
    prompt.classList.add("prompt");
    this.element = QSL.make("section", { class: `card reply ${name}`, "aria-label": title },
      QSL.make("h3", {}, title, " ", this.status), prompt, reply, this.report, rest);
  }

  async ask(path, asked, former, signal, grown) {
    const mine = (this.run = {}); // a run that was stopped for a newer one says nothing more
    const [prompt, reply] = [new Reading(TOP, state.info.k), new Reading(TOP, state.info.k)];
    Object.assign(this, { said: "", ids: null, failed: false, drawn: false, instead: [], finish: null });
    this.element.style.minHeight = `${this.element.offsetHeight}px`; // so that nothing jumps while it is answered again
    this.panel.clear("");
    this.report.replaceChildren();
    this.status.textContent = "waiting …";
    const ids = [];
    let filled = 0;
    const draw = () => {
      this.drawn = false;
      if (this.run !== mine) return;
      const fill = Boolean(this.finish) || performance.now() - filled > CALM;
      if (fill) filled = performance.now();
      this.panel.parts[1].instead = reply.pieces.map((piece) => this.instead[piece.start] || []);
      // A token's activations come one step after its text: what has none yet stands there without colour.
      const known = reply.text;
      this.panel.parts[1].tail.textContent = this.said.startsWith(known) ? this.said.slice(known.length) : "";
      this.panel.grow(fill);
      const count = this.ids?.length ?? this.instead.length; // an engine without logprobs tells it at last
      this.status.textContent = this.finish ? `${count} tokens, ${this.finish}` : count ? `${count} of ${asked.max_tokens} tokens` : "writing …";
      grown();
    };
    try {
      for await (const chunk of stream(path, asked, signal)) {
        if (this.run !== mine) return;
        const first = chunk.qsl?.prompt;
        if (first) {
          let from = 0; // what the former turn ended with is shown there
          this.prompt = first.length;
          while (from < former.length && first[from] && former[from] === first[from].id) from += 1;
          for (const record of first) {
            ids.push(record.id);
            if (record.index >= from) prompt.add(record);
          }
          this.from = from;
          this.panel.show([prompt, reply]);
        }
        for (const choice of chunk.choices) {
          this.said += choice.delta?.content ?? choice.text ?? "";
          this.instead.push(...alternatives(choice));
          for (const record of choice.qsl?.tokens || []) reply.add(record);
          if (choice.finish_reason) this.finish = choice.finish_reason === "length" ? "cut off at the limit" : "ended";
          if (choice.qsl?.token_ids) {
            this.ids = choice.qsl.token_ids;
            this.seen = [...ids, ...this.ids];
            this.tell(choice.qsl);
          }
        }
        if (!this.drawn) {
          this.drawn = true;
          requestAnimationFrame(draw);
        }
      }
    } catch (error) {
      if (this.run !== mine) return;
      this.failed = true;
      this.finish = signal.aborted ? "stopped" : "refused";
      if (!signal.aborted) this.report.replaceChildren(QSL.make("p", { class: "refused", role: "alert" },
        error.wait ? `${error.message} Try again in ${error.wait} s.` : error.message));
    }
    draw();
    this.element.style.minHeight = "";
    $("chat-says").textContent = `${this.name === "plain" ? "Unsteered" : "Steered"}: ${this.status.textContent}`;
  }

  // Read the finished reply, as its plan made it, in another layer.
  async read(layer, edits, signal) {
    const found = await call("POST", "/api/read", { token_ids: this.seen, prompt_tokens: this.prompt, layers: [layer], top: 1, top_tokens: TOP,
      plan: this.name === "steered" ? { edits } : null, monitor: state.feature && layerOf(state.feature) === layer ? [state.feature] : [] }, signal);
    const whole = Reading.ofAnswer(found, layer, TOP, state.info.k);
    this.panel.show([whole.slice(this.from, this.prompt), whole.slice(this.prompt)]);
    const [, reply] = this.panel.parts;
    reply.instead = reply.reading.pieces.map((piece) => this.instead[piece.start] || []);
    this.panel.grow();
  }

  // What the plan did, in the words of its report.
  tell(choice) {
    if (!choice.plan) return;
    this.report.append(...(choice.fired ? [] : [QSL.make("p", { class: "refused" }, "The plan never fired: its places or features did not occur.")]),
      QSL.make("ul", {}, choice.plan.map((one) => QSL.make("li", {}, QSL.make("bdi", { class: "address" }, one.edit),
        ` acted on ${one.fired} of ${one.selected} tokens`, one.fired ? `, moved the residual by ${QSL.value(one.moved)} (${QSL.share(one.share, 1)} of its length)` : ""))));
  }
}

class Turn {
  constructor(text) {
    Object.assign(this, { text, form: state.form, sides: {}, scale: new Scale() });
    this.compared = QSL.make("p", { class: "note-line compared", role: "status" });
    this.pair = QSL.make("div", { class: "pair" });
    this.element = QSL.make("article", { class: "turn" }, QSL.make("h2", {}, "You"),
      QSL.make("p", { class: "said", dir: "auto" }, text), this.compared, this.pair);
  }

  async answer(names, signal) {
    const place = turns.indexOf(this);
    this.edits = state.edits.map((edit) => ({ ...edit }));
    Object.assign(this, { made: JSON.stringify(this.edits), layer: state.layer });
    this.compared.textContent = "";
    if (!this.edits.length) delete this.sides.steered;
    const wanted = names.filter((name) => name === "plain" || this.edits.length);
    for (const name of wanted) this.sides[name] ||= new Side(name, this.scale);
    this.pair.replaceChildren(...["plain", "steered"].flatMap((name) => this.sides[name]?.element || []));
    this.scale.panels = Object.values(this.sides).map((side) => side.panel);
    const formers = turns[place - 1]?.sides || {};
    await Promise.all(wanted.map((name) => {
      const former = this.form === "text" ? [] : (formers[name] || formers.plain)?.seen || [];
      return this.sides[name].ask(...body(this, name, place), former, signal, () => this.mark());
    }));
    if (signal.aborted && running?.signal !== signal) return; // a newer run has begun
    this.mark(true);
    if (!signal.aborted) await this.judge(signal);
  }

  // Read all finished replies in the present layer: none is made anew.
  async reread(signal) {
    const { layer } = state;
    const sides = Object.values(this.sides);
    if (!state.info.reads || layer === this.layer || sides.some((side) => !side.ids || side.failed)) return;
    await Promise.all(sides.map((side) => side.read(layer, this.edits, signal)));
    this.layer = layer;
    this.mark();
    outdated();
  }

  // Mark what differs, and count it once both replies are there.
  mark(whole = false) {
    const { plain, steered } = this.sides;
    const [a, b] = [plain, steered].map((side) => side?.panel.parts[1].reading);
    if (!a || !b || (!whole && Math.max(a.pieces.length, b.pieces.length) > MOST_MARKED)) return;
    const only = differing(a, b);
    plain.panel.mark(plain.panel.parts[1], only[0]);
    steered.panel.mark(steered.panel.parts[1], only[1]);
    if (!whole) return;
    const first = Math.min(...[...only[0], ...only[1]]);
    this.compared.append(only[0].size + only[1].size ? `Underlined: ${only[0].size} tokens of the unsteered and ${only[1].size} of the`
      + ` steered reply are not in the other; the first is token ${first + 1}. ` : "Both replies are the same, token for token. ");
  }

  // Whether the steered reply is still language: the guard of qsl sweep.
  async judge(signal) {
    const { plain, steered } = this.sides;
    if (!state.info.reads || !steered?.ids?.length || !plain.ids?.length || steered.failed || plain.failed) return;
    const prompt = this.form === "text" ? { prompt: this.text }
      : { messages: [...history("plain", turns.indexOf(this)), { role: "user", content: this.text }], enable_thinking: this.form === "think" };
    try {
      const found = await call("POST", "/api/coherence", { ...prompt, plain: plain.ids, steered: steered.ids }, signal);
      this.compared.append(QSL.make("b", {}, found.coherent ? "Still language" : "Incoherent: weaken the plan"),
        ` (perplexity under the unsteered model ${found.perplexity.map(QSL.value).join(" → ")}; repeated 4-grams`
        + ` ${found.repetition.map((share) => (share === null ? "–" : QSL.share(share, 1))).join(" → ")}).`);
    } catch (error) {
      if (!signal.aborted) this.compared.append(`Whether it is still language is not known: ${error.message}`);
    }
  }
}

async function run(turn, names) {
  running?.abort();
  const mine = (running = new AbortController());
  const done = turn.answer(names, mine.signal);
  buttons();
  await done;
  if (running === mine) running = null;
  buttons();
}

function buttons() {
  $("stop").disabled = !busy();
  $("send").disabled = busy();
  $("chat-intro").hidden = turns.length > 0;
  $("again").disabled = $("new-chat").disabled = !turns.length;
  outdated();
}

async function send() {
  await planIsThere; // of the address, which the server may still be looking at
  if (busy()) return undefined;
  if (!state.say.trim()) {
    $("say").focus();
    return undefined;
  }
  const turn = new Turn(state.say);
  turns.push(turn);
  $("turns").append(turn.element);
  set({ say: "" });
  turn.element.scrollIntoView({ block: "nearest" });
  return run(turn, ["plain", "steered"]);
}

// Answer the last turn once more, with the plan, the layer and the settings of now.
const again = (names = ["plain", "steered"]) => (turns.length ? run(turns.at(-1), names) : undefined);

let rereading = new AbortController();
function layerMoved() {
  rereading.abort();
  const mine = (rereading = new AbortController());
  if (!busy()) turns.at(-1)?.reread(mine.signal).catch(() => {}); // then the line below says what is old
}

let soon = 0;
function planMoved() {
  const last = turns.at(-1);
  if (!last || !$("live").checked || JSON.stringify(state.edits) === last.made) return;
  clearTimeout(soon);
  soon = setTimeout(() => again(last.sides.plain?.failed === false ? ["steered"] : undefined), 250);
}

function showSettings() {
  $("settings-say").textContent = `Settings: ${FORMS[state.form]}, ${state.tokens} new tokens, ${state.temperature
    ? `temperature ${state.temperature}, top p ${state.top_p}, seed ${state.seed}` : "the most probable token each time"}`;
}

function outdated() {
  const last = turns.at(-1);
  const plan = last?.made !== undefined && JSON.stringify(state.edits) !== last.made;
  const layer = last?.layer !== undefined && state.layer !== last.layer;
  $("outdated").hidden = busy() || !(plan || layer);
  $("outdated").textContent = `The last reply was ${[plan && "made with another plan", layer && `read in layer ${last.layer}`].filter(Boolean).join(" and ")}`
    + ". Answer again takes the present choice.";
}

export function startChat(plan) {
  planIsThere = plan;
  const forms = state.info.has_chat ? FORMS : { text: FORMS.text };
  if (!Object.hasOwn(forms, state.form)) set({ form: Object.keys(forms)[0] });
  for (const [value, text] of Object.entries(forms)) $("form").append(new Option(text, value));
  for (const name of ["form", "temperature", "top_p", "tokens", "seed"]) {
    $(name).value = state[name];
    $(name).addEventListener("change", (event) => {
      const value = name === "form" ? event.target.value : Number(event.target.value);
      if (event.target.validity.valid && event.target.value !== "") set({ [name]: value });
      else event.target.value = state[name];
    });
  }
  $("live").checked = state.info.engine.engine !== "llama.cpp"; // there each plan starts a program
  $("say").value = state.say;
  $("say").addEventListener("input", (event) => set({ say: event.target.value }));
  $("say").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  $("send").addEventListener("click", send);
  $("stop").addEventListener("click", () => running?.abort());
  $("again").addEventListener("click", () => again());
  $("new-chat").addEventListener("click", () => {
    running?.abort();
    turns.length = 0;
    $("turns").replaceChildren();
    $("say").focus();
    buttons();
  });
  listen((changed) => {
    for (const name of ["say", "form", "temperature", "top_p", "tokens", "seed"])
      if (changed.has(name) && $(name).value !== String(state[name])) $(name).value = state[name];
    if (changed.has("edits")) planMoved();
    if (changed.has("layer")) layerMoved();
    outdated();
    showSettings();
  });
  buttons();
  showSettings();
}
