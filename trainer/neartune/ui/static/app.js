// The page of `neartune ui`. No build step: what is here is what runs. Text goes in by text nodes only.

const LANGUAGES = ["en", "zh"];
const HTML_LANGUAGE = { en: "en", zh: "zh-CN" };
const OFTEN = 1000;
const SELDOM = 4000;
const ACTIVE = ["running", "starting", "waiting"];

const words = {};
let language = "en";
let leave = () => {};

// — words, numbers ————————————————————————————————————————————————————————————————————————————————

function say(key, values = {}) {
  const text = words[language][key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

const format = (options) => new Intl.NumberFormat(HTML_LANGUAGE[language], options);
const count = (value) => format({ maximumFractionDigits: 0 }).format(value);

function number(value) {
  if (value === null || value === undefined) return "–";
  return value !== 0 && Math.abs(value) < 1e-4 ? value.toExponential(2) : format({ maximumSignificantDigits: 4 }).format(value);
}

const percent = (value) => format({ style: "percent", maximumSignificantDigits: 3 }).format(value);

function bytes(value) {
  if (value < 1000) return `${count(value)} B`;
  const units = ["byte", "kilobyte", "megabyte", "gigabyte", "terabyte"];
  let at = 0;
  for (; value >= 1000 && at < units.length - 1; at += 1) value /= 1000;
  return format({ style: "unit", unit: units[at], unitDisplay: "short", maximumSignificantDigits: 3 }).format(value);
}

function duration(seconds) {
  const unit = (value, name) => format({ style: "unit", unit: name, unitDisplay: "short", maximumFractionDigits: 0 }).format(value);
  if (seconds < 90) return unit(Math.ceil(seconds), "second");
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return unit(minutes, "minute");
  return `${unit(Math.floor(minutes / 60), "hour")} ${unit(minutes % 60, "minute")}`;
}

const moment = (text) =>
  new Intl.DateTimeFormat(HTML_LANGUAGE[language], { dateStyle: "medium", timeStyle: "short" }).format(new Date(text));

// — elements ——————————————————————————————————————————————————————————————————————————————————————

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && name !== "list" && !(node instanceof SVGElement)) node[name] = value;
    else if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false && child !== ""));
  return node;
}

/** In place of what was in `node`. */
function put(node, ...children) {
  node.replaceChildren();
  return fill(node, {}, children);
}

const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function announce(text) {
  document.getElementById("status").textContent = text;
}

/** Of what goes wrong again and again, until it does not. */
function warn(text) {
  const banner = document.getElementById("banner");
  if (banner.textContent !== text) banner.textContent = text;
  banner.hidden = !text;
}

function field(label, input, more = {}) {
  input.id ||= `f${Math.random().toString(36).slice(2)}`;
  return h("div", { className: `field ${more.className ?? ""}` }, h("label", { htmlFor: input.id }, label), input);
}

function badge(state) {
  return h("span", { className: `badge ${state}` }, say(`state.${state}`));
}

/** A whole answer may be empty, or nothing but line breaks. */
const answerText = (text) => text.trim() || "–";

const metrics = (found) =>
  Object.entries(found ?? {})
    .map(([name, value]) => `${name} ${number(value)}`)
    .join(", ");

// — the server ————————————————————————————————————————————————————————————————————————————————————

class Refused extends Error {
  constructor(status, found) {
    super(say(`error.${found.error}`, { status, ...found.values }));
    this.values = found.values;
  }
}

async function answered(response) {
  if (response.ok) return response;
  let found = { error: "http", values: {} };
  if (response.headers.get("Content-Type")?.startsWith("application/json")) found = await response.json();
  throw new Refused(response.status, found);
}

async function send(path, options) {
  try {
    return await answered(await fetch(path, options));
  } catch (error) {
    if (error instanceof TypeError) throw new Error(say("error.gone"));
    throw error;
  }
}

async function get(name, query = {}, signal = undefined) {
  const asked = new URLSearchParams(query).toString();
  return (await send(`api/${name}${asked && "?"}${asked}`, { signal })).json();
}

async function post(name, body = {}, signal = undefined) {
  return send(`api/${name}`, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
}

const isAbort = (error) => error.name === "AbortError";

/** Calls `work(signal)` now and again until the view is left; it returns how long to wait. */
function repeat(work) {
  const ending = new AbortController();
  let timer = 0;
  const round = async () => {
    let wait = SELDOM;
    try {
      if (!document.hidden) wait = await work(ending.signal);
      warn("");
    } catch (error) {
      if (isAbort(error)) return;
      warn(error.message);
    }
    if (!ending.signal.aborted) timer = setTimeout(round, wait);
  };
  round();
  return {
    end: () => { ending.abort(); clearTimeout(timer); },
    now: () => { clearTimeout(timer); round(); },
  };
}

// — a curve ———————————————————————————————————————————————————————————————————————————————————————

/** Of [step, value] points in order: for each bucket of steps its middle, mean, least and most. */
export function buckets(points, first, last, most) {
  const wide = Math.max(1, (last - first + 1) / most);
  const found = [];
  let open = null;
  for (const [step, value] of points) {
    if (value === null) continue;
    const at = Math.floor((step - first) / wide);
    if (open?.at !== at) found.push((open = { at, from: step, to: step, sum: 0, count: 0, least: value, most: value }));
    open.to = step;
    open.sum += value;
    open.count += 1;
    open.least = Math.min(open.least, value);
    open.most = Math.max(open.most, value);
  }
  return found.map((one) => ({ step: (one.from + one.to) / 2, mean: one.sum / one.count, least: one.least, most: one.most }));
}

function ticks(least, most, about) {
  const raw = (most - least) / about || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= raw);
  const found = [];
  for (let at = Math.ceil(least / step) * step; at <= most + step / 1e6; at += step) found.push(at);
  return found;
}

/** `lines` and `dots`: lists of {points, second}. */
function curve(svg, label, lines, dots) {
  const wide = Math.max(280, svg.clientWidth || 600);
  const high = wide < 500 ? 200 : 260;
  const [left, right, top, bottom] = [46, 8, 8, 22];
  svg.setAttribute("viewBox", `0 0 ${wide} ${high}`);
  const steps = [...lines, ...dots].flatMap((line) => line.points.map(([step]) => step));
  const last = steps.reduce((a, b) => Math.max(a, b), 2);
  const first = steps.includes(0) ? 0 : 1;
  const drawn = lines.map((line) => ({ ...line, parts: buckets(line.points, first, last, (wide - left - right) / 2) }));
  const values = [
    ...drawn.flatMap((line) => line.parts.flatMap((part) => [part.least, part.most])),
    ...dots.flatMap((line) => line.points.map(([, value]) => value).filter((value) => value !== null)),
  ];
  const least = Math.min(...values);
  const most = Math.max(...values);
  const slack = (most - least || Math.abs(most) || 1) * 0.05;
  const x = (step) => left + ((step - first) / (last - first)) * (wide - left - right);
  const y = (value) => top + ((most + slack - value) / (most - least + 2 * slack)) * (high - top - bottom);
  const at = (step, value) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`;
  const parts = [s("title", {}, label)];
  for (const value of values.length ? ticks(least - slack, most + slack, 4) : []) {
    parts.push(s("path", { class: "grid", d: `M${left} ${y(value)}H${wide - right}` }));
    parts.push(s("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, number(value)));
  }
  for (const step of ticks(first, last, wide / 110).filter((one) => Number.isInteger(one))) {
    const anchor = step >= last - (last - first) / 40 ? "end" : "middle";
    parts.push(s("text", { x: x(step), y: high - 4, "text-anchor": anchor }, count(step)));
  }
  for (const line of drawn.filter((one) => one.parts.length)) {
    const second = line.second ? " second" : "";
    const up = line.parts.map((part) => at(part.step, part.most));
    const down = line.parts.map((part) => at(part.step, part.least)).reverse();
    if (line.parts.length > 1) parts.push(s("path", { class: `band${second}`, d: `M${[...up, ...down].join("L")}Z` }));
    parts.push(s("path", { class: `line${second}`, d: `M${line.parts.map((part) => at(part.step, part.mean)).join("L")}` }));
    if (line.parts.length === 1) parts.push(dot(line.parts[0].step, line.parts[0].mean, second));
  }
  for (const line of dots) {
    for (const [step, value] of line.points) if (value !== null) parts.push(dot(step, value, line.second ? " second" : ""));
  }
  put(svg, ...parts);

  function dot(step, value, second) {
    return s("circle", { class: second.trim(), cx: x(step), cy: y(value), r: 3.5 }, s("title", {}, `${count(step)}: ${number(value)}`));
  }
}

// — a new run —————————————————————————————————————————————————————————————————————————————————————

const draft = { preset: "", text: "", name: "", at_once: false };

function keepDraft() {
  localStorage.setItem("neartune.draft", JSON.stringify(draft));
}

function suggested() {
  const now = new Date();
  const two = (value) => String(value).padStart(2, "0");
  return `run-${two(now.getMonth() + 1)}${two(now.getDate())}-${two(now.getHours())}${two(now.getMinutes())}${two(now.getSeconds())}`;
}

async function newRun(main) {
  const { presets, home } = await get("presets");
  if (!presets.length) {
    put(main, h("h1", {}, say("new.title")), h("p", { className: "error" }, say("new.none")));
    return undefined;
  }
  const chosen = () => presets.find((preset) => preset.name === draft.preset) ?? presets[0];
  if (!draft.text || !presets.some((preset) => preset.name === draft.preset)) {
    draft.preset = presets[0].name;
    draft.text = presets[0].text;
  }
  draft.name ||= suggested();

  const choice = h("select", { onchange: choose }, presets.map((one) => h("option", { value: one.name }, one.name)));
  choice.value = draft.preset;
  const again = h("button", { type: "button", onclick: choose }, say("new.again"));
  const where = h("p", { className: "soft" });
  const gutter = h("div", { className: "gutter", ariaHidden: "true" });
  const notes = h("ul", { className: "notes", id: "notes" });
  const area = h("textarea", {
    id: "recipe", spellcheck: false, autocapitalize: "off", autocomplete: "off", wrap: "off", value: draft.text,
    oninput: edited, onkeydown: indent,
  });
  area.setAttribute("aria-label", say("new.recipe"));
  area.setAttribute("aria-describedby", "notes");
  const verdict = h("p", { className: "verdict", role: "status" });
  const advice = h("div");
  const name = h("input", { type: "text", id: "name", value: draft.name, maxLength: 64, size: 24, oninput: () => { draft.name = name.value.trim(); keepDraft(); } });
  const atOnce = h("input", { type: "checkbox", id: "at-once", checked: draft.at_once, onchange: () => { draft.at_once = atOnce.checked; keepDraft(); } });
  const planning = h("button", { type: "button", id: "plan", onclick: plan }, say("new.plan"));
  const starting = h("button", { type: "button", id: "start", className: "main", onclick: start }, say("new.start"));
  const trouble = h("div", { role: "alert" });
  const planned = h("div", { id: "planned" });

  put(main,
    h("h1", {}, say("new.title")),
    h("div", { className: "row" }, field(say("new.preset"), choice), again),
    where,
    h("div", { className: "editor" }, h("div", { className: "paper" }, gutter, area), notes),
    verdict,
    advice,
    h("div", { className: "row" }, field(say("new.name"), name, { className: "grow" }), planning, starting),
    h("div", { className: "check" }, atOnce, h("label", { htmlFor: "at-once" }, say("new.at_once"))),
    trouble,
    planned,
  );

  let complaints = [];
  let checking = null;
  let planRequest = null;
  let timer = 0;
  told();
  resized();
  check();
  window.addEventListener("resize", place);

  function told() {
    where.textContent = say("new.where", { directory: chosen().directory, home });
  }

  function choose() {
    draft.preset = choice.value;
    draft.text = area.value = chosen().text;
    told();
    edited();
  }

  function edited() {
    draft.text = area.value;
    keepDraft();
    resized();
    clearTimeout(timer);
    timer = setTimeout(check, 250);
  }

  function indent(event) {
    if (event.key === "Escape") area.blur();
  }

  function resized() {
    const lines = area.value.split("\n").length;
    const wrong = new Set(complaints.map((one) => one.line));
    put(gutter,
    ...Array.from({ length: lines }, (_, at) => h("span", { className: wrong.has(at + 1) ? "wrong" : "" }, String(at + 1))),
    );
    area.rows = lines + 1;
  }

  async function check() {
    checking?.abort();
    checking = new AbortController();
    try {
      const found = await (await post("check", { preset: draft.preset, text: area.value }, checking.signal)).json();
      show(found.complaints, found.advice);
    } catch (error) {
      if (!isAbort(error)) show([{ line: null, text: error.message }], []);
    }
  }

  function show(found, lines) {
    complaints = found;
    resized();
    put(notes,
    ...found.map((one) =>
        h("li", {},
          one.line !== null && h("button", { type: "button", className: "link", onclick: () => jump(one.line) }, say("new.line", { line: one.line })),
          h("span", { lang: "en" }, one.text)),
      ),
    );
    place();
    verdict.className = `verdict ${found.length ? "wrong" : "good"}`;
    verdict.textContent = found.length ? say(found.length === 1 ? "new.wrong_one" : "new.wrong", { count: count(found.length) }) : say("new.good");
    area.setAttribute("aria-invalid", String(found.length > 0));
    put(advice, ...lines.map((line) => h("p", { className: "soft" }, say("new.advice"), h("span", { lang: "en" }, line))));
    starting.disabled = planning.disabled = found.length > 0;
  }

  /** Beside their lines, one below the other. */
  function place() {
    const at = gutter.getBoundingClientRect().top - notes.getBoundingClientRect().top;
    let free = 0;
    complaints.forEach((one, index) => {
      const note = notes.children[index];
      const line = gutter.children[(one.line ?? 1) - 1];
      const top = Math.max(free, line ? at + line.offsetTop - gutter.offsetTop : 0);
      note.style.top = `${top}px`;
      free = top + note.offsetHeight + 4;
    });
  }

  function jump(line) {
    const before = area.value.split("\n").slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
    const end = area.value.indexOf("\n", before);
    area.focus();
    area.setSelectionRange(before, end < 0 ? area.value.length : end);
  }

  async function plan() {
    planRequest?.abort();
    planRequest = new AbortController();
    trouble.replaceChildren();
    put(planned, h("p", { className: "soft" }, say("plan.working")));
    planning.disabled = true;
    try {
      showPlan(planned, await (await post("plan", { preset: draft.preset, text: area.value }, planRequest.signal)).json());
      announce(say("plan.title"));
    } catch (error) {
      planned.replaceChildren();
      if (!isAbort(error)) refuse(error);
    }
    planning.disabled = complaints.length > 0;
  }

  function refuse(error) {
    if (error.values?.complaints) return show(error.values.complaints, []);
    put(trouble, h("p", { className: "error" }, error.message));
    return undefined;
  }

  async function start() {
    starting.disabled = true;
    trouble.replaceChildren();
    try {
      const found = await (await post("start", { preset: draft.preset, text: area.value, name: name.value.trim(), at_once: atOnce.checked })).json();
      draft.name = "";
      keepDraft();
      location.hash = `#/run/${encodeURIComponent(found.name)}`;
    } catch (error) {
      refuse(error);
      starting.disabled = complaints.length > 0;
    }
  }

  return () => {
    clearTimeout(timer);
    checking?.abort();
    planRequest?.abort();
    window.removeEventListener("resize", place);
  };
}

const tile = (label, value, more = "") => h("div", {}, h("dt", {}, label), h("dd", {}, value), more && h("dd", {}, more));

function bars(rows) {
  const most = Math.max(...rows.map((row) => row.value), 1e-9);
  const bar = (value) =>
    s("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" }, s("rect", { class: "bar", width: (100 * value) / most, height: 10 }));
  return h("div", { className: "bars" }, rows.flatMap((row) => [h("span", {}, row.label), h("span", { className: "number" }, row.text), bar(row.value)]));
}

/** With what is learnt, between ⟦ and ⟧, marked. */
function marked(text) {
  return text.split(/⟦|⟧/).map((part, at) => (at % 2 ? h("mark", {}, part) : part));
}

function showPlan(node, plan) {
  const total = plan.memory.reduce((sum, part) => sum + part.bytes, 0);
  const set = plan.settings.filter((setting) => setting.origin !== "default");
  put(node,
    h("h2", {}, say("plan.title")),
    h("p", {}, plan.base, plan.has_weights ? "" : ` · ${say("plan.to_fetch", { size: bytes(plan.base_bytes) })}`),
    h("dl", { className: "numbers" },
      tile(say("plan.rows"), count(plan.rows), say("plan.held_out", { count: count(plan.held_out) })),
      tile(say("plan.steps"), count(plan.steps), say("plan.evaluations", { count: count(plan.evaluations) })),
      tile(say("plan.time"), plan.eta === null ? "–" : duration(plan.eta), plan.eta === null ? say("plan.no_time") : say("plan.measured")),
      tile(say("plan.learnt"), count(plan.learnt), say("plan.of", { count: count(plan.parameters), share: percent(plan.learnt / plan.parameters) })),
      tile(say("plan.memory"), bytes(total), say("plan.limit", { size: bytes(plan.memory_limit), device: plan.device })),
      tile(say("plan.disk"), bytes(plan.disk), say("plan.free", { size: bytes(plan.disk_free) }))),
    plan.said.filter((line) => !plan.sample || !line.includes(plan.sample)).map((line) => h("p", { className: "soft", lang: "en" }, line)),
    plan.sample && [h("h2", {}, say("plan.sample")), h("pre", {}, marked(plan.sample))],
    plan.lengths.length > 0 && [
      h("h2", {}, say("plan.lengths")),
      bars(plan.lengths.map((bin) => ({ label: bin.low === bin.high ? count(bin.low) : `${count(bin.low)}–${count(bin.high)}`, text: count(bin.rows), value: bin.rows }))),
    ],
    h("h2", {}, say("plan.memory_parts")),
    bars(plan.memory.map((part) => ({ label: h("span", { lang: "en" }, part.name), text: bytes(part.bytes), value: part.bytes }))),
    h("h2", {}, say("plan.modules")),
    h("div", { className: "scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, h("th", {}, say("plan.module")), h("th", { className: "number" }, say("plan.how_many")), h("th", { className: "number" }, say("plan.parameters")))),
      h("tbody", {}, plan.kinds.map((kind) => h("tr", {}, h("td", {}, kind.name), h("td", { className: "number" }, count(kind.modules)), h("td", { className: "number" }, count(kind.parameters))))))),
    h("h2", {}, say("plan.settings")),
    h("div", { className: "scroll" }, h("table", {}, h("tbody", {}, set.map((setting) =>
      h("tr", {}, h("td", {}, setting.name), h("td", {}, shown(setting.value)), h("td", { className: "soft" }, setting.origin)))))),
  );
}

const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));

// — runs ——————————————————————————————————————————————————————————————————————————————————————————

const picked = new Set();

function progressText(run) {
  if (!run.step && !run.steps) return "";
  return run.steps ? say("runs.step_of", { step: count(run.step), steps: count(run.steps) }) : say("runs.step", { step: count(run.step) });
}

async function listed(main) {
  const body = h("tbody");
  const table = h("table", { className: "cards" },
    h("thead", {}, h("tr", {}, h("th", {}, h("span", { className: "unseen" }, say("runs.pick"))),
      ["run", "state", "progress", "base", "best", "changed"].map((one) => h("th", {}, say(`runs.${one}`))))),
    body);
  const button = h("button", { type: "button", id: "compare", onclick: () => {
    const [a, b] = [...picked];
    location.hash = `#/compare/${encodeURIComponent(a)}/${encodeURIComponent(b)}`;
  } }, say("runs.compare"));
  const empty = h("p", { className: "soft" });
  put(main,
    h("h1", {}, say("runs.title")),
    empty,
    table,
    h("div", { className: "row level" }, button, h("span", { className: "soft" }, say("runs.pick_two"))),
  );
  let before = "";
  const loop = repeat(async (signal) => {
    const { runs } = await get("runs", {}, signal);
    const now = JSON.stringify(runs);
    if (now !== before) draw(runs);
    before = now;
    return runs.some((run) => ACTIVE.includes(run.state)) ? OFTEN : SELDOM;
  });
  limit();

  function limit() {
    button.disabled = picked.size !== 2;
    for (const box of body.querySelectorAll("input")) box.disabled = picked.size === 2 && !box.checked;
  }

  function draw(runs) {
    const focused = document.activeElement?.dataset?.run;
    for (const name of picked) if (!runs.some((run) => run.name === name)) picked.delete(name);
    table.hidden = !runs.length;
    empty.textContent = runs.length ? "" : say("runs.none");
    put(body, ...runs.map((run) => {
      const box = h("input", { type: "checkbox", checked: picked.has(run.name), onchange: () => {
        if (box.checked) picked.add(run.name);
        else picked.delete(run.name);
        limit();
      } });
      box.dataset.run = run.name;
      box.setAttribute("aria-label", say("runs.pick_run", { name: run.name }));
      return h("tr", {},
        h("td", { className: "pick" }, box),
        h("td", {}, h("a", { href: `#/run/${encodeURIComponent(run.name)}` }, run.name),
          (run.served ?? []).map((one) => h("div", { className: "served" }, say("runs.served", { name: one })))),
        h("td", {}, badge(run.state)),
        h("td", {}, progressText(run)),
        h("td", { className: "wide" }, run.base ?? ""),
        h("td", { className: "wide" }, metrics(run.metrics)),
        h("td", { className: "soft" }, run.changed ? moment(run.changed) : ""));
    }));
    limit();
    if (focused) body.querySelector(`input[data-run="${CSS.escape(focused)}"]`)?.focus();
  }

  return loop.end;
}

// — one run ———————————————————————————————————————————————————————————————————————————————————————

async function oneRun(main, name) {
  const seen = { steps: [], evaluations: [], samples: null, machine: null, line: null, at: 0, logAt: 0, state: "" };
  const state = h("p", { id: "state" });
  const actions = h("div", { className: "row" });
  const trouble = h("div", { role: "alert" });
  const bar = h("progress", { max: 1, value: 0 });
  bar.setAttribute("aria-label", say("run.progress"));
  const tiles = h("dl", { className: "numbers" });
  const svg = s("svg", { role: "img" });
  const figure = h("figure", {}, h("figcaption", {}, h("span", { className: "key" }, say("run.loss")), h("span", { className: "key dots" }, say("run.held_out"))), svg);
  const sections = { evaluations: h("section"), samples: h("section"), machine: h("section"), recipe: h("section") };
  const log = h("pre", { tabIndex: 0, lang: "en" });
  log.setAttribute("aria-label", say("run.log"));
  put(main,
    h("h1", {}, name), state, actions, trouble, bar, tiles, figure,
    sections.evaluations, sections.samples, sections.machine,
    h("h2", {}, say("run.log")), log, sections.recipe,
  );
  const drawings = {};
  window.addEventListener("resize", drawCurve);

  const loop = repeat(async (signal) => {
    const run = await get("run", { name }, signal);
    for (let more = true; more;) more = await readMetrics(signal);
    await readLog(signal);
    draw(run);
    return run.job?.state === "running" || ACTIVE.includes(run.state) ? OFTEN : SELDOM;
  });

  async function readMetrics(signal) {
    const found = await get("metrics", { name, from: seen.at }, signal);
    if (found.anew) Object.assign(seen, { steps: [], evaluations: [], samples: null, machine: null, line: null });
    seen.at = found.next;
    for (const line of found.lines) note(line);
    return found.more;
  }

  function note(line) {
    if (line.kind === "eval") {
      seen.evaluations = seen.evaluations.filter((one) => one.step < line.step);
      seen.evaluations.push(line);
    } else if (line.kind === "samples") seen.samples = line;
    else if (line.kind === "machine") seen.machine = line;
    else if (line.kind === undefined) {
      while (seen.steps.length && seen.steps[seen.steps.length - 1][0] >= line.step) seen.steps.pop(); // it went on from a checkpoint
      seen.steps.push([line.step, line.loss]);
      seen.line = line;
    }
  }

  async function readLog(signal) {
    const found = await get("log", { name, from: seen.logAt }, signal);
    seen.logAt = found.next;
    if (found.anew) log.textContent = "";
    if (found.text) {
      if (!seen.hasLog) log.textContent = "";
      seen.hasLog = true;
      const isAtEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 20;
      log.append(found.text);
      if (log.textContent.length > 400000) log.textContent = log.textContent.slice(-200000);
      if (isAtEnd) log.scrollTop = log.scrollHeight;
    } else if (!seen.hasLog) log.textContent = say("run.no_log");
  }

  /** Draws a part again only when what it shows has changed. */
  function part(key, value, work) {
    const now = JSON.stringify(value);
    if (drawings[key] !== now) work();
    drawings[key] = now;
  }

  function draw(run) {
    if (seen.state && seen.state !== run.state) announce(`${name}: ${say(`state.${run.state}`)}`);
    seen.state = run.state;
    part("state", [run.state, run.why, run.base, run.task], () =>
      put(state, badge(run.state), " ", h("span", { className: "soft" }, [run.base, run.task].filter(Boolean).join(" · ")),
        run.why && h("span", { className: "error", lang: "en" }, run.why)));
    part("actions", [run.state, run.has_report, run.can_continue], () => drawActions(run));
    bar.hidden = !run.steps;
    bar.value = run.steps ? run.step / run.steps : 0;
    part("tiles", [run.step, run.steps, run.eta, run.state, seen.line], () => drawTiles(run));
    part("curve", [seen.at, seen.steps.length], drawCurve);
    part("evaluations", seen.evaluations, drawEvaluations);
    part("samples", seen.samples, drawSamples);
    part("machine", seen.machine, drawMachine);
    part("recipe", run.recipe, () => drawRecipe(run));
  }

  function drawActions(run) {
    const isActive = ACTIVE.includes(run.state);
    const button = (id, text, path, body) => h("button", { type: "button", id, onclick: async (event) => {
      event.target.disabled = true;
      trouble.replaceChildren();
      try {
        await post(path, { name, ...body });
        delete drawings.actions;
        if (path === "stop") put(trouble, h("p", { className: "soft" }, say("run.stopping")));
        loop.now();
      } catch (error) {
        put(trouble, h("p", { className: "error" }, error.message));
        event.target.disabled = false;
      }
    } }, text);
    if (!isActive) trouble.replaceChildren();
    put(actions, [
      isActive && run.job && run.job.state !== "ended" && button("stop", say("run.stop"), "stop", {}),
      !isActive && run.can_continue && button("continue", say("run.continue"), "continue", { at_once: false }),
      run.has_report && h("a", { id: "report", href: `report?name=${encodeURIComponent(name)}`, target: "_blank", rel: "noopener" }, say("run.report")),
      run.state === "finished" && run.task === "text-generation" && h("a", { href: `#/chat/${encodeURIComponent(name)}` }, say("run.chat")),
    ].filter(Boolean));
  }

  function drawTiles(run) {
    const line = seen.line;
    put(tiles, [
      tile(say("run.step"), count(run.step), run.steps ? say("run.of_steps", { steps: count(run.steps) }) : ""),
      line && tile(say("run.loss"), number(line.loss)),
      line && run.state !== "finished" && run.eta !== null && ACTIVE.includes(run.state) && tile(say("run.left"), duration(run.eta)),
      run.seconds && tile(say("run.took"), duration(run.seconds)),
      line && tile(say("run.rate"), number(line.tokens_per_second), say("run.tokens")),
      line && tile(say("run.learning_rate"), number(line.learning_rate)),
      line && tile(say("run.grad_norm"), number(line.grad_norm)),
      line && tile(say("run.micro"), count(line.micro_batch)),
    ].filter(Boolean));
  }

  function drawCurve() {
    figure.hidden = !seen.steps.length;
    if (figure.hidden) return;
    curve(svg, say("run.curve"), [{ points: seen.steps }], [{ points: seen.evaluations.map((one) => [one.step, one.loss]), second: true }]);
  }

  function drawEvaluations() {
    const rows = seen.evaluations;
    if (!rows.length) return sections.evaluations.replaceChildren();
    const names = Object.keys(rows[0]).filter((key) => typeof rows[0][key] === "number" && key !== "step");
    const recent = [rows[0], ...rows.slice(1).slice(-9)];
    return put(sections.evaluations,
    h("h2", {}, say("run.evaluations")),
      h("div", { className: "scroll" }, h("table", {},
        h("thead", {}, h("tr", {}, h("th", { className: "number" }, say("run.step")), names.map((one) => h("th", { className: "number" }, one)))),
        h("tbody", {}, recent.map((row) => h("tr", {}, h("td", { className: "number" }, row.step ? count(row.step) : say("run.before")),
          names.map((one) => h("td", { className: "number" }, number(row[one])))))))),
    );
  }

  function drawSamples() {
    if (!seen.samples) return sections.samples.replaceChildren();
    return put(sections.samples,
    h("h2", {}, say("run.samples", { step: count(seen.samples.step) })),
      h("div", { className: "samples" }, seen.samples.samples.map((one) => h("div", {}, h("strong", {}, one.prompt),
        h("div", { className: "sides" },
          h("div", { className: "said" }, h("small", {}, say("run.base_says")), answerText(one.base)),
          h("div", { className: "said" }, h("small", {}, say("run.adapter_says")), answerText(one.adapter)))))),
    );
  }

  function drawMachine() {
    const one = seen.machine;
    if (!one) return sections.machine.replaceChildren();
    return put(sections.machine,
    h("h2", {}, say("run.machine")),
      h("dl", { className: "numbers" },
        tile(say("run.cpu"), percent(one.cpu / 100), say("run.cpu_own", { share: percent(one.process_cpu / 100), cores: count(one.cores) })),
        tile(say("run.memory"), bytes(one.memory_used), say("run.memory_own", { total: bytes(one.memory_total), own: bytes(one.process_memory) })),
        tile(say("run.disk"), bytes(one.disk_free), say("run.disk_rate", { read: bytes(one.disk_read), write: bytes(one.disk_write) })),
        tile(say("run.network"), say("run.per_second", { size: bytes(one.net_in) }), say("run.sent", { size: bytes(one.net_out) })),
        (one.gpus ?? []).map((gpu) => tile(gpu.name, gpu.utilisation === null ? "–" : percent(gpu.utilisation / 100),
          [gpu.memory_used !== null && `${bytes(gpu.memory_used)} / ${bytes(gpu.memory_total)}`, gpu.temperature !== null && `${count(gpu.temperature)} °C`, gpu.power !== null && `${count(gpu.power)} W`].filter(Boolean).join(" · ")))),
    );
  }

  function drawRecipe(run) {
    const rows = Object.entries(run.recipe ?? {});
    if (!rows.length) return sections.recipe.replaceChildren();
    return put(sections.recipe,
    h("h2", {}, say("run.recipe")),
      h("details", {}, h("summary", {}, say("run.recipe_show", { count: count(rows.length) })),
        h("div", { className: "scroll" }, h("table", {}, h("tbody", {}, rows.map(([key, value]) => h("tr", {}, h("td", {}, key), h("td", {}, shown(value)))))))),
    );
  }

  return () => {
    loop.end();
    window.removeEventListener("resize", drawCurve);
  };
}

// — two runs ——————————————————————————————————————————————————————————————————————————————————————

async function compared(main, a, b) {
  const found = await get("compare", { a, b });
  const svg = s("svg", { role: "img" });
  const column = (at) => found.losses.filter((row) => row[at] !== null && row[at] !== undefined).map((row) => [row[0], row[at]]);
  const dots = found.evaluations.map((points, at) => ({ points, second: at === 1 }));
  const differences = Object.entries(found.differences);
  const link = (name, at) => h("a", { href: `#/run/${encodeURIComponent(name)}`, className: `key${at ? " second" : ""}` }, name);
  const rows = (pairs, render) => pairs.map(([name, [one, two]]) => h("tr", {}, h("td", {}, name), h("td", {}, render(one)), h("td", {}, render(two))));
  const table = (title, body) => [h("h2", {}, title), h("div", { className: "scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, h("th", {}), found.runs.map((name) => h("th", {}, name)))), h("tbody", {}, body)))];
  put(main,
    h("h1", {}, say("compare.title", { a, b })),
    h("p", { className: "legend" }, h("span", {}, link(a, 0), " ", badge(found.states[0])), h("span", {}, link(b, 1), " ", badge(found.states[1]))),
    h("figure", {}, h("figcaption", {}, say("compare.caption")), svg),
    ...table(say("compare.best"), rows(Object.entries(found.metrics), number)),
    ...(differences.length ? table(say("compare.differences"), rows(differences, (value) => (value === null ? "–" : shown(value)))) : [h("p", {}, say("compare.same"))]),
  );
  const draw = () => curve(svg, say("compare.caption"), [{ points: column(1) }, { points: column(2), second: true }], dots);
  draw();
  window.addEventListener("resize", draw);
  return () => window.removeEventListener("resize", draw);
}

// — chat ——————————————————————————————————————————————————————————————————————————————————————————

const talk = { model: "", other: "", turns: [], temperature: 0, longest: 256 };

async function chat(main, wanted) {
  const place = h("div");
  put(main, h("h1", {}, say("chat.title")), place);
  put(place, h("p", { className: "soft", role: "status" }, say("chat.starting")));
  const leaving = new AbortController();
  load();
  return () => leaving.abort();

  async function load() {
    try {
      const { models } = await get("models", {}, leaving.signal);
      ready(models.map((model) => model.id));
    } catch (error) {
      if (isAbort(error)) return;
      put(place, h("p", { className: "error" }, error.message), h("button", { type: "button", onclick: load }, say("chat.retry")));
    }
  }

  function ready(models) {
    if (!models.length) return put(place, h("p", { className: "soft" }, say("chat.none")));
    if (wanted && models.includes(wanted)) talk.model = wanted;
    if (!models.includes(talk.model)) talk.model = models[0];
    if (!models.includes(talk.other)) talk.other = "";
    let asking = null;
    const choice = (id, value, first, change) => {
      const node = h("select", { id, onchange: () => change(node.value) }, first, models.map((model) => h("option", { value: model }, model)));
      node.value = value;
      return node;
    };
    const turns = h("div", { className: "turns", role: "log" });
    turns.setAttribute("aria-live", "polite");
    const text = h("textarea", { id: "question", rows: 2, placeholder: say("chat.placeholder"), onkeydown: (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
    } });
    text.setAttribute("aria-label", say("chat.question"));
    const button = h("button", { type: "button", id: "ask", className: "main", onclick: () => (asking ? asking.abort() : ask()) }, say("chat.ask"));
    const numeric = (id, value, limits, change) => h("input", { type: "number", id, value, ...limits, onchange: (event) => change(Number(event.target.value)) });
    const free = h("button", { type: "button", onclick: async () => {
      await post("unload");
      put(place, h("p", {}, say("chat.unloaded")), h("button", { type: "button", onclick: load }, say("chat.load")));
    } }, say("chat.unload"));
    put(place,
    h("div", { className: "row" },
        field(say("chat.model"), choice("model", talk.model, null, (value) => { talk.model = value; forget(); })),
        field(say("chat.other"), choice("other", talk.other, h("option", { value: "" }, say("chat.nothing")), (value) => { talk.other = value; forget(); })),
        field(say("chat.temperature"), numeric("temperature", talk.temperature, { min: 0, max: 2, step: 0.1 }, (value) => { talk.temperature = value; })),
        field(say("chat.longest"), numeric("longest", talk.longest, { min: 1, max: 4096, step: 1 }, (value) => { talk.longest = value; })),
        h("button", { type: "button", onclick: () => { forget(); text.focus(); } }, say("chat.anew")), free),
      turns,
      h("div", { className: "ask" }, text, button),
    );
    talk.turns.forEach(show);
    if (document.activeElement === document.body || document.activeElement === main) text.focus();

    function forget() {
      asking?.abort();
      talk.turns = [];
      turns.replaceChildren();
    }

    function show(turn) {
      const sides = turn.answers.map((one) => {
        const said = h("span");
        one.show = () => { said.textContent = one.isWhole ? answerText(one.text) : one.text.trimStart(); };
        one.show();
        return h("div", { className: "said", title: one.model }, h("small", {}, one.model), said);
      });
      turns.append(h("div", { className: "turn user" }, turn.question), h("div", { className: sides.length > 1 ? "sides" : "turn" }, ...sides));
    }

    async function ask() {
      const question = text.value.trim();
      if (!question || asking) return;
      const names = [talk.model, ...(talk.other ? [talk.other] : [])];
      const turn = { question, answers: names.map((model) => ({ model, text: "", show: () => {} })) };
      const before = talk.turns.filter((one) => one.answers.length === names.length);
      talk.turns.push(turn);
      show(turn);
      text.value = "";
      asking = new AbortController();
      button.textContent = say("chat.stop");
      const signal = AbortSignal.any([asking.signal, leaving.signal]);
      await Promise.all(turn.answers.map(async (answer, at) => {
        const history = before.flatMap((one) => [{ role: "user", content: one.question }, { role: "assistant", content: one.answers[at].text }]);
        try {
          await stream(answer, [...history, { role: "user", content: question }], signal);
        } catch (error) {
          if (!isAbort(error)) answer.text += `${answer.text && "\n"}${error.message}`;
        }
        answer.isWhole = true;
        answer.show();
      }));
      asking = null;
      button.textContent = say("chat.ask");
    }
  }

  async function stream(answer, messages, signal) {
    const response = await post("chat", { model: answer.model, messages, stream: true, temperature: talk.temperature, max_tokens: talk.longest }, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") continue;
        const found = JSON.parse(data);
        if (typeof found.error === "string") throw new Refused(502, found);
        if (found.error) throw new Error(say("error.answer", { text: found.error.message }));
        answer.text += found.choices[0]?.delta.content ?? "";
      }
      answer.show();
      window.scrollTo({ top: document.body.scrollHeight });
    }
  }
}

// — where we are ——————————————————————————————————————————————————————————————————————————————————

const VIEWS = { new: newRun, runs: listed, run: oneRun, compare: compared, chat };
const NAV = [["new", "nav.new"], ["runs", "nav.runs"], ["chat", "nav.chat"]];
let turn = 0;

async function render() {
  leave();
  leave = () => {};
  turn += 1;
  const mine = turn;
  const [, view, ...rest] = (location.hash || "#/new").split("/");
  const name = view in VIEWS ? view : "new";
  const given = rest.map(decodeURIComponent);
  document.documentElement.lang = HTML_LANGUAGE[language];
  const at = { run: "runs", compare: "runs" }[name] ?? name;
  put(document.getElementById("nav"),
    ...NAV.map(([key, word]) => h("a", key === at ? { href: `#/${key}`, "aria-current": "page" } : { href: `#/${key}` }, say(word))),
  );
  document.getElementById("nav").setAttribute("aria-label", say("nav.label"));
  document.getElementById("skip").textContent = say("nav.skip");
  const other = LANGUAGES.find((one) => one !== language);
  const button = document.getElementById("language");
  button.textContent = say(`language.${other}`);
  button.lang = HTML_LANGUAGE[other];
  document.title = [given.join(" · ") || say(`nav.${at}`), "neartune"].join(" – ");
  const main = h("div");
  put(document.getElementById("main"), main);
  try {
    const end = await VIEWS[name](main, ...given);
    if (mine === turn) leave = end ?? leave;
    else end?.();
  } catch (error) {
    put(main, h("p", { className: "error", role: "alert" }, error.message));
  }
}

async function begin() {
  if (location.search) history.replaceState(null, "", `${location.pathname}${location.hash}`); // the token need not be seen
  const found = await Promise.all(LANGUAGES.map(async (one) => (await fetch(`static/words.${one}.json`)).json()));
  LANGUAGES.forEach((one, at) => { words[one] = found[at]; });
  const wanted = localStorage.getItem("neartune.language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
  language = LANGUAGES.includes(wanted) ? wanted : "en";
  try {
    Object.assign(draft, JSON.parse(localStorage.getItem("neartune.draft") ?? "{}"));
  } catch {
    localStorage.removeItem("neartune.draft");
  }
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    document.getElementById("main").focus();
  });
  document.getElementById("language").addEventListener("click", () => {
    language = LANGUAGES.find((one) => one !== language);
    localStorage.setItem("neartune.language", language);
    render();
  });
  window.addEventListener("hashchange", render);
  await render();
}

begin();
