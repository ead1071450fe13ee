// The requests to the server. In a report the answers are in the page instead. Rows come as JSON lines. A tail remembers
// its position in a file, and reads the file anew if it has changed (a resumed run removes rows).

const answers = document.getElementById("answers");
export const saved = answers && JSON.parse(answers.textContent);

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function ask(path, params = {}) {
  const query = new URLSearchParams(params);
  const response = await fetch(`/api/${path}?${query}`, { credentials: "same-origin" });
  if (response.ok) return response;
  let message = response.statusText;
  try {
    message = (await response.json()).error ?? message;
  } catch {
    // not an error of this server: the status is enough
  }
  throw new ApiError(response.status, message);
}

export async function login(token) {
  const response = await fetch("/login", { method: "POST", headers: { Authorization: `Bearer ${token}` } });
  return response.ok;
}

// The objects of JSON lines. A damaged line is left out.
export function rowsOf(text) {
  return text.split("\n").flatMap((line) => {
    try {
      const row = JSON.parse(line);
      return row && typeof row === "object" ? [row] : [];
    } catch {
      return [];
    }
  });
}

export async function runsOf(withMetrics) {
  return saved ?? (await ask("runs", withMetrics ? { metrics: 1 } : {})).json();
}

class Tail {
  constructor(path, run) {
    this.path = path;
    this.run = run;
    this.place = { next: 0, mark: 0 };
  }

  // Calls `take` with new rows, and before that `clear` if the file has changed. True if there is anything new.
  async read(clear, take) {
    let changed = false;
    for (let more = true; more; ) {
      const { next, mark } = this.place;
      const response = await ask(this.path, { run: this.run, from: next, mark });
      const text = await response.text();
      this.place = JSON.parse(response.headers.get("X-Place"));
      if (this.place.reset) clear();
      if (text) take(rowsOf(text));
      changed ||= this.place.reset || text !== "";
      more = this.place.more;
    }
    return changed;
  }
}

const MOST_ERRORS = 2000;
const SUMMARY_WITHIN_MS = 1000; // of a long run the first summary takes longer, and comes with a later refresh
export const NO_SUMMARY = { findings: [], main: [], recoveries: 0 };

// What a run has written so far: its summary, its errors, and its metrics as columns of numbers, aligned to `steps`.
export class RunData {
  constructor(name) {
    this.name = name;
    this.metrics = new Tail("metrics", name);
    this.failures = new Tail("errors", name);
    this.errors = [];
    this.summary = this.drawn = NO_SUMMARY;
    this.asking = null; // the request for a summary, if there is one
    this.stale = true; // the summary
    this.clear();
  }

  clear() {
    this.steps = [];
    this.times = [];
    this.columns = new Map();
  }

  take(rows) {
    for (const row of rows) {
      if (typeof row.step !== "number") continue;
      const place = this.steps.length;
      this.steps.push(row.step);
      this.times.push(row.time_s ?? null);
      for (const [name, value] of Object.entries(row)) {
        if (name === "step" || name === "time_s") continue;
        let column = this.columns.get(name);
        if (!column) this.columns.set(name, (column = []));
        while (column.length < place) column.push(null);
        column.push(typeof value === "number" ? value : null);
      }
    }
    for (const column of this.columns.values()) while (column.length < this.steps.length) column.push(null);
  }

  async refresh() {
    if (saved) {
      const { columns, ...rest } = saved.data[this.name];
      Object.assign(this, rest, { columns: new Map(Object.entries(columns)), summary: saved.summaries[this.name] });
      return true;
    }
    const metrics = await this.metrics.read(
      () => this.clear(),
      (rows) => this.take(rows),
    );
    const errors = await this.failures.read(
      () => (this.errors = []),
      (rows) => (this.errors = this.errors.concat(rows).slice(-MOST_ERRORS)),
    );
    this.stale ||= metrics || errors;
    if (this.stale && !this.asking) this.asking = this.summarize();
    if (this.asking) await Promise.race([this.asking, new Promise((done) => setTimeout(done, SUMMARY_WITHIN_MS))]);
    const changed = metrics || errors || this.summary !== this.drawn;
    this.drawn = this.summary;
    return changed;
  }

  async summarize() {
    this.stale = false;
    try {
      this.summary = await (await ask("summary", { run: this.name })).json();
    } catch (error) {
      this.summary = { ...NO_SUMMARY, trouble: error.message };
      this.stale = true;
    }
    this.asking = null;
  }
}

export async function samplesOf(run, step) {
  return saved ? saved.samples[`${run} ${step}`] : (await ask("samples", { run, step })).json();
}

// The address of a small version of an image. Undefined: a report does not hold this image.
export const imageSource = (run, name) => (saved ? saved.images[name] : `/api/image?${new URLSearchParams({ run, name })}`);

const AT_ONCE = 16; // the server's limit

export async function responsesOf(run, step, version, places) {
  if (saved) return places.map((place) => saved.samples[`${run} ${step}`].whole[place]);
  const parts = Array.from({ length: Math.ceil(places.length / AT_ONCE) }, (_, i) => places.slice(i * AT_ONCE, (i + 1) * AT_ONCE));
  const answers = await Promise.all(parts.map((part) => ask("responses", { run, step, version, at: part.join(",") })));
  return (await Promise.all(answers.map((answer) => answer.text()))).flatMap(rowsOf);
}
