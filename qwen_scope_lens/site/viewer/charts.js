// The drawings: bars of a histogram, a meter. Colours and sizes are the stylesheet's.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

// counts[i] is what lies between edges[i] and edges[i + 1]; heights are logarithmic.
QSL.histogram = (counts, edges, describe, ends) => {
  const width = 320, height = 80, gap = 1;
  const top = Math.log1p(Math.max(1, ...counts));
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height + 16}`, class: "histogram", role: "img",
    "aria-label": "histogram" });
  const step = width / counts.length;
  counts.forEach((count, i) => {
    const tall = count ? Math.max(1.5, (height * Math.log1p(count)) / top) : 0;
    const title = draw("title", {}, describe(count, edges[i], edges[i + 1]));
    svg.append(
      draw("rect", { x: i * step, y: 0, width: step, height, class: "hover" }, title.cloneNode(true)),
      draw("rect", { x: i * step + gap / 2, y: height - tall, width: Math.max(0.5, step - gap), height: tall,
        class: "column" }, title),
    );
  });
  svg.append(draw("line", { x1: 0, x2: width, y1: height, y2: height, class: "axis" }));
  const anchors = ["start", "middle", "end"];
  ends.forEach((text, i) =>
    svg.append(draw("text", { x: (width * i) / (ends.length - 1), y: height + 13,
      "text-anchor": anchors[Math.round((2 * i) / (ends.length - 1))] }, text)));
  return svg;
};

// A piece of text on a background as strong as its value is beside the strongest; 0 has none.
QSL.heat = (element, value, strongest) => {
  element.classList.toggle("on", value > 0);
  element.style.setProperty("--share", value > 0 ? String(0.12 + 0.88 * Math.min(1, value / strongest)) : "0");
  return element;
};

// A bar behind a number: share from 0 to 1. The size is set through the object model, which a
// content security policy without inline styles allows.
QSL.meter = (share, kind = "") => {
  const bar = QSL.make("span", { class: `meter ${kind}`, "aria-hidden": "true" });
  bar.style.setProperty("--share", String(Math.max(0, Math.min(1, share || 0))));
  return bar;
};
