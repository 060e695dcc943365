// What a query finds: in the layer that is shown, and in all others.
"use strict";

const NAMED_HITS = 6; // features named for each other layer
const PATIENCE = 250; // milliseconds after a key before the other layers are read

// Feature numbers that the query and the filter leave, in order.
QSL.select = (index, state) => {
  const words = state.query.toLocaleLowerCase().trim();
  const number = words.match(/(?:^|\/)(\d+)$/);
  const wanted = number && (words === number[1] || words === `${state.ref}/${number[1]}`.toLocaleLowerCase())
    ? Number(number[1]) : null;
  const hits = words ? new Set(index.words.flatMap((word, i) =>
    word.toLocaleLowerCase().trim().includes(words) ? [i] : [])) : null;
  const exact = words ? new Set(index.words.flatMap((word, i) =>
    word.toLocaleLowerCase().trim() === words ? [i] : [])) : null;
  const found = [];
  for (let f = 0; f < index.count.length; f += 1) {
    if (state.only === "alive" && !index.count[f] && f !== wanted) continue;
    if (state.only === "labelled" && !index.labels[f]) continue;
    let rank = 0;
    if (words) {
      const label = (index.labels[f] || "").toLocaleLowerCase();
      const tokens = [...index.peaks[f], ...index.promoted[f]];
      if (f === wanted) rank = 4;
      else if (label.includes(words)) rank = 3;
      else if (tokens.some((token) => exact.has(token))) rank = 2;
      else if (tokens.some((token) => hits.has(token))) rank = 1;
      else continue;
    }
    found.push([rank, QSL.columns[state.sort].key(index, f), f]);
  }
  const sign = state.down ? -1 : 1;
  found.sort((a, b) => b[0] - a[0] || (a[1] < b[1] ? -sign : a[1] > b[1] ? sign : a[2] - b[2]));
  return found.map((entry) => entry[2]);
};

// What stands in place of the list where it would be empty. `set` changes the state and searches.
QSL.nothing = (index, state, set) => {
  const kinds = { alive: "features that fire", all: "features", labelled: "features with a label" };
  const query = state.query.trim();
  const all = state.only === "all" ? 0 : QSL.select(index, { ...state, only: "all" }).length;
  return [
    QSL.make("p", {}, QSL.make("b", {}, query ? ["Nothing found in this layer for “", QSL.make("bdi", {}, query), "”",
      state.only === "all" ? "." : `, among the ${kinds[state.only]}.`] : `This layer has no ${kinds[state.only]}.`)),
    query ? QSL.make("p", { class: "quiet" }, "The search reads numbers, addresses and labels, the tokens of a"
      + " feature's strongest examples, and the tokens that it promotes. It does not read whole texts.") : null,
    QSL.make("p", { class: "buttons" },
      all ? QSL.button(`Show ${QSL.number(all)} among all features of this layer`, () => set({ only: "all" })) : null,
      query ? QSL.button("Clear the search", () => set({ query: "" })) : null),
  ].filter(Boolean);
};

let asked = 0;

// Search the other layers one after the other, and say in `box` what is there.
QSL.searchElsewhere = async (box, layer) => {
  const mine = (asked += 1);
  const query = QSL.state.query.trim();
  const others = QSL.site.layers.filter((one) => one !== layer);
  box.replaceChildren();
  box.hidden = !query || !others.length;
  if (box.hidden) return;
  const says = QSL.make("span", { class: "quiet", "aria-live": "polite" }, "Searching the other layers …");
  const rows = QSL.make("ul", {});
  box.append(QSL.make("h2", {}, "In other layers"), says, rows);
  await new Promise((done) => setTimeout(done, PATIENCE));
  let layers = 0;
  for (const [i, one] of others.entries()) {
    if (mine !== asked) return;
    says.textContent = `Searching layer ${i + 1} of ${others.length} …`;
    const index = await QSL.load(`${one.folder}/index`);
    if (mine !== asked) return;
    const found = QSL.select(index, { ...QSL.state, ref: one.ref, sort: "density", down: true });
    if (!found.length) continue;
    layers += 1;
    const features = found.length === 1 ? "1 feature" : `${QSL.number(found.length)} features`;
    rows.append(QSL.make("li", {}, QSL.link(`${one.ref}?q=${encodeURIComponent(query)}`, {}, one.ref), `, ${features}: `,
      found.slice(0, NAMED_HITS).map((f, n) => [n ? ", " : "", QSL.link(`${one.ref}/${f}`, {}, String(f)),
        index.labels[f] ? [" ", QSL.make("bdi", {}, index.labels[f])] : ""]),
      found.length > NAMED_HITS ? " …" : ""));
  }
  says.textContent = layers ? `Found in ${layers} of ${others.length} other layers.`
    : others.length === 1 ? "Nothing found there either." : `Nothing found in any of the ${others.length} others.`;
};
