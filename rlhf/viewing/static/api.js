// What the page asks the server for. Rows come as JSON lines; a tail remembers where it stopped, and begins anew where
// the file is not the one it was (a run that is resumed takes rows back).

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
    // not one of our errors: the status says enough
  }
  throw new ApiError(response.status, message);
}

export async function login(token) {
  const response = await fetch("/login", { method: "POST", headers: { Authorization: `Bearer ${token}` } });
  return response.ok;
}

export function rowsOf(text) {
  const rows = [];
  for (const line of text.split("\n")) {
    if (!line) continue;
    try {
      const row = JSON.parse(line);
      if (row && typeof row === "object") rows.push(row);
    } catch {
      // a damaged line: the others can be read
    }
  }
  return rows;
}

class Tail {
  constructor(path, run) {
    this.path = path;
    this.run = run;
    this.place = { next: 0, mark: 0 };
  }

  // Calls `take` with new rows, and `clear` before them where they begin anew. True if anything changed.
  async read(clear, take) {
    let changed = false;
    for (let more = true; more; ) {
      const { next, mark } = this.place;
      const response = await ask(this.path, { run: this.run, from: next, mark });
      const text = await response.text();
      this.place = JSON.parse(response.headers.get("X-Place"));
      if (this.place.reset) {
        clear();
        changed = true;
      }
      if (text) {
        take(rowsOf(text));
        changed = true;
      }
      more = this.place.more;
    }
    return changed;
  }
}

const MOST_ERRORS = 2000;

// Metrics and errors of a run as far as they are written: columns of numbers, aligned to `steps`.
export class RunData {
  constructor(name) {
    this.name = name;
    this.metrics = new Tail("metrics", name);
    this.failures = new Tail("errors", name);
    this.errors = [];
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
    const metrics = await this.metrics.read(
      () => this.clear(),
      (rows) => this.take(rows),
    );
    const errors = await this.failures.read(
      () => (this.errors = []),
      (rows) => (this.errors = this.errors.concat(rows).slice(-MOST_ERRORS)),
    );
    return metrics || errors;
  }
}

export async function samplesOf(run, step) {
  return (await ask("samples", { run, step })).json();
}

const AT_ONCE = 16; // the server's limit

export async function responsesOf(run, step, version, places) {
  const asked = [];
  for (let i = 0; i < places.length; i += AT_ONCE) {
    asked.push(ask("responses", { run, step, version, at: places.slice(i, i + AT_ONCE).join(",") }));
  }
  const texts = await Promise.all(asked.map(async (one) => (await one).text()));
  return texts.flatMap(rowsOf);
}
