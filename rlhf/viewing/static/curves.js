// Curves of all metrics: the main metrics first, then stage by stage. A chart is drawn when it comes into view. An eager
// chart is drawn at once, so that it can be printed.

import { html, useEffect, useMemo, useRef, useState } from "./vendor/htm-preact.module.js";
import { Check, Search } from "./fields.js";
import { number } from "./format.js";

const ORDER = ["rewards", "eval", "rollouts", "experience", "advantages", "preference", "update", "weight_sync", "throughput", "time", "memory", "data", "recovery"];

// The metrics to read first: those of the worst problems, then the main ones.
export function mainOf(runs) {
  const problems = runs.flatMap((run) => run.data.summary.findings.filter((one) => one.severity !== "notice").map((one) => one.metrics[0]));
  const names = new Set([...problems.slice(0, 2), ...runs.flatMap((run) => run.data.summary.main)]);
  return [...names].filter((name) => runs.some((run) => run.data.columns.has(name)));
}

function sectionsOf(runs, names, wanted) {
  const matching = [...names].filter((name) => name.includes(wanted)).sort();
  const first = mainOf(runs).filter((name) => name.includes(wanted));
  const stages = Map.groupBy(matching, (name) => name.split("/")[0]);
  const rank = ([stage]) => (ORDER.includes(stage) ? ORDER.indexOf(stage) : ORDER.length);
  return [["first", first], ...[...stages].sort((a, b) => rank(a) - rank(b))].filter(([, members]) => members.length);
}

const FEW = 20; // values that are shown without smoothing

// Returns the exponential mean of many values, corrected for its start.
function smoothed(values, weight) {
  if (values.length < FEW) return values;
  let sum = 0;
  let mass = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}

function tableOf(run, name, { smoothing, log, byTime }) {
  const column = run.columns.get(name) ?? [];
  const xs = byTime ? run.times : run.steps;
  const places = [];
  for (let i = 0; i < column.length; i++) if (column[i] !== null && xs[i] !== null) places.push(i);
  const positive = (value) => (log && value <= 0 ? null : value);
  const values = places.map((i) => column[i]);
  return [places.map((i) => xs[i]), values.map(positive), smoothed(values, smoothing).map(positive)];
}

const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// The range of a linear axis. Without it uPlot would draw a flat curve at 0 at the bottom of an axis from 0 to 100.
export function around(u, low, high) {
  if (low === null || high === null) return [0, 1];
  if (low === high) return low === 0 ? [-1, 1] : [low - Math.abs(low) / 10, high + Math.abs(high) / 10];
  return uPlot.rangeNum(low, high, 0.1, true);
}

// Shades the steps of the findings that name this metric.
function shade(u, name, runs) {
  const { ctx, bbox } = u;
  ctx.save();
  ctx.globalAlpha = 0.13;
  for (const finding of runs.flatMap((run) => run.data.summary.findings)) {
    if (!finding.metrics.includes(name)) continue;
    const left = Math.max(u.valToPos(finding.first_step, "x", true), bbox.left);
    const right = Math.min(Math.max(u.valToPos(finding.last_step, "x", true), left + 3), bbox.left + bbox.width);
    ctx.fillStyle = colourOf(`--${finding.severity}`);
    if (right > left) ctx.fillRect(left, bbox.top, right - left, bbox.height);
  }
  ctx.restore();
}

function optionsOf(name, runs, width, log, byTime, readOut) {
  const axis = { stroke: colourOf("--faint"), grid: { stroke: colourOf("--line"), width: 1 }, ticks: { show: false } };
  const short = (u, values) => values.map((value) => (value === null ? "" : number(value)));
  const series = runs.flatMap((run) => [
    { stroke: colourOf(run.colour), width: 1, alpha: 0.3, spanGaps: true, points: { show: false } },
    { stroke: colourOf(run.colour), width: 2, spanGaps: true, points: { size: 4 } },
  ]);
  return {
    width,
    height: 150,
    padding: [8, 8, 0, 0],
    legend: { show: false },
    cursor: { y: false, sync: { key: byTime ? "time" : "step" }, points: { size: 6 } },
    scales: { x: { time: false }, y: log ? { distr: 3 } : { range: around } },
    axes: [
      { ...axis, size: 24, space: 60, values: short, incrs: byTime ? undefined : [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 1e5] },
      { ...axis, size: 52, space: 34, values: short },
    ],
    series: [{}, ...series],
    hooks: { setCursor: [readOut], drawClear: byTime ? [] : [(u) => shade(u, name, runs)] },
  };
}

function Chart({ name, about, runs, settings, tick, theme, eager }) {
  const root = useRef();
  const value = useRef();
  const [seen, see] = useState(Boolean(eager));
  useEffect(() => {
    const watch = new IntersectionObserver((entries) => entries.some((one) => one.isIntersecting) && see(true), {
      rootMargin: "300px",
    });
    watch.observe(root.current);
    return () => watch.disconnect();
  }, []);

  const shown = runs.filter((run) => run.data.columns.has(name));
  const names = shown.map((run) => run.name).join();
  const { smoothing, byTime } = settings;
  const log = settings.log && shown.some((run) => run.data.columns.get(name).some((one) => one > 0));
  const tables = useMemo(
    () => (seen ? shown.map((run) => tableOf(run.data, name, { smoothing, log, byTime })) : []),
    [seen, name, tick, smoothing, log, byTime, names],
  );
  const plot = useRef(null);
  const joined = useRef(null);

  const print = (values) => {
    value.current?.replaceChildren(
      ...values.map((one, i) => {
        const span = document.createElement("span");
        if (shown.length > 1) span.style.color = `var(${shown[i].colour})`;
        span.textContent = number(one);
        return span;
      }),
    );
  };
  const last = () => shown.map((run) => run.data.columns.get(name).findLast((one) => one !== null));
  const readOut = (u) => {
    const i = u.cursor.idx;
    if (i == null || !joined.current) return print(last());
    print(shown.map((_, k) => joined.current[2 + 2 * k]?.[i] ?? joined.current[1 + 2 * k]?.[i]));
  };

  useEffect(() => {
    if (!seen || !shown.length) return undefined;
    joined.current = tables.length === 1 ? tables[0] : uPlot.join(tables);
    plot.current = new uPlot(optionsOf(name, shown, root.current.clientWidth, log, byTime, readOut), joined.current, root.current);
    const sized = new ResizeObserver(() => {
      const width = root.current?.clientWidth;
      if (plot.current && width && width !== plot.current.width) plot.current.setSize({ width, height: 150 });
    });
    sized.observe(root.current);
    return () => {
      sized.disconnect();
      plot.current?.destroy();
      plot.current = null;
    };
  }, [seen, log, byTime, theme, name, names]);

  useEffect(() => {
    if (!plot.current) return;
    joined.current = tables.length === 1 ? tables[0] : uPlot.join(tables);
    plot.current.setData(joined.current);
    print(last());
  }, [tables]);

  return html`<figure class="chart" data-metric=${name}>
    <figcaption title=${about}>
      <span class="name">${name}</span>
      <span class="value" ref=${value}></span>
    </figcaption>
    <div class="plot" ref=${root}></div>
  </figure>`;
}

export function Charts({ names, about, ...look }) {
  return html`<div class="grid">
    ${names.map((name) => html`<${Chart} key=${name} name=${name} about=${about(name)} ...${look} />`)}
  </div>`;
}

export function Curves({ runs, settings, set, tick, about, theme, focus }) {
  const names = new Set(runs.flatMap((run) => [...run.data.columns.keys()]));
  const sections = sectionsOf(runs, names, settings.wanted);
  const search = useRef();
  useEffect(() => {
    if (focus) search.current?.focus();
  }, [focus]);
  return html`<main class="curves">
    <div class="bar">
      <${Search}
        placeholder="metrics with …"
        label="only metrics with this in their name"
        value=${settings.wanted}
        set=${(wanted) => set({ wanted })}
        field=${search}
      />
      <label class="slide">
        smoothing
        <input
          ...${{ type: "range", min: 0, max: 0.98, step: 0.02, value: settings.smoothing }}
          onInput=${(event) => set({ smoothing: Number(event.target.value) })}
        />
        <output>${settings.smoothing.toFixed(2)}</output>
      </label>
      <${Check} checked=${settings.log} set=${(log) => set({ log })}>log scale<//>
      <${Check} checked=${settings.byTime} set=${(byTime) => set({ byTime })}>by time<//>
    </div>
    ${!names.size && html`<p class="empty">No step is written yet. Curves appear with the first step.</p>`}
    ${names.size > 0 && !sections.length && html`<p class="empty">No metric has “${settings.wanted}” in its name.</p>`}
    ${sections.map(
      ([stage, members]) => html`<details open class="stage" key=${stage} data-stage=${stage}>
        <summary>${stage === "first" ? "at a glance" : stage} <small>${members.length}</small></summary>
        <${Charts} names=${members} ...${{ runs, settings, tick, theme, about }} />
      </details>`,
    )}
  </main>`;
}
