// Elements and text. Everything shown is made here from text nodes: no string ever becomes markup,
// so nothing that a corpus or a label says can run.
"use strict";

const QSL = (globalThis.QSL = {});

const PLAIN = ["class", "id", "title", "type", "dir", "role", "tabindex", "for", "colspan", "scope"];

// make("td", {class: "number", title: "…"}, "text", element, …)
QSL.make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (!PLAIN.includes(name) && !name.startsWith("aria-") && !name.startsWith("data-"))
      throw new Error(`attribute ${name} is not made from data`);
    element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
};

QSL.button = (text, action, attributes = {}) => {
  const element = QSL.make("button", { type: "button", ...attributes }, text);
  element.addEventListener("click", action);
  return element;
};

// A link inside the site: addresses only, behind the #.
QSL.link = (address, attributes, ...children) => {
  const element = QSL.make("a", attributes, ...children);
  element.href = "#" + encodeURI(address);
  return element;
};

// Characters that cannot be seen, or that would turn the direction of what follows. The joiners
// U+200C and U+200D stay: Persian and emoji need them.
const UNSEEN = /(<0x[0-9A-F]{2}>|[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb])/u;
const MARKS = { "\n": "↵", "\r": "␍", "\t": "→" };

// The text as nodes, what cannot be seen as a mark.
QSL.text = (text) =>
  text.split(UNSEEN).filter((part) => part !== "").map((part) => {
    if (part in MARKS) return QSL.make("span", { class: "mark" }, MARKS[part]);
    if (/^<0x[0-9A-F]{2}>$/.test(part))
      return QSL.make("span", { class: "mark byte", title: "a byte of a character" }, part.slice(3, 5));
    if (UNSEEN.test(part)) {
      const code = "U+" + part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      return QSL.make("span", { class: "mark" }, code);
    }
    return document.createTextNode(part);
  });

// One token alone, with the spaces at its ends made visible.
QSL.token = (text, attributes = {}) => {
  const [, before, inside, after] = text.match(/^( *)([^]*?)( *)$/u);
  const spaces = (run) => (run ? QSL.make("span", { class: "mark" }, "·".repeat(run.length)) : null);
  return QSL.make("bdi", { class: "token", ...attributes }, spaces(before), QSL.text(inside), spaces(after));
};

// A number with what it is.
QSL.fact = (text, value) => QSL.make("div", { class: "fact" }, QSL.make("b", {}, value), QSL.make("span", {}, text));

QSL.number = (value) => Number(value).toLocaleString("en");

QSL.share = (part, whole) => {
  if (!whole || !part) return "0%";
  const percent = (100 * part) / whole;
  if (percent >= 1) return percent.toFixed(percent >= 10 ? 0 : 1) + "%";
  return percent.toFixed(Math.min(8, 1 - Math.floor(Math.log10(percent)))) + "%"; // two digits
};

QSL.value = (value) => {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 100 ? value.toFixed(0) : size >= 0.01 ? Number(value).toPrecision(3) : Number(value).toExponential(1);
};

// Light or dark: the reader's choice on this machine, else the system's.
QSL.theme = () => {
  const { dataset } = document.documentElement;
  const dark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  dataset.theme = dark ? "light" : "dark";
  try {
    localStorage.setItem("qsl-theme", dataset.theme);
  } catch {
    /* storage is off: the choice lasts until the page is closed */
  }
};

QSL.themeAsChosen = () => {
  try {
    const chosen = localStorage.getItem("qsl-theme");
    if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
  } catch {
    /* storage is off */
  }
};
