// Loads the data files. A page opened from disk may not fetch(), so every file is a script that
// calls QSL.deliver(name, text); the text is base64 of gzipped JSON and nothing else.
"use strict";

QSL.arrived = new Map(); // name -> {resolve, reject} while under way
QSL.base = ""; // where data/ is, seen from the page
QSL.kept = new Map(); // name -> promise of the content; of each kind only the last few
QSL.MOST_KEPT = { block: 24, index: 12, documents: 8 };

QSL.deliver = (name, text) => {
  const waiting = QSL.arrived.get(name);
  if (waiting) unpack(text).then(waiting.resolve, waiting.reject);
};

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// load("site"), load("FOLDER/index"), load("FOLDER/block-0000"), load("documents-ID/0000")
QSL.load = (name) => {
  if (QSL.kept.has(name)) return QSL.kept.get(name);
  const promise = new Promise((resolve, reject) => {
    QSL.arrived.set(name, { resolve, reject });
    const script = document.createElement("script");
    script.src = `${QSL.base}data/${name.split("/").map(encodeURIComponent).join("/")}.js`;
    script.onerror = () => reject(new Error(`data/${name}.js is not there: is the site complete?`));
    script.onload = () => script.remove();
    document.head.append(script);
  });
  promise.catch(() => QSL.kept.delete(name));
  promise.finally(() => QSL.arrived.delete(name)).catch(() => {});
  QSL.kept.set(name, promise);
  for (const [kind, most] of Object.entries(QSL.MOST_KEPT)) {
    const names = [...QSL.kept.keys()].filter((key) => kindOf(key) === kind);
    if (names.length > most) QSL.kept.delete(names[0]);
  }
  return promise;
};

const kindOf = (name) =>
  name.startsWith("documents-") ? "documents" : name.includes("/block-") ? "block" : name.endsWith("/index") ? "index" : "site";

// The full text of a document; null where the site or the store does not have it.
QSL.loadText = async (layer, doc) => {
  if (!layer.documents_folder) return null;
  const number = Math.floor(doc / layer.texts);
  const texts = await QSL.load(`${layer.documents_folder}/${String(number).padStart(4, "0")}`);
  return texts[doc - number * layer.texts];
};

QSL.loadFeature = async (layer, feature) => {
  const number = Math.floor(feature / layer.block);
  const block = await QSL.load(`${layer.folder}/block-${String(number).padStart(4, "0")}`);
  return block[feature - number * layer.block];
};
