// The page: the runs, the tabs, the keys, and a request every two seconds for new data of the runs.

import { html, render, useEffect, useMemo, useRef, useState } from "./vendor/htm-preact.module.js";
import { ApiError, login, RunData, runsOf, saved } from "./api.js";
import { Curves } from "./curves.js";
import { Errors } from "./errors.js";
import { Choice } from "./fields.js";
import { actionOf, KEYS, TABS, useKeys } from "./keys.js";
import { NO_FILTER } from "./listing.js";
import { Overview, stateOf, TONES } from "./overview.js";
import { Samples } from "./samples.js";
import { tip } from "./tokens.js";

const EVERY_MS = 2000;
const HIDDEN_EVERY_MS = 15000;

// ---- the place of the reader, kept in the address: a link shows the same

const TEXT = ["tab", "run", "split", "group", "colour", "runB"];
const NUMBERS = ["step", "stepB", "sample"];

function readPlace() {
  const given = new URLSearchParams(location.hash.slice(1));
  const place = { tab: TABS[0], run: null, step: null, split: "", group: null, sample: 0, colour: "advantage" };
  Object.assign(place, { compare: given.get("compare") === "1", runB: null, stepB: null, follow: !given.has("step") });
  for (const name of TEXT) if (given.has(name)) place[name] = given.get(name);
  for (const name of NUMBERS) if (given.has(name)) place[name] = Number(given.get(name));
  if (!TABS.includes(place.tab)) place.tab = TABS[0];
  return place;
}

function writePlace(place) {
  const kept = new URLSearchParams();
  for (const name of [...TEXT, ...NUMBERS]) {
    const unused = (name.endsWith("B") && !place.compare) || (name === "step" && place.follow);
    if (!unused && place[name] !== null && place[name] !== "") kept.set(name, place[name]);
  }
  if (place.compare) kept.set("compare", "1");
  // the frame of a notebook has no address to write
  if (location.protocol !== "about:") history.replaceState(null, "", `#${kept}`);
}

// Returns the requested place, with a run and a step that exist.
function settle(place, runs) {
  const withSamples = runs.filter((run) => run.steps.length);
  const run = runs.find((one) => one.name === place.run) ?? withSamples.at(0) ?? runs.at(0);
  if (!run) return place;
  const steps = run.steps;
  const nearest = (all, step) => all.reduce((best, one) => (Math.abs(one - step) < Math.abs(best - step) ? one : best), all[0]);
  const step = !steps.length ? null : place.follow || place.step === null ? steps.at(-1) : nearest(steps, place.step);
  const next = { ...place, run: run.name, step };
  if (place.compare) {
    const others = withSamples.filter((one) => one.name !== run.name);
    const second = runs.find((one) => one.name === place.runB) ?? others[0] ?? run;
    next.runB = second.name;
    const wished = place.stepB ?? (second === run ? steps[0] : step);
    next.stepB = second.steps.length ? nearest(second.steps, wished) : null;
  }
  return next;
}

// ---- parts of the page

function Login({ enter, wrong }) {
  const field = useRef();
  return html`<form
    class="login"
    onSubmit=${(event) => {
      event.preventDefault();
      enter(field.current.value);
    }}
  >
    <h1>rlhf view</h1>
    <p>This server needs the token with which it was started.</p>
    <input type="password" autocomplete="current-password" aria-label="token" ref=${field} autofocus />
    <button>log in</button>
    ${wrong && html`<p class="bad">This is not the token.</p>`}
  </form>`;
}

function Help({ close }) {
  return html`<div class="veil" onClick=${close}>
    <div class="help" role="dialog" aria-label="keys" onClick=${(event) => event.stopPropagation()}>
      <h2>Keys</h2>
      <dl>
        ${KEYS.map(
          ([keys, meaning]) =>
            html`<div key=${keys}>
              <dt>${keys.split(" ").map((key) => (key === "or" ? " or " : html`<kbd key=${key}>${key}</kbd>`))}</dt>
              <dd>${meaning}</dd>
            </div>`,
        )}
      </dl>
      <button onClick=${close}>close</button>
    </div>
  </div>`;
}

function RunChips({ runs, shown, toggle }) {
  return html`<div class="runs">
    ${runs.map((run) => {
      const [kind, words] = stateOf(run);
      const on = shown.has(run.name);
      const { recoveries } = run.data.summary;
      return html`<button
        key=${run.name}
        class="run"
        aria-pressed=${on ? "true" : "false"}
        title=${`${words}; click to ${on ? "hide" : "show"}`}
        onClick=${() => toggle(run.name)}
      >
        <i style=${{ background: on ? `var(${run.colour})` : "var(--line)" }}></i>
        <span>${run.name}</span>
        <small class=${kind}>${words}${recoveries ? `, ${recoveries} ${recoveries === 1 ? "recovery" : "recoveries"}` : ""}</small>
      </button>`;
    })}
  </div>`;
}

// ---- the whole

const darkMode = matchMedia("(prefers-color-scheme: dark)");

function useTheme() {
  const [dark, setDark] = useState(darkMode.matches);
  useEffect(() => darkMode.addEventListener("change", () => setDark(darkMode.matches)), []);
  return dark ? "dark" : "light";
}

const data = new Map(); // the metrics and errors of each run

async function refresh(withMetrics) {
  const answer = await runsOf(withMetrics);
  const runs = answer.runs.map((run, i) => {
    if (!data.has(run.name)) data.set(run.name, new RunData(run.name));
    return { ...run, colour: TONES[i % TONES.length], data: data.get(run.name) };
  });
  const changed = await Promise.all(runs.map((run) => run.data.refresh()));
  return { runs, metrics: answer.metrics, changed: changed.some(Boolean) };
}

// Reads the runs every two seconds. `moved` is called when the address no longer has the token with which a link let the
// browser in.
function useRuns(moved) {
  const [runs, setRuns] = useState([]);
  const [tick, setTick] = useState(0); // counts the times when there was new data
  const [metrics, setMetrics] = useState([]);
  const [trouble, setTrouble] = useState(null);
  const [locked, setLocked] = useState(false);
  const [wrong, setWrong] = useState(false); // the given token
  const known = useRef(false); // the metrics' meanings are here

  useEffect(() => {
    let timer = null;
    let gone = false;
    const turn = async () => {
      try {
        const answer = await refresh(!known.current);
        if (gone) return;
        if (answer.metrics) setMetrics(answer.metrics.map((one) => ({ ...one, pattern: new RegExp(`^${one.pattern}$`) })));
        known.current = true;
        setRuns(answer.runs);
        if (answer.changed) setTick((n) => n + 1);
        setTrouble(null);
        setLocked(false);
      } catch (error) {
        if (gone) return;
        if (error instanceof ApiError && error.status === 401) setLocked(true);
        else setTrouble(error instanceof ApiError ? error.message : "The server does not answer.");
      }
      if (!saved) timer = setTimeout(turn, document.hidden ? HIDDEN_EVERY_MS : EVERY_MS);
    };
    const start = async () => {
      const token = new URLSearchParams(location.hash.slice(1)).get("token");
      if (token !== null) {
        history.replaceState(null, "", location.pathname);
        moved();
        if (!(await login(token))) setWrong(true);
      }
      await turn();
    };
    start();
    return () => {
      gone = true;
      clearTimeout(timer);
    };
  }, [locked]);

  const enter = async (token) => {
    const right = await login(token);
    setWrong(!right);
    if (right) setLocked(false);
  };

  const about = useMemo(() => {
    const meanings = new Map();
    return (name) => {
      if (!meanings.has(name)) {
        const metric = metrics.find(({ pattern }) => pattern.test(name));
        meanings.set(name, metric ? `${metric.meaning}${metric.unit === "1" ? "" : ` (${metric.unit})`}` : name);
      }
      return meanings.get(name);
    };
  }, [metrics]);

  return { runs, tick, about, trouble, locked, wrong, enter };
}

function App() {
  const [asked, setAsked] = useState(readPlace);
  const { runs, tick, about, trouble, locked, wrong, enter } = useRuns(() => setAsked(readPlace()));
  const [hidden, setHidden] = useState(new Set());
  const [settings, setSettings] = useState({ wanted: "", smoothing: 0.6, log: false, byTime: false });
  const [filter, setFilter] = useState(NO_FILTER);
  const [errorText, setErrorText] = useState("");
  const [help, setHelp] = useState(false);
  const [searching, setSearching] = useState(0);
  const theme = useTheme();
  const samples = useRef({ groups: [], splits: [], count: 0 }).current; // the content of the samples tab, for the keys

  const place = settle(asked, runs);
  const go = (change) => setAsked((before) => ({ ...settle(before, runs), ...change }));

  useEffect(() => {
    if (runs.length) writePlace(place);
  });
  useEffect(() => {
    addEventListener("hashchange", () => setAsked(readPlace()));
    addEventListener("scroll", () => tip.hide(), { passive: true, capture: true });
    addEventListener("beforeprint", () => document.querySelectorAll(".overview > details").forEach((fold) => (fold.open = true)));
  }, []);

  const toggleHelp = () => setHelp((shown) => !shown);
  const search = () => {
    go({ tab: "curves" });
    setSearching((n) => n + 1);
  };
  useKeys((event) => (locked ? undefined : actionOf(event, { place, go, runs, samples, toggleHelp, search, closeHelp: () => setHelp(false) })));

  if (locked) return html`<${Login} enter=${enter} wrong=${wrong} />`;
  const shown = new Set(runs.filter((run) => !hidden.has(run.name)).map((run) => run.name));
  const toggle = (name) => {
    const next = new Set(hidden);
    if (!next.delete(name)) next.add(name);
    setHidden(next);
  };
  const drawn = runs.filter((run) => shown.has(run.name));
  const current = runs.find((run) => run.name === place.run);
  const count = runs.reduce((sum, run) => sum + run.data.errors.length, 0);
  const title = saved ? "rlhf report" : "rlhf view";
  document.title = runs.length ? `${runs.map((run) => run.name).join(", ")} – ${title}` : title;
  return html`
    <header class="top">
      <nav class="tabs" role="tablist">
        ${TABS.map(
          (tab) =>
            html`<button key=${tab} role="tab" aria-selected=${tab === place.tab ? "true" : "false"} onClick=${() => go({ tab })}>
              ${tab}${tab === "errors" && count ? html` <b class="count">${count}</b>` : ""}
            </button>`,
        )}
      </nav>
      ${place.tab === "samples"
        ? html`<div class="runs">
            <${Choice}
              label="run"
              value=${place.run ?? ""}
              options=${runs.map((run) => [run.name, run.name])}
              set=${(run) => go({ run, follow: true, group: null })}
            />
            ${current &&
            html`<small class=${stateOf(current)[0]}>${stateOf(current)[1]}${place.follow && current.state !== "finished" ? ", following" : ""}</small>`}
          </div>`
        : html`<${RunChips} ...${{ runs, shown, toggle }} />`}
      <button class="ask" aria-label="keys" onClick=${() => setHelp(true)}>?</button>
    </header>
    ${trouble && html`<p class="trouble" role="alert">${trouble}</p>`}
    ${place.tab === "overview" && html`<${Overview} runs=${drawn} ...${{ go, settings, tick, about, theme }} />`}
    ${place.tab === "curves" &&
    html`<${Curves}
      runs=${drawn}
      settings=${settings}
      set=${(change) => setSettings((before) => ({ ...before, ...change }))}
      focus=${searching}
      ...${{ tick, about, theme }}
    />`}
    ${place.tab === "samples" &&
    html`<${Samples} ...${{ place, go, runs, tick, theme, filter, setFilter }} content=${samples} focus=${place.sample} />`}
    ${place.tab === "errors" && html`<${Errors} runs=${drawn} go=${go} wanted=${errorText} setWanted=${setErrorText} />`}
    ${help && html`<${Help} close=${() => setHelp(false)} />`}
  `;
}

render(html`<${App} />`, document.getElementById("app"));
