// The page of one feature.
"use strict";

// An example is {d: document, p: position, v: its value, t: pieces, on: [[piece, value], …], at: peak}.
function passage(example, strongest, breaks) {
  const values = new Map(example.on);
  const text = QSL.make("p", { class: "passage", dir: "auto" });
  example.t.forEach((piece, i) => {
    const inside = QSL.text(piece);
    if (breaks && piece.includes("\n")) inside.push("\n");
    const value = values.get(i);
    if (value === undefined) return text.append(...inside);
    const token = QSL.make("span", { class: i === example.at ? "on peak" : "on", title: `${QSL.value(value)}` }, inside);
    token.style.setProperty("--share", String(0.12 + 0.88 * Math.min(1, value / strongest)));
    text.append(token);
  });
  return text;
}

function examples(heading, list, strongest, documents, breaks) {
  return [
    heading ? QSL.make("h3", {}, heading) : null,
    ...list.map((example) => {
      const [key, labels] = documents[example.d];
      return QSL.make("div", { class: "example" },
        QSL.make("div", { class: "meta" },
          QSL.make("b", {}, QSL.value(example.v)),
          QSL.make("span", { title: `token ${example.p} of document ${example.d}` }, "document ", QSL.make("bdi", {}, key)),
          labels.map(([name, value]) => QSL.make("bdi", { class: "chip", title: name }, value))),
        passage(example, strongest, breaks));
    }),
  ];
}

function card(title, ...content) {
  return QSL.make("section", { class: "card" }, QSL.make("h2", {}, title), content);
}

function activations(page) {
  const used = page.histogram.map((count, i) => (count ? i : -1)).filter((i) => i >= 0);
  if (!used.length) return null;
  const [first, last] = [used[0], used[used.length - 1] + 1];
  const edges = QSL.site.edges.slice(first, last + 1);
  const say = (count, from, to) => `${QSL.number(count)} activations from ${QSL.value(from)} to ${QSL.value(to)}`;
  const middle = edges[Math.floor(edges.length / 2)];
  const ends = last - first > 3 ? [edges[0], middle, edges[edges.length - 1]] : [edges[0], edges[edges.length - 1]];
  return card("Activations, by size", QSL.histogram(page.histogram.slice(first, last), edges, say, ends.map(QSL.value)));
}

function written(page) {
  if (!page.promoted) return null;
  const most = Math.max(...page.promoted.concat(page.suppressed).map((entry) => Math.abs(entry[1])), 1e-9);
  const column = (title, kind, list) => QSL.make("div", {}, QSL.make("h3", {}, title),
    QSL.make("div", { class: "rows" }, list.map(([token, value]) => [
      QSL.make("span", {}, QSL.token(token)),
      QSL.make("span", { class: "number" }, QSL.value(value), QSL.meter(Math.abs(value) / most, kind))])));
  return card("Tokens it writes", QSL.make("div", { class: "two" },
    column("Promotes", "up", page.promoted), column("Suppresses", "down", page.suppressed)));
}

function neighbours(layer, index, title, list, show) {
  if (!list.length) return null;
  return card(title, QSL.make("div", { class: "rows" }, list.map(([feature, share, extra]) => [
    QSL.make("span", {}, QSL.link(`${layer.ref}/${feature}`, {}, String(feature)), " ",
      index.labels[feature] ? QSL.make("bdi", {}, index.labels[feature])
        : QSL.make("span", { class: "quiet" }, index.peaks[feature].slice(0, 3).map((token) => [QSL.token(index.words[token]), " "]))),
    QSL.make("span", { class: "number", title: extra }, show(share)),
    QSL.meter(share)])));
}

function breakdown(page) {
  return page.groups.map(([name, rows]) => {
    const most = Math.max(...rows.map(([, fired, all]) => fired / all), 1e-12);
    return card(`Fires on, by ${name}`, QSL.make("div", { class: "rows" }, rows.map(([value, fired, all]) => [
      QSL.make("bdi", {}, value),
      QSL.make("span", { class: "number", title: `${QSL.number(fired)} of ${QSL.number(all)} tokens` }, QSL.share(fired, all)),
      QSL.meter(fired / all / most)])));
  });
}

function geometry(page) {
  const names = { decoder_norm: "length of its direction", encoder_norm: "length of its reading vector",
    cosine: "cosine of the two", bias: "encoder bias" };
  return card("In the SAE", QSL.make("div", { class: "rows" }, Object.entries(names).map(([key, name]) => [
    QSL.make("span", {}, name), QSL.make("span", { class: "number" }, QSL.value(page.geometry[key])), QSL.make("span")])));
}

function headline(layer, page, feature) {
  const address = `${layer.ref}/${feature}`;
  const copied = QSL.button("Copy address", async () => {
    try {
      await navigator.clipboard.writeText(address);
      copied.textContent = "Copied";
    } catch {
      copied.textContent = "Select it by hand";
    }
  });
  const step = (by, text, title) => {
    const target = QSL.beside(feature, by);
    const press = QSL.button(text, () => QSL.go(by), { title });
    press.disabled = target === null;
    return press;
  };
  const label = page.label ? QSL.make("bdi", {}, page.label.text) : QSL.make("span", { class: "quiet" }, "No label yet");
  const source = page.label ? [page.label.score === null ? null : `score ${QSL.value(page.label.score)}`,
    ...Object.entries(page.label.provenance).map(([name, value]) => `${name}: ${typeof value === "string" ? value : JSON.stringify(value)}`)]
    .filter(Boolean).join(" · ") : "";
  return [
    QSL.make("div", { class: "title" }, QSL.link(layer.ref, {}, "‹ all features"),
      QSL.make("span", { class: "address", id: "address" }, address), copied,
      QSL.make("span", { class: "steps" }, step(-1, "‹ Previous", "p"), step(1, "Next ›", "n"))),
    QSL.make("h1", { id: "label" }, `${feature} · `, label),
    source ? QSL.make("p", { class: "quiet" }, QSL.make("bdi", {}, source)) : null,
  ];
}

QSL.showFeature = (main, layer, index, page, feature) => {
  const fires = page.tokens > 0;
  const facts = QSL.make("section", { class: "card facts" },
    fact(`of tokens (${QSL.number(page.tokens)})`, QSL.share(page.tokens, layer.tokens)),
    fact(`of documents (${QSL.number(page.documents)})`, QSL.share(page.documents, layer.documents)),
    fact("strongest activation", QSL.value(page.maximum)),
    fact("mean where it fires", QSL.value(page.mean)));
  const texts = QSL.make("section", { class: "card", id: "examples" });
  const fill = () => {
    const box = QSL.make("input", { type: "checkbox" });
    box.checked = QSL.breaks;
    box.addEventListener("change", () => {
      QSL.breaks = box.checked;
      fill();
    });
    const groups = page.quantiles.flatMap(([quantile, list]) => examples(
      `Around its ${Math.round(100 * quantile)}th percentile`, list, page.maximum, page.from, QSL.breaks));
    texts.replaceChildren(
      QSL.make("h2", {}, "Where it fires most"),
      fires ? QSL.make("div", { class: "tools" }, QSL.make("label", {}, box, "line breaks")) : "",
      ...(fires ? examples(null, page.top, page.maximum, page.from, QSL.breaks).filter(Boolean)
        : [QSL.make("p", { class: "note" }, "It fires on no token of this corpus: dead, or about something that is not in it.")]),
      ...groups.filter(Boolean));
  };
  fill();
  main.replaceChildren(
    ...headline(layer, page, feature).filter(Boolean), facts,
    page.tokens > 0.1 * layer.tokens
      ? QSL.make("p", { class: "note" }, "It fires on more than a tenth of all tokens: such features rarely have one meaning.") : "",
    QSL.make("div", { class: "feature" }, texts, QSL.make("div", { class: "side" },
      [activations(page), ...breakdown(page), written(page),
        neighbours(layer, index, "Directions nearest to its own", page.nearest, (cosine) => cosine.toFixed(2)),
        neighbours(layer, index, "Fires together with", page.together.map(([f, share, count]) =>
          [f, share, `${QSL.number(count)} tokens in common; Jaccard index`]), (share) => QSL.share(share, 1)),
        geometry(page)].filter(Boolean))));
  scrollTo(0, 0);
};
