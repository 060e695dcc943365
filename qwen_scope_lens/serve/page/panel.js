// A panel: texts with a colour on every token, what the colour means, and the features that fire: of the
// token that is chosen, else of the whole text. Used for a text, a reply and both sides of a comparison.

import { addEdit, featureButton } from "/names.js";
import { labels, listen, set, short, state } from "/state.js";

const MOST_LISTED = 12;
const panels = new Set();

// The colour of a feature means the same in all panels of one scale. The first token and those of extreme
// norm do not count: next to them nothing else would have a colour.
export class Scale {
  constructor() {
    this.panels = [];
  }

  strongest(address) {
    let most = 0, outlier = 0;
    for (const { reading } of this.panels.flatMap((panel) => panel.parts))
      (reading?.track(address) || []).forEach((value, i) => {
        if (reading.pieces[i].note) outlier = Math.max(outlier, value);
        else most = Math.max(most, value);
      });
    return most || outlier || 1;
  }
}

export class Panel {
  // A text's tail is what is written but not read yet. `names`: of the texts, for screen readers. `empty`: what stands there before anything was read.
  constructor(names, { scale = new Scale(), empty = "", most = MOST_LISTED, open = true } = {}) {
    this.scale = scale;
    this.parts = names.map((name) => ({ name, reading: null, drawn: 0, strip: this.#strip(name),
      tail: QSL.make("em", { class: "tail" }), differs: new Set(), instead: [] }));
    this.caption = QSL.make("p", { class: "note-line caption" }, empty);
    this.list = QSL.make("ol", { class: "features" });
    this.heading = QSL.make("summary", {}, "");
    this.firing = QSL.make("details", { class: "firing" }, this.heading, this.list);
    this.firing.open = open;
    this.token = null; // {part, index}
    this.most = most; // features of the whole text
    scale.panels.push(this);
    panels.add(this);
  }

  get elements() {
    return [...this.parts.map((part) => part.strip), this.caption, this.firing];
  }

  get reading() {
    return this.parts.at(-1).reading;
  }

  show(readings) {
    this.parts.forEach((part, i) => {
      part.tail.textContent = "";
      Object.assign(part, { reading: readings[i], drawn: 0, differs: new Set(), instead: [] });
      part.strip.replaceChildren(part.tail);
    });
    this.token = null;
    this.grow();
  }

  // Nothing is known of the present text: colours and lists go at once.
  clear(says) {
    this.show(this.parts.map(() => null));
    this.caption.replaceChildren(says);
  }

  // Draw the pieces that were added to the readings, and unless there are more to come at once, the list.
  grow(fill = true) {
    for (const part of this.parts) {
      const pieces = part.reading?.pieces || [], { strip } = part;
      const atEnd = strip.scrollTop + strip.clientHeight > strip.scrollHeight - 8;
      if (part.drawn && pieces.length >= part.drawn) part.strip.children[--part.drawn].remove(); // it may have grown
      for (; part.drawn < pieces.length; part.drawn += 1) part.tail.before(this.#token(pieces[part.drawn], part.drawn));
      strip.hidden = !pieces.length && !part.tail.textContent;
      if (atEnd && part === this.parts.at(-1)) strip.scrollTop = strip.scrollHeight;
    }
    this.paint();
    if (fill) this.fill();
  }

  mark(part, differs) {
    part.differs = differs;
    [...part.strip.children].forEach((token, i) => token.classList.toggle("differs", differs.has(i)));
  }

  #strip(name) {
    const strip = QSL.make("div", { class: "passage strip", role: "group", dir: "auto", "aria-label": `${name}: tokens; arrow keys move, Enter lists what fires` });
    const at = (event) => [...strip.children].indexOf(event.target.closest(".strip > span"));
    const part = () => this.parts.find((one) => one.strip === strip);
    strip.addEventListener("click", (event) => at(event) >= 0 && this.choose(part(), at(event)));
    for (const event of ["pointerover", "focusin"]) strip.addEventListener(event, (what) => at(what) >= 0 && this.#say(part(), at(what)));
    strip.addEventListener("keydown", (event) => {
      const i = at(event), last = part().drawn - 1;
      const step = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: last }[event.key];
      if (i < 0) return;
      if (event.key === "Enter" || event.key === " ") this.choose(part(), i);
      else if (event.key === "Escape" && this.token) this.choose(this.token.part, this.token.index);
      else if (step >= 0 && step <= last) this.#reach(strip, step);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    return strip;
  }

  #reach(strip, i) {
    for (const token of strip.querySelectorAll("[tabindex='0']")) token.setAttribute("tabindex", "-1");
    strip.children[i].setAttribute("tabindex", "0");
    strip.children[i].focus();
  }

  #token(piece, i) {
    const inside = piece.text === "" ? [QSL.make("span", { class: "mark byte", title: "a part of a character" }, "…")] : QSL.text(piece.text);
    if (piece.text.includes("\n") && !piece.special) inside.push("\n");
    const kind = piece.special ? "special" : null;
    return QSL.make("span", { role: "button", class: kind, tabindex: i ? "-1" : "0" }, inside);
  }

  // What a pointer or a screen reader learns of a token; made when it is asked for.
  #say(part, i) {
    const element = part.strip.children[i], piece = part.reading?.pieces[i];
    if (!piece) return;
    const address = state.hover || state.feature;
    const track = address && part.reading.track(address);
    const says = [track ? `${short(address)}: ${QSL.value(track[i])}` : "", piece.note,
      part.differs.has(i) ? "differs from the other reply" : ""].filter(Boolean).join("; ");
    element.title = says;
    element.setAttribute("aria-label", `${piece.text.trim() || "white space"}; ${says || "token"}`);
  }

  // Choose a token, or let it go again.
  choose(part, index) {
    const same = this.token && this.token.part === part && this.token.index === index;
    this.token?.part.strip.children[this.token.index]?.removeAttribute("aria-pressed");
    this.token = same ? null : { part, index };
    if (this.token) {
      part.strip.children[index].setAttribute("aria-pressed", "true");
      this.firing.open = true;
    }
    this.#reach(part.strip, index);
    this.paint();
    this.fill();
  }

  // Colour the tokens by the feature that is pointed at, else by the chosen one.
  paint() {
    const address = state.hover || state.feature;
    const strongest = address ? this.scale.strongest(address) : 1;
    for (const part of this.parts) {
      const track = (address && part.reading?.track(address)) || null;
      [...part.strip.children].forEach((token, i) => {
        QSL.heat(token, track ? track[i] : 0, strongest);
        token.classList.toggle("chosen", this.token?.part === part && this.token.index === i);
      });
    }
    if (this.reading) this.caption.replaceChildren(...this.#explain(address));
  }

  #explain(address) {
    if (!address) return ["Choose a feature to colour the text by it."];
    const parts = this.parts.filter((part) => part.reading?.pieces.length);
    if (!parts.length) return [];
    const tracks = parts.map((part) => part.reading.track(address));
    const label = labels.get(address);
    const name = [QSL.make("b", {}, short(address)), label ? [" ", QSL.make("bdi", {}, label)] : ""].flat();
    if (!tracks.at(-1)) {
      const layers = [...parts.at(-1).reading.layers].join(", ");
      return [...name, layers ? ` was not computed here (read in layer ${layers}): no colour.` : " was not computed here: no colour."];
    }
    const pieces = parts.flatMap((part, i) => (tracks[i] ? part.reading.pieces : []));
    const all = tracks.filter(Boolean).flat();
    const fires = all.filter((value) => value > 0).length;
    if (!fires) return [...name, " fires on none of these tokens."];
    const rank = (i) => all[i] * (pieces[i].note ? 1e-9 : 1); // an outlier is named only where there is nothing else
    const peak = all.reduce((best, _, i) => (rank(i) > rank(best) ? i : best), 0);
    return [...name, ` fires on ${fires} of ${all.length} tokens, most on `, QSL.token(pieces[peak].text),
      ` (${QSL.value(all[peak])}).`];
  }

  // The features of the chosen token, else of the whole text.
  fill() {
    const chosen = this.token;
    const rows = !this.reading ? [] : chosen ? chosen.part.reading.on(chosen.index).slice(0, MOST_LISTED)
      : this.reading.strongest(this.most);
    const about = chosen && chosen.part.reading.pieces[chosen.index];
    this.heading.replaceChildren(...(about ? ["On ", QSL.token(about.text), about.note ? ` (${about.note})` : ""] : rows.length ? ["Strongest features"] : []));
    this.firing.hidden = !rows.length && !about;
    // A button that goes is never left by the pointer: what it coloured would stay.
    if (state.hover && this.list.querySelector(".feature-button:hover, .feature-button:focus")) set({ hover: null });
    const most = Math.max(1e-9, ...rows.map((row) => row[1]));
    const instead = (chosen && chosen.part.instead[chosen.index]) || [];
    this.list.replaceChildren(...rows.map(([address, value]) => QSL.make("li", {},
      featureButton(address), QSL.make("span", { class: "number" }, QSL.value(value)), QSL.meter(value / most, "fire"),
      QSL.button("Steer", () => addEdit.with(address), { class: "small", "aria-label": `Steer ${short(address)}` }))),
    ...(about && !rows.length ? [QSL.make("li", { class: "quiet" }, "No feature is known here.")] : []),
    ...(instead.length ? [QSL.make("li", { class: "instead quiet" }, "Most probable here: ", instead.map(([text, share]) =>
      [QSL.token(text), ` ${QSL.share(share, 1)} `]))] : []),
    ...(about ? [QSL.make("li", { class: "instead" }, QSL.button("Back to the whole text", () => this.choose(chosen.part, chosen.index), { class: "small" }))] : []));
  }
}

listen((changed) => {
  if (!["feature", "hover", "labels"].some((name) => changed.has(name))) return;
  for (const panel of panels) {
    if (!panel.caption.isConnected) panels.delete(panel); // an earlier chat
    else panel.paint();
    if (changed.has("labels")) panel.fill();
  }
});
