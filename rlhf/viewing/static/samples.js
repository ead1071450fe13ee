// The responses to a prompt side by side, at one step, or at two steps of one run or of two runs.

import { html, useEffect, useMemo, useRef, useState } from "./vendor/htm-preact.module.js";
import { Check, Choice } from "./fields.js";
import { number, signed, visible } from "./format.js";
import { SmallImages, TextWithImages } from "./images.js";
import { saved } from "./api.js";
import { failed, groupsOf, isFilter, NO_FILTER, passes, splitsOf, useListing, useResponses } from "./listing.js";
import { COLOURS, drawTokens, scaleOf, tip } from "./tokens.js";

const previewOf = (prompt) => visible(prompt.replace(/<\|[^|<>]*\|>/g, " ")).trim().slice(0, 80) || "(empty prompt)";
const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
const scoresOf = (rows) => rows.map((row) => row.score).filter((score) => score != null);
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const rounded = (value) => Number(value.toPrecision(3));

function Dots({ rows, low, high }) {
  const place = (score) => (high > low ? (score - low) / (high - low) : 0.5);
  return html`<span class="dots" aria-hidden="true">
    ${scoresOf(rows)
      .slice(0, 32)
      .map((score, i) => html`<i key=${i} style=${{ left: `${4 + 92 * place(score)}%` }}></i>`)}
  </span>`;
}

function GroupList({ run, groups, chosen, choose }) {
  const list = useRef();
  useEffect(() => {
    list.current?.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "nearest" });
  }, [chosen]);
  const scores = groups.flatMap((group) => scoresOf(group.rows));
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  return html`<div class="groups" role="listbox" aria-label="prompts" ref=${list}>
    ${groups.slice(0, 500).map((group) => {
      const own = scoresOf(group.rows);
      return html`<button
        key=${group.key}
        role="option"
        class="group"
        aria-selected=${group.key === chosen ? "true" : "false"}
        data-group=${group.key}
        onClick=${() => choose(group.key)}
      >
        <span class="preview"><${SmallImages} run=${run} names=${group.images} />${previewOf(group.preview)}</span>
        ${group.told && html`<span class="preview told">${visible(group.told)}</span>`}
        <span class="sum">
          <${Dots} rows=${group.rows} low=${low} high=${high} />
          <b>${own.length ? number(mean(own)) : ""}</b>
        </span>
      </button>`;
    })}
    ${groups.length > 500 && html`<p class="empty">${groups.length - 500} more: narrow the filters.</p>`}
  </div>`;
}

function Tokens({ run, response, colour, scale, theme }) {
  const root = useRef();
  const [all, setAll] = useState(false);
  const [left, setLeft] = useState(0);
  useEffect(
    () => setLeft(drawTokens(root.current, response.tokens, colour, scale, all, run)),
    [response, colour, scale, all, run, theme],
  );
  const over = (event) => {
    const span = event.target.closest?.("[data-i]");
    if (span && root.current.contains(span)) tip.show(response.tokens, span);
    else tip.hide();
  };
  return html`<div class="text tokens" ref=${root} onMouseOver=${over} onMouseLeave=${() => tip.hide()} onClick=${over}></div>
    ${left > 0 && html`<button class="more" onClick=${() => setAll(true)}>${left} more tokens</button>`}`;
}

function Turns({ run, turns, images }) {
  return html`<div class="text">
    ${turns.slice(1).map(
      (turn, i) =>
        html`<div key=${i} class=${turn.sampled ? "turn policy" : "turn environment"}>
          <div class="who">${turn.role}</div>
          <${TextWithImages} run=${run} text=${turn.text} names=${images} />
        </div>`,
    )}
  </div>`;
}

const written = (value) => visible(typeof value === "string" ? value : JSON.stringify(value, null, 1));

// A value of a data row or of an agent, and how much of it is shown.
function Value({ name, value, whole }) {
  return html`<div class="value">
    <b>${visible(name)}</b>${whole && html` <small>the first ${value.length} of ${whole} characters</small>`}
    <pre>${written(value)}</pre>
  </div>`;
}

function Card({ run, response, row, colour, scale, focused, dim, hasError, theme }) {
  const root = useRef();
  useEffect(() => {
    if (focused) root.current.scrollIntoView({ block: "nearest", inline: "nearest" });
  }, [focused]);
  const { score, advantage, min_version: oldest, max_version: newest, mean_rollout_logprob: logprob } = response;
  const scores = Object.entries(response.scores ?? {});
  return html`<article
    ref=${root}
    class=${`card${focused ? " focused" : ""}${dim ? " dim" : ""}`}
    data-sample=${response.sample ?? row.sample}
    aria-label=${`response ${response.sample}`}
  >
    <header>
      <small>#${response.sample ?? row.sample ?? 0}</small>
      ${score != null && html`<span title="weighted sum of the rewards">score <b class="score">${number(score)}</b></span>`}
      ${advantage != null &&
      html`<span title="advantage, mean over the tokens">adv <b class=${advantage >= 0 ? "up" : "down"}>${signed(rounded(advantage))}</b></span>`}
      ${scores.length > 1 && scores.map(([name, value]) => html`<span class="chip" key=${name}>${name} ${number(value)}</span>`)}
      <span class="chip" title="tokens that the policy sampled">${response.response_tokens ?? "?"} tok</span>
      ${typeof logprob === "number" &&
      html`<span class="chip" title="mean log-probability by the engine">lp ${number(rounded(logprob))}</span>`}
      ${newest >= 0 &&
      html`<span class="chip" title="weights that sampled it">v${oldest === newest ? newest : `${oldest}–${newest}`}</span>`}
      ${response.truncated && html`<span class="chip bad">truncated</span>`}
      ${response.broken?.length > 0 &&
      html`<span class="chip bad" title="calls that did not continue the session's tokens">broken: ${[...new Set(response.broken)].join(", ")}</span>`}
      ${response.cut > 0 && html`<span class="chip bad">${response.cut} more tokens are not in this report</span>`}
      ${hasError && html`<span class="chip bad">error</span>`}
      ${response.preferred === true && html`<span class="chip good">chosen</span>`}
      ${response.preferred === false && html`<span class="chip bad">rejected</span>`}
    </header>
    ${response.tokens
      ? html`<${Tokens} ...${{ run, response, colour, scale, theme }} />`
      : response.turns?.length
        ? html`<${Turns} run=${run} turns=${response.turns} images=${response.images} />`
        : html`<div class="text">${visible(response.response ?? "")}</div>`}
    ${response.privileged_prompt != null &&
    html`<${Value} name="the teacher's prompt (the policy did not see it)" value=${response.privileged_prompt} />`}
    ${response.result != null &&
    html`<${Value} name="result of the agent" value=${response.result} whole=${response.shortened?.result} />`}
  </article>`;
}

const MOST_CARDS = 64;

function Side({ labelled, tone, run, step, group, colour, scale, responses, error, filter, errors, focus, theme }) {
  if (error) return html`<p class="empty">${error.message}</p>`;
  if (!responses) return html`<p class="empty">…</p>`;
  return html`<section class="side">
    ${labelled && html`<h3><i style=${{ background: `var(${tone})` }}></i>${run} · step ${step}</h3>`}
    <div class="cards">
      ${responses.slice(0, MOST_CARDS).map((response, i) => {
        const row = group.rows[i];
        return html`<${Card}
          key=${`${run} ${step} ${group.key} ${i}`}
          ...${{ run, response, row, colour, scale, theme }}
          focused=${focus === i}
          dim=${!passes(row, filter, step, errors)}
          hasError=${failed(errors, step, row)}
        />`;
      })}
    </div>
    ${responses.length > MOST_CARDS && html`<p class="empty">${responses.length - MOST_CARDS} more responses.</p>`}
  </section>`;
}

function Legend({ colour, scale, there }) {
  if (!there) return html`<span class="legend">the tokens of these responses are not recorded</span>`;
  if (colour === COLOURS.none) return null;
  if (scale === null) return html`<span class="legend">no ${colour.label} here</span>`;
  const ends = colour.below ? ["0", `≤ ${number(-scale)}`] : [`≤ ${number(-scale)}`, `≥ ${signed(scale)}`];
  return html`<span class="legend" title="what the colours stand for">
    ${ends[0]}<i class=${colour.below ? "ramp below" : "ramp"}></i>${ends[1]}
  </span>`;
}

function Filters({ filter, set }) {
  const box = (name, label) =>
    html`<input
      type="number"
      step="any"
      aria-label=${label}
      placeholder=${label.split(" ").at(-1)}
      value=${filter[name]}
      onInput=${(event) => set({ ...filter, [name]: event.target.value })}
    />`;
  const truncated = [["", "truncated or not"], ["yes", "truncated"], ["no", "not truncated"]];
  return html`<div class="filters">
    <span>score</span>${box("scoreFrom", "score from")}${box("scoreTo", "score to")}
    <span>tokens</span>${box("tokensFrom", "tokens from")}${box("tokensTo", "tokens to")}
    <${Choice} label="truncated" value=${filter.truncated} options=${truncated} set=${(value) => set({ ...filter, truncated: value })} />
    <${Check} checked=${filter.error} set=${(error) => set({ ...filter, error })}>with an error<//>
    ${isFilter(filter) && html`<button onClick=${() => set(NO_FILTER)}>clear</button>`}
  </div>`;
}

function StepPicker({ tone, steps, step, choose }) {
  const place = steps.indexOf(step);
  const go = (to) => choose(steps[Math.max(0, Math.min(steps.length - 1, to))]);
  return html`<div class="steps">
    ${tone && html`<i style=${{ background: `var(${tone})` }}></i>`}
    <button aria-label="previous step" disabled=${place <= 0} onClick=${() => go(place - 1)}>‹</button>
    <span class="at">step <b>${step ?? "–"}</b></span>
    <button aria-label="next step" disabled=${place >= steps.length - 1} onClick=${() => go(place + 1)}>›</button>
    <input
      type="range"
      aria-label="step"
      min="0"
      max=${Math.max(steps.length - 1, 0)}
      value=${Math.max(place, 0)}
      onInput=${(event) => go(Number(event.target.value))}
    />
  </div>`;
}

export function Samples({ place, go, runs, content, tick, theme, focus, filter, setFilter }) {
  const [again, renew] = useState(0);
  const a = useListing(place.run, place.step, `${tick} ${again}`);
  const b = useListing(place.compare ? place.runB : null, place.compare ? place.stepB : null, `${tick} ${again}`);
  const runA = runs.find((run) => run.name === place.run);
  const runB = runs.find((run) => run.name === place.runB);
  const errorsA = runA?.data.errors ?? [];
  const errorsB = runB?.data.errors ?? [];
  const splits = splitsOf(a.listing);
  const split = splits.includes(place.split) ? place.split : (splits[0] ?? "");
  const groupsA = useMemo(
    () => groupsOf(a.listing, split, filter, place.step, errorsA),
    [a.listing, split, filter, errorsA],
  );
  const groupsB = useMemo(
    () => groupsOf(b.listing, split, NO_FILTER, place.stepB, errorsB),
    [b.listing, split, errorsB],
  );
  const keyB = (group) => groupsB.find((one) => one.promptId === group.promptId && one.hash === group.hash);
  const gain = (group) => mean(scoresOf(group.rows)) - mean(scoresOf(keyB(group).rows)) || 0;
  const common = () => groupsA.filter(keyB).map((group) => [gain(group), group]).sort(([x], [y]) => y - x);
  const groups = place.compare && b.listing ? common().map(([, group]) => group) : groupsA;
  const group = groups.find((one) => one.key === place.group) ?? groups[0];
  const groupB = place.compare && group ? keyB(group) : undefined;
  const gotA = useResponses(place.run, place.step, a.listing, group, () => renew((n) => n + 1));
  const gotB = useResponses(place.runB, place.stepB, b.listing, groupB, () => renew((n) => n + 1));
  const colour = Object.hasOwn(COLOURS, place.colour) ? COLOURS[place.colour] : COLOURS.advantage;
  const shown = [...(gotA.responses ?? []), ...((groupB && gotB.responses) || [])];
  const scale = useMemo(() => scaleOf(colour, shown), [colour, gotA.responses, gotB.responses]);
  const there = shown.some((response) => response.tokens);
  const names = runs.map((run) => [run.name, run.name]);
  const colours = Object.entries(COLOURS).map(([name, { label }]) => [name, label]);
  const look = { colour, scale, filter, theme, labelled: place.compare };
  const { columns = {}, shortened = {}, images } = gotA.responses?.[0] ?? {}; // a preview has no marks
  const prompt = gotA.responses?.[0]?.prompt ?? group?.preview ?? "";
  useEffect(() => tip.hide(), [place.step, group?.key]);
  useEffect(() => {
    Object.assign(content, { groups: groups.map((one) => one.key), at: group?.key, count: group?.rows.length ?? 0, splits, split });
  });

  const missing = () => {
    if (!place.run) return "No run yet.";
    if (!runA?.steps.length) return "No samples are written yet. They appear with the first step or evaluation that samples responses.";
    if (a.error) return a.error.message;
    if (!a.listing || groups.length) return null;
    if (!place.compare || !groupsA.length) return "No response passes the filters.";
    return `No prompt of these responses is in step ${place.stepB} of ${place.runB} too. An evaluation set has the same prompts at every evaluation.`;
  };

  return html`<main class="samples">
    <div class="bar">
      <${StepPicker}
        tone=${place.compare && "--run-a"}
        steps=${runA?.steps ?? []}
        step=${place.step}
        choose=${(step) => go({ step, follow: step === runA.steps.at(-1) })}
      />
      ${place.compare &&
      html`<div class="against">
        <${Choice} label="run to compare with" value=${place.runB} options=${names} set=${(name) => go({ runB: name, stepB: null })} />
        <${StepPicker} tone="--run-b" steps=${runB?.steps ?? []} step=${place.stepB} choose=${(stepB) => go({ stepB })} />
      </div>`}
      ${splits.length > 1 &&
      html`<div class="tabs small" role="group" aria-label="set">
        ${splits.map(
          (one) =>
            html`<button key=${one} aria-pressed=${one === split ? "true" : "false"} onClick=${() => go({ split: one, group: null })}>
              ${one}
            </button>`,
        )}
      </div>`}
      <button aria-pressed=${place.compare ? "true" : "false"} onClick=${() => go({ compare: !place.compare })}>compare</button>
    </div>
    <div class="bar second">
      <label class="colour">
        colour
        <${Choice} label="colour of the tokens" value=${place.colour} options=${colours} set=${(name) => go({ colour: name })} />
      </label>
      ${shown.length > 0 && html`<${Legend} ...${{ colour, scale, there }} />`}
      ${saved && html`<small>${saved.limits}</small>`}
      <details class="filterbox">
        <summary>filters${isFilter(filter) ? " •" : ""}</summary>
        <${Filters} filter=${filter} set=${setFilter} />
      </details>
    </div>
    ${missing()
      ? html`<p class="empty">${missing()}</p>`
      : html`<div class="board">
          <${GroupList} run=${place.run} groups=${groups} chosen=${group?.key} choose=${(key) => go({ group: key, sample: 0 })} />
          <div class="detail">
            <details class="prompt" open>
              <summary>
                prompt ${group?.promptId ?? ""} <small>${group ? `${group.rows.length} responses, median ${number(median(group.rows.map((row) => row.tokens ?? 0)))} tokens` : ""}</small>
              </summary>
              <pre><${TextWithImages} run=${place.run} text=${prompt} names=${images} before /></pre>
              ${Object.entries(columns).map(
                ([name, value]) =>
                  html`<${Value} key=${name} name=${name} value=${value} whole=${shortened[`columns.${name}`]} />`,
              )}
            </details>
            <div class=${place.compare ? "sides two" : "sides"}>
              <${Side} ...${{ ...look, ...gotA, group }} run=${place.run} step=${place.step} tone="--run-a" errors=${errorsA} focus=${focus} />
              ${groupB &&
              html`<${Side} ...${{ ...look, ...gotB, group: groupB }} run=${place.runB} step=${place.stepB} tone="--run-b" errors=${errorsB} />`}
            </div>
          </div>
        </div>`}
  </main>`;
}
