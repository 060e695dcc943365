// The page of one feature.
"use strict";

// An example is {d: document, p: position, v: its value, t: pieces, on: [[piece, value], …], at: peak,
// c: [from, to] in the characters of its document, null where the document has no text}.
function passage(example, strongest, breaks) {
  const values = new Map(example.on);
  const text = QSL.make("p", { class: "passage", dir: "auto" });
  example.t.forEach((piece, i) => {
    const inside = QSL.text(piece);
    if (breaks && piece.includes("\n")) inside.push("\n");
    const value = values.get(i);
    if (value === undefined) return text.append(...inside);
    const token = QSL.make("span", { class: i === example.at && "peak", title: `${QSL.value(value)}` }, inside);
    text.append(QSL.heat(token, value, strongest));
  });
  return text;
}

// A stretch of text with its line breaks.
const lines = (text) =>
  text.split("\n").flatMap((line, i) => (i ? [QSL.make("span", { class: "mark" }, "↵"), "\n", ...QSL.text(line)] : QSL.text(line)));

// The button that shows the whole document around an example, and takes it back.
function wholeDocument(layer, example, text) {
  if (!layer.documents_folder || !example.c) return null;
  const around = [];
  const press = QSL.button("whole document", async () => {
    if (around.length) {
      around.splice(0).forEach((part) => part.remove());
    } else {
      press.disabled = true;
      // Characters are counted as Python counts them, so that one of two code units is one.
      const found = await QSL.loadText(layer, example.d).catch((error) => error);
      if (typeof found !== "string") {
        press.textContent = found ? found.message : "the store has no text of it";
        return;
      }
      const whole = Array.from(found);
      if (example.c[0] === 0 && whole.length <= example.c[1]) {
        press.textContent = "this is the whole document";
        return;
      }
      press.disabled = false;
      around.push(QSL.make("span", { class: "rest" }, lines(whole.slice(0, example.c[0]).join(""))),
        QSL.make("span", { class: "rest" }, lines(whole.slice(example.c[1]).join(""))));
      text.prepend(around[0]);
      text.append(around[1]);
    }
    const open = around.length > 0;
    text.classList.toggle("whole", open);
    press.textContent = open ? "only the passage" : "whole document";
    press.setAttribute("aria-expanded", String(open));
    const peak = text.querySelector(".peak");
    text.scrollTop = open ? Math.max(0, peak.offsetTop - text.clientHeight / 2) : 0;
  }, { class: "small", "aria-expanded": "false" });
  return press;
}

function examples(layer, heading, list, strongest, documents, breaks) {
  return [
    heading ? QSL.make("h3", {}, heading) : null,
    ...list.map((example) => {
      const [key, labels] = documents[example.d];
      const text = passage(example, strongest, breaks);
      return QSL.make("div", { class: "example" },
        QSL.make("div", { class: "meta" },
          QSL.make("b", {}, QSL.value(example.v)),
          QSL.make("span", { title: `token ${example.p} of document ${example.d}` }, "document ", QSL.make("bdi", {}, key)),
          labels.map(([name, value]) => QSL.make("bdi", { class: "chip", title: name }, value)),
          wholeDocument(layer, example, text)),
        text);
    }),
  ];
}

// `says` explains the card in a line: what is counted, what the bars' scale is.
function card(title, says, ...content) {
  return QSL.make("section", { class: "card" }, QSL.make("h2", {}, title), content,
    QSL.make("p", { class: "note-line" }, says));
}

function activations(page) {
  const used = page.histogram.map((count, i) => (count ? i : -1)).filter((i) => i >= 0);
  if (!used.length) return null;
  const [first, last] = [used[0], used[used.length - 1] + 1];
  const edges = QSL.site.edges.slice(first, last + 1);
  const say = (count, from, to) => `${QSL.number(count)} activations from ${QSL.value(from)} to ${QSL.value(to)}`;
  const middle = edges[Math.floor(edges.length / 2)];
  const ends = last - first > 3 ? [edges[0], middle, edges[edges.length - 1]] : [edges[0], edges[edges.length - 1]];
  return card("How strongly it fires", "Across: activation. Up: number of tokens. Both scales are logarithmic.",
    QSL.histogram(page.histogram.slice(first, last), edges, say, ends.map(QSL.value)));
}

function written(page) {
  if (!page.promoted) return null;
  const most = Math.max(...page.promoted.concat(page.suppressed).map((entry) => Math.abs(entry[1])), 1e-9);
  const column = (title, kind, list) => QSL.make("div", {}, QSL.make("h3", {}, title),
    QSL.make("div", { class: "rows" }, list.map(([token, value]) => [
      QSL.make("span", {}, QSL.token(token)),
      QSL.make("span", { class: "number" }, QSL.value(value), QSL.meter(Math.abs(value) / most, kind))])));
  return card("Effect on the next token", "Logit lens: the feature's direction read through the last norm and the"
    + " unembedding; logits over the vocabulary's mean. For early layers a hint and no more. Bars: relative to the largest.",
  QSL.make("div", { class: "two" },
    column("Promotes", "up", page.promoted), column("Suppresses", "down", page.suppressed)));
}

// A feature's label, or the tokens on which it fires most.
const whatItIs = (index, feature) =>
  index.labels[feature] ? [QSL.make("bdi", {}, index.labels[feature])]
    : index.peaks[feature].slice(0, 3).flatMap((token) => [QSL.token(index.words[token]), " "]);

function neighbours(layer, index, title, says, list, show) {
  if (!list.length) return null;
  return card(title, says, QSL.make("div", { class: "rows" }, list.map(([feature, share, extra]) => [
    QSL.make("span", {}, QSL.link(`${layer.ref}/${feature}`, {}, String(feature)), " ",
      whatItIs(index, feature)),
    QSL.make("span", { class: "number", title: extra }, show(share)),
    QSL.meter(share)])));
}

// The nearest features of other layers; what they are about comes with those layers' own data.
function otherLayers(page) {
  if (!page.across.length) return null;
  const rows = page.across.map(([ref, feature, cosine]) => {
    const about = QSL.make("span", { class: "about" });
    const one = QSL.site.layers.find((layer) => layer.ref === ref);
    if (one) QSL.load(`${one.folder}/index`).then((index) => about.append(...whatItIs(index, feature)), () => {});
    const name = `layer ${ref.slice(ref.lastIndexOf("/") + 1)}, ${feature}`;
    return [QSL.make("span", {}, one ? QSL.link(`${ref}/${feature}`, { title: `${ref}/${feature}` }, name) : name, " ", about),
      QSL.make("span", { class: "number" }, cosine.toFixed(2)), QSL.meter(cosine)];
  });
  return card("Similar features of other layers", "Cosine of the decoder directions, in the layers before and after that"
    + " were built together with this one. Bars: from 0 to 1.", QSL.make("div", { class: "rows" }, rows));
}

function breakdown(page) {
  return page.groups.map(([name, rows]) => {
    const most = Math.max(...rows.map(([, fired, all]) => fired / all), 1e-12);
    return card(`Fires on, by ${name}`, "Share of all tokens of each kind. Bars: relative to the largest.", QSL.make("div", { class: "rows" }, rows.map(([value, fired, all]) => [
      QSL.make("bdi", {}, value),
      QSL.make("span", { class: "number", title: `${QSL.number(fired)} of ${QSL.number(all)} tokens` }, QSL.share(fired, all)),
      QSL.meter(fired / all / most)])));
  });
}

function geometry(page) {
  const names = { decoder_norm: "decoder norm", encoder_norm: "encoder norm",
    cosine: "cosine of encoder and decoder", bias: "encoder bias" };
  return card("Weights in the SAE", "The encoder row reads the feature from the residual; the decoder row is the direction it adds.", QSL.make("div", { class: "rows" }, Object.entries(names).map(([key, name]) => [
    QSL.make("span", {}, name), QSL.make("span", { class: "number" }, QSL.value(page.geometry[key])), QSL.make("span")])));
}

function headline(layer, page, feature) {
  const address = `${layer.ref}/${feature}`;
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
      QSL.make("span", { class: "address", id: "address" }, address),
      QSL.make("span", { class: "steps" }, step(-1, "‹ Previous", "p"), step(1, "Next ›", "n"))),
    QSL.make("h1", { id: "label" }, `${feature} · `, label),
    source ? QSL.make("p", { class: "quiet" }, QSL.make("bdi", {}, source)) : null,
    ...QSL.takeaway(layer, page, feature),
  ];
}

// What is known of a feature, without a headline: elements from the top down.
QSL.featureBody = (layer, index, page) => {
  const fires = page.tokens > 0;
  const facts = QSL.make("section", { class: "card facts" },
    QSL.fact(`of tokens: it fires on ${QSL.number(page.tokens)}`, QSL.share(page.tokens, layer.tokens)),
    QSL.fact(`of documents: it fires in ${QSL.number(page.documents)}`, QSL.share(page.documents, layer.documents)),
    QSL.fact("strongest activation", QSL.value(page.maximum)),
    QSL.fact("typical activation: the mean where it fires", QSL.value(page.mean)));
  const texts = QSL.make("section", { class: "card", id: "examples" });
  const fill = () => {
    const box = QSL.make("input", { type: "checkbox" });
    box.checked = QSL.breaks;
    box.addEventListener("change", () => {
      QSL.breaks = box.checked;
      fill();
    });
    const groups = page.quantiles.flatMap(([quantile, list]) => examples(
      layer, `Around its ${Math.round(100 * quantile)}th percentile`, list, page.maximum, page.from, QSL.breaks));
    texts.replaceChildren(
      QSL.make("h2", {}, "Where it fires most"),
      fires ? QSL.make("p", { class: "note-line" }, "The number is the activation on the underlined token. The stronger the"
        + " colour, the larger the activation, relative to the feature's strongest.") : "",
      fires ? QSL.make("div", { class: "tools" }, QSL.make("label", {}, box, "line breaks")) : "",
      ...(fires ? examples(layer, null, page.top, page.maximum, page.from, QSL.breaks).filter(Boolean)
        : [QSL.make("p", { class: "note" }, "It fires on no token of this corpus: it is a dead feature, or its subject is not in the corpus.")]),
      ...groups.filter(Boolean));
  };
  fill();
  return [facts,
    page.tokens > 0.1 * layer.tokens
      ? QSL.make("p", { class: "note" }, "It fires on more than a tenth of all tokens: such features rarely have one meaning.") : "",
    QSL.make("div", { class: "feature" }, texts, QSL.make("div", { class: "side" },
      [activations(page), ...breakdown(page), ...QSL.featureCards(layer, index, page)]))];
};

// What the weights of a feature say, and its neighbours: a card each.
QSL.featureCards = (layer, index, page) => [written(page),
  neighbours(layer, index, "Similar features of this layer", "Cosine of the decoder directions. Bars: from 0 to 1.",
    page.nearest, (cosine) => cosine.toFixed(2)),
  otherLayers(page),
  neighbours(layer, index, "Fires together with", "Of the tokens where either fires, the share where both do"
    + " (Jaccard index). Bars: from 0 to 100%.", page.together.map(([f, share, count]) =>
    [f, share, `${QSL.number(count)} tokens in common; Jaccard index`]), (share) => QSL.share(share, 1)),
  geometry(page)].filter(Boolean);

QSL.showFeature = (main, layer, index, page, feature) => {
  main.replaceChildren(...headline(layer, page, feature).filter(Boolean), ...QSL.featureBody(layer, index, page));
  scrollTo(0, 0);
};
