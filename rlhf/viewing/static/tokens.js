// A response token by token: what colours it, and the numbers of the one under the pointer.

import { number, signed, visible } from "./format.js";

const at = (column, i) => (column ? (column[i] ?? null) : null);
const minus = (a, b) => (a === null || b === null ? null : a - b);

const old = (t, i) => at(t.old_logprobs, i);
const rollout = (t, i) => at(t.rollout_logprobs, i);

// `least`: what the strongest colour stands for at the least, so that rounding errors stay pale.
export const COLOURS = {
  advantage: { key: "a", label: "advantage", least: 0.1, of: (t, i) => at(t.advantages, i) },
  logprob: { key: "l", label: "log-probability", least: 1, below: true, of: rollout },
  difference: { key: "d", label: "trainer − rollout", least: 0.02, of: (t, i) => minus(old(t, i), rollout(t, i)) },
  reference: {
    key: "r",
    label: "KL to the reference",
    least: 0.1,
    of: (t, i) => minus(old(t, i) ?? rollout(t, i), at(t.ref_logprobs, i)),
  },
  teacher: {
    key: "t",
    label: "student − teacher",
    least: 0.1,
    of: (t, i) => minus(old(t, i) ?? rollout(t, i), at(t.teacher_logprobs, i)),
  },
  none: { key: "n", label: "no colour", least: 1, of: () => null },
};

// What the strongest colour stands for: nearly the largest of the values shown. Null: there are none.
export function scaleOf(colour, responses) {
  const found = [];
  for (const { tokens } of responses) {
    if (!tokens) continue;
    for (let i = 0; i < tokens.ids.length; i++) {
      const value = colour.of(tokens, i);
      if (value !== null) found.push(Math.abs(value));
    }
  }
  if (!found.length) return null;
  found.sort((a, b) => a - b);
  return Math.max(found[Math.floor(0.98 * (found.length - 1))], colour.least);
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

function spanOf(text, i) {
  const span = document.createElement("span");
  span.className = text === "" ? "token part" : "token";
  span.dataset.i = i;
  span.textContent = visible(text).replaceAll("\n", "↵\n");
  return span;
}

const FIRST = 3000; // tokens that are drawn at once

// Fills an element with the tokens of a response. Everything is text: nothing of it is ever read as HTML.
export function drawTokens(root, tokens, colour, scale, { all = false } = {}) {
  root.replaceChildren();
  const mixed = tokens.sampled.includes(false);
  const count = all ? tokens.ids.length : Math.min(tokens.ids.length, FIRST);
  let block = root;
  for (let i = 0; i < count; i++) {
    if (mixed && (i === 0 || tokens.sampled[i] !== tokens.sampled[i - 1])) {
      const own = tokens.sampled[i];
      block = document.createElement("div");
      block.className = own ? "turn policy" : "turn environment";
      const label = document.createElement("div");
      label.className = "who";
      label.textContent = own ? "policy" : "environment (not trained)";
      block.append(label);
      root.append(block);
    }
    const span = spanOf(tokens.texts[i], i);
    paint(span, colour.of(tokens, i), colour, scale);
    block.append(span);
  }
  return tokens.ids.length - count;
}

function line(table, name, value, note = "") {
  const row = table.insertRow();
  row.insertCell().textContent = name;
  row.insertCell().textContent = value;
  row.insertCell().textContent = note;
}

const percent = (logprob) => (logprob === null ? "" : `${number(100 * Math.exp(logprob))} %`);

export function describe(tokens, i) {
  const box = document.createElement("div");
  const text = document.createElement("div");
  text.className = "what";
  text.textContent = tokens.texts[i] === "" ? "part of a character" : JSON.stringify(visible(tokens.texts[i]));
  const table = document.createElement("table");
  line(table, "token", String(tokens.ids[i]), `place ${i}`);
  if (!tokens.sampled[i]) {
    line(table, "environment", "not trained");
  } else {
    line(table, "rollout logprob", number(rollout(tokens, i)), percent(rollout(tokens, i)));
    if (tokens.old_logprobs) line(table, "trainer logprob", number(old(tokens, i)), percent(old(tokens, i)));
    if (tokens.old_logprobs) line(table, "trainer − rollout", signed(COLOURS.difference.of(tokens, i)));
    if (tokens.ref_logprobs) {
      line(table, "reference logprob", number(at(tokens.ref_logprobs, i)), percent(at(tokens.ref_logprobs, i)));
      const d = COLOURS.reference.of(tokens, i);
      line(table, "KL to reference", signed(d), d === null ? "" : `k3 ${number(Math.expm1(-d) + d)}`);
    }
    if (tokens.teacher_logprobs) line(table, "teacher logprob", number(at(tokens.teacher_logprobs, i)));
    if (tokens.advantages) line(table, "advantage", signed(at(tokens.advantages, i)));
  }
  box.append(text, table);
  return box;
}

// One box for the whole page, beside the token that it speaks of.
export const tip = {
  box: null,
  show(tokens, span) {
    if (!this.box) {
      this.box = document.createElement("div");
      this.box.id = "tip";
      this.box.setAttribute("role", "tooltip");
      document.body.append(this.box);
    }
    this.box.replaceChildren(describe(tokens, Number(span.dataset.i)));
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
