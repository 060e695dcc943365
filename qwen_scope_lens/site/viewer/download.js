// What a reader takes along: the address of a feature, a plan that steers it, its page as a file.
"use strict";

// A plan for `qsl steer --plan`: the feature added once at its typical activation.
QSL.plan = (address, page) => JSON.stringify({
  format: "qsl-plan", version: 1,
  edits: [{ ref: address, op: "add", strength: page.mean, unit: "raw" }],
}, null, 1) + "\n";

// Every example of the page, with what it stands for.
function rowsOf(page) {
  const row = (kind, example) => ({
    kind,
    activation: example.v,
    document: page.from[example.d][0],
    position: example.p,
    token: example.t[example.at],
    text: example.t.join(""),
    labels: Object.fromEntries(page.from[example.d][1]),
    fires_on: example.on.map(([piece, value]) => ({ text: example.t[piece], activation: value })),
  });
  return [...page.top.map((example) => row("strongest", example)),
    ...page.quantiles.flatMap(([quantile, list]) => list.map((example) => row(`quantile ${quantile}`, example)))];
}

QSL.featureJSON = (layer, page, feature) => {
  const pairs = (list) => list && list.map(([token, logit]) => ({ token, logit }));
  return JSON.stringify({
    format: "qwen-scope-feature", version: 1,
    address: `${layer.ref}/${feature}`, model: QSL.site.model, made: layer.made, label: page.label,
    fires_on: { tokens: page.tokens, of_tokens: layer.tokens, documents: page.documents, of_documents: layer.documents },
    activation: { maximum: page.maximum, mean_where_it_fires: page.mean,
      histogram: { edges: QSL.site.edges, tokens: page.histogram } },
    by_label: Object.fromEntries(page.groups.map(([name, rows]) => [name,
      rows.map(([value, fired, tokens]) => ({ value, fired, tokens }))])),
    promoted: pairs(page.promoted), suppressed: pairs(page.suppressed),
    similar: [...page.nearest.map(([f, cosine]) => ({ address: `${layer.ref}/${f}`, cosine })),
      ...page.across.map(([ref, f, cosine]) => ({ address: `${ref}/${f}`, cosine }))],
    fires_together: page.together.map(([f, jaccard, tokens]) => ({ address: `${layer.ref}/${f}`, jaccard, tokens })),
    weights: page.geometry,
    examples: rowsOf(page),
  }, null, 1) + "\n";
};

// The examples as a table: one row each, one column per label of the documents.
QSL.featureCSV = (layer, page, feature) => {
  const rows = rowsOf(page);
  const names = [...new Set(rows.flatMap((row) => Object.keys(row.labels)))];
  const columns = ["address", "kind", "activation", "document", "position", "token", "text"];
  const cell = (value) => {
    const text = String(value ?? "");
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [[...columns, ...names], ...rows.map((row) => [`${layer.ref}/${feature}`,
    ...columns.slice(1).map((name) => row[name]), ...names.map((name) => row.labels[name])])]
    .map((line) => line.map(cell).join(",") + "\n").join("");
};

// Give the reader a file.
QSL.save = (name, type, text) => {
  const link = QSL.make("a", {});
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
};

// A button that copies; where the browser forbids it, the text is shown and selected in `box`.
QSL.copier = (name, text, box, done, attributes) => {
  const press = QSL.button(name, async () => {
    try {
      await navigator.clipboard.writeText(text);
      box.replaceChildren(QSL.make("p", { class: "quiet", "aria-live": "polite" }, done));
    } catch {
      const shown = QSL.make("pre", {}, text);
      box.replaceChildren(QSL.make("p", { class: "quiet" }, "The browser does not let this page copy. Copy it by hand:"), shown);
      getSelection().selectAllChildren(shown);
    }
  }, attributes);
  return press;
};

// The buttons of a feature's page, and the line below that says what happened.
QSL.takeaway = (layer, page, feature) => {
  const address = `${layer.ref}/${feature}`;
  const file = `${layer.folder}_${feature}`;
  const box = QSL.make("div", { id: "taken" });
  const plan = QSL.copier("Copy as plan", QSL.plan(address, page), box,
    ["Copied: the feature added at its typical activation, ", QSL.value(page.mean),
      ". Save it as plan.json, then: ", QSL.make("code", {}, 'qsl steer "your prompt" --plan plan.json')],
    { id: "copy-plan", title: "A plan for qsl steer: this feature added at its typical activation" });
  plan.disabled = !page.tokens;
  if (!page.tokens) plan.title = "It fires on no token here, so its typical activation is not known";
  return [QSL.make("div", { class: "buttons" },
    QSL.copier("Copy address", address, box, "Copied."), plan,
    QSL.button("Download JSON", () => QSL.save(`${file}.json`, "application/json", QSL.featureJSON(layer, page, feature)),
      { title: "Everything on this page" }),
    QSL.button("Download CSV", () => QSL.save(`${file}.csv`, "text/csv", QSL.featureCSV(layer, page, feature)),
      { title: "The examples, one per row" })), box];
};
