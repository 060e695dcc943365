// A text as the model read it: its pieces, and what is known of features on them. What is not known is
// null and never 0.

import { learn } from "/state.js";

// `top`: how many features a token's list has at most; `k`: how many are active on a token at most.
export class Reading {
  constructor(top, k) {
    Object.assign(this, { top, k, pieces: [], lists: [], tracks: new Map(), layers: new Set() });
  }

  // From the answer of /api/read or of a side of /api/compare, with the lists of one layer.
  static ofAnswer(answer, layer, top, k) {
    const reading = new Reading(top, k);
    reading.pieces = answer.pieces.map((piece) => ({ ids: piece.ids, text: piece.text, special: piece.special,
      note: piece.first ? "first token" : piece.extreme.length ? "extreme norm" : "" }));
    reading.lists = answer.tokens.map((layers) => new Map(layers[layer]));
    reading.layers = new Set([layer]);
    for (const firing of [...answer.features[layer], ...answer.monitor]) {
      learn(firing);
      reading.tracks.set(firing.feature, firing.track);
    }
    return reading;
  }

  // The pieces of some tokens, counted from the first of them.
  slice(from, to = Infinity) {
    const part = new Reading(this.top, this.k);
    let at = 0;
    const kept = this.pieces.map((piece) => [at, (at += piece.ids.length)][0]).map((start) => start >= from && start < to);
    const own = (list) => list.filter((_, i) => kept[i]);
    at = 0;
    part.pieces = own(this.pieces).map((piece) => ({ ...piece, start: [at, (at += piece.ids.length)][0] }));
    part.lists = own(this.lists);
    part.layers = this.layers;
    for (const [address, track] of this.tracks) part.tracks.set(address, own(track));
    return part;
  }

  // Add the next token's record of a completion. A token whose text is empty spells a part of a
  // character: it is one piece with the tokens after it.
  add(record) {
    const last = this.pieces.at(-1);
    const joins = last && last.text === "" && !last.special;
    const list = joins ? this.lists.at(-1) : new Map();
    if (joins) {
      last.ids.push(record.id);
      last.text = record.text;
      last.special = record.special;
      last.note ||= record.note;
    } else {
      this.pieces.push({ ids: [record.id], text: record.text, special: record.special, note: record.note, start: record.index });
      this.lists.push(list);
    }
    for (const [layer, firings] of Object.entries(record.explain || {})) {
      this.layers.add(Number(layer));
      for (const one of firings) {
        learn(one);
        list.set(one.feature, Math.max(one.activation, list.get(one.feature) || 0));
      }
    }
    const at = this.pieces.length - 1;
    for (const [address, value] of Object.entries(record.monitor || {})) {
      if (!this.tracks.has(address)) this.tracks.set(address, []);
      const track = this.tracks.get(address);
      track[at] = Math.max(value, track[at] || 0);
    }
  }

  // Whether the list of a piece has all of its active features.
  #whole(i) {
    return this.lists[i].size < this.top || (this.pieces[i].ids.length === 1 && this.lists[i].size >= this.k);
  }

  // The activation on every piece; null where it was not computed for all of them.
  track(address) {
    const known = this.tracks.get(address);
    if (known && known.length === this.pieces.length) return known;
    if (!this.layers.has(Number(address.split("/").at(-2)))) return null;
    const track = [];
    for (const [i, list] of this.lists.entries()) {
      if (!list.has(address) && !this.#whole(i)) return null;
      track.push(list.get(address) || 0);
    }
    return track;
  }

  // [[address, activation], ...] of one piece, the strongest first.
  on(i) {
    return [...this.lists[i]].sort((a, b) => b[1] - a[1]);
  }

  // The same over the text. The first token and those of extreme norm are left out: they are outliers.
  strongest(most) {
    const best = new Map();
    this.lists.forEach((list, i) => {
      if (this.pieces[i].note || this.pieces[i].special) return;
      for (const [address, value] of list) if (value > (best.get(address) || 0)) best.set(address, value);
    });
    return [...best].sort((a, b) => b[1] - a[1]).slice(0, most);
  }

  get text() {
    return this.pieces.map((piece) => (piece.special ? "" : piece.text)).join("");
  }
}

// Which pieces of two readings are not in their longest common subsequence of tokens: two sets.
export function differing(a, b) {
  const [x, y] = [a, b].map((reading) => reading.pieces.map((piece) => piece.ids.join(" ")));
  let start = 0;
  while (start < x.length && start < y.length && x[start] === y[start]) start += 1;
  let [m, n] = [x.length, y.length];
  while (m > start && n > start && x[m - 1] === y[n - 1]) [m, n] = [m - 1, n - 1];
  const rows = m - start, columns = n - start, width = columns + 1;
  const only = [new Set(), new Set()];
  if (rows * columns > 4e6) { // too long to align: all of the middle counts as different
    for (let i = start; i < m; i += 1) only[0].add(i);
    for (let i = start; i < n; i += 1) only[1].add(i);
    return only;
  }
  const best = new Uint16Array((rows + 1) * width);
  for (let i = rows - 1; i >= 0; i -= 1)
    for (let j = columns - 1; j >= 0; j -= 1)
      best[i * width + j] = x[start + i] === y[start + j] ? best[(i + 1) * width + j + 1] + 1
        : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
  let i = 0, j = 0;
  while (i < rows || j < columns) {
    if (i < rows && j < columns && x[start + i] === y[start + j]) [i, j] = [i + 1, j + 1];
    else if (j >= columns || (i < rows && best[(i + 1) * width + j] >= best[i * width + j + 1])) only[0].add(start + i++);
    else only[1].add(start + j++);
  }
  return only;
}
