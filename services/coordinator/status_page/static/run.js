// One run: what it does now, and what it has done.
import { clock, distance, duration, element, find, follow, moment, number, percent, roughly, setText, times, whole } from "./common.js";
import { REASONS, accuracyChart, bandSwatch, gapChart, isPaused, lineSwatch, swatch, timeline } from "./chart.js";

const FEW = 12; // pairs that are drawn before the reader asks for all
const ROWS = 60;
const WIDE = 8; // ratio of distances from which their scale is logarithmic, as in a report

function runId() {
  const part = location.pathname.split("/").pop();
  try { return decodeURIComponent(part); } catch { return part; }
}

const id = runId();
const past = { step: [], time: [], count: [], stride: 1, pairs: [], teachers: [], networks: [], marks: { network: [], kind: [], step: [], time: [], value: [] }, events: new Map() };
const seen = new Map(); // by rank: what it did last, in this epoch
let now = null;
let all = false;
let isDue = false;
let hasChosen = false; // whether the reader has chosen the scale of the distances

document.title = `${id} · switokd`;
setText(find("name"), id);

// Take over what is new: rows from `from` on, marks from `marks_from` on, events by number.
function takeHistory(part) {
  const rows = part.step.length;
  const join = (old, added) => old.slice(0, part.from).concat(added);
  past.stride = part.stride;
  for (const name of ["step", "time", "count"]) past[name] = join(past[name], part[name]);
  past.pairs = part.pairs.map((pair, i) => {
    const old = past.pairs[i] || {};
    const made = { teacher: pair.teacher, student: pair.student };
    for (const name of ["gap", "low", "high", "threshold", "e_s", "e_t", "learning"]) made[name] = join(old[name] || [], pair[name]);
    return made;
  });
  past.teachers = part.teachers.map((teacher, i) => {
    const old = (past.teachers[i] || { reasons: {} }).reasons;
    const reasons = {};
    for (const name of new Set([...Object.keys(old), ...Object.keys(teacher.reasons)])) {
      const before = old[name] || new Array(part.from).fill(0);
      reasons[name] = join(before, teacher.reasons[name] || new Array(rows).fill(0));
    }
    return { name: teacher.name, reasons };
  });
  past.networks = part.networks;
  for (const name of Object.keys(past.marks)) past.marks[name] = past.marks[name].slice(0, part.marks_from).concat(part.marks[name]);
  for (const event of part.events) past.events.set(event.number, event);
}

function forgetTwins() { // an event of several ranks gets a new number when a rank is added
  const kept = new Map();
  for (const event of [...past.events.values()].sort((a, b) => a.number - b.number)) kept.set(`${event.kind} ${event.at}`, event);
  past.events = new Map([...kept.values()].map((event) => [event.number, event]));
}

const isOver = () => now !== null && ["finished", "failed", "stopped"].includes(now.state);

function due() {
  if (isDue) return;
  isDue = true;
  setTimeout(() => { isDue = false; requestAnimationFrame(draw); }, 150);
}

function draw() {
  if (now) { drawFacts(); drawNetworks(); drawRanks(); }
  if (past.step.length) { drawTeachers(); drawPairs(); drawNumbers(); }
  drawAccuracy();
  drawEvents();
}

const wide = (node) => Math.max(280, Math.min(node.clientWidth || 320, 1200));

function drawFacts() {
  const state = element("span", { class: `state ${now.state}`, text: now.state });
  const took = (now.ended_at || now.now) - (now.started_at || now.now);
  const when = now.ended_at ? `ended ${moment(now.ended_at)} after ${duration(took)}` : `running for ${duration(took)}`;
  const epoch = now.training_epoch ? `, epoch ${whole(now.training_epoch)}${now.planned_epochs ? ` of ${whole(now.planned_epochs)}` : ""}` : "";
  const text = ` step ${whole(now.last_step)}${planned()}${epoch}, ${when}${left()}`;
  find("progress").hidden = !now.planned_steps;
  find("progress").value = now.planned_steps ? Math.min(1, now.last_step / now.planned_steps) : 0;
  const summary = find("summary");
  if (!summary.firstChild || summary.firstChild.textContent !== now.state || summary.dataset.text !== text) {
    summary.replaceChildren(state, text);
    summary.dataset.text = text;
  }
  if (find("announce").dataset.state !== now.state) {
    find("announce").dataset.state = now.state;
    setText(find("announce"), `The run is ${now.state}.`);
  }
  find("failure").hidden = !now.failure;
  setText(find("failure"), now.failure || "");
  find("waiting").hidden = !now.waiting_for.length;
  if (find("waiting").dataset.text !== now.waiting_for.join("\n")) {
    find("waiting").dataset.text = now.waiting_for.join("\n");
    find("waiting").replaceChildren(...now.waiting_for.map((text) => element("li", { text })));
  }
  const again = now.epoch - 1;
  const facts = [
    ["Strategy", now.semantics && now.semantics !== "paper" ? `${now.strategy}, ${now.semantics}` : now.strategy],
    ["Ranks", isOver() ? `${now.rank_count}` : `${now.connected_ranks} of ${now.rank_count} connected`],
    ["Steps per second", rate()],
    ["Started", moment(now.started_at)],
    ["Started again", again > 0 ? times(again) : null],
    ["In the journal to step", now.recorded_step ? whole(now.recorded_step) : null],
    ["Decided without the coordinator", `${whole(now.decided_alone_steps)} steps`],
  ].filter(([, value]) => value !== null);
  const list = find("facts");
  if (list.children.length !== facts.length) {
    list.replaceChildren(...facts.map(() => element("div", {}, element("dt"), element("dd"))));
  }
  facts.forEach(([name, value], i) => { setText(list.children[i].children[0], name); setText(list.children[i].children[1], value); });
}

function planned() {
  if (!now.planned_steps) return "";
  return ` of ${whole(now.planned_steps)} (${Math.floor(100 * Math.min(1, now.last_step / now.planned_steps))} %)`;
}

// Steps per second in the last `seconds` for which there are steps; 0: not known.
function pace(seconds) {
  const n = past.step.length;
  if (n < 3) return 0;
  let i = n - 2;
  while (i > 0 && past.time[i] > past.time[n - 1] - seconds) i -= 1;
  const took = past.time[n - 1] - past.time[i];
  return past.time[i] && took > 0 ? (past.step[n - 1] - past.step[i]) / took : 0;
}

const quiet = () => now.now - past.time[past.time.length - 1];

function rate() {
  if (isOver()) return null;
  const found = pace(10);
  if (!found) return "–";
  return quiet() > 10 ? `none for ${duration(quiet())}` : number(found, 3);
}

// The time left at the pace of the last minutes, which also has evaluations and checkpoints in it.
function left() {
  const found = pace(120);
  if (isOver() || !now.planned_steps || !found || quiet() > 10) return "";
  const seconds = Math.max(0, now.planned_steps - now.last_step) / found;
  return `, about ${roughly(seconds)} left`;
}

// Figures stay, so that a reader's place is not lost: only what changed is replaced.
function figureOf(parent, key, name) {
  let figure = [...parent.children].find((child) => child.dataset.key === key);
  if (!figure) {
    const caption = element("figcaption", {}, element("h3", { text: name }), element("span", { class: "now" }));
    figure = element("figure", {}, caption, element("div"));
    figure.dataset.key = key;
    parent.append(figure);
  }
  return figure;
}

function put(figure, chart, text) {
  setText(figure.querySelector(".now"), text);
  figure.lastChild.replaceChildren(chart);
}

function drawTeachers() {
  const parent = find("teachers");
  const seen = new Set();
  for (const teacher of past.teachers) {
    let paused = 0;
    for (const [reason, counts] of Object.entries(teacher.reasons)) {
      if (!counts.some(Boolean)) continue;
      seen.add(reason);
      if (isPaused(reason)) paused += counts.reduce((a, b) => a + b, 0);
    }
    const share = paused / (past.count.reduce((a, b) => a + b, 0) || 1);
    const current = now && now.networks.find((network) => network.name === teacher.name);
    const reason = current && current.reason ? REASONS[current.reason] : null;
    const text = `${reason ? `${isOver() ? "at the end " : ""}${reason.short} · ` : ""}paused in ${percent(share)} of the steps`;
    const figure = figureOf(parent, teacher.name, teacher.name);
    const label = `Timeline of ${teacher.name}: ${text}`;
    put(figure, timeline(wide(parent), past.step, past.count, past.stride, teacher.reasons, label), text);
  }
  const shown = Object.keys(REASONS).filter((reason) => seen.has(reason));
  const legend = find("reason-legend");
  if (legend.dataset.shown !== shown.join()) {
    legend.dataset.shown = shown.join();
    legend.replaceChildren(...shown.map((reason) => element("li", {}, swatch(reason), REASONS[reason].text)));
  }
}

function drawPairs() {
  const parent = find("pairs");
  const legend = find("gap-legend");
  const kind = past.stride > 1 ? "band" : "lines";
  if (legend.dataset.kind !== kind) {
    legend.dataset.kind = kind;
    const entries = [[lineSwatch("gap"), "gap"], [lineSwatch("threshold"), "threshold"]];
    if (kind === "band") entries.push([bandSwatch(), "least to greatest gap of a point's steps"]);
    legend.replaceChildren(...entries.map(([drawn, text]) => element("li", {}, drawn, text)));
  }
  const shown = all ? past.pairs : past.pairs.slice(0, FEW);
  if (!hasChosen) find("logarithmic").checked = isWide(shown);
  shown.forEach((pair) => {
    const name = `${pair.teacher} → ${pair.student}`;
    const figure = figureOf(parent, JSON.stringify([pair.teacher, pair.student]), name);
    const live = now && now.pairs.find((p) => p.teacher === pair.teacher && p.student === pair.student);
    const n = past.step.length - 1;
    const [gap, threshold] = live ? [live.gap, live.threshold] : [pair.gap[n], pair.threshold[n]];
    const mode = live ? ` · ${live.mode} mode${live.held ? ", held" : ""}${live.switches === null ? "" : ` · ${whole(live.switches)} switches`}` : "";
    const text = `gap ${distance(gap)} · threshold ${distance(threshold)}${mode}`;
    const width = wide(figure);
    put(figure, gapChart(width, past.step, past.stride, pair, `Gap against threshold of ${name}: ${text}`, find("logarithmic").checked), text);
  });
  const total = past.pairs.length;
  const points = past.stride > 1 ? `Each point is the mean of up to ${whole(past.stride)} steps. ` : "";
  setText(find("points"), `${points}${total > shown.length ? `${shown.length} of ${total} pairs. ` : ""}`);
  if (total > shown.length && !find("all")) {
    const button = element("button", { text: `Show all ${total} pairs` });
    button.id = "all";
    button.type = "button";
    button.onclick = () => { all = true; button.remove(); due(); };
    parent.after(button);
  }
}

// Distances fall as networks learn: a linear axis would not tell a late gap from its threshold.
function isWide(pairs) {
  let [least, most] = [Infinity, 0];
  for (const pair of pairs) {
    for (const value of [...pair.gap, ...pair.threshold]) {
      if (value === null) continue;
      least = Math.min(least, value);
      most = Math.max(most, value);
    }
  }
  return least > 0 && most > WIDE * least;
}

function drawAccuracy() {
  const { network, kind, step, value } = past.marks;
  const lines = [];
  past.networks.forEach((name, place) => {
    for (const [wanted, look] of [["test_accuracy", ""], ["accuracy", "thin"]]) {
      const steps = [], values = [];
      for (let i = 0; i < step.length; i += 1) {
        if (network[i] === place && kind[i] === wanted && value[i] !== null) { steps.push(step[i]); values.push(value[i]); }
      }
      if (steps.length) lines.push({ name, steps, values, look: `c${place % 6} d${place % 6} ${look}`, hasDots: !look });
    }
  });
  const parent = find("accuracy");
  if (!lines.length) { setText(parent, "No rank has sent an accuracy yet."); return; }
  if (parent.firstChild && parent.firstChild.nodeType === Node.TEXT_NODE) parent.replaceChildren();
  const first = past.step.length ? past.step[0] : Math.min(...lines.flatMap((line) => line.steps));
  const last = Math.max(past.step.length ? past.step[past.step.length - 1] : 0, ...lines.flatMap((line) => line.steps));
  const figure = figureOf(parent, "accuracy", "Top-1 accuracy over the steps");
  put(figure, accuracyChart(wide(parent), lines, [first, last], "Accuracy of each network over the steps; the last values are in the table below"), "thick: test set, thin: training");
  const legend = find("accuracy-legend");
  if (legend.dataset.names !== JSON.stringify(past.networks)) {
    legend.dataset.names = JSON.stringify(past.networks);
    legend.replaceChildren(...past.networks.map((name, i) => element("li", {}, lineSwatch("line", `c${i % 6}`, `d${i % 6}`), name)));
  }
}

// Fill a table, changing only the cells whose text has changed. A column: [title, cell, is a number].
function fill(table, columns, rows) {
  const [head, body] = [table.tHead, table.tBodies[0]];
  const titles = JSON.stringify(columns.map(([title]) => title));
  if (table.dataset.titles !== titles) {
    table.dataset.titles = titles;
    head.replaceChildren(element("tr", {}, ...columns.map(([text, , isNumber]) => element("th", { text, scope: "col", class: isNumber ? "number" : "" }))));
    body.replaceChildren();
  }
  while (body.children.length > rows.length) body.lastChild.remove();
  rows.forEach((row, r) => {
    if (!body.children[r]) {
      body.append(element("tr", {}, ...columns.map(([, , isNumber], c) => element(c ? "td" : "th", { scope: c ? "" : "row", class: isNumber ? "number" : "" }))));
    }
    columns.forEach(([, cell], c) => setText(body.children[r].children[c], cell(row)));
  });
}

function drawNetworks() {
  fill(find("networks"), [
    ["Network", (n) => n.name],
    ["Role", (n) => n.role],
    ["Test accuracy", (n) => percent(n.test_accuracy), true],
    ["Training accuracy", (n) => percent(n.accuracy), true],
    ["Loss", (n) => number(n.loss), true],
    ["Samples", (n) => (n.samples ? whole(n.samples) : "–"), true],
    ["Paused", (n) => percent(n.paused_ratio), true],
    ["Mode", (n) => (n.reason ? REASONS[n.reason].short : "–")],
  ], now.networks);
}

function drawRanks() {
  const ended = isOver();
  const shown = now.ranks.length ? now.ranks : [];
  fill(find("ranks"), [
    ["Rank", (r) => `${r.rank}`],
    ["Networks", (r) => r.networks.join(", ")],
    ["Phase", (r) => (ended ? "ended" : r.phase)],
    ["Step", (r) => whole(r.step), true],
    ["Lag in steps", (r) => whole(r.lag_steps), true],
    ["In the phase for", (r) => (ended ? "–" : duration(r.phase_seconds)), true],
    ["Last heard of", (r) => (ended ? "–" : `${duration(r.heartbeat_age_seconds)} ago`), true],
    ["State", (r) => (ended ? "ended" : r.is_waited_for ? "the others wait for it" : r.is_connected ? "connected" : "not connected")],
  ], shown);
  const rows = find("ranks").tBodies[0].children;
  shown.forEach((rank, i) => rows[i].classList.toggle("late", rank.is_waited_for && !ended));
  const left = now.ranks_left_out ? ` (${now.ranks_left_out} more are not shown)` : "";
  const text = shown.length ? `What each rank ${ended ? "did last" : "does now"}${left}` : ended ? "What the ranks did last is not known" : "No rank has sent a heartbeat yet";
  setText(find("ranks").caption, text);
  find("ranks").tHead.hidden = !shown.length;
}

const WHAT = {
  new: (e) => `the run has begun${e.text ? `: ${e.text}` : ""}`,
  restart: (e) => `started again: ${e.text}`,
  coordinator: (e) => e.text,
  connected: (e) => `${ranks(e.ranks)} connected`,
  lost: (e) => `${ranks(e.ranks)} lost`,
  notice: (e) => e.text,
  asked: (e) => `command asked for: ${e.text}`,
  command: (e) => `command taken: ${e.text}`,
  refused: (e) => `command refused: ${e.text}`,
  checkpoint: (e) => `checkpoint: ${e.text}`,
  failed: (e) => `the run has failed: ${e.text}`,
  finished: () => "the run has finished",
  stopped: () => "the run was stopped before its last step",
};

function ranks(list) {
  const sorted = [...list].sort((a, b) => a - b);
  const shown = sorted.slice(0, 8).join(", ");
  return `${sorted.length > 1 ? "ranks" : "rank"} ${shown}${sorted.length > 8 ? ` and ${sorted.length - 8} more` : ""}`;
}

function drawEvents() {
  const list = find("events");
  const events = [...past.events.values()].sort((a, b) => b.number - a.number).slice(0, 300);
  const key = events.map((event) => `${event.number}`).join();
  find("no-events").hidden = events.length > 0;
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(...events.map((event) => element("li", {},
    element("span", { class: "when", text: clock(event.at) }),
    element("span", { class: "at", text: `step ${whole(event.step)}` }),
    element("span", { class: "what", text: (WHAT[event.kind] || ((e) => `${e.kind}: ${e.text}`))(event) }))));
}

function drawNumbers() {
  if (!find("numbers").open) return;
  const n = past.step.length;
  const every = Math.max(1, Math.ceil(n / ROWS));
  const chosen = [];
  for (let i = n - 1; i >= 0; i -= every) chosen.push(i);
  const columns = [["Step", (i) => whole(past.step[i]), true]];
  for (const pair of past.pairs.slice(0, all ? undefined : FEW)) {
    const name = `${pair.teacher} → ${pair.student}`;
    columns.push(
      [`${name}: gap`, (i) => distance(pair.gap[i]), true],
      [`${name}: threshold`, (i) => distance(pair.threshold[i]), true],
      [`${name}: learning`, (i) => percent(pair.learning[i] / (past.count[i] || 1)), true],
    );
  }
  for (const teacher of past.teachers) columns.push([`${teacher.name}: why`, (i) => most(teacher.reasons, i)]);
  fill(find("steps"), columns, chosen);
}

function most(reasons, i) {
  let found = "";
  for (const [reason, counts] of Object.entries(reasons)) if (!found || counts[i] > reasons[found][i]) found = reason;
  return found ? REASONS[found].short : "–";
}

find("numbers").addEventListener("toggle", due);
find("logarithmic").addEventListener("change", () => { hasChosen = true; due(); });
new ResizeObserver(due).observe(find("main"));

follow(`api/runs/${encodeURIComponent(id)}/events`, (event, data) => {
  if (event === "history") { takeHistory(data); forgetTwins(); }
  if (event === "status") {
    // Ranks leave one by one, and are not in a document after that: what they did last stays.
    if (!now || data.epoch !== now.epoch) seen.clear();
    for (const rank of data.ranks) seen.set(rank.rank, rank);
    if (data.ended_at) data.ranks = [...seen.values()].sort((a, b) => a.rank - b.rank);
    now = data;
  }
  due();
}, isOver);
