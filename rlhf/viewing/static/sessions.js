// The parts of a response: the sequences of an agent's session, and in each of them turns, tool calls and results.

// Marks around tool calls in sampled text, and around results in other text. Without an end mark, the part ends with
// its turn.
const CALLS = [
  ["<tool_call>", "</tool_call>"],
  ["<function_calls>", "</function_calls>"],
  ["<function=", "</function>"],
  ["<minimax:tool_call>", "</minimax:tool_call>"],
  ["<seed:tool_call>", "</seed:tool_call>"],
  ["<start_function_call>", "<end_function_call>"],
  ["<|tool_call_start|>", "<|tool_call_end|>"],
  ["<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"],
  ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"],
  ["<|python_tag|>", null],
  ["[TOOL_CALLS]", null],
];
const RESULTS = [
  ["<tool_response>", "</tool_response>"],
  ["<start_function_response>", "<end_function_response>"],
  ["<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"],
  ["<|start_header_id|>ipython", "<|eot_id|>"],
  ["<|im_start|>tool", "<|im_end|>"],
  ["[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
];
const NAME = /"name"\s*:\s*"([\w.-]{1,60})"|<function=([\w.-]{1,60})/;
const LABELS = {
  policy: "policy",
  environment: "environment (not trained)",
  call: "tool call",
  result: "tool result (not trained)",
};

// The sequences as a tree: each with its own tokens, its depth, and a title. A response of one sequence has no title.
function sequencesOf(tokens) {
  const count = tokens.ids.length;
  const given = tokens.sequences ?? [];
  if (!given.length) return [{ own: 0, end: count, depth: 0, title: null }];
  const sequences = [];
  for (const [k, { start, own, after }] of given.entries()) {
    const trunk = after === null ? undefined : sequences.findLast((other) => other.start <= Math.max(after, 0));
    const title =
      k === 0 ? "first sequence" : after === null ? "new context" : after < 0 ? "branch of the prompt" : `branch after place ${after}`;
    sequences.push({ start, own, end: Math.min(given[k + 1]?.start ?? count, count), depth: trunk ? trunk.depth + 1 : 0, title });
  }
  return sequences;
}

// The first marked part of a text from a place on, as [begin, end] in characters. Null: there is none.
function nextMarked(text, from, marks) {
  const begins = marks.map(([begin, end]) => [text.indexOf(begin, from), begin, end]).filter(([at]) => at >= 0);
  if (!begins.length) return null;
  const [at, begin, end] = begins.reduce((a, b) => (b[0] < a[0] ? b : a));
  const last = end === null ? -1 : text.indexOf(end, at + begin.length);
  return [at, last < 0 ? text.length : last + end.length];
}

// The parts of one turn, tokens [start, end): each with its kind, and its first and last token.
function partsOfTurn(tokens, start, end) {
  const sampled = tokens.sampled[start];
  const [plain, marked, marks] = sampled ? ["policy", "call", CALLS] : ["environment", "result", RESULTS];
  const text = tokens.texts.slice(start, end).join("");
  const spans = [];
  for (let at = 0, span; (span = nextMarked(text, at, marks)); at = span[1]) spans.push(span);
  const parts = [];
  let place = 0;
  for (let i = start; i < end; i++) {
    const span = spans.find(([from, to]) => from < place + tokens.texts[i].length && place < to);
    const last = parts.at(-1);
    if (last && last.span === span) last.end = i + 1;
    else parts.push({ span, start: i, end: i + 1, kind: span ? marked : plain, name: span && NAME.exec(text.slice(...span)) });
    place += tokens.texts[i].length;
  }
  return parts;
}

function partsOf(tokens, { own, end }) {
  const parts = [];
  for (let start = own, i = own + 1; start < end; i++) {
    if (i < end && tokens.sampled[i] === tokens.sampled[start]) continue;
    parts.push(...partsOfTurn(tokens, start, i));
    start = i;
  }
  return parts;
}

function element(className, text = "") {
  return Object.assign(document.createElement("div"), { className, textContent: text });
}

// Fills an element with the sequences and parts of a response. `write(block, i)` adds token i to a block.
export function drawParts(root, tokens, count, write) {
  root.replaceChildren();
  for (const sequence of sequencesOf(tokens)) {
    if (sequence.own >= count) break;
    const branch = sequence.title === null ? root : element("sequence");
    if (sequence.title !== null) {
      branch.style.marginLeft = `${Math.min(sequence.depth, 6)}rem`;
      branch.append(element("who", sequence.title));
      root.append(branch);
    }
    const parts = partsOf(tokens, sequence);
    const isPlain = sequence.title === null && parts.length === 1 && parts[0].kind === "policy";
    for (const { kind, name, start, end } of parts) {
      if (start >= count) break;
      const block = isPlain ? root : element(`turn ${kind}`);
      if (!isPlain) {
        block.append(element("who", name ? `${LABELS[kind]}: ${name[1] ?? name[2]}` : LABELS[kind]));
        branch.append(block);
      }
      for (let i = start; i < Math.min(end, count); i++) write(block, i);
    }
  }
}
