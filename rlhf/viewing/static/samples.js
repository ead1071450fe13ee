// The responses of a step, a prompt's side by side; or of two steps (of one run or two), the same prompts side by side.

import { html, useEffect, useMemo, useRef, useState } from "./vendor/htm-preact.module.js";
import { number, signed, visible } from "./format.js";
import { failed, groupsOf, NO_FILTER, passes, splitsOf, useListing, useResponses } from "./listing.js";
import { COLOURS, drawTokens, scaleOf, tip } from "./tokens.js";

const previewOf = (prompt) => visible(prompt.replace(/<\|[^|<>]*\|>/g, " ")).trim().slice(0, 80) || "(empty prompt)";
const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

function Dots({ rows, low, high }) {
  const place = (score) => (high > low ? (score - low) / (high - low) : 0.5);
  return html`<span class="dots" aria-hidden="true">
    ${rows
      .filter((row) => row.score !== undefined && row.score !== null)
      .slice(0, 32)
      .map((row, i) => html`<i key=${i} style=${{ left: `${4 + 92 * place(row.score)}%` }}></i>`)}
  </span>`;
}

function GroupList({ groups, chosen, choose }) {
  const list = useRef();
  useEffect(() => {
    list.current?.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "nearest" });
  }, [chosen]);
  const scores = groups.flatMap((group) => group.rows.map((row) => row.score).filter((score) => score !== undefined));
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  return html`<div class="groups" role="listbox" aria-label="prompts" ref=${list}>
    ${groups.slice(0, 500).map((group) => {
      const own = group.rows.map((row) => row.score).filter((score) => score !== undefined && score !== null);
      return html`<button
        key=${group.key}
        role="option"
        class="group"
        aria-selected=${group.key === chosen ? "true" : "false"}
        data-group=${group.key}
        onClick=${() => choose(group.key)}
      >
        <span class="preview">${previewOf(group.preview)}</span>
        <span class="sum">
          <${Dots} rows=${group.rows} low=${low} high=${high} />
          <b>${own.length ? number(own.reduce((a, b) => a + b, 0) / own.length) : ""}</b>
        </span>
      </button>`;
    })}
    ${groups.length > 500 && html`<p class="empty">${groups.length - 500} more: narrow the filters.</p>`}
  </div>`;
}

function Tokens({ response, colour, scale, theme }) {
  const root = useRef();
  const [all, setAll] = useState(false);
  const [left, setLeft] = useState(0);
  useEffect(() => setLeft(drawTokens(root.current, response.tokens, colour, scale, { all })), [
    response,
    colour,
    scale,
    all,
    theme,
  ]);
  const over = (event) => {
    const span = event.target.closest?.("[data-i]");
    if (span && root.current.contains(span)) tip.show(response.tokens, span);
    else tip.hide();
  };
  return html`<div class="text tokens" ref=${root} onMouseOver=${over} onMouseLeave=${() => tip.hide()} onClick=${over}></div>
    ${left > 0 && html`<button class="more" onClick=${() => setAll(true)}>${left} more tokens</button>`}`;
}

function Turns({ turns }) {
  return html`<div class="text">
    ${turns.slice(1).map(
      (turn, i) =>
        html`<div key=${i} class=${turn.sampled ? "turn policy" : "turn environment"}>
          <div class="who">${turn.role}</div>
          ${visible(turn.text)}
        </div>`,
    )}
  </div>`;
}

function Card({ response, row, colour, scale, focused, dim, hasError, theme }) {
  const root = useRef();
  useEffect(() => {
    if (focused) root.current.scrollIntoView({ block: "nearest", inline: "nearest" });
  }, [focused]);
  const chips = Object.entries(response.scores ?? {});
  return html`<article
    ref=${root}
    class=${`card${focused ? " focused" : ""}${dim ? " dim" : ""}`}
    data-sample=${response.sample ?? row.sample}
    aria-label=${`response ${response.sample}`}
  >
    <header>
      <small>#${response.sample ?? row.sample ?? 0}</small>
      ${response.score !== null &&
      response.score !== undefined &&
      html`<span title="weighted sum of the rewards">score <b class="score">${number(response.score)}</b></span>`}
      ${response.advantage !== null &&
      response.advantage !== undefined &&
      html`<span title="advantage, mean over the tokens"
        >adv <b class=${response.advantage >= 0 ? "up" : "down"}>${signed(Number(response.advantage.toPrecision(3)))}</b></span
      >`}
      ${chips.length > 1 && chips.map(([name, value]) => html`<span class="chip" key=${name}>${name} ${number(value)}</span>`)}
      <span class="chip" title="tokens that the policy sampled">${response.response_tokens ?? "?"} tok</span>
      ${typeof response.mean_rollout_logprob === "number" &&
      html`<span class="chip" title="mean log-probability by the engine">lp ${number(Number(response.mean_rollout_logprob.toPrecision(3)))}</span>`}
      ${response.max_version >= 0 &&
      html`<span class="chip" title="weights that sampled it"
        >v${response.min_version === response.max_version ? response.max_version : `${response.min_version}–${response.max_version}`}</span
      >`}
      ${response.truncated && html`<span class="chip bad">truncated</span>`}
      ${hasError && html`<span class="chip bad">error</span>`}
      ${response.preferred === true && html`<span class="chip good">chosen</span>`}
      ${response.preferred === false && html`<span class="chip bad">rejected</span>`}
    </header>
    ${response.tokens
      ? html`<${Tokens} ...${{ response, colour, scale, theme }} />`
      : response.turns?.length
        ? html`<${Turns} turns=${response.turns} />`
        : html`<div class="text">${visible(response.response ?? "")}</div>`}
  </article>`;
}

const MOST_CARDS = 64;

function Side({ label, tone, run, step, listing, group, colour, scale, responses, error, filter, errors, focus, theme }) {
  if (error) return html`<p class="empty">${error.message}</p>`;
  if (!responses) return html`<p class="empty">…</p>`;
  return html`<section class="side">
    ${label && html`<h3><i style=${{ background: `var(${tone})` }}></i>${label}</h3>`}
    <div class="cards">
      ${responses.slice(0, MOST_CARDS).map((response, i) => {
        const row = group.rows[i];
        return html`<${Card}
          key=${`${run} ${step} ${group.key} ${i}`}
          ...${{ response, row, colour, scale, theme }}
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
  if (!there) return html`<span class="legend">these responses have no tokens on record</span>`;
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
  const active = JSON.stringify(filter) !== JSON.stringify(NO_FILTER);
  return html`<div class="filters">
    <span>score</span>${box("scoreFrom", "score from")}${box("scoreTo", "score to")}
    <span>tokens</span>${box("tokensFrom", "tokens from")}${box("tokensTo", "tokens to")}
    <select
      aria-label="truncated"
      value=${filter.truncated}
      onChange=${(event) => set({ ...filter, truncated: event.target.value })}
    >
      <option value="">truncated or not</option>
      <option value="yes">truncated</option>
      <option value="no">not truncated</option>
    </select>
    <label class="check">
      <input
        type="checkbox"
        checked=${filter.error}
        onChange=${(event) => set({ ...filter, error: event.target.checked })}
      />
      with an error
    </label>
    ${active && html`<button onClick=${() => set(NO_FILTER)}>clear</button>`}
  </div>`;
}

export function StepPicker({ label, tone, steps, step, choose }) {
  const place = steps.indexOf(step);
  const go = (to) => choose(steps[Math.max(0, Math.min(steps.length - 1, to))]);
  return html`<div class="steps">
    ${label && html`<i style=${{ background: `var(${tone})` }}></i>`}
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

export function Samples({ place, go, runs, other, tick, theme, focus, filter, setFilter }) {
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
  const groups = place.compare && b.listing ? groupsA.filter(keyB) : groupsA;
  const group = groups.find((one) => one.key === place.group) ?? groups[0];
  const groupB = place.compare && group ? keyB(group) : undefined;
  const gotA = useResponses(place.run, place.step, a.listing, group, () => renew((n) => n + 1));
  const gotB = useResponses(place.runB, place.stepB, b.listing, groupB, () => renew((n) => n + 1));
  const colour = Object.hasOwn(COLOURS, place.colour) ? COLOURS[place.colour] : COLOURS.advantage;
  const shown = [...(gotA.responses ?? []), ...((groupB && gotB.responses) || [])];
  const scale = useMemo(() => scaleOf(colour, shown), [colour, gotA.responses, gotB.responses]);
  const there = shown.some((response) => response.tokens);
  const prompt = gotA.responses?.[0]?.prompt ?? group?.preview ?? "";
  useEffect(() => tip.hide(), [place.step, group?.key]);
  useEffect(() => {
    Object.assign(other, { groups: groups.map((one) => one.key), at: group?.key, splits, split });
    other.count = group?.rows.length ?? 0;
  });

  const missing = !place.run
    ? "No run yet."
    : !runA?.steps.length
      ? "No samples are written yet. They come with the first step or evaluation of a run that samples responses."
      : a.error
        ? a.error.message
        : a.listing && !groups.length
          ? place.compare && groupsA.length
            ? `No prompt of these responses is in step ${place.stepB} of ${place.runB} too. An evaluation set has the same prompts at every evaluation.`
            : "No response passes the filters."
          : null;

  return html`<main class="samples">
    <div class="bar">
      <${StepPicker}
        label=${place.compare}
        tone="--run-a"
        steps=${runA?.steps ?? []}
        step=${place.step}
        choose=${(step) => go({ step, follow: step === runA.steps.at(-1) })}
      />
      ${place.compare &&
      html`<div class="against">
        <select aria-label="run to compare with" value=${place.runB} onChange=${(event) => go({ runB: event.target.value, stepB: null })}>
          ${runs.map((run) => html`<option key=${run.name} value=${run.name}>${run.name}</option>`)}
        </select>
        <${StepPicker}
          label=${true}
          tone="--run-b"
          steps=${runB?.steps ?? []}
          step=${place.stepB}
          choose=${(stepB) => go({ stepB })}
        />
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
        <select aria-label="colour of the tokens" value=${place.colour} onChange=${(event) => go({ colour: event.target.value })}>
          ${Object.entries(COLOURS).map(([name, one]) => html`<option key=${name} value=${name}>${one.label}</option>`)}
        </select>
      </label>
      ${shown.length > 0 && html`<${Legend} ...${{ colour, scale, there }} />`}
      <details class="filterbox">
        <summary>filters${JSON.stringify(filter) === JSON.stringify(NO_FILTER) ? "" : " •"}</summary>
        <${Filters} filter=${filter} set=${setFilter} />
      </details>
    </div>
    ${missing
      ? html`<p class="empty">${missing}</p>`
      : html`<div class="board">
          <${GroupList} groups=${groups} chosen=${group?.key} choose=${(key) => go({ group: key, sample: 0 })} />
          <div class="detail">
            <details class="prompt" open>
              <summary>
                prompt ${group?.promptId ?? ""} <small>${group ? `${group.rows.length} responses, median ${number(median(group.rows.map((row) => row.tokens ?? 0)))} tokens` : ""}</small>
              </summary>
              <pre>${visible(prompt)}</pre>
            </details>
            <div class=${place.compare ? "sides two" : "sides"}>
              <${Side}
                ...${{ colour, scale, filter, theme, group }}
                label=${place.compare ? `${place.run} · step ${place.step}` : ""}
                tone="--run-a"
                run=${place.run}
                step=${place.step}
                responses=${gotA.responses}
                error=${gotA.error}
                errors=${errorsA}
                focus=${focus}
              />
              ${place.compare &&
              groupB &&
              html`<${Side}
                ...${{ colour, scale, filter, theme }}
                group=${groupB}
                label=${`${place.runB} · step ${place.stepB}`}
                tone="--run-b"
                run=${place.runB}
                step=${place.stepB}
                responses=${gotB.responses}
                error=${gotB.error}
                errors=${errorsB}
                focus=${null}
              />`}
            </div>
          </div>
        </div>`}
  </main>`;
}
