// The first tab: for each run its state, diagnosis, main curves, numbers, time and settings, by stage of a pipeline.

import { html } from "./vendor/htm-preact.module.js";
import { NO_SUMMARY, saved } from "./api.js";
import { Charts, mainOf } from "./curves.js";
import { ago, visible } from "./format.js";

const NUM_MAIN = 6; // curves
export const TONES = [..."abcdef"].map((letter) => `--run-${letter}`);
const toneOf = (i) => `var(${TONES[i % TONES.length]})`;

// The class and the words of a run's state. A server knows the age of the newest row.
export function stateOf(run) {
  if (run.state === "finished") return ["done", run.state];
  if (run.state === "failed") return ["bad", run.state];
  if (saved || run.age_s === null) return ["idle", run.state];
  return [run.age_s < 120 ? "live" : "idle", `last row ${ago(run.age_s)}`];
}

const NUMBER = /^[-+]?[\d.]+(e[-+]?\d+)?( \(.+\))?$/;

function Table({ title, headings, rows }) {
  const aligned = (i) => (i && rows.every((row) => row[i] === "-" || row[i] === "" || NUMBER.test(row[i])) ? "number" : "");
  return html`<section>
    ${title && html`<h3>${title}</h3>`}
    ${rows.length > 0
      ? html`<div class="scroll">
          <table>
            <thead><tr>${headings.map((text, i) => html`<th key=${i} class=${aligned(i)}>${visible(text)}</th>`)}</tr></thead>
            <tbody>
              ${rows.map((row, k) => html`<tr key=${k}>${row.map((text, i) => html`<td key=${i} class=${aligned(i)}><div>${visible(text)}</div></td>`)}</tr>`)}
            </tbody>
          </table>
        </div>`
      : html`<p>Nothing.</p>`}
  </section>`;
}

// The settings, or facts of the environment, that are not the same in all runs.
function Differences({ title, part, runs }) {
  const trees = runs.map((run) => run.data.summary[part]);
  const names = [...new Set(trees.flatMap(Object.keys))].filter((name) => name !== "run.name");
  const rows = names.map((name) => [name, ...trees.map((tree) => tree[name] ?? "-")]);
  const differing = rows.filter(([, ...values]) => new Set(values).size > 1);
  return html`<${Table} title=${`${title}: what differs`} headings=${["key", ...runs.map((run) => run.name)]} rows=${differing} />`;
}

function Finding({ finding, step }) {
  const until = finding.last_step < step ? `to ${finding.last_step}, and not in later steps` : "until the newest step";
  return html`<article class=${`finding ${finding.severity}`} data-kind=${finding.kind}>
    <b class="tag">${finding.severity}</b> <b>${finding.what}</b>
    <p>${finding.why}</p>
    <p><b>Try:</b> ${finding.advice}</p>
    <small>Steps ${finding.first_step} ${until}. See ${finding.metrics.join(", ")}.</small>
  </article>`;
}

function Diagnosis({ run, several }) {
  const { findings, step } = run.data.summary;
  if (step === null) return null;
  return html`<section>
    <h3>Diagnosis${several && ` of ${run.name}`}</h3>
    ${findings.map((finding) => html`<${Finding} key=${finding.kind} ...${{ finding, step }} />`)}
    ${!findings.length && html`<article class="finding fine"><b class="tag">fine</b> Nothing in the metrics looks wrong.</article>`}
  </section>`;
}

const LANE = 22;
const LEFT = 130;
const WIDTH = 900;

function Timeline({ spans, toneOfName }) {
  const laneOf = ({ role, lane }) => (lane === "main" ? role : `${role} ${lane}`);
  const lanes = [...new Set(spans.map(laneOf))];
  const start = Math.min(...spans.map((span) => span.start_s));
  const length = Math.max(...spans.map((span) => span.end_s)) - start;
  const scale = (WIDTH - LEFT) / (length || 1);
  return html`<small>The last ${length.toPrecision(3)} s, from timeline.json, which opens in Perfetto:</small>
    <div class="scroll">
      <svg viewBox=${`0 0 ${WIDTH} ${LANE * lanes.length}`} role="img" aria-label="timeline">
        ${lanes.map((lane, i) => html`<text key=${lane} x="0" y=${LANE * i + 15}>${lane.slice(0, 20)}</text>`)}
        ${spans.map(
          (span, i) =>
            html`<rect
              key=${i}
              x=${LEFT + (span.start_s - start) * scale}
              y=${LANE * lanes.indexOf(laneOf(span)) + 3}
              width=${Math.max((span.end_s - span.start_s) * scale, 0.6)}
              height=${LANE - 6}
              fill=${toneOfName(span.name)}
            >
              <title>${span.name}: ${(span.end_s - span.start_s).toPrecision(3)} s, by ${span.role}</title>
            </rect>`,
        )}
      </svg>
    </div>`;
}

function Time({ time, spans }) {
  const names = time.map(([name]) => name);
  const toneOfName = (name) => (names.includes(name) ? toneOf(names.indexOf(name)) : "var(--strong)");
  return html`<section>
    <h3>Where the time went</h3>
    <div class="shares">${time.map(([name, share]) => html`<i key=${name} title=${name} style=${{ width: `${100 * share}%`, background: toneOfName(name) }}></i>`)}</div>
    ${time.map(
      ([name, share, length]) =>
        html`<span class="share" key=${name}><i style=${{ background: toneOfName(name) }}></i>${name} ${(100 * share).toFixed(1)} % <small>${length}</small></span>`,
    )}
    <p><small>Stages may overlap.</small></p>
    ${spans.length > 0 && html`<${Timeline} ...${{ spans, toneOfName }} />`}
  </section>`;
}

// The samples before and after: the first and the last evaluation of a set, or without any the first and the last step.
function beforeAfter(run) {
  const [first, ...more] = [...run.data.columns].filter(([name]) => name.startsWith("eval/"));
  const evaluated = first ? run.data.steps.filter((step, i) => first[1][i] !== null && run.steps.includes(step)) : [];
  const steps = evaluated.length > 1 ? evaluated : run.steps;
  const split = evaluated.length > 1 ? first[0].split("/")[1] : "";
  return { tab: "samples", run: run.name, runB: run.name, step: steps.at(-1), stepB: steps[0], split, compare: true, follow: false };
}

function Details({ run, go }) {
  const { tables, time, spans, config, environment } = run.data.summary;
  const files = [["configuration", config], ["environment", environment]].filter(([, tree]) => Object.keys(tree).length);
  return html`${run.steps.length > 0 && html`<p><button onClick=${() => go(beforeAfter(run))}>samples before and after</button></p>`}
    ${tables.map((table) => html`<${Table} key=${table.title} ...${table} />`)}
    ${time.length + spans.length > 0 && html`<${Time} ...${{ time, spans }} />`}
    ${files.map(([name, tree]) => html`<details class="file" key=${name}><summary>${name}</summary><${Table} headings=${["key", "value"]} rows=${Object.entries(tree)} /></details>`)}`;
}

function Stage({ stage, runs, go, look }) {
  const several = runs.length > 1;
  const names = mainOf(runs).slice(0, NUM_MAIN);
  return html`<h2>${stage || (several ? "Comparison" : "Run")}</h2>
    ${runs.map((run) => html`<${Diagnosis} key=${run.name} ...${{ run, several }} />`)}
    ${several && html`<${Differences} title="Configuration" part="config" runs=${runs} />`}
    ${names.length > 0 && html`<section data-stage="first"><h3>Main curves</h3><${Charts} eager ...${{ names, runs, ...look }} /></section>`}
    ${runs.map((run) =>
      several
        ? html`<details key=${run.name}><summary>${run.name}</summary><${Details} ...${{ run, go }} /></details>`
        : html`<${Details} key=${run.name} ...${{ run, go }} />`,
    )}
    ${several && html`<${Differences} title="Environment" part="environment" runs=${runs} />`}`;
}

export function Overview({ runs: all, go, ...look }) {
  const runs = all.filter(({ data: { summary } }) => summary !== NO_SUMMARY && !summary.trouble);
  const rows = runs.map(({ data: { summary }, ...run }) => [run.name, stateOf(run)[1], summary.what, summary.progress, summary.machine]);
  return html`<main class="overview">
    ${all.length > runs.length && html`<p class="empty">${all.find((run) => run.data.summary.trouble)?.data.summary.trouble ?? "…"}</p>`}
    ${saved && html`<small>Written ${saved.written}.</small>`}
    ${rows.length > 0 && html`<${Table} headings=${["run", "state", "what", "steps", "machine and code"]} rows=${rows} />`}
    ${runs
      .filter((run) => run.data.summary.ended_by !== null)
      .map((run) => html`<article class="finding failure" key=${run.name}><b class="tag">failed</b> ${run.name}: ${visible(run.data.summary.ended_by)}</article>`)}
    ${[...Map.groupBy(runs, (run) => run.data.summary.stage)].map(
      ([stage, members]) => html`<${Stage} key=${stage} ...${{ stage, runs: members, go, look }} />`,
    )}
  </main>`;
}
