// Which page is shown: the address behind the #, the search field, the keyboard.
"use strict";

const $ = (id) => document.getElementById(id);
QSL.breaks = false;
QSL.current = null; // {layer, index, feature}

// "" | LAYER | LAYER/FEATURE, the latter two with ?q=WORDS
function parse() {
  let text = location.hash.slice(1);
  try {
    text = decodeURIComponent(text);
  } catch {
    /* not encoded: as it is */
  }
  const [path, query] = text.split("?q=");
  const layers = QSL.site.layers;
  if (!path) return { layer: layers[0], feature: null, query };
  const exact = layers.find((layer) => layer.ref === path);
  if (exact) return { layer: exact, feature: null, query };
  const owner = layers.find((layer) => path.startsWith(`${layer.ref}/`));
  const number = owner && path.slice(owner.ref.length + 1);
  if (!owner || !/^\d+$/.test(number) || Number(number) >= owner.d_sae) return { unknown: path };
  return { layer: owner, feature: Number(number), query };
}

async function show() {
  const { layer, feature, query, unknown } = parse();
  const main = $("main");
  if (unknown !== undefined) {
    main.replaceChildren(QSL.make("h1", {}, "No such feature"),
      QSL.make("p", {}, "This site has no ", QSL.make("bdi", { class: "address" }, unknown), ". It has the layers:"),
      QSL.make("ul", {}, QSL.site.layers.map((one) =>
        QSL.make("li", {}, QSL.link(one.ref, {}, one.ref), ` with features 0 to ${one.d_sae - 1}`))));
    return;
  }
  const state = QSL.state;
  if (state.ref !== layer.ref) Object.assign(state, { ref: layer.ref, here: -1, shown: 0, order: [] });
  if (query !== undefined) state.query = query;
  $("layers").value = layer.ref;
  $("search").value = state.query;
  document.title = feature === null ? `${layer.ref} · features` : `${layer.ref}/${feature}`;
  const asked = location.hash;
  const index = await QSL.load(`${layer.folder}/index`);
  if (!state.order.length) state.order = QSL.select(index, state);
  QSL.current = { layer, index, feature };
  if (feature === null) return QSL.showList(main, layer, index);
  const page = await QSL.loadFeature(layer, feature);
  if (location.hash !== asked) return undefined; // the reader has gone on meanwhile
  const place = state.order.indexOf(feature);
  if (place >= 0) state.here = place;
  QSL.showFeature(main, layer, index, page, feature);
  return undefined;
}

function failed(error) {
  $("main").replaceChildren(QSL.make("h1", {}, "This cannot be shown"), QSL.make("p", {}, String(error.message || error)));
}

const update = () => show().catch(failed);

// The feature before or after in the list's order, or by number where it is not in the list.
QSL.beside = (feature, by) => {
  const { order } = QSL.state;
  const place = order.indexOf(feature);
  if (place < 0) {
    const next = feature + by;
    return next >= 0 && next < QSL.current.layer.d_sae ? next : null;
  }
  return order[place + by] ?? null;
};

QSL.go = (by) => {
  const { layer, feature } = QSL.current;
  const next = QSL.beside(feature, by);
  if (next !== null) location.hash = encodeURI(`${layer.ref}/${next}`);
};

// The query as the field, the state and the address have it.
QSL.putQuery = (query) => {
  QSL.state.query = query;
  if ($("search").value !== query) $("search").value = query;
  const tail = query ? `?q=${encodeURIComponent(query)}` : "";
  history.replaceState(null, "", `#${encodeURI(QSL.current.layer.ref)}${tail}`);
};

function search() {
  if (!QSL.current) return undefined;
  QSL.putQuery($("search").value);
  QSL.state.shown = 0;
  const { feature } = QSL.current;
  if (feature === null) return QSL.refresh();
  QSL.current.feature = null;
  QSL.state.order = [];
  QSL.state.here = -1;
  return update();
}

function layerStep(by) {
  const { layers } = QSL.site;
  const next = layers[layers.indexOf(QSL.current.layer) + by];
  if (next) location.hash = encodeURI(next.ref);
}

const KEYS = {
  "/": ["search", () => $("search").focus()],
  j: ["next line of the list", () => QSL.current.feature === null && QSL.walk(1)],
  k: ["line before", () => QSL.current.feature === null && QSL.walk(-1)],
  Enter: ["open the feature", () => {
    const { layer, feature } = QSL.current;
    const chosen = QSL.state.order[Math.max(0, QSL.state.here)];
    if (feature === null && chosen !== undefined) location.hash = encodeURI(`${layer.ref}/${chosen}`);
  }],
  n: ["next feature", () => QSL.current.feature !== null && QSL.go(1)],
  p: ["feature before", () => QSL.current.feature !== null && QSL.go(-1)],
  Escape: ["back to the list", () => {
    if (QSL.current.feature !== null) location.hash = encodeURI(QSL.current.layer.ref);
  }],
  "]": ["next layer", () => layerStep(1)],
  "[": ["layer before", () => layerStep(-1)],
  t: ["light or dark", QSL.theme],
  "?": ["this list", () => $("keys").showModal()],
};
const SAME = { ArrowDown: "j", ArrowUp: "k", ArrowRight: "n", ArrowLeft: "p" };

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open || !QSL.current) return;
  if (event.target === $("search")) {
    if (event.key === "Escape" || event.key === "Enter" || event.key === "ArrowDown") $("search").blur();
    if (event.key === "Enter") KEYS.Enter[1]();
    return;
  }
  if (event.target.closest("select, input, textarea")) return;
  if (event.key === "Enter" && event.target.closest("a, button")) return;
  const key = SAME[event.key] || event.key;
  const used = QSL.current.feature === null ? ["n", "p"].includes(key) : ["j", "k", "Enter"].includes(key);
  if (!(key in KEYS) || (event.key in SAME && used)) return;
  event.preventDefault();
  KEYS[key][1]();
}

async function start() {
  QSL.themeAsChosen();
  QSL.site = await QSL.load("site");
  $("brand").textContent = QSL.site.model;
  for (const layer of QSL.site.layers) $("layers").append(new Option(layer.ref, layer.ref));
  $("layers").addEventListener("change", () => (location.hash = encodeURI($("layers").value)));
  $("search").addEventListener("input", search);
  $("theme").addEventListener("click", QSL.theme);
  $("help").addEventListener("click", () => $("keys").showModal());
  $("keys").append(QSL.make("h2", {}, "Keyboard"),
    QSL.make("dl", {}, Object.entries(KEYS).map(([key, [what]]) => [
      QSL.make("dt", {}, QSL.make("kbd", {}, key)), QSL.make("dd", {}, what)])),
    QSL.button("Close", () => $("keys").close()));
  addEventListener("hashchange", update);
  addEventListener("keydown", pressed);
  await show();
}

start().catch(failed);
