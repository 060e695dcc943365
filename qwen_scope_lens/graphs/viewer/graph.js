// A feature graph: layers upwards, tokens across. All that is shown is made from text nodes, so
// nothing that a text or a label says can run. The view is kept in the address, behind the #.
"use strict";

const G = JSON.parse(document.getElementById("graph").textContent);
const $ = (id) => document.getElementById(id);
const STEP = 15, GAP = 26, MARGIN = 66, ROW = 30;
const into = G.nodes.map(() => []), outOf = G.nodes.map(() => []);
G.edges.forEach(([source, target, weight]) => {
  into[target].push([source, weight]);
  outOf[source].push([target, weight]);
});
const byStrength = (a, b) => Math.abs(b[1]) - Math.abs(a[1]);
[...into, ...outOf].forEach((list) => list.sort(byStrength));
const number = new Map(G.nodes.map((node, i) => [node.name, i]));

const make = (tag, attributes, ...children) => {
  const svg = ["svg", "g", "path", "circle", "rect", "line", "text", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  Object.entries(attributes || {}).forEach(([name, value]) => {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  });
  element.append(...children.filter((child) => child !== null));
  return element;
};
const value = (x) => (x === null || x === undefined ? "–" : Math.abs(x) >= 100 ? x.toFixed(0) : Number(x).toPrecision(3));
const token = (node) => (node.position === null ? "every token" : `“${G.tokens[node.position]}”`);
const title = (node) => {
  if (node.kind === "target") return G.target;
  if (node.kind === "embedding") return `embedding of ${token(node)}`;
  if (node.kind === "feature") return `${node.layer}/${node.number}${node.label ? ` ${node.label}` : ""} on ${token(node)}`;
  return `${node.kind} of layer ${node.layer}, ${token(node)}`;
};

// --- the address: #node=NAME&edges=N&groups=NAME:node,node|NAME:node ------------------------------

let state = { node: null, edges: 150, groups: new Map() };

function read() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const edges = Number.parseInt(parts.get("edges") ?? "150", 10);
  const groups = new Map();
  (parts.get("groups") || "").split("|").forEach((part) => {
    const at = part.lastIndexOf(":");
    const members = part.slice(at + 1).split(",").filter((name) => number.has(name));
    if (at > 0 && members.length) groups.set(part.slice(0, at), new Set(members));
  });
  state = { node: number.get(parts.get("node")) ?? null, edges: edges >= 0 ? edges : 150, groups };
}

function write() {
  const parts = new URLSearchParams();
  if (state.node !== null) parts.set("node", G.nodes[state.node].name);
  if (state.edges !== 150) parts.set("edges", state.edges);
  const groups = [...state.groups].map(([name, members]) => `${name}:${[...members].join(",")}`);
  if (groups.length) parts.set("groups", groups.join("|"));
  history.replaceState(null, "", `#${parts}`);
  draw();
}

const choose = (i) => { state.node = state.node === i ? null : i; write(); };

// --- the picture ----------------------------------------------------------------------------------

const rows = [...new Set(G.nodes.map((node) => node.layer))].sort((a, b) => b - a);
const column = (node) => (node.position === null ? -1 : node.position);
const cells = new Map();
G.nodes.forEach((node, i) => {
  const key = `${node.layer} ${column(node)}`;
  cells.set(key, [...(cells.get(key) || []), i]);
});
const columns = [...new Set(G.nodes.map(column))].sort((a, b) => a - b);
const PER_LINE = 6;
const place = [];
let width = MARGIN, height = 12;
const leftOf = new Map(), topOf = new Map();
columns.forEach((at) => {
  const most = Math.max(...rows.map((layer) => (cells.get(`${layer} ${at}`) || []).length));
  leftOf.set(at, width);
  width += Math.max(Math.min(most, PER_LINE) * STEP, 34) + GAP;
});
rows.forEach((layer) => {
  const lines = Math.max(...columns.map((at) => Math.ceil((cells.get(`${layer} ${at}`) || []).length / PER_LINE)));
  topOf.set(layer, height);
  height += lines * STEP + ROW;
});
cells.forEach((members, key) => {
  const [layer, at] = key.split(" ").map(Number);
  members.sort((a, b) => G.nodes[b].influence - G.nodes[a].influence);
  members.forEach((i, n) => {
    place[i] = [leftOf.get(at) + STEP / 2 + (n % PER_LINE) * STEP, topOf.get(layer) + STEP / 2 + Math.floor(n / PER_LINE) * STEP];
  });
});
const strongest = G.edges.map((edge, i) => [i, edge[3]]).sort(byStrength).map(([i]) => i);
const largest = Math.max(1e-12, ...G.edges.map((edge) => edge[3]));

function edgesShown() {
  if (state.node === null) return strongest.slice(0, state.edges);
  const mine = strongest.filter((i) => G.edges[i][0] === state.node || G.edges[i][1] === state.node);
  return mine.slice(0, Math.max(20, state.edges));
}

function draw() {
  const grouped = new Set([...state.groups.values()].flatMap((members) => [...members]));
  const near = new Set(state.node === null ? [] : [state.node, ...into[state.node].map((e) => e[0]), ...outOf[state.node].map((e) => e[0])]);
  const picture = make("svg", { width, height: height + 26, role: "img", "aria-label": "feature graph" });
  rows.forEach((layer) => {
    const y = topOf.get(layer);
    const name = layer === -1 ? "tokens" : layer === G.n_layers ? "target" : `layer ${layer}`;
    picture.append(make("text", { x: 4, y: y + 11 }, name), make("line", { class: "row", x1: MARGIN, x2: width, y1: y - ROW / 2, y2: y - ROW / 2 }));
  });
  columns.forEach((at) => {
    const text = at === -1 ? "bias" : G.tokens[at].replace(/\n/g, "↵");
    picture.append(make("text", { class: "token", x: leftOf.get(at), y: height + 14 }, text.length > 14 ? `${text.slice(0, 13)}…` : text));
  });
  const scale = state.node === null ? largest : Math.max(1e-12, ...[...into[state.node], ...outOf[state.node]].map((e) => Math.abs(e[1])));
  edgesShown().forEach((i) => {
    const [source, target, weight, influence] = G.edges[i];
    const [x1, y1] = place[source], [x2, y2] = place[target], middle = (y1 + y2) / 2;
    const share = (state.node === null ? influence : Math.abs(weight)) / scale;
    picture.append(make("path", { class: weight < 0 ? "minus" : "plus", d: `M${x1} ${y1}C${x1} ${middle} ${x2} ${middle} ${x2} ${y2}`,
      "stroke-width": (0.4 + 5 * share).toFixed(2), "stroke-opacity": (0.15 + 0.7 * Math.sqrt(share)).toFixed(2) }));
  });
  G.nodes.forEach((node, i) => {
    const [cx, cy] = place[i];
    const kind = `node ${node.kind}${i === state.node ? " chosen" : grouped.has(node.name) ? " grouped" : ""}${near.size && !near.has(i) ? " dim" : ""}`;
    const r = (2.5 + 4.2 * Math.sqrt(Math.min(1, node.influence / 0.15))).toFixed(1);
    const dot = make("circle", { class: kind, cx, cy, r, tabindex: 0, "data-node": node.name }, make("title", {}, `${title(node)}\ninfluence ${value(node.influence)}`));
    dot.addEventListener("click", () => choose(i));
    dot.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(i); });
    picture.append(dot);
  });
  $("board").replaceChildren(picture);
  $("edges").value = state.edges;
  $("side").replaceChildren(...(state.node === null ? overview() : facts(state.node)), ...groupList());
}

// --- beside it ------------------------------------------------------------------------------------

function table(list, head) {
  const body = list.slice(0, 25).map(([i, weight]) => {
    const row = make("tr", { class: "go", tabindex: 0 }, make("td", { dir: "auto" }, title(G.nodes[i])),
      make("td", { class: `number ${weight < 0 ? "minus" : "plus"}` }, value(weight)));
    row.addEventListener("click", () => choose(i));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(i); });
    return row;
  });
  const more = list.length > 25 ? make("p", { class: "quiet" }, `and ${list.length - 25} weaker ones`) : null;
  return [make("h2", {}, head), make("table", {}, ...body), more].filter(Boolean);
}

function overview() {
  const features = G.nodes.map((node, i) => [i, node.influence]).filter(([i]) => G.nodes[i].kind === "feature").sort(byStrength);
  return [...G.said.map((line) => make("p", { class: "quiet", dir: "auto" }, line)), ...table(features, "Most influential features")];
}

function facts(i) {
  const node = G.nodes[i];
  const lines = [["influence on the target", node.influence], [node.kind === "target" ? "value" : node.kind === "feature" ? "activation" : "length", node.value],
    ["sum of edges into it", node.linear], ["of that, edges not kept", node.left_out], ["edges from features", node.features], ["lost when these are removed", node.removed]];
  const out = [make("h2", {}, node.kind), make("p", { dir: "auto" }, title(node))];
  if (node.kind === "feature") {
    const address = `${G.group}/${node.layer}/${node.number}`;
    out.push(make("p", { class: "quiet" }, G.pages ? make("a", { href: `${G.pages}#${encodeURI(address)}` }, address) : address));
  }
  out.push(make("table", {}, ...lines.filter(([, x]) => x !== null && x !== undefined).map(([name, x]) =>
    make("tr", {}, make("td", {}, name), make("td", { class: "number" }, value(x))))));
  const field = make("input", { type: "text", placeholder: "name of a group", "aria-label": "name of a group", maxlength: 40 });
  const add = make("button", { type: "button", id: "group" }, "group");
  add.addEventListener("click", () => {
    const name = field.value.replace(/[|:,]/g, " ").trim();
    if (!name) return field.focus();
    state.groups.set(name, (state.groups.get(name) || new Set()).add(node.name));
    return write();
  });
  out.push(make("p", { class: "tools" }, field, add));
  return [...out, ...table(into[i], "What goes into it"), ...table(outOf[i], "Where it goes")];
}

function groupList() {
  if (!state.groups.size) return [];
  const chips = [...state.groups].map(([name, members]) => {
    const nodes = [...members].map((one) => number.get(one));
    const chip = make("span", { class: "chip", title: "click to go through its nodes", tabindex: 0 },
      `${name}: ${nodes.length}, influence ${value(nodes.reduce((sum, i) => sum + G.nodes[i].influence, 0))} `);
    chip.addEventListener("click", () => { state.node = nodes[(nodes.indexOf(state.node) + 1) % nodes.length]; write(); });
    const drop = make("button", { type: "button", title: "drop this group" }, "×");
    drop.addEventListener("click", (event) => { event.stopPropagation(); state.groups.delete(name); write(); });
    chip.append(drop);
    return chip;
  });
  return [make("h2", {}, "Groups"), make("p", {}, ...chips)];
}

$("edges").addEventListener("change", () => {
  const count = Number.parseInt($("edges").value, 10);
  state.edges = count >= 0 ? count : 150;
  write();
});
addEventListener("hashchange", () => { read(); draw(); });
read();
draw();
