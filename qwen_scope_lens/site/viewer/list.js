// All features of a layer: the summary, and the table that is searched, sorted and walked through.
"use strict";

const PAGE = 100;

// What the list shows at the moment; kept while a feature's page is open, so that one comes back
// to the same place, and next and previous follow the list.
QSL.state = { ref: null, query: "", sort: "density", down: true, only: "alive", order: [], here: -1, shown: PAGE };

QSL.columns = {
  feature: { name: "Feature", key: (index, f) => f, first: false },
  density: { name: "Share of tokens", key: (index, f) => index.count[f], first: true },
  maximum: { name: "Strongest", key: (index, f) => index.maximum[f], first: true },
  label: { name: "Label", key: (index, f) => index.labels[f] || "\uffff", first: false },
};

function densityChart(index, tokens) {
  const low = -6, high = 0, bins = 36;
  const edges = Array.from({ length: bins + 1 }, (_, i) => low + ((high - low) * i) / bins);
  const counts = new Array(bins).fill(0);
  for (const count of index.count)
    if (count) {
      const at = Math.floor(((Math.log10(count / tokens) - low) / (high - low)) * bins);
      counts[Math.min(bins - 1, Math.max(0, at))] += 1;
    }
  const say = (n, from, to) =>
    `${QSL.number(n)} features fire on ${QSL.share(10 ** from, 1)} to ${QSL.share(10 ** to, 1)} of tokens`;
  return QSL.histogram(counts, edges, say, ["0.0001%", "0.1%", "100% of tokens"]);
}

function summary(layer, index) {
  const alive = index.count.filter((count) => count > 0).length;
  const dense = index.count.filter((count) => count > 0.1 * layer.tokens).length;
  const chart = QSL.make("section", { class: "card" },
    QSL.make("h2", {}, "Features, by how often they fire"), densityChart(index, layer.tokens),
    QSL.make("p", { class: "note-line" }, "Across: share of tokens. Up: number of features. Both scales are logarithmic."));
  const facts = QSL.make("section", { class: "card facts" },
    QSL.fact(`of ${QSL.number(layer.d_sae)} features fire`, QSL.number(alive)),
    QSL.fact("never fire here", QSL.number(layer.d_sae - alive)),
    QSL.fact("fire on over 10% of tokens", QSL.number(dense)),
    QSL.fact(`features fire per token (k = ${layer.k})`, QSL.value(layer.l0)),
    QSL.fact(`tokens of ${QSL.number(layer.documents)} documents`, QSL.number(layer.tokens)),
    ...layer.metrics.map(([name, value]) => QSL.fact(name, QSL.value(value))));
  return QSL.make("div", { class: "summary" }, facts, chart);
}

function row(layer, index, f, i, state) {
  const labelled = Object.keys(index.labels).length > 0;
  const word = (token) => QSL.token(index.words[token]);
  const address = `${layer.ref}/${f}`;
  const line = QSL.make("tr", { class: i === state.here && "here", "data-feature": f },
    QSL.make("td", { class: "id" }, QSL.link(address, {}, String(f))),
    QSL.make("td", { class: labelled ? "said" : "said none" }, QSL.make("bdi", {}, index.labels[f] || "")),
    QSL.make("td", { class: "number" }, QSL.share(index.count[f], layer.tokens),
      QSL.meter(1 + Math.log10(index.count[f] / layer.tokens) / 6)),
    QSL.make("td", { class: "number spare" }, QSL.value(index.maximum[f])),
    QSL.make("td", { class: "peaks" }, QSL.make("div", { class: "tokens" }, index.peaks[f].map(word))),
    QSL.make("td", { class: "spare" }, QSL.make("div", { class: "tokens" }, index.promoted[f].map(word))));
  line.addEventListener("click", (event) => {
    if (event.target.closest("a") || String(getSelection())) return;
    state.here = i;
    location.hash = encodeURI(address);
  });
  return line;
}

QSL.showList = (main, layer, index) => {
  const state = QSL.state;
  const body = QSL.make("tbody");
  const count = QSL.make("span", { class: "count quiet", role: "status" });
  const more = QSL.button("", () => fill(state.shown + 2 * PAGE, state.shown), { class: "more" });
  const elsewhere = QSL.make("section", { class: "card elsewhere", id: "elsewhere" });
  const nothing = QSL.make("section", { class: "card", id: "nothing" });
  const table = QSL.make("table", { class: "list" });
  const about = summary(layer, index);

  // Show the list up to a place; the rows before `from` are there already.
  function fill(upTo, from = 0) {
    state.shown = Math.min(state.order.length, Math.max(PAGE, upTo));
    const rows = state.order.slice(from, state.shown).map((f, i) => row(layer, index, f, from + i, state));
    if (from) body.append(...rows);
    else body.replaceChildren(...rows);
    more.hidden = state.shown >= state.order.length;
    more.textContent = `Show more (${QSL.number(state.order.length - state.shown)} left)`;
  }

  QSL.refresh = (keep) => {
    state.order = QSL.select(index, state);
    if (!keep) state.here = -1;
    const found = state.order.length;
    count.textContent = found === 1 ? "1 feature" : `${QSL.number(found)} features`;
    fill(keep ? state.shown : PAGE);
    head.replaceChildren(...heads());
    table.hidden = scale.hidden = !found;
    about.hidden = Boolean(state.query.trim()); // results stand where they are seen
    nothing.hidden = Boolean(found);
    nothing.replaceChildren(...(found ? [] : QSL.nothing(index, state, set)));
    QSL.searchElsewhere(elsewhere, layer).catch((error) => elsewhere.append(QSL.make("p", {}, error.message)));
  };

  function set(change) {
    Object.assign(state, change);
    only.value = state.only;
    QSL.putQuery(state.query);
    QSL.refresh();
  }

  QSL.walk = (step) => {
    state.here = Math.max(0, Math.min(state.order.length - 1, state.here + step));
    if (state.here >= state.shown) fill(state.here + PAGE);
    [...body.children].forEach((line, i) => line.classList.toggle("here", i === state.here));
    body.children[state.here]?.scrollIntoView({ block: "nearest" });
  };

  function heads() {
    const sortable = ["feature", "label", "density", "maximum"].map((key) => {
      const column = QSL.columns[key];
      const sorted = state.sort === key ? (state.down ? "descending" : "ascending") : null;
      const press = () => {
        state.down = state.sort === key ? !state.down : column.first;
        state.sort = key;
        QSL.refresh();
      };
      const kind = (key === "density" ? "number" : key === "maximum" ? "number spare" : null);
      const none = key === "label" && !Object.keys(index.labels).length;
      return QSL.make("th", { scope: "col", class: none ? "none" : kind, "aria-sort": sorted }, QSL.button(column.name, press));
    });
    return [...sortable, QSL.make("th", { scope: "col", class: "plain" }, "Tokens it fires on"),
      QSL.make("th", { scope: "col", class: "spare" }, "Tokens it promotes")];
  }
  const head = QSL.make("tr", {}, heads());
  const scale = QSL.make("p", { class: "note-line scale" }, QSL.meter(0.5),
    " The bar beside a share of tokens is logarithmic: empty at 0.0001%, half full at 0.1%, full at 100%.");

  const only = document.createElement("select");
  for (const [value, text] of [["alive", "that fire"], ["all", "all"], ["labelled", "with a label"]])
    only.append(new Option(text, value, false, state.only === value));
  only.addEventListener("change", () => {
    state.only = only.value;
    QSL.refresh();
  });

  table.append(QSL.make("thead", {}, head), body);
  main.replaceChildren(
    QSL.make("h1", {}, QSL.site.title),
    QSL.make("div", { class: "address" }, layer.ref),
    about,
    QSL.make("div", { class: "tools" }, QSL.make("label", {}, "Features", only), count),
    nothing, elsewhere, scale, table, more,
    QSL.make("p", { class: "quiet" }, layer.made));
  QSL.refresh(true);
  body.querySelector(".here")?.scrollIntoView({ block: "center" });
  if (state.here < 0) scrollTo(0, 0);
};
