"use strict";
// Draws the report. Whatever a run says goes through shown() into text nodes, never into markup.

const $ = (id) => document.getElementById(id);
const redraws = []; // charts, drawn again when the theme changes
const DASHES = ["solid", "dash", "dot", "dashdot"];
let plotly = null;

// ---------------------------------------------------------------- text

const CODE = (point) => `⟨U+${point.toString(16).toUpperCase().padStart(4, "0")}⟩`;
const HIDDEN = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/gu;

/** Control, direction and zero-width characters as what they are, not as what they do. */
function shown(text) {
  return String(text).replace(HIDDEN, (sign) => {
    const point = sign.codePointAt(0);
    return point < 0x20 ? String.fromCodePoint(0x2400 + point) : point === 0x7f ? "\u2421" : CODE(point);
  });
}

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  for (const child of children) made.append(child instanceof Node ? child : shown(child));
  return made;
}

async function bytes(id) {
  const packed = Uint8Array.from(atob($(id).textContent), (letter) => letter.charCodeAt(0));
  $(id).remove(); // megabytes that nobody needs twice
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

// ---------------------------------------------------------------- tables

const NUMBER = /^(–|-?[\d.,]+(e[+-]?\d+)?( ?(s|ms|min|h|%|×|[kMG]?B))?)$/;

function table(given, heading = true) {
  const numeric = given.columns.map((_, i) => i > 0 && given.rows.every((row) => NUMBER.test(row[i])));
  const cell = (value, i) => {
    if (i === 0) return node("th", { scope: "row" }, value);
    const made = node("td", numeric[i] ? { class: "number" } : {}, value.text || value);
    if (value.text) {
      const bar = node("span", { class: "bar", "aria-hidden": "true" }, node("span"));
      bar.firstChild.style.width = `${100 * value.share}%`;
      made.append(bar);
    }
    return made;
  };
  const made = node("table", {},
    node("caption", {}, given.caption),
    node("thead", {}, node("tr", {}, ...given.columns.map((name, i) => node("th", { scope: "col", ...(numeric[i] ? { class: "number" } : {}) }, name)))),
    node("tbody", {}, ...given.rows.map((row) => node("tr", {}, ...row.map(cell)))));
  if (!heading) made.caption.remove();
  const box = node("div", {}, node("div", { class: "wide", tabindex: "0", role: "group", "aria-label": given.caption }, made));
  if (given.note) box.append(node("p", { class: "faint" }, given.note));
  return box;
}

function alarms(found) {
  if (!found.length) return node("p", { class: "faint" }, "No alarms.");
  const list = node("div", { role: "region", "aria-label": "Alarms" }, node("h3", {}, "Alarms"));
  for (const alarm of found) {
    list.append(node("div", { class: `alarm ${alarm.severity === "critical" ? "critical" : "warning"}` },
      node("p", {}, node("strong", {}, `${alarm.severity}: ${alarm.name}`), ` · ${alarm.run}, ${alarm.when}`),
      node("p", {}, alarm.message), node("p", {}, node("em", {}, "What to do: "), alarm.remedy)));
  }
  return list;
}

// ---------------------------------------------------------------- charts

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const runColour = (i) => colour(`run${i % 6}`);

function layout(more = {}) {
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), automargin: true };
  return {
    margin: { l: 48, r: 12, t: 8, b: 36 }, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    font: { color: colour("ink"), size: 12 }, hovermode: "x unified",
    hoverlabel: { bgcolor: colour("paper"), bordercolor: colour("line"), font: { color: colour("ink") } },
    legend: { orientation: "h", y: -0.18 }, showlegend: false,
    ...more, xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, rangemode: "normal", ...more.yaxis },
  };
}

/** A figure: what it shows in words, and the chart that `traces` makes in the theme of the moment. */
function figure(caption, said, traces, more = () => ({})) {
  const plot = node("div", { class: "plot", role: "img", "aria-label": shown(`${caption}. ${said}`) });
  const made = node("figure", {}, node("figcaption", {}, caption), plot, node("span", { class: "faint" }, said));
  const draw = () => plotly.react(plot, traces(), layout(more()), { displayModeBar: false, responsive: true });
  redraws.push(draw);
  return [made, draw];
}

// Plotly reads a little HTML in names: a run called <b> must stay what it is called.
const plain = (text) => shown(text).replace(/[&<>]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[sign]);

const isNumber = (value) => typeof value === "number";

function smooth(values, width) {
  if (width < 2) return values.map((value) => (isNumber(value) ? value : null));
  return values.map((_, i) => {
    const near = values.slice(Math.max(0, i - width + 1), i + 1).filter(isNumber);
    return near.length ? near.reduce((a, b) => a + b, 0) / near.length : null;
  });
}

const short = (value) => (isNumber(value) ? String(Number(value.toPrecision(4))) : String(value));

/** Ticks at powers of ten, at 1, 2 and 5 of each, or where they fall: as the values spread. */
function logAxis(values) {
  const decades = Math.log10(values.reduce((a, b) => Math.max(a, b), 0) / values.reduce((a, b) => Math.min(a, b), Infinity));
  return { type: "log", tickformat: ".3~g", ...(decades > 3 ? { dtick: 1 } : decades > 0.8 ? { dtick: "D2" } : { nticks: 5 }) };
}

function curve(data, series, name) {
  const known = series.metrics.map((each, i) => ({ i, steps: each.step, values: each[name] })).filter((each) => each.values);
  const said = known.map(({ i, steps, values }) => {
    const last = values.findLast((value) => value !== null);
    const broken = steps.filter((_, k) => typeof values[k] === "string");
    const told = broken.length ? `; not finite ${broken.length} times, first at step ${broken[0]}` : "";
    return `${data.runs[i].name}: last ${short(last)}${told}`;
  }).join(" · ");
  const bounded = /ratio|percentage|frac|_time$/.test(name) && known.every(({ values }) => values.every((v) => !isNumber(v) || v >= 0));
  const isLog = data.logScale.includes(name) && known.every(({ values }) => values.every((v) => !isNumber(v) || v > 0));
  const traces = () => known.map(({ i, steps, values }) => {
    const kept = steps.map((_, k) => k).filter((k) => values[k] !== null); // evaluations are rare
    return {
      x: kept.map((k) => steps[k]), y: smooth(kept.map((k) => values[k]), Number($("smooth").value)),
      name: plain(data.runs[i].name), mode: kept.length < 12 ? "lines+markers" : "lines",
      line: { color: runColour(i), width: 1.8, dash: DASHES[i % 4] },
      hovertemplate: "%{y:.6~g}",
    };
  });
  const more = () => ({
    xaxis: { title: { text: "step", standoff: 4 } },
    yaxis: isLog ? logAxis(known.flatMap(({ values }) => values.filter(isNumber))) : { nticks: 6, rangemode: bounded ? "tozero" : "normal" },
    showlegend: known.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
  });
  const [made, draw] = figure(data.words[name], said, traces, more);
  if (data.words[name] !== name) made.firstChild.append(node("code", {}, name));
  return [made, draw];
}

const PARTS = ["#4c78a8", "#f58518", "#72b7b2", "#b279a2", "#54a24b", "#e45756", "#9d755d", "#bab0ac"];

function stacked(caption, stack, unit, byStep) {
  const names = Object.keys(stack.parts);
  const traces = () => names.map((name, i) => ({
    x: stack.labels, y: stack.parts[name], name: plain(name), type: byStep ? "scatter" : "bar",
    ...(byStep ? { stackgroup: "one", mode: "lines", line: { width: 0.5, color: PARTS[i % 8] }, fillcolor: PARTS[i % 8] }
      : { marker: { color: PARTS[i % 8] } }),
    hovertemplate: `%{y:.3s}${unit}`,
  }));
  const more = () => ({
    barmode: "stack", showlegend: true, legend: { orientation: "h", y: -0.25 },
    xaxis: byStep ? { title: { text: "step", standoff: 4 } } : {}, yaxis: { ticksuffix: unit, tickformat: "~s" },
  });
  const [made, draw] = figure(caption, "The figures are in the table below.", traces, more);
  made.querySelector(".plot").style.height = "340px";
  return [made, draw];
}

async function drawCharts(data, series) {
  const script = document.createElement("script");
  script.textContent = await bytes("plotly");
  document.head.append(script); // known to the page's policy by its hash
  plotly = window.Plotly;
  const names = Object.keys(data.words);
  const add = ([made, draw], place) => { place.append(made); draw(); };
  const held = names.filter((name) => names.includes(`${name}-truncated_ratio`)); // one a set
  for (const name of data.headlines.flatMap((each) => (each === "eval/*" ? held : [each]))) {
    if (names.includes(name)) add(curve(data, series, name), $("curve-grid"));
  }
  const chooser = $("add-curve");
  chooser.append(...names.map((name) => node("option", { value: name }, data.words[name] === name ? name : `${data.words[name]} (${name})`)));
  chooser.addEventListener("change", () => {
    if (!chooser.value) return;
    const [made, draw] = curve(data, series, chooser.value);
    $("curve-grid").prepend(made);
    draw();
    chooser.value = "";
  });
  $("smooth").addEventListener("change", () => redraws.forEach((draw) => draw()));
  const grids = { time: node("div", { class: "grid large" }), memory: node("div", { class: "grid large" }) };
  for (const [id, grid] of Object.entries(grids)) $(id).querySelector("h2").after(grid);
  data.runs.forEach((run, i) => {
    add(stacked(`Seconds of each step: ${run.name}`, series.stepTime[i], "s", true), grids.time);
    add(stacked(`Bytes held after entering each phase: ${run.name}`, data.memory[i], "B", false), grids.memory);
  });
}

// ---------------------------------------------------------------- samples

/* r run, s step, h held-out set, u prompt uid, p prompt, l label, w reward, v why no verdict, f ending,
   g weight version, a advantage, i token ids, t texts, e engine log-probs, d drift, n entropies,
   x the answer where the texts are not it */

function quantile(values) {
  const sorted = values.filter(isNumber).map(Math.abs).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(0.99 * (sorted.length - 1))] || sorted.at(-1) : 0;
}

const SHADES = { drift: "215 95 0", entropy: "135 70 235", up: "20 110 210", down: "215 95 0" };
const UNITS = { drift: "nats", entropy: "nats", advantage: "" };

function samplesView(data, samples) {
  const form = $("filters").elements;
  const scale = data.runs.map((_, run) => {
    const mine = samples.filter((sample) => sample.r === run);
    return {
      drift: quantile(mine.flatMap((sample) => sample.d)), entropy: quantile(mine.flatMap((sample) => sample.n)),
      advantage: quantile(mine.map((sample) => sample.a)),
    };
  });
  let found = [], count = 0, chosen = null;
  samples.sort((a, b) => (a.h !== b.h ? (a.h < b.h ? -1 : 1) : b.s - a.s || a.r - b.r)); // training first, then the newest

  function options(name, values, all, told = (value) => value) {
    form[name].append(node("option", { value: "" }, all), ...values.map((value, i) => node("option", { value: String(i) }, told(value))));
    return (value) => form[name].value === "" || values[Number(form[name].value)] === value;
  }
  const distinct = (of) => [...new Set(samples.map(of))].sort();
  const verdict = (sample) => sample.v || "graded";
  const tests = [
    [(s) => s.r, options("run", data.runs.map((_, i) => i), "all", (i) => data.runs[i].name)],
    [(s) => s.h, options("set", distinct((s) => s.h), "all", (name) => (name ? `held out: ${name}` : "training"))],
    [verdict, options("verdict", distinct(verdict), "any", (why) => (why === "graded" ? "graded" : `none: ${why}`))],
    [(s) => s.f, options("finish", distinct((s) => s.f), "any", (how) => ({ stop: "stop token", length: "length limit" })[how] || how)],
  ];
  const within = (name, value) => {
    const [low, high] = [form[`${name}-from`].value, form[`${name}-to`].value];
    return (low === "" || value >= Number(low)) && (high === "" || value <= Number(high));
  };

  function filter() {
    const text = form.text.value.toLowerCase();
    const holds = (s) => [s.u, s.p, s.l, s.x ?? s.t.join("")].some((each) => each.toLowerCase().includes(text));
    found = samples.filter((s) => tests.every(([of, passes]) => passes(of(s))) && within("step", s.s)
      && within("reward", s.w) && within("length", s.i.length) && (!text || holds(s)));
    $("count").textContent = `${found.length.toLocaleString("en")} of ${samples.length.toLocaleString("en")} samples`;
    count = 0;
    $("list").replaceChildren();
    extend();
    choose(found[0] ?? null);
  }

  function extend() {
    for (const sample of found.slice(count, count + 100)) {
      const grade = sample.v ? `no verdict (${sample.v})` : `reward ${sample.w}`;
      const run = data.runs.length > 1 ? `${data.runs[sample.r].name}, ` : "";
      const button = node("button", { type: "button" }, `${run}step ${sample.s} · ${grade} · ${sample.i.length} tokens`,
        node("small", {}, (sample.x ?? sample.t.join("")).slice(0, 80).replace(/\s+/g, " ")));
      button.addEventListener("click", () => choose(sample));
      button.sample = sample;
      $("list").append(node("li", {}, button));
    }
    count += 100;
    $("more").hidden = count >= found.length;
  }

  function choose(sample) {
    chosen = sample;
    for (const button of $("list").querySelectorAll("button")) button.setAttribute("aria-current", String(button.sample === sample));
    hideTip();
    if (!sample) return $("sample").replaceChildren(node("p", { class: "faint" }, "No sample passes the filters."));
    const facts = {
      Run: data.runs[sample.r].name, Step: `${sample.s}${sample.h ? `, held-out set ${sample.h}` : ""} (weights of version ${sample.g})`,
      "Right answer": sample.l, Reward: sample.v ? `none: ${sample.v}` : sample.w,
      Advantage: isNumber(sample.a) ? sample.a : "none: not counted in the loss",
      Ended: { stop: "by a stop token", length: "at the length limit" }[sample.f] || sample.f, Tokens: sample.i.length,
    };
    const list = node("dl", {}, ...Object.entries(facts).flatMap(([name, value]) => [node("dt", {}, name), node("dd", {}, value)]));
    const tokens = node("div", { class: "tokens", tabindex: "0", role: "group", id: "tokens",
      "aria-label": "Tokens of the answer: arrow keys move from one to the next" });
    tokens.append(...sample.t.map((text, i) => {
      const made = node("span", {}, text === "" ? "·" : text.replace(/\n/g, "↵\n"));
      made.index = i;
      return made;
    }));
    $("sample").replaceChildren(node("h3", {}, sample.u), list, node("h3", {}, "Prompt"), node("pre", { tabindex: "0" }, sample.p),
      node("h3", {}, "Answer"), tokens);
    if (sample.x !== undefined) $("sample").append(node("h3", {}, "Answer as text"), node("pre", { tabindex: "0" }, sample.x));
    paint();
  }

  function paint() {
    if (!chosen) return;
    const mode = $("colours").querySelector("input:checked").value;
    const values = { drift: chosen.d, entropy: chosen.n, advantage: chosen.t.map(() => chosen.a) }[mode] || [];
    const most = scale[chosen.r][mode];
    for (const span of $("tokens").children) {
      const value = values[span.index];
      const share = isNumber(value) && most ? Math.min(1, Math.abs(value) / most) : 0;
      const shade = mode === "advantage" ? SHADES[value > 0 ? "up" : "down"] : SHADES[mode];
      span.style.backgroundColor = typeof value === "string" && value !== "nan" ? "red" : share ? `rgb(${shade} / ${(0.6 * Math.sqrt(share)).toFixed(3)})` : "";
    }
    const signs = mode === "advantage" ? ", blue above 0 and orange below" : "";
    const known = values.some(isNumber);
    $("legend").textContent = mode === "none" ? "" : !known ? `not known of this sample: ${chosen.h ? "the trainer does not see held-out prompts" : "it was not trained on, or the run is of an earlier version"}`
      : `from 0 (clear) to ${short(most)} ${UNITS[mode]} (strongest; 99 % of the run's are below)${signs}`;
  }

  // ------------------------------------------------------------ one token

  function tip(span) {
    hideTip();
    span.classList.add("at");
    const i = span.index, engine = chosen.e[i], drift = chosen.d[i];
    const value = (number, digits) => (isNumber(number) ? number.toPrecision(digits) : number === undefined ? "not known" : String(number));
    const ours = isNumber(engine) && isNumber(drift) ? Number((engine + drift).toPrecision(10)) : drift === undefined ? undefined : "not finite";
    const rows = {
      Token: `${i + 1} of ${chosen.i.length}: id ${chosen.i[i]} “${chosen.t[i]}”`,
      "log p, engine": value(engine, 6), "log p, trainer": value(ours, 6), "drift (trainer − engine)": value(drift, 3),
      Advantage: isNumber(chosen.a) ? value(chosen.a, 4) : "none", Entropy: value(chosen.n[i], 3),
    };
    $("tip").replaceChildren(node("dl", {}, ...Object.entries(rows).flatMap(([name, each]) => [node("dt", {}, name), node("dd", {}, each)])));
    $("tip").hidden = false;
    const at = span.getClientRects()[0] || span.getBoundingClientRect(), box = $("tip").getBoundingClientRect();
    const below = at.bottom + 6 + box.height < innerHeight;
    $("tip").style.left = `${Math.max(4, Math.min(at.left, innerWidth - box.width - 8))}px`;
    $("tip").style.top = `${below ? at.bottom + 6 : Math.max(4, at.top - box.height - 6)}px`;
  }

  function hideTip() {
    $("tip").hidden = true;
    document.querySelector(".tokens .at")?.classList.remove("at");
  }

  $("sample").addEventListener("mouseover", (event) => (event.target.index === undefined ? hideTip() : tip(event.target)));
  $("sample").addEventListener("mouseleave", hideTip);
  $("sample").addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hideTip();
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!by || event.target.id !== "tokens") return;
    event.preventDefault();
    const at = document.querySelector(".tokens .at"), all = $("tokens").children;
    const next = at ? Math.max(0, Math.min(all.length - 1, at.index + by)) : 0;
    all[next]?.scrollIntoView({ block: "nearest" });
    if (all[next]) tip(all[next]);
  });
  $("sample").addEventListener("focusout", hideTip);
  $("filters").addEventListener("input", filter);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("reset", () => setTimeout(filter));
  $("colours").addEventListener("change", paint);
  $("more").addEventListener("click", extend);
  form.run.parentElement.hidden = data.runs.length < 2;
  filter();
}

// ---------------------------------------------------------------- the page

function theme() {
  const asked = $("theme").value;
  const dark = asked ? asked === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  if (plotly) redraws.forEach((draw) => draw());
}

async function main() {
  $("theme").addEventListener("change", theme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", theme);
  theme();
  const [data, series, said] = (await Promise.all(["data", "series", "said"].map(bytes))).map((text) => JSON.parse(text));
  const { tables } = data;
  document.title = shown(`${data.runs.map((run) => run.name).join(", ")} – miles-lite report`);
  const overview = table(tables.overview, false);
  [...overview.querySelectorAll("thead th")].slice(1).forEach((cell, i) => {
    const swatch = node("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = `var(--run${i % 6})`;
    cell.prepend(swatch);
  });
  $("overview").append(alarms(data.alarms), overview);
  $("time").append(table(tables.step_time));
  $("memory").append(table(tables.memory));
  $("waste").append(table(tables.ledger));
  $("plan").append(table(tables.limits), table(tables.planned));
  $("drift").append(table(tables.drift), table(tables.causes));
  if (data.runs.length > 1) $("config").append(tables.differences.rows.length ? table(tables.differences) : node("p", {}, "The runs have the same settings and environment."));
  $("config").append(node("details", {}, node("summary", {}, "All settings, and where the runs took place"), table(tables.configuration)));
  if (said.stride > 1) $("curve-grid").before(node("p", { class: "faint" }, `Every ${said.stride}th step is drawn, to keep the file small.`));
  $("samples-told").textContent = shown([said.told, ...said.notes].join(" "));
  const samples = (await bytes("packed-samples")).split("\n").filter(Boolean).map((line) => JSON.parse(line));
  if (samples.length) samplesView(data, samples);
  else [...$("samples").children].slice(1).forEach((each) => { each.hidden = each.id !== "samples-told"; });
  await drawCharts(data, series);
  $("state").hidden = true;
  document.documentElement.dataset.ready = "true";
}

main().catch((error) => {
  $("state").hidden = false;
  $("state").className = "alarm critical";
  $("state").textContent = shown(`This report could not be drawn: ${error}. It needs a browser of 2023 or later.`);
  throw error;
});
