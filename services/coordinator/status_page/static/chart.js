// Charts as SVG: gap against threshold, timeline of a teacher, accuracy. Numbers in, elements out.
const SVG = "http://www.w3.org/2000/svg";
const LEFT = 44, RIGHT = 10, TOP = 6, BOTTOM = 20;

// By reason: words, whether the teacher pauses, and how a reader of grey tells it from others.
export const REASONS = {
  gap_within_threshold: { text: "learning: the gap is within the threshold", short: "learning: gap within threshold" },
  not_better: { text: "learning: the gap is too large, but the teacher is not the better one", short: "learning: not the better one", hatch: "dots" },
  held_learning: { text: "learning: a command holds it", short: "learning: held", hatch: "upright" },
  strategy_learning: { text: "learning: the strategy wants it so", short: "learning: by the strategy", hatch: "level" },
  gap_too_large: { text: "paused: the gap is too large", short: "paused: gap too large" },
  held_paused: { text: "paused: a command holds it", short: "paused: held", hatch: "upright" },
  strategy_paused: { text: "paused: the strategy wants it so", short: "paused: by the strategy", hatch: "level" },
};
const ORDER = Object.keys(REASONS);
export const isPaused = (reason) => ORDER.indexOf(reason) >= ORDER.indexOf("gap_too_large");

export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function picture(width, height, label) {
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
}

// Round numbers between two bounds, about `count` of them.
function ticks(low, high, count) {
  const span = high - low || 1;
  const power = 10 ** Math.floor(Math.log10(span / count));
  const size = [1, 2, 5, 10].map((m) => m * power).find((m) => span / m <= count) || 10 * power;
  const found = [];
  for (let k = Math.ceil(low / size - 1e-9); k * size <= high + size * 1e-9; k += 1) found.push(Number((k * size).toPrecision(12)));
  return found;
}

function scale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

function place(at) { return Math.round(at * 10) / 10; }

function frame(chart, width, height, x, steps, y, marks, shown) {
  const bottom = height - BOTTOM;
  for (const mark of marks) {
    chart.append(svg("path", { class: "grid", d: `M${LEFT} ${place(y(mark))}H${width - RIGHT}` }));
    const label = svg("text", { x: LEFT - 5, y: place(y(mark)) + 4, "text-anchor": "end" });
    label.textContent = shown(mark);
    chart.append(label);
  }
  chart.append(svg("path", { class: "axis", d: `M${LEFT} ${bottom}H${width - RIGHT}` }));
  stepLabels(chart, width, height, x, steps);
}

function stepLabels(chart, width, height, x, [first, last]) {
  const name = svg("text", { x: 2, y: height - 5 });
  name.textContent = "step";
  chart.append(name);
  const found = ticks(first, last, Math.max(4, Math.floor(width / 80))).filter(Number.isInteger);
  found.forEach((step) => {
    const at = place(x(step));
    const anchor = at > width - 50 ? "end" : "middle";
    const label = svg("text", { x: anchor === "end" ? Math.min(at + 12, width - 2) : at, y: height - 5, "text-anchor": anchor });
    label.textContent = String(step);
    chart.append(svg("path", { class: "axis", d: `M${at} ${height - BOTTOM}v4` }), label);
  });
}

// A line that breaks where a value is missing, or where steps are missing.
function path(steps, values, x, y, widest) {
  let d = "";
  let before = null;
  values.forEach((value, i) => {
    if (value === null) { before = null; return; }
    const isNext = before !== null && steps[i] - steps[before] <= widest;
    d += `${isNext ? "L" : "M"}${place(x(steps[i]))} ${place(y(value))}`;
    if (!isNext && !(i + 1 < steps.length && steps[i + 1] - steps[i] <= widest)) d += "h1";
    before = i;
  });
  return d;
}

// A scale by factors of ten, for gaps that shrink: its marks, and where a value is.
function logarithmic(low, high, from, to) {
  const y = scale(Math.log10(low), Math.log10(high), from, to);
  const isFew = high / low < 100;
  const marks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
    for (const part of isFew ? [1, 2, 5] : [1]) marks.push(Number((part * 10 ** power).toPrecision(3)));
  }
  return [(value) => y(Math.log10(Math.max(value, low))), marks.filter((mark) => mark >= low && mark <= high)];
}

export function gapChart(width, steps, stride, pair, label, isLogarithmic) {
  const height = 168;
  const chart = picture(width, height, label);
  const range = [steps[0], Math.max(steps[steps.length - 1], steps[0] + 1)];
  const tops = [...pair.high, ...pair.threshold].filter((value) => value !== null);
  const top = Math.max(...tops, 1e-6) * 1.06;
  const x = scale(...range, LEFT, width - RIGHT);
  let [y, marks] = [scale(0, top, height - BOTTOM, TOP), ticks(0, top, 6)];
  if (isLogarithmic) {
    const least = Math.min(...[...pair.low, ...pair.threshold].filter((value) => value > 0), top);
    [y, marks] = logarithmic(Math.max(least, top / 1e5) * 0.9, top, height - BOTTOM, TOP);
  }
  frame(chart, width, height, x, range, y, marks, (value) => String(value));
  const widest = typical(steps, stride);
  if (stride > 1) {
    const there = steps.map((_, i) => i).filter((i) => pair.high[i] !== null && pair.low[i] !== null);
    const up = there.map((i) => `${place(x(steps[i]))} ${place(y(pair.high[i]))}`);
    const down = there.map((i) => `${place(x(steps[i]))} ${place(y(pair.low[i]))}`).reverse();
    if (up.length > 1) chart.append(svg("path", { class: "band", d: `M${up.join("L")}L${down.join("L")}Z` }));
  }
  chart.append(
    svg("path", { class: "gap", d: path(steps, pair.gap, x, y, widest) }),
    svg("path", { class: "threshold", d: path(steps, pair.threshold, x, y, widest) }),
  );
  return chart;
}

// The widest distance of two points that are neighbours: sampled runs have points at even distances.
function typical(steps, stride) {
  const spaces = steps.slice(1).map((step, i) => step - steps[i]).sort((a, b) => a - b);
  return Math.max(2 * stride, 1.5 * (spaces[Math.floor(spaces.length / 2)] || 1));
}

let hatches = 0;
function hatch(kind, reason) {
  const id = `hatch${(hatches += 1)}`;
  const base = svg("rect", { width: 6, height: 6, class: `r-${reason}` });
  const lines = { dots: "M1 1h2M4 4h2", upright: "M2 0v6", level: "M0 3h6" }[kind];
  return [id, svg("pattern", { id, width: 6, height: 6, patternUnits: "userSpaceOnUse" }, base,
    svg("path", { d: lines, class: `hatch h-${reason}` }))];
}

export function swatch(reason) {
  const made = svg("svg", { width: 26, height: 14, "aria-hidden": "true" });
  const box = { x: 0.5, y: 0.5, width: 25, height: 13 };
  const known = REASONS[reason].hatch;
  if (known) {
    const [id, pattern] = hatch(known, reason);
    made.append(svg("defs", {}, pattern), svg("rect", { ...box, fill: `url(#${id})` }));
  } else made.append(svg("rect", { ...box, class: `r-${reason}` }));
  made.append(svg("rect", { ...box, class: "frame" }));
  return made;
}

export function lineSwatch(...classes) {
  const made = svg("svg", { width: 30, height: 12, "aria-hidden": "true" });
  made.append(svg("path", { d: "M0 6H30", class: classes.join(" ") }));
  return made;
}

export function bandSwatch() {
  const made = svg("svg", { width: 30, height: 12, "aria-hidden": "true" });
  made.append(svg("rect", { width: 30, height: 12, class: "band" }));
  return made;
}

// Columns that are wide enough to be seen, each with the number of steps by reason.
function timeColumns(steps, counts, stride, reasons, x) {
  const columns = [];
  for (let i = 0; i < steps.length; i += 1) {
    const next = i + 1 < steps.length ? steps[i + 1] : steps[i] + Math.max(stride, 1);
    const end = Math.min(next, Math.max(steps[i] + stride, next - steps[i] > 2 * stride ? next : 0));
    const [from, to] = [x(steps[i]), x(end)];
    const last = columns[columns.length - 1];
    const joins = last && last.to - last.from < 1.5 && from - last.to < 1;
    const column = joins ? last : { from, to, sums: {} };
    column.to = to;
    for (const reason of ORDER) {
      const found = reasons[reason] ? reasons[reason][i] : 0;
      if (found) column.sums[reason] = (column.sums[reason] || 0) + found;
    }
    if (!joins) columns.push(column);
  }
  return columns;
}

export function timeline(width, steps, counts, stride, reasons, label) {
  const height = 54;
  const bar = height - BOTTOM - TOP;
  const chart = picture(width, height, label);
  const range = [steps[0], steps[steps.length - 1] + stride];
  const x = scale(...range, LEFT, width - RIGHT);
  const paths = Object.fromEntries(ORDER.map((reason) => [reason, ""]));
  let open = null;
  const close = () => {
    if (!open) return;
    let y = height - BOTTOM;
    for (const reason of ORDER) { // learning below, paused above
      const share = open.shares[reason];
      if (!share) continue;
      const tall = share * bar;
      paths[reason] += `M${place(open.from)} ${place(y)}H${place(open.to)}V${place(y - tall)}H${place(open.from)}Z`;
      y -= tall;
    }
  };
  for (const { from, to, sums } of timeColumns(steps, counts, stride, reasons, x)) {
    const total = Object.values(sums).reduce((a, b) => a + b, 0) || 1;
    const shares = Object.fromEntries(Object.entries(sums).map(([reason, n]) => [reason, n / total]));
    const key = JSON.stringify(shares);
    if (open && open.key === key && from - open.to < 1) { open.to = to; continue; }
    close();
    open = { from, to, shares, key };
  }
  close();
  for (const reason of ORDER) {
    if (!paths[reason]) continue;
    if (REASONS[reason].hatch) {
      const [id, pattern] = hatch(REASONS[reason].hatch, reason);
      chart.append(svg("defs", {}, pattern), svg("path", { d: paths[reason], fill: `url(#${id})` }));
    } else chart.append(svg("path", { d: paths[reason], class: `r-${reason}` }));
  }
  chart.append(svg("rect", { class: "frame", x: LEFT, y: TOP, width: width - RIGHT - LEFT, height: bar }));
  stepLabels(chart, width, height, x, range);
  return chart;
}

export function accuracyChart(width, lines, range, label) {
  const height = 190;
  const chart = picture(width, height, label);
  const values = lines.flatMap((line) => line.values);
  const low = Math.max(0, Math.min(...values) - 0.05);
  const x = scale(range[0], Math.max(range[1], range[0] + 1), LEFT, width - RIGHT);
  const y = scale(low, 1, height - BOTTOM, TOP);
  frame(chart, width, height, x, [range[0], Math.max(range[1], range[0] + 1)], y, ticks(low, 1, 6), (value) => `${Math.round(100 * value)} %`);
  for (const line of lines) {
    const d = line.steps.map((step, i) => `${i ? "L" : "M"}${place(x(step))} ${place(y(line.values[i]))}`).join("");
    chart.append(svg("path", { class: `line ${line.look}`, d }));
    if (line.hasDots && line.steps.length <= 40) {
      line.steps.forEach((step, i) => chart.append(svg("circle", { class: `dot ${line.look}`, cx: place(x(step)), cy: place(y(line.values[i])), r: 2.5 })));
    }
  }
  return chart;
}
