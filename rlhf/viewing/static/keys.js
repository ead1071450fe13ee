// The keys of the page: their meaning for the reader, and their actions.

import { useEffect, useRef } from "./vendor/htm-preact.module.js";
import { COLOURS, tip } from "./tokens.js";

export const TABS = ["overview", "curves", "samples", "errors"];

export const KEYS = [
  ["0 1 2 3", "overview, curves, samples, errors"],
  ["← →", "step before, step after"],
  ["Home End", "first step, last step (and follow)"],
  ["↑ ↓ or k j", "prompt before, prompt after"],
  ["[ ]", "response before, response after"],
  ["s", "next set (training, evaluation)"],
  [Object.values(COLOURS).map((one) => one.key).join(" "), "colour: " + Object.values(COLOURS).map((one) => one.label).join(", ")],
  ["c", "compare with another step or run"],
  ["shift ← →", "step of the other side"],
  ["/", "search metrics"],
  ["?", "these keys"],
  ["Esc", "close, leave a field"],
];

// The element of a list at a distance from another one, or the last one in that direction.
const walk = (list, from, by) => list[Math.max(0, Math.min(list.length - 1, Math.max(list.indexOf(from), 0) + by))];

// Returns the action of a key, or undefined. `samples` is the content of the samples tab.
export function actionOf({ key, shiftKey }, { place, go, runs, samples, toggleHelp, search, closeHelp }) {
  const stepsOf = (name) => runs.find((run) => run.name === name)?.steps ?? [];
  const step = (by) => () => {
    const steps = stepsOf(place.run);
    const next = walk(steps, place.step, by);
    if (steps.length) go({ step: next, follow: next === steps.at(-1) && by > 0 });
  };
  const stepB = (by) => () => {
    const steps = stepsOf(place.runB);
    if (place.compare && steps.length) go({ stepB: walk(steps, place.stepB, by) });
  };
  const group = (by) => () => go({ group: walk(samples.groups, samples.at, by) ?? null, sample: 0 });
  const sample = (by) => () => go({ sample: Math.max(0, Math.min(samples.count - 1, place.sample + by)) });
  const split = () => {
    const { splits } = samples;
    if (splits.length) go({ split: splits[(splits.indexOf(samples.split) + 1) % splits.length], group: null });
  };
  const everywhere = {
    "?": toggleHelp,
    "/": search,
    Escape: () => {
      closeHelp();
      tip.hide();
    },
    ...Object.fromEntries(TABS.map((tab, i) => [i, () => go({ tab })])),
  };
  if (place.tab !== "samples") return everywhere[key];
  const shifted = { ArrowLeft: stepB(-1), ArrowRight: stepB(1) };
  const onSamples = {
    ArrowLeft: step(-1),
    ArrowRight: step(1),
    Home: step(-Infinity),
    End: step(Infinity),
    ArrowUp: group(-1),
    ArrowDown: group(1),
    k: group(-1),
    j: group(1),
    "[": sample(-1),
    "]": sample(1),
    s: split,
    c: () => go({ compare: !place.compare }),
    ...Object.fromEntries(Object.entries(COLOURS).map(([name, colour]) => [colour.key, () => go({ colour: name })])),
  };
  return (shiftKey && shifted[key]) || onSamples[key] || everywhere[key];
}

// Calls the action that `find` returns for a pressed key, except in a field for text.
export function useKeys(find) {
  const press = useRef();
  press.current = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest?.("input:not([type=range]):not([type=checkbox]), select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const action = find(event);
    if (action) {
      event.preventDefault();
      action();
    }
  };
  useEffect(() => addEventListener("keydown", (event) => press.current(event)), []);
}
