"use strict";
// Draws the timelines that stand in the page as JSON. Sizes are bytes throughout; x is the number of an event.

const data = JSON.parse(document.getElementById("data").textContent);
const MB = 1e6, MIB = 2 ** 20, GIB = 2 ** 30;
const EDGE = { left: 58, right: 8, top: 14, bottom: 30 };
const SPANS_MARKED = 24; // phases in sight above which their beginnings are not marked
const FAR = 2.5; // a limit above so many peaks is told, not drawn

const chart = document.getElementById("chart");
const hidden = new Set();
let line = null; // the timeline shown
let range = null; // [first, last] event in sight
let cursor = 0; // index of the point whose numbers are shown
let drag = null; // where a selection began, as an event

// ---- numbers -------------------------------------------------------------------------------------------------------

function sums(deltas) {
  let sum = 0;
  return Float64Array.from(deltas, (delta) => (sum += delta)); // whole numbers below 2^53: exact
}

function binary(size) {
  if (!size) return "0";
  return Math.abs(size) >= GIB / 10 ? `${(size / GIB).toFixed(2)} GiB` : `${(size / MIB).toFixed(1)} MiB`;
}

const megabytes = (size) => (size ? (size / MB).toFixed(1) : "0");
const gibibytes = (size) => (size ? (size / GIB).toFixed(2) : "0");
const full = (size) => `${megabytes(size)} MB (${binary(size)})`;

function open(timeline) {
  const parts = timeline.parts.map(sums);
  const positions = sums(timeline.positions);
  const totals = positions.map((_, i) => parts.reduce((sum, part) => sum + part[i], 0));
  return { ...timeline, parts, positions, totals };
}

/** The last point at or before an event. */
function pointAt(event) {
  let low = 0, high = line.positions.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (line.positions[middle] <= event) low = middle; else high = middle - 1;
  }
  return low;
}

const spanAt = (event) => line.spans.find((span) => event < span.stop) ?? line.spans.at(-1);
const limitOf = (timeline) => (data.budget === null ? null : data.budget - (timeline.context ?? 0));

/** Totals of the parts in sight, at every point. */
const shownTotals = () => line.totals.map((_, i) =>
  line.parts.reduce((sum, part, number) => sum + (hidden.has(number) ? 0 : part[i]), 0));

/** Whether a line at this size belongs in the picture: it would press it flat, or is no measure of some parts alone. */
const near = (size) => size !== null && !hidden.size && size <= FAR * line.totals[line.peak];

// ---- drawing -------------------------------------------------------------------------------------------------------

function element(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

/** Where things are on the screen: x by event, y by bytes. */
function scales() {
  const { width, height } = chart.getBoundingClientRect();
  const right = width - EDGE.right, bottom = height - EDGE.bottom;
  const [first, last] = range;
  const highest = Math.max(...line.shown.slice(pointAt(first), pointAt(last - 1) + 1));
  const marks = [line.reserved, limitOf(line)].filter(near);
  const top = Math.max(1.16 * highest, ...marks.map((mark) => 1.1 * mark), 1);
  const perEvent = (right - EDGE.left) / (last - first);
  return {
    left: EDGE.left, right, bottom, top, perEvent,
    x: (event) => EDGE.left + (Math.min(Math.max(event, first), last) - first) * perEvent,
    y: (size) => bottom - (size / top) * (bottom - EDGE.top),
    event: (x) => first + (Math.min(Math.max(x, EDGE.left), right) - EDGE.left) / perEvent,
  };
}

function draw() {
  line.shown = shownTotals();
  const s = scales();
  const svg = element("svg", {});
  drawTicks(svg, s);
  drawParts(svg, s);
  drawPhases(svg, s);
  drawMarks(svg, s);
  const over = element("g", { id: "over" });
  svg.append(over);
  chart.replaceChildren(svg);
  drawCursor();
}

function drawTicks(svg, s) {
  const [unit, name] = s.top >= GIB ? [GIB, "GiB"] : [MIB, "MiB"];
  const rough = s.top / unit / 6;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough);
  for (let i = 0; i * step * unit < s.top; i++) {
    const y = s.y(i * step * unit);
    svg.append(element("line", { x1: s.left, x2: s.right, y1: y, y2: y }));
    const label = `${+(i * step).toPrecision(6)}${i ? "" : ` ${name}`}`;
    svg.append(element("text", { x: s.left - 8, y: y + 4, "text-anchor": "end" }, label));
  }
}

/** One closed path a part: along its upper edge, and back along its lower one. A level holds until the next event. */
function drawParts(svg, s) {
  const first = pointAt(range[0]), last = pointAt(range[1] - 1);
  const ends = (i) => (i + 1 < line.positions.length ? line.positions[i + 1] : line.events);
  let below = new Float64Array(last - first + 1);
  const peaks = line.spans.map((span) => pointAt(span.peak)).filter((i) => i >= first && i <= last);
  const bars = element("g", {}); // a peak of a few events is too thin for the area to show
  data.parts.forEach((part, number) => {
    if (hidden.has(number)) return;
    const above = below.map((size, i) => size + line.parts[number][first + i]);
    let upper = "", lower = "";
    for (let i = first; i <= last; i++) {
      const x0 = s.x(line.positions[i]).toFixed(1), x1 = s.x(ends(i)).toFixed(1);
      upper += `L${x0} ${s.y(above[i - first]).toFixed(1)}H${x1}`;
      lower = `L${x1} ${s.y(below[i - first]).toFixed(1)}H${x0}` + lower;
    }
    svg.append(element("path", { d: `M${upper.slice(1)}${lower}Z`, fill: part.colour }));
    for (const i of peaks) {
      const y = s.y(above[i - first]), height = s.y(below[i - first]) - y;
      const width = Math.max(1.5, s.perEvent);
      if (height > 0) bars.append(element("rect", { x: s.x(line.positions[i]), y, width, height, fill: part.colour }));
    }
    below = above;
  });
  svg.append(bars);
}

function drawPhases(svg, s) {
  const spans = line.spans.filter((span) => span.stop > range[0] && span.start < range[1]);
  for (const span of spans) {
    const from = s.x(span.start), to = s.x(span.stop);
    if (span.start > range[0] && spans.length <= SPANS_MARKED) {
      svg.append(element("line", { class: "start", x1: from, x2: from, y1: EDGE.top, y2: s.bottom }));
    }
    if (to - from > 8 * span.phase.length) {
      const place = { class: "phase", x: (from + to) / 2, y: s.bottom + 20, "text-anchor": "middle" };
      svg.append(element("text", place, span.phase));
    }
  }
}

function drawMarks(svg, s) {
  const limit = limitOf(line);
  const late = s.x(line.positions[line.peak]) > (s.left + s.right) * 0.4;
  const side = late ? { x: s.left + 6, "text-anchor": "start" } : { x: s.right - 6, "text-anchor": "end" };
  const across = (size, kind, text) => {
    const y = s.y(size);
    svg.append(element("line", { class: kind, x1: s.left, x2: s.right, y1: y, y2: y }));
    svg.append(element("text", { class: `named ${kind}`, ...side, y: y - 6 }, text));
  };
  if (near(line.reserved)) across(line.reserved, "reserved", `reserved by the allocator: ${binary(line.reserved)}`);
  if (limit === null || hidden.size) return;
  const less = line.context && s.right > 620 ? ` (${binary(data.budget)} less ${binary(line.context)} of CUDA context)` : "";
  const text = `${data.budget_name || "limit"}: ${binary(limit)}${less}`;
  if (near(limit)) {
    const y = s.y(limit);
    svg.append(element("rect", { class: "over", x: s.left, y: EDGE.top, width: s.right - s.left,
                                 height: Math.max(0, y - EDGE.top) }));
    across(limit, "limit", text);
  } else {
    svg.append(element("text", { class: "named limit", ...side, y: EDGE.top + 10 }, `↑ ${text}`));
  }
}

/** What moves with the pointer: the line, the point and the selection; and the mark of the peak, above all else. */
function drawCursor() {
  const s = scales(), over = document.getElementById("over");
  over.replaceChildren();
  const peak = line.positions[line.peak];
  if (peak >= range[0] && peak <= range[1]) {
    const x = s.x(peak + 0.5), y = s.y(line.shown[line.peak]);
    const anchor = x > s.right - 120 ? "end" : x < s.left + 120 ? "start" : "middle";
    over.append(element("circle", { cx: x, cy: y, r: 4.5 }));
    const label = `${hidden.size ? "at the peak, of those shown:" : "peak"} ${full(line.shown[line.peak])}`;
    over.append(element("text", { class: "named peak", x, y: y - 11, "text-anchor": anchor }, label));
  }
  if (cursor !== line.peak) {
    const x = s.x(line.positions[cursor] + 0.5);
    over.append(element("line", { class: "cursor", x1: x, x2: x, y1: EDGE.top, y2: s.bottom }));
    over.append(element("circle", { cx: x, cy: s.y(line.shown[cursor]), r: 3.5 }));
  }
  if (drag !== null && drag.to !== null) {
    const [from, to] = [s.x(drag.from), s.x(drag.to)].sort((a, b) => a - b);
    over.append(element("rect", { class: "selection", x: from, y: EDGE.top, width: to - from, height: s.bottom - EDGE.top }));
  }
  tell();
}

// ---- words beside the chart ----------------------------------------------------------------------------------------

function tell() {
  const event = line.positions[cursor];
  const rows = [
    ["total", full(line.totals[cursor])],
    ["phase", spanAt(event).phase],
    ["module", line.names[line.modules[cursor]]],
    ["operator", line.names[line.operators[cursor]]],
    ["event", `${(event + 1).toLocaleString("en")} of ${line.events.toLocaleString("en")}`
              + (cursor === line.peak ? ", the peak" : "")],
  ];
  const nodes = rows.filter(([, value]) => value).flatMap(([name, value]) => {
    const term = document.createElement("dt"), description = document.createElement("dd");
    term.textContent = name;
    description.textContent = value;
    description.className = name;
    return [term, description];
  });
  document.getElementById("moment").replaceChildren(...nodes);
  data.parts.forEach((_, number) => {
    const size = line.parts[number][cursor];
    const row = document.getElementById(`part-${number}`);
    row.title = `${size.toLocaleString("en")} bytes`;
    row.cells[1].textContent = megabytes(size);
    row.cells[2].textContent = gibibytes(size);
  });
}

function buildLegend() {
  const body = document.querySelector("#legend tbody");
  data.parts.forEach((part, number) => {
    const row = document.createElement("tr"), button = document.createElement("button");
    const swatch = document.createElement("i");
    row.id = `part-${number}`;
    swatch.style.background = part.colour;
    button.append(swatch, part.name);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      if (!hidden.delete(number)) hidden.add(number);
      row.classList.toggle("hidden", hidden.has(number));
      button.setAttribute("aria-pressed", String(!hidden.has(number)));
      draw();
    });
    row.insertCell().append(button);
    row.insertCell();
    row.insertCell();
    body.prepend(row); // the top of the stack first
  });
}

function buildTabs() {
  const tabs = document.getElementById("tabs");
  if (data.timelines.length < 2) return;
  data.timelines.forEach((timeline) => {
    const button = document.createElement("button");
    button.textContent = timeline.name;
    button.addEventListener("click", () => show(timeline));
    tabs.append(button);
  });
}

// ---- what the user does --------------------------------------------------------------------------------------------

function show(timeline) {
  line = open(timeline);
  for (const button of document.querySelectorAll("#tabs button")) {
    button.setAttribute("aria-pressed", String(button.textContent === timeline.name));
  }
  cursor = line.peak;
  zoom(0, line.events);
}

function zoom(first, last) {
  range = [first, last];
  document.getElementById("reset").hidden = first === 0 && last === line.events;
  draw();
}

function eventUnder(pointer) {
  return scales().event(pointer.clientX - chart.getBoundingClientRect().left);
}

chart.addEventListener("pointermove", (pointer) => {
  const event = eventUnder(pointer);
  cursor = pointAt(event);
  if (drag !== null && Math.abs(event - drag.from) * scales().perEvent > 4) drag.to = event;
  drawCursor();
});
chart.addEventListener("pointerdown", (pointer) => {
  if (pointer.pointerType !== "mouse" || pointer.button !== 0) return;
  drag = { from: eventUnder(pointer), to: null };
  chart.setPointerCapture(pointer.pointerId);
});
chart.addEventListener("pointerup", () => {
  const selected = drag;
  drag = null;
  if (selected === null || selected.to === null) return;
  const [from, to] = [selected.from, selected.to].sort((a, b) => a - b);
  if (to - from >= 2) zoom(Math.floor(from), Math.ceil(to)); else drawCursor();
});
chart.addEventListener("pointercancel", () => { drag = null; drawCursor(); });
chart.addEventListener("pointerleave", () => {
  if (drag !== null) return;
  cursor = line.peak;
  drawCursor();
});
chart.addEventListener("dblclick", () => zoom(0, line.events));
chart.addEventListener("keydown", (key) => {
  const step = key.shiftKey ? 20 : 1;
  const first = pointAt(range[0]), last = pointAt(range[1] - 1);
  const to = { ArrowLeft: cursor - step, ArrowRight: cursor + step, Home: first, End: last }[key.key];
  if (to === undefined) return;
  key.preventDefault();
  cursor = Math.min(Math.max(to, first), last);
  drawCursor();
});
document.getElementById("reset").addEventListener("click", () => zoom(0, line.events));
new ResizeObserver(() => { if (line !== null) draw(); }).observe(chart);

buildLegend();
buildTabs();
show(data.timelines[0]);
