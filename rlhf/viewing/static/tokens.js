// A response token by token: its colour, and the numbers of the token under the pointer.

import { number, signed, visible } from "./format.js";
import { imageElement, nameIn } from "./images.js";
import { drawParts } from "./sessions.js";

const at = (column, i) => (column ? (column[i] ?? null) : null);
const minus = (a, b) => (a === null || b === null ? null : a - b);

const old = (t, i) => at(t.old_logprobs, i);
const rollout = (t, i) => at(t.rollout_logprobs, i);
const current = (t, i) => old(t, i) ?? rollout(t, i);

// `least`: the smallest value for the strongest colour, so that rounding errors stay pale.
export const COLOURS = {
  advantage: { key: "a", label: "advantage", least: 0.1, of: (t, i) => at(t.advantages, i) },
  logprob: { key: "l", label: "log-probability", least: 1, below: true, of: rollout },
  difference: { key: "d", label: "trainer − rollout", least: 0.02, of: (t, i) => minus(old(t, i), rollout(t, i)) },
  reference: { key: "r", label: "KL to the reference", least: 0.1, of: (t, i) => minus(current(t, i), at(t.ref_logprobs, i)) },
  teacher: { key: "t", label: "student − teacher", least: 0.1, of: (t, i) => minus(current(t, i), at(t.teacher_logprobs, i)) },
  none: { key: "n", label: "no colour", least: 1, of: () => null },
};

// The value for the strongest colour: nearly the largest of the shown values. Null: there are no values.
export function scaleOf(colour, responses) {
  const values = responses.flatMap(({ tokens }) => tokens?.ids.map((_, i) => colour.of(tokens, i)) ?? []);
  const sizes = values.filter((value) => value !== null).map(Math.abs).sort((a, b) => a - b);
  return sizes.length ? Math.max(sizes[Math.floor(0.98 * (sizes.length - 1))], colour.least) : null;
}

function paint(span, value, colour, scale) {
  if (value === null || !scale) {
    span.style.background = "";
    return;
  }
  const strength = Math.min(Math.abs(value) / scale, 1) * 0.75;
  const hue = colour.below ? "--surprise" : value >= 0 ? "--positive" : "--negative";
  span.style.background = `rgb(var(${hue}) / ${strength.toFixed(3)})`;
}

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function spanOf(text, i) {
  const span = element("span", text === "" ? "token part" : "token", visible(text).replaceAll("\n", "↵\n"));
  span.dataset.i = i;
  return span;
}

const FIRST = 3000; // tokens to draw at once

// The number of positions of the image that begins with token i.
function lengthOfImage(tokens, i) {
  let end = i + 1;
  while (end < tokens.ids.length && tokens.ids[end] === null && tokens.texts[end] === "") end++;
  return end - i;
}

// Fills an element with the tokens of a response, as text and never as HTML, and each image as a single part. Returns
// the number of tokens left out.
export function drawTokens(root, tokens, colour, scale, all, run) {
  const count = all ? tokens.ids.length : Math.min(tokens.ids.length, FIRST);
  drawParts(root, tokens, count, (block, i) => {
    if (tokens.ids[i] === null) {
      const name = nameIn(tokens.texts[i]);
      if (name) block.append(imageElement(run, name, lengthOfImage(tokens, i)));
      return;
    }
    const span = spanOf(tokens.texts[i], i);
    paint(span, colour.of(tokens, i), colour, scale);
    block.append(span);
  });
  return tokens.ids.length - count;
}

const percent = (logprob) => (logprob === null ? "" : `${number(100 * Math.exp(logprob))} %`);

// The numbers of a token: name, value, note.
function numbersOf(tokens, i) {
  const rows = [["token", String(tokens.ids[i]), `place ${i}`]];
  if (!tokens.sampled[i]) return [...rows, ["environment", "not trained"]];
  const logprob = (name, value) => rows.push([`${name} logprob`, number(value), percent(value)]);
  logprob("rollout", rollout(tokens, i));
  if (tokens.old_logprobs) {
    logprob("trainer", old(tokens, i));
    rows.push(["trainer − rollout", signed(COLOURS.difference.of(tokens, i))]);
  }
  if (tokens.ref_logprobs) {
    logprob("reference", at(tokens.ref_logprobs, i));
    const d = COLOURS.reference.of(tokens, i);
    rows.push(["KL to reference", signed(d), d === null ? "" : `k3 ${number(Math.expm1(-d) + d)}`]);
  }
  if (tokens.teacher_logprobs) rows.push(["teacher logprob", number(at(tokens.teacher_logprobs, i))]);
  if (tokens.advantages) rows.push(["advantage", signed(at(tokens.advantages, i))]);
  return rows;
}

function fill(box, tokens, i) {
  const text = tokens.texts[i] === "" ? "part of a character" : JSON.stringify(visible(tokens.texts[i]));
  const table = document.createElement("table");
  for (const [name, value, note = ""] of numbersOf(tokens, i)) {
    const row = table.insertRow();
    for (const cell of [name, value, note]) row.insertCell().textContent = cell;
  }
  box.replaceChildren(element("div", "what", text), table);
}

// One box for the whole page, next to the token under the pointer.
export const tip = {
  box: null,
  show(tokens, span) {
    if (!this.box) {
      this.box = Object.assign(document.createElement("div"), { id: "tip", role: "tooltip" });
      document.body.append(this.box);
    }
    fill(this.box, tokens, Number(span.dataset.i));
    this.box.hidden = false;
    const { left, bottom, top } = span.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const x = Math.max(8, Math.min(left, document.documentElement.clientWidth - width - 8));
    const y = bottom + height + 12 > window.innerHeight ? top - height - 6 : bottom + 6;
    this.box.style.left = `${x}px`;
    this.box.style.top = `${Math.max(8, y)}px`;
  },
  hide() {
    if (this.box) this.box.hidden = true;
  },
};
