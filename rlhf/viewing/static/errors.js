// errors.jsonl of the runs shown: what went wrong and did not stop the run, or was the last thing before it stopped.

import { html } from "./vendor/htm-preact.module.js";
import { visible } from "./format.js";

const MOST = 300;

export function Errors({ runs, go, wanted, setWanted }) {
  const all = runs.flatMap((run) => run.data.errors.map((error) => ({ ...error, run: run.name, hasSamples: run.steps.includes(error.step) })));
  const found = all.filter((error) => JSON.stringify(error).toLowerCase().includes(wanted.toLowerCase())).reverse();
  return html`<main class="errors">
    <div class="bar">
      <input
        type="search"
        placeholder="errors with …"
        aria-label="only errors with this text"
        value=${wanted}
        onInput=${(event) => setWanted(event.target.value)}
      />
      <span>${found.length} of ${all.length}</span>
    </div>
    ${!all.length && html`<p class="empty">No error is on record.</p>`}
    <div class="list">
      ${found.slice(0, MOST).map(
        (error, i) =>
          html`<article class="error" key=${i}>
            <header>
              ${runs.length > 1 && html`<span class="chip">${error.run}</span>`}
              <b>${error.stage}</b>
              <span class="chip bad">${error.kind}</span>
              ${error.source && html`<span class="chip">${error.source}</span>`}
              ${error.hasSamples
                ? html`<button class="link" onClick=${() => go({ tab: "samples", run: error.run, step: error.step, follow: false })}>
                    step ${error.step}
                  </button>`
                : html`<span class="chip">step ${error.step}</span>`}
              ${error.prompt_id !== null && error.prompt_id !== undefined && html`<span class="chip">prompt ${error.prompt_id}</span>`}
              ${error.sample !== null && error.sample !== undefined && html`<span class="chip">response ${error.sample}</span>`}
            </header>
            <pre>${visible(error.message ?? "")}</pre>
          </article>`,
      )}
    </div>
    ${found.length > MOST && html`<p class="empty">The last ${MOST} are shown.</p>`}
  </main>`;
}
