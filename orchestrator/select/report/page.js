"use strict";
// Everything here improves a page that is whole without it: tables are in the page, and charts are drawn of their cells.
const $ = (what, at = document) => at.querySelector(what);
const $$ = (what, at = document) => [...at.querySelectorAll(what)];
const SVG = "http://www.w3.org/2000/svg";
const data = JSON.parse($("#data").textContent);
const board = $("#board");
const keys = $$("thead th", board).map((th) => th.dataset.k);
const whole = (td) => td.title || td.textContent.trim(); // networks are shown by their short names
const rows = $$("tbody tr", board).map((tr) => {
  const row = { tr, id: tr.id, knobs: JSON.parse(tr.dataset.knobs) };
  [...tr.cells].forEach((td, i) => {
    const number = td.classList.contains("n");
    row[keys[i]] = number ? (td.dataset.v === undefined ? null : Number(td.dataset.v)) : whole(td);
  });
  row.text = `${[...tr.cells].map(whole).join(" ")} ${tr.dataset.knobs}`.toLowerCase();
  return row;
});
const byId = new Map(rows.map((row) => [row.id, row]));
// Points of one kind share a colour and a shape: a method, or in a report of several sweeps a sweep.
const by = data.by || "method";
const kinds = data.kinds || [...new Set(rows.map((row) => row[by]))].sort();

function node(name, attributes = {}, ...children) {
  const made = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/* Theme */
const themes = ["auto", "light", "dark"];
$("#theme").addEventListener("click", (event) => {
  const next = themes[(themes.indexOf(document.documentElement.dataset.theme || "auto") + 1) % 3];
  document.documentElement.dataset.theme = next;
  event.target.textContent = `Theme: ${next}`;
});

/* The leaderboard: sort, filter */
function sortBy(th, downwards) {
  const key = th.dataset.k;
  for (const other of $$("thead th", board)) other.setAttribute("aria-sort", "none");
  th.setAttribute("aria-sort", downwards ? "descending" : "ascending");
  const missing = (value) => value === null || value === "" || value === "-";
  const sorted = [...rows].sort((a, b) => {
    const one = a[key], two = b[key];
    if (missing(one) || missing(two)) return missing(one) - missing(two);
    const order = typeof one === "number" ? one - two : one.localeCompare(two, undefined, { numeric: true });
    return downwards ? -order : order;
  });
  board.tBodies[0].append(...sorted.map((row) => row.tr));
}
for (const th of $$("thead th", board)) {
  $("button", th).addEventListener("click", () => {
    const state = th.getAttribute("aria-sort");
    const first = th.dataset.k === "val_metric"; // what is better when larger is shown downwards first
    sortBy(th, state === "none" ? first : state === "ascending");
  });
}
function filter() {
  const words = $("#find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const method = $("#of-method").value, status = $("#of-status").value, sweep = $("#of-sweep") ? $("#of-sweep").value : "";
  let shown = 0;
  for (const row of rows) {
    const fits =
      words.every((word) => row.text.includes(word)) &&
      (!method || row.method === method) && (!status || row.status === status) &&
      (!sweep || row.sweep === sweep);
    row.tr.hidden = !fits;
    shown += fits;
  }
  $("#count").textContent = `${shown} of ${rows.length} trials`;
  drawFront();
}
for (const id of ["#find", "#of-method", "#of-status", "#of-sweep"]) if ($(id)) $(id).addEventListener("input", filter);

/* Charts */
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#56b4e9", "#7f3fbf", "#666666"];
const DASHES = ["none", "7 3", "2 3", "9 3 2 3", "4 2", "1 2"];
const SHAPES = [
  "M-5,0A5,5 0 1,0 5,0A5,5 0 1,0 -5,0Z", "M-4.5,-4.5H4.5V4.5H-4.5Z", "M0,-6L5.5,4.5H-5.5Z", "M0,-6.5L5.5,0L0,6.5L-5.5,0Z",
  "M0,6L5.5,-4.5H-5.5Z", "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z", "M0,-6.5L6,-1.5L3.8,5.5H-3.8L-6,-1.5Z",
];
const colourOf = (kind) => COLOURS[Math.max(0, kinds.indexOf(kind)) % COLOURS.length];
const dashesOf = (kind) => DASHES[Math.max(0, kinds.indexOf(kind)) % DASHES.length];
function mark(kind) {
  const i = Math.max(0, kinds.indexOf(kind)), colour = colourOf(kind);
  const hollow = Math.floor(i / SHAPES.length) % 2;
  return node("svg:path", {
    d: SHAPES[i % SHAPES.length], fill: hollow ? "var(--paper)" : colour, stroke: hollow ? colour : "var(--paper)",
    "stroke-width": hollow ? 2 : 1,
  });
}
function short(value, digits = 3) {
  const size = Math.abs(value);
  for (const [above, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= above) return `${Number((value / above).toPrecision(digits))}${unit}`;
  }
  return size && size < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(digits)));
}
/* Labels of ticks, with as many digits as tell them apart. */
function labelled(ticks) {
  const digits = [3, 4, 5, 6].find((n) => new Set(ticks.map((t) => short(t, n))).size === ticks.length);
  return ticks.map((t) => short(t, digits || 7));
}
/* The smallest and the largest number; not by Math.min(...values), which some 100,000 of them overflow. */
function ends(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}
function scale(values, from, to, log) {
  let [low, high] = ends(values);
  if (log) {
    if (low === high) [low, high] = [low / 2, high * 2];
    const a = Math.log(low), b = Math.log(high), pad = (b - a) * 0.06;
    const place = (v) => from + ((Math.log(v) - a + pad) / (b - a + 2 * pad)) * (to - from);
    const ticks = [];
    const steps = b - a > 7 ? [1] : [1, 2, 5];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
      for (const m of steps) {
        const t = Number(`${m}e${e}`);
        if (Math.log(t) >= a - pad && Math.log(t) <= b + pad) ticks.push(t);
      }
    }
    return { place, ticks: ticks.length > 1 ? ticks : [low, high] };
  }
  // Numbers that differ by rounding alone are drawn as equal: a step between them would be too small to be added to them.
  const size = Math.max(Math.abs(low), Math.abs(high));
  if (high - low <= size * 1e-9) [low, high] = [low - (size * 0.1 || 0.5), high + (size * 0.1 || 0.5)];
  const pad = (high - low) * 0.06;
  const place = (v) => from + ((v - low + pad) / (high - low + 2 * pad)) * (to - from);
  const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const ticks = [];
  for (let t = Math.ceil((low - pad) / step) * step; t <= high + pad; t += step) ticks.push(Number(t.toPrecision(12)));
  return { place, ticks };
}
const wide = (values) => {
  const [low, high] = ends(values);
  return low > 0 && high / low > 15;
};

/* An empty chart with axes in `holder`: x and y are {label, values, log} or, for x, {label, names}. */
function axes(holder, x, y, height) {
  const width = Math.max(240, holder.clientWidth), left = 60, right = 12, top = 10, bottom = 42;
  const svg = node("svg:svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group" });
  const sy = scale(y.values, height - bottom, top, y.log);
  let sx;
  if (x.names) {
    const gap = (width - left - right) / x.names.length;
    sx = { place: (name) => left + gap * (x.names.indexOf(name) + 0.5), ticks: x.names };
  } else sx = scale(x.values, left, width - right, x.log);
  const rising = labelled(sy.ticks), along = x.names ? x.names.map(String) : labelled(sx.ticks);
  sy.ticks.forEach((t, i) => {
    const at = sy.place(t);
    svg.append(node("svg:line", { x1: left, x2: width - right, y1: at, y2: at, class: "grid" }));
    svg.append(node("svg:text", { x: left - 6, y: at + 4, "text-anchor": "end" }, rising[i]));
  });
  let free = -1;
  for (const [i, t] of sx.ticks.entries()) {
    const at = sx.place(t), label = along[i];
    svg.append(node("svg:line", { x1: at, x2: at, y1: top, y2: height - bottom, class: "grid" }));
    if (at - label.length * 3.5 < free) continue;
    free = at + label.length * 3.5 + 6;
    svg.append(node("svg:text", { x: at, y: height - bottom + 16, "text-anchor": "middle" }, label));
  }
  const middle = (left + width - right) / 2, foot = height - 6;
  svg.append(node("svg:text", { x: middle, y: foot, "text-anchor": "middle", class: "name" }, x.label));
  const turned = { x: 0, y: 0, "text-anchor": "middle", class: "name" };
  turned.transform = `translate(12 ${(top + height - bottom) / 2}) rotate(-90)`;
  svg.append(node("svg:text", turned, y.label));
  holder.replaceChildren(svg);
  return { svg, x: sx.place, y: sy.place };
}

const tip = $("#tip");
function tell(event, lines) {
  tip.replaceChildren(...lines.map((line) => node("div", {}, line)));
  tip.hidden = false;
  const box = event.currentTarget.getBoundingClientRect();
  const x = event.clientX || box.x + box.width / 2, y = event.clientY || box.y;
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${y + 18 + tip.offsetHeight > innerHeight ? Math.max(4, y - tip.offsetHeight - 10) : y + 18}px`;
}
const hush = () => { tip.hidden = true; };
addEventListener("keydown", (event) => { if (event.key === "Escape") hush(); });

/* A trial's point: hover, focus, click and Enter. */
function point(chart, row, x, y, lines, reachable) {
  const g = node("svg:g", {
    class: "point", transform: `translate(${x} ${y})`, "data-id": row.id, role: "button",
    tabindex: reachable ? 0 : -1, "aria-label": lines.join(", "),
  });
  g.append(node("svg:circle", { r: 11, fill: "transparent" }), mark(row[by]));
  for (const name of ["pointermove", "focus"]) g.addEventListener(name, (event) => tell(event, lines));
  for (const name of ["pointerleave", "blur"]) g.addEventListener(name, hush);
  g.addEventListener("click", () => open(row.id));
  g.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(row.id); }
  });
  chart.svg.append(g);
  return g;
}
const say = (row, key) => row.tr.cells[keys.indexOf(key)].textContent.trim();
const legend = (holder, names) => holder.replaceChildren(...names.map((name) => {
  const shape = node("svg:svg", { viewBox: "-8 -8 16 16", width: 16, height: 16, "aria-hidden": "true" });
  shape.append(mark(name));
  if (!data.own) return node("span", {}, shape, name);
  const sample = node("svg:svg", { viewBox: "0 -8 30 16", width: 30, height: 16, "aria-hidden": "true" });
  sample.append(node("svg:path", { d: "M0,0H30", class: "own", stroke: colourOf(name), "stroke-dasharray": dashesOf(name) }));
  return node("span", {}, shape, sample, name);
}));

const isBest = (row) => row.id === data.recommended || (data.bests || []).includes(row.id);

/* The Pareto front */
function drawFront() {
  const holder = $("#front-chart");
  if (!holder) return;
  const key = $("#front-axis").value, front = new Set(data.fronts[key]);
  const able = rows.filter((r) => r.status === "complete" && r.val_metric !== null && r[key] !== null);
  if (!able.length) {
    holder.replaceChildren(node("p", {}, "No complete trial has a value of both."));
    return;
  }
  const values = able.map((r) => r[key]);
  const log = wide(values);
  const label = data.axes[key] + (log ? " (log scale)" : "");
  const chart = axes(holder, { label, values, log }, { label: `${data.metric} on val`, values: able.map((r) => r.val_metric) },
    Math.min(440, Math.max(300, innerHeight * 0.55)));
  const steps = (ids) => able.filter((r) => ids.has(r.id)).sort((a, b) => a[key] - b[key])
    .map((r, i) => `${i ? `H${chart.x(r[key])}V` : `M${chart.x(r[key])},`}${chart.y(r.val_metric)}`).join("");
  for (const [kind, ids] of Object.entries((data.own || {})[key] || {})) {
    if (!able.some((r) => r[by] === kind && !r.tr.hidden)) continue;
    const look = { class: "own", stroke: colourOf(kind), "stroke-dasharray": dashesOf(kind) };
    chart.svg.append(node("svg:path", { d: steps(new Set(ids)), ...look }));
  }
  if (!data.own) chart.svg.append(node("svg:path", { d: steps(front), class: "front" }));
  const shown = able.filter((r) => !r.tr.hidden);
  shown.sort((a, b) => front.has(a.id) - front.has(b.id));
  const tags = [];
  for (const r of shown) {
    const x = chart.x(r[key]), y = chart.y(r.val_metric);
    if (r.val_sd !== null && r.val_sd !== undefined) {
      const [one, two] = [chart.y(r.val_metric - r.val_sd), chart.y(r.val_metric + r.val_sd)];
      chart.svg.append(node("svg:line", { x1: x, x2: x, y1: one, y2: two, class: "spread" }));
    }
    const lines = [`${r.id}: ${r.method}`, `${data.metric} ${say(r, "val_metric")}`, `${data.axes[key]} ${short(r[key], 4)}`];
    if (front.has(r.id)) lines.push("on the front");
    const g = point(chart, r, x, y, lines, front.has(r.id));
    g.classList.toggle("dim", !front.has(r.id));
    const ringed = isBest(r);
    if (ringed) g.append(node("svg:circle", { r: 10, class: "ring" }));
    if (data.own ? ringed : front.has(r.id)) tags.push({ g, x, y, text: r.id, ringed });
  }
  // Names where there is room for them, the most important ones first.
  const placed = [];
  for (const { g, x, y, text } of tags.sort((a, b) => b.ringed - a.ringed)) {
    const long = text.length * 7.4, end = x + 12 + long > chart.svg.viewBox.baseVal.width;
    const left = end ? x - 12 - long : x + 12;
    for (const down of [-7, 16]) {
      if (placed.some(([from, to, at]) => left < to && left + long > from && Math.abs(y + down - at) < 14)) continue;
      g.append(node("svg:text", { x: end ? -12 : 12, y: down, "text-anchor": end ? "end" : "start", class: "tag" }, text));
      placed.push([left, left + long, y + down]);
      break;
    }
  }
  legend($("#front-legend"), kinds.filter((kind) => shown.some((r) => r[by] === kind)));
}

/* Several sweeps: the best so far over what was spent */
function drawProgress() {
  const holder = $("#progress-chart");
  if (!holder) return;
  const lines = Object.entries(data.progress).filter(([, points]) => points.length);
  const points = lines.flatMap(([, line]) => line), spent = points.map((p) => p[0]);
  const log = wide(spent);
  const x = { label: `device-seconds${log ? " (log scale)" : ""}`, values: spent, log };
  const chart = axes(holder, x, { label: `${data.metric} on val`, values: points.map((p) => p[1]) }, 260);
  for (const [kind, line] of lines) {
    const d = line.map(([s, v], i) => (i ? `H${chart.x(s)}V${chart.y(v)}` : `M${chart.x(s)},${chart.y(v)}`)).join("");
    chart.svg.append(node("svg:path", { d, class: "own", "data-kind": kind, stroke: colourOf(kind), "stroke-dasharray": dashesOf(kind) }));
    const [s, v] = line[line.length - 1];
    const end = node("svg:g", { transform: `translate(${chart.x(s)} ${chart.y(v)})` }, mark(kind));
    end.append(node("svg:title", {}, `${kind}: ${short(v, 4)} after ${short(s)} device-seconds`));
    chart.svg.append(end);
  }
  legend($("#progress-legend"), lines.map(([kind]) => kind));
}

/* Learning curves */
function drawLines(holder, lines, xLabel, yLabel, height = 260) {
  if (!lines.length) {
    holder.replaceChildren(node("p", {}, "Nothing was recorded for these trials."));
    return;
  }
  const xs = lines.flatMap((l) => l.points.map((p) => p[0])), ys = lines.flatMap((l) => l.points.map((p) => p[1]));
  const log = wide(ys) && yLabel !== data.metric;
  const chart = axes(holder, { label: xLabel, values: xs }, { label: yLabel + (log ? " (log)" : ""), values: ys, log }, height);
  for (const l of lines) {
    const d = l.points.map((p, i) => `${i ? "L" : "M"}${chart.x(p[0])},${chart.y(p[1])}`).join("");
    const path = node("svg:path", { d, class: l.best ? "line best" : "line" });
    if (["pruned", "failed"].includes(l.row.status)) path.classList.add("stopped");
    if (data.own) path.style.stroke = colourOf(l.row[by]);
    const wide = node("svg:path", { d, class: "catch" });
    const end = l.points[l.points.length - 1];
    const words = [`${l.row.id}: ${l.row.method}`, `${yLabel} ${short(end[1])} at the end`, `val ${say(l.row, "val_metric")}`];
    wide.addEventListener("pointermove", (event) => { path.classList.add("over"); tell(event, words); });
    wide.addEventListener("pointerleave", () => { path.classList.remove("over"); hush(); });
    wide.addEventListener("click", () => open(l.row.id));
    chart.svg.append(path, wide);
    if (l.points.length === 1) chart.svg.append(node("svg:circle", { cx: chart.x(end[0]), cy: chart.y(end[1]), r: l.best ? 4 : 2.5, class: "dot" }));
  }
  for (const best of lines.filter((l) => l.best)) {
    const end = best.points[best.points.length - 1];
    chart.svg.append(node("svg:text", { x: chart.x(end[0]), y: chart.y(end[1]) - 7, "text-anchor": "end", class: "tag" }, best.row.id));
  }
}
const pairs = (losses, part) => losses.step.map((s, i) => [s, losses[part][i]]).filter((p) => p[1] !== null);
function drawCurves() {
  if (!$("#curve-method")) return;
  const method = $("#curve-method").value;
  const mine = rows.filter((r) => r.method === method && data.curves[r.id]);
  const parts = [...new Set(mine.flatMap((r) => Object.keys(data.curves[r.id].losses)))].filter((p) => p !== "step");
  const chooser = $("#curve-part"), kept = chooser.value;
  parts.sort((a, b) => (b === "loss") - (a === "loss") || a.localeCompare(b));
  chooser.replaceChildren(...parts.map((p) => node("option", {}, p)));
  if (parts.includes(kept)) chooser.value = kept;
  const part = chooser.value;
  const best = mine.find((r) => r.status === "complete"); // rows are in the leaderboard's order
  const lines = mine.filter((r) => data.curves[r.id].losses[part])
    .map((row) => ({ row, best: row === best, points: pairs(data.curves[row.id].losses, part) })).filter((l) => l.points.length);
  drawLines($("#curve-chart"), lines.sort((a, b) => a.best - b.best), "optimizer steps", part || "loss");
}
function drawVal() {
  const holder = $("#val-chart");
  if (!holder) return;
  const lines = rows.filter((r) => data.curves[r.id] && data.curves[r.id].val.length)
    .map((row) => ({ row, best: isBest(row), points: data.curves[row.id].val.map((p) => [p[0] * 100, p[1]]) }));
  drawLines(holder, lines.sort((a, b) => a.best - b.best), "% of the trial's budget", data.metric);
}

/* Slices: the val metric over each knob of a method */
function drawSlices() {
  const place = $("#slices");
  if (!place) return;
  const method = $("#slice-method").value;
  const mine = rows.filter((r) => r.method === method && r.val_metric !== null && r.status !== "running");
  const names = [...new Set(mine.flatMap((r) => Object.keys(r.knobs)))];
  place.replaceChildren();
  for (const name of names) {
    const able = mine.filter((r) => r.knobs[name] !== undefined && r.knobs[name] !== null);
    const values = able.map((r) => r.knobs[name]);
    if (new Set(values.map(String)).size < 2) continue;
    const holder = node("div", { class: "slice" });
    place.append(holder);
    const distinct = [...new Set(values)];
    const numeric = distinct.length > 5 && values.every((v) => typeof v === "number");
    const log = numeric && wide(values);
    const x = numeric ? { label: name + (log ? " (log scale)" : ""), values, log } : { label: name, names: distinct.sort((a, b) => (a < b ? -1 : 1)).map(String) };
    const chart = axes(holder, x, { label: `${data.metric} on val`, values: able.map((r) => r.val_metric) }, 210);
    for (const r of able) {
      const at = chart.x(numeric ? r.knobs[name] : String(r.knobs[name]));
      const g = point(chart, r, at, chart.y(r.val_metric), [`${r.id}: ${r.method}`, `${name} ${r.knobs[name]}`, `val ${say(r, "val_metric")} (${r.status})`], false);
      g.classList.toggle("dim", r.status !== "complete");
    }
  }
  if (!place.children.length) place.append(node("p", {}, "No knob of this method took two values or more in the trials that were scored."));
}

/* One trial */
const dialog = $("#trial");
function open(id) {
  const row = byId.get(id);
  hush();
  if (!row) {
    $("#said").textContent = `This report has no trial ${id}.`;
    return;
  }
  const list = node("dl");
  keys.forEach((key, i) => {
    const text = whole(row.tr.cells[i]);
    if (text && text !== "-" && key !== "trial_id") list.append(node("dt", {}, $$("thead th", board)[i].dataset.title), node("dd", {}, text));
  });
  for (const [name, value] of Object.entries(row.knobs)) list.append(node("dt", { class: "knob" }, name), node("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value)));
  const holder = node("div", { class: "chart" });
  const parts = [node("h2", { id: "trial-name" }, `${row.id}: ${row.method}`), list, holder];
  const section = document.getElementById(`classes-${id}`);
  if (section) {
    const link = node("a", { href: `#classes-${id}` }, "Results by class and worst errors");
    link.addEventListener("click", () => { section.open = true; dialog.close(); });
    parts.push(node("p", {}, link));
  }
  const command = data.exports ? data.exports[row.sweep] : data.export;
  if (row.status === "complete") parts.push(node("p", {}, "Take it away: ", node("code", {}, `${command} --trial ${id.split("/").pop()}`)));
  $("#trial-body").replaceChildren(...parts);
  dialog.showModal();
  const curve = data.curves[id];
  if (curve && curve.losses.loss) drawLines(holder, [{ row, best: true, points: pairs(curve.losses, "loss") }], "optimizer steps", "loss", 200);
}
$("#trial-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-trial]");
  if (link) { event.preventDefault(); open(link.dataset.trial); }
});

/* Print shows everything. */
let folded = [];
addEventListener("beforeprint", () => { folded = $$("details:not([open])"); folded.forEach((d) => { d.open = true; }); });
addEventListener("afterprint", () => { folded.forEach((d) => { d.open = false; }); });

function drawAll() { drawFront(); drawProgress(); drawVal(); drawCurves(); drawSlices(); }
const on = (id, what) => { const found = $(id); if (found) found.addEventListener("input", what); };
on("#front-axis", drawFront);
on("#curve-method", drawCurves);
on("#curve-part", drawCurves);
on("#slice-method", drawSlices);
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
drawAll();
$("#count").textContent = `${rows.length} trials`;
const asked = decodeURIComponent(location.hash.slice(1));
if (byId.has(asked) || /^t\d+$/.test(asked)) open(asked);
document.documentElement.dataset.ready = "yes";
