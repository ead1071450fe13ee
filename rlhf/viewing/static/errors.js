// errors.jsonl of the shown runs: the errors that a run survived, and the error that ended it.

import { html } from "./vendor/htm-preact.module.js";
import { Search } from "./fields.js";
import { visible } from "./format.js";

const MOST = 300;

export function Errors({ runs, go, wanted, setWanted }) {
  const all = runs.flatMap((run) => run.data.errors.map((error) => ({ ...error, run: run.name, hasSamples: run.steps.includes(error.step) })));
  const shown = all.filter((error) => JSON.stringify(error).toLowerCase().includes(wanted.toLowerCase())).reverse();
  return html`<main class="errors">
    <div class="bar">
      <${Search} placeholder="errors with …" label="only errors with this text" value=${wanted} set=${setWanted} />
      <span>${shown.length} of ${all.length}</span>
    </div>
    ${!all.length && html`<p class="empty">There are no errors.</p>`}
    <div class="list">
      ${shown.slice(0, MOST).map(
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
              ${error.prompt_id != null && html`<span class="chip">prompt ${error.prompt_id}</span>`}
              ${error.sample != null && html`<span class="chip">response ${error.sample}</span>`}
            </header>
            <pre>${visible(error.message ?? "")}</pre>
            ${error.stack && html`<details><summary>stack</summary><pre>${visible(error.stack)}</pre></details>`}
          </article>`,
      )}
    </div>
    ${shown.length > MOST && html`<p class="empty">The last ${MOST} are shown.</p>`}
  </main>`;
}
