// Draws one inspection (see inspect/page.py, page_data, for its fields) and, on the page that
// triton-gru-predict serves, requests another whenever the text changes. Texts are inserted as
// textContent only, never as markup.
"use strict";
const byId = (id) => document.getElementById(id);
const KEEP = [31, 95, 168], HALF = [246, 244, 239], DROP = [224, 108, 0];
const MINUS = [123, 50, 148], PLUS = [0, 136, 55]; // candidate and state, -1 and 1
const MAP_HEIGHT = 240;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}
const mix = (from, to, share) => from.map((value, i) => value + (to[i] - value) * share);
// The colour of a value from 0 to 1: `low`, white at the half, `high`.
const between = (low, high, value) =>
  value < 0.5 ? mix(low, HALF, 2 * value) : mix(HALF, high, 2 * value - 1);
const css = (color) => `rgb(${color.map(Math.round).join(",")})`;
const percent = (share) =>
  share > 0 && share < 0.0005 ? "<0.1%"
    : `${share < 0.0995 ? (100 * share).toFixed(1) : Math.round(100 * share)}%`;
const count = (tokens) => tokens >= 10 ? Math.round(tokens).toLocaleString("en") : tokens.toFixed(1);
const bytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));

let shown = null; // the inspection on the page
let chosen = 0; // the selected token

function draw(inspection) {
  shown = { ...inspection };
  for (const name of ["r", "z", "n", "h", "written"]) shown[name] = bytes(inspection[name]);
  const { layer_type, layer, layers, units, checkpoint } = shown;
  byId("model").textContent =
    `${checkpoint}, ${layer_type}, layer ${layer} of ${layers}, ${units.length} units`;
  drawStrip();
  drawFindings();
  drawChart();
  choose(shown.tokens.length - 1);
}

function drawStrip() {
  byId("strip").replaceChildren(...shown.tokens.flatMap((token, t) => {
    const button = make("button", "", token.label);
    button.type = "button";
    button.title = `forgets ${percent(shown.forgotten[t])} of the memory`;
    button.classList.toggle("most", shown.most.includes(t));
    button.classList.toggle("blank", token.blank);
    button.addEventListener("click", () => choose(t));
    return token.label.includes("⏎") ? [button, make("span", "break")] : [button];
  }));
}

function drawFindings() {
  const { memory, most, tokens, forgotten, surprise } = shown;
  const named = (t) => {
    const before = [...tokens.slice(0, t).map((token) => token.label).join("")];
    const span = make("span", "place", `${before.length > 10 ? "…" : ""}${before.slice(-10).join("")}`);
    span.append(make("b", "drop", tokens[t].label), ` (${percent(forgotten[t])})`);
    return span;
  };
  const line = make("span");
  line.append(`Half of the units keep their value for fewer than ${count(memory[memory.length >> 1])} tokens, `
    + `one in ten for more than ${count(memory[Math.floor(memory.length / 10)])}. `);
  if (most.length) {
    line.append("It forgets most at: ");
    most.forEach((t, i) => line.append(i ? ", " : "", named(t)));
    line.append(" (underlined in orange). ");
  }
  const costs = surprise.filter((cost) => cost !== null);
  if (costs.length) {
    const mean = costs.reduce((a, b) => a + b) / costs.length;
    line.append(`The text cost ${mean.toFixed(2)} bits per token.`);
  }
  byId("findings").replaceChildren(line);
}

function meter(name, share, kind) {
  const row = make("div", `meter ${kind}`);
  const track = make("div", "track"), fill = make("div", "fill");
  fill.style.width = `${100 * share}%`;
  track.append(fill);
  row.append(make("span", "name", name), track, make("span", "value", percent(share)));
  return row;
}

function choose(t) {
  const { tokens, origin, recent, drawnOn, next, surprise, written } = shown;
  chosen = Math.max(0, Math.min(t, tokens.length - 1));
  t = chosen;
  const T = tokens.length, row = written.subarray(t * T, (t + 1) * T);
  byId("after").textContent = t === T - 1 ? "at the end" : `after “${tokens[t].label}”`;
  [...byId("strip").querySelectorAll("button")].forEach((button, s) => {
    const share = s < t ? row[s] / 255 : 0;
    button.style.background = share ? css(mix([255, 255, 255], KEEP, share)) : "";
    button.style.color = share > 0.55 ? "#fff" : s > t ? "#9a9da3" : "";
    button.classList.toggle("chosen", s === t);
    button.setAttribute("aria-pressed", String(s === t));
  });
  const heading = (...parts) => {
    const h3 = make("h3");
    h3.append(...parts);
    return h3;
  };
  const token = make("span", "token", tokens[t].label);
  byId("before").replaceChildren(
    ...(t === 0
      ? [heading("Nothing predicts the first token")]
      : [heading("Expected here; ", token.cloneNode(true), ` cost ${surprise[t].toFixed(1)} bits`),
        ...next[t - 1].map(([label, p, id]) => meter(label, p, id === tokens[t].id ? "right" : ""))]));
  byId("gates").replaceChildren(
    heading("The memory after ", token.cloneNode(true), " is from"),
    meter("this token", origin[t][0], "drop"),
    meter(`${recent} before it`, origin[t][1], "keep"),
    meter("older ones", origin[t][2], "keep"),
    heading("The new content draws on the past"),
    meter("mean of r", drawnOn[t], drawnOn[t] < 0.5 ? "drop" : "keep"));
  byId("following").replaceChildren(
    heading("Expected next"), ...next[t].map(([label, p]) => meter(label, p, "")));
  [...document.querySelectorAll("#chart .tokens .cell")].forEach((cell, i) =>
    cell.classList.toggle("chosen", i % T === t));
  const cursor = document.querySelector("#chart .cursor");
  const plot = document.querySelector("#chart .plot");
  cursor.style.left = `${plot.offsetLeft + t * shown.width}px`;
  cursor.style.width = `${shown.width}px`;
  const chart = byId("chart"), left = t * shown.width;
  const visible = chart.clientWidth - plot.offsetLeft - shown.width;
  if (left < chart.scrollLeft) chart.scrollLeft = left;
  if (left > chart.scrollLeft + visible) chart.scrollLeft = left - visible;
}

function chartRow(name, unit, ...content) {
  const row = make("div", "row"), label = make("div", "label", name), plot = make("div", "plot");
  if (unit) label.append(make("span", "unit", unit));
  plot.append(...content);
  row.append(label, plot);
  return row;
}

function cells(items, className, fill) {
  const line = make("div", "cells");
  items.forEach((item, t) => {
    const cell = make("div", className);
    cell.style.width = `${shown.width}px`;
    fill(cell, item, t);
    line.append(cell);
  });
  return line;
}

function tokenRow() {
  const row = chartRow("", "", cells(shown.tokens, "cell", (cell, token) => {
    cell.textContent = token.label;
    cell.title = token.label;
  }));
  row.classList.add("tokens");
  return row;
}

function barRow(name, unit, values, height, className) {
  const top = Math.max(...values.map((value) => value ?? 0), 1e-9);
  return chartRow(name, unit, cells(values, "column", (column, value, t) => {
    column.style.height = `${Math.max(1, (height * (value ?? 0)) / top)}px`;
    column.classList.add(...className(t));
  }));
}

function guessRows() {
  const { tokens, next } = shown;
  return next[0].map((_, rank) => cells([null, ...next.slice(0, -1)], "cell guess", (cell, row, t) => {
    if (!row) return;
    const [label, p, id] = row[rank], right = id === tokens[t].id;
    cell.textContent = label;
    cell.title = `${label} ${percent(p)}`;
    cell.classList.toggle("right", right);
    cell.style.background = css(mix([255, 255, 255], right ? KEEP : [70, 72, 77], p));
    cell.style.color = p > 0.5 ? "#fff" : right ? css(KEEP) : "";
  }));
}

// One map: units from the top in their order, tokens from left to right.
function mapRow(name, unit, values, low, high, description) {
  const { units, tokens, width } = shown, T = tokens.length;
  const canvas = make("canvas");
  canvas.width = T;
  canvas.height = units.length;
  canvas.style.width = `${T * width}px`;
  canvas.style.height = `${MAP_HEIGHT}px`;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", description);
  const context = canvas.getContext("2d"), image = context.createImageData(T, units.length);
  values.forEach((value, i) => {
    const color = between(low, high, value / 255);
    for (let channel = 0; channel < 3; channel++) image.data[4 * i + channel] = color[channel];
    image.data[4 * i + 3] = 255;
  });
  context.putImageData(image, 0, 0);
  const row = chartRow("", "", canvas), caption = make("div", "row caption");
  row.querySelector(".plot").addEventListener("pointermove", (event) => point(event, canvas));
  caption.append(make("span", "name", name));
  caption.lastChild.append(make("span", "unit", `  ${unit}`));
  return [caption, row];
}

// Where the units' memory falls below a round number of tokens.
function memoryTicks([, row]) {
  const { memory } = shown, label = row.querySelector(".label");
  let last = -1e9;
  for (const tokens of [1e6, 1e5, 1e4, 1000, 100, 30, 10, 5, 3, 2, 1.5]) {
    const unit = memory.findIndex((value) => value < tokens);
    const top = 6 + (MAP_HEIGHT * unit) / memory.length; // 6: the plot's padding
    if (unit <= 0 || top - last < 13) continue;
    const tick = make("span", "tick", `${tokens.toLocaleString("en")} tokens –`);
    tick.style.top = `${top}px`;
    label.append(tick);
    last = top;
  }
}

function point(event, canvas) {
  const box = canvas.getBoundingClientRect(), T = shown.tokens.length, H = shown.units.length;
  const t = Math.floor((event.clientX - box.left) / shown.width);
  const row = Math.floor(((event.clientY - box.top) / box.height) * H);
  if (t < 0 || t >= T || row < 0 || row >= H) return;
  const at = row * T + t, gate = (name) => (shown[name][at] / 255).toFixed(2);
  const signed = (name) => ((2 * shown[name][at]) / 255 - 1).toFixed(2);
  byId("pointer").textContent =
    `“${shown.tokens[t].label}”, unit ${shown.units[row]}: update gate z ${gate("z")}, reset gate r `
    + `${gate("r")}, candidate n ${signed("n")}, state h ${signed("h")}; the unit keeps its value for `
    + `${count(shown.memory[row])} tokens`;
}

function drawChart() {
  const { tokens, forgotten, surprise, most, z, r, n, h } = shown;
  const chart = byId("chart"), T = tokens.length, left = chart.scrollLeft;
  const longest = Math.max(...tokens.map((token) => token.label.length));
  const least = longest <= 2 ? 17 : Math.min(84, 9 * longest + 6);
  const space = chart.clientWidth - (window.innerWidth < 736 ? 100 : 152) - 2;
  shown.width = Math.max(least, Math.min(40, Math.floor(space / T)));
  const zRow = mapRow("Update gate z", "a line is a unit, longest memory on top; blue keeps it, orange replaces it", z, DROP, KEEP,
    "Update gate of every unit at every token");
  memoryTicks(zRow);
  const rows = make("div", "rows");
  rows.append(
    tokenRow(),
    chartRow("Expected here", "likeliest first; blue: it came", ...guessRows()),
    barRow("Surprise", `up to ${Math.max(...surprise.map((c) => c ?? 0)).toFixed(1)} bits`, surprise,
      44, () => []),
    barRow("Forgetting", `up to ${percent(Math.max(...forgotten))} of the memory`, forgotten, 56,
      (t) => ["forget", ...(most.includes(t) ? ["most"] : [])]),
    ...zRow,
    ...mapRow("Reset gate r", "same units; blue: the new content uses the past", r, DROP, KEEP,
      "Reset gate of every unit at every token"),
    tokenRow(),
    ...mapRow("Candidate n", "the new content; purple −1, green 1", n, MINUS, PLUS, "Candidate of every unit"),
    ...mapRow("State h", "the memory; purple −1, green 1", h, MINUS, PLUS, "State of every unit"),
    make("div", "cursor"));
  chart.replaceChildren(rows);
  chart.scrollLeft = left;
}

byId("chart").addEventListener("click", (event) => {
  const plot = event.target.closest(".plot");
  if (plot) choose(Math.floor((event.clientX - plot.getBoundingClientRect().left) / shown.width));
});
byId("chart").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  choose(chosen + step);
});
let resizing;
window.addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(() => { drawChart(); choose(chosen); }, 100);
});

// On the served page: one request at a time, then one for the last text typed meanwhile.
let asking = false, waiting = false;

async function ask() {
  waiting = asking;
  if (asking) return;
  asking = true;
  let error = "";
  try {
    const answer = await fetch("inspect", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ text: byId("text").value, layer: Number(byId("layer").value) }),
    });
    const found = await answer.json();
    if (answer.ok) drawServed(found);
    else error = found.error;
  } catch {
    error = "The server does not answer: is triton-gru-predict still running?";
  }
  byId("error").textContent = error;
  byId("shown").classList.toggle("stale", Boolean(error));
  asking = false;
  if (waiting) ask();
}

function drawServed(inspection) {
  draw(inspection);
  byId("next").replaceChildren(...inspection.next.at(-1).filter(([,, , text]) => text).map(
    ([label, p, , text]) => {
      const button = make("button", "", `${label} `);
      button.type = "button";
      button.append(make("small", "", percent(p)));
      button.addEventListener("click", () => {
        byId("text").value += text;
        byId("text").focus();
        ask();
      });
      return button;
    }));
}

const start = JSON.parse(byId("data").textContent);
if (start.served) {
  byId("typing").hidden = false;
  byId("text").value = start.text;
  byId("text").maxLength = start.most_characters;
  byId("layer").replaceChildren(...Array.from({ length: start.inspection.layers }, (_, i) => {
    const option = make("option", "", String(i + 1));
    option.value = i + 1;
    return option;
  }));
  byId("layer").value = start.inspection.layer;
  byId("layer-choice").hidden = start.inspection.layers === 1;
  byId("layer").addEventListener("change", ask);
  // Not while a Chinese character is being composed.
  byId("text").addEventListener("input", (event) => event.isComposing || ask());
  byId("text").addEventListener("compositionend", ask);
  drawServed(start.inspection);
} else {
  draw(start.inspection);
}
