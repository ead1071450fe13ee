// Form fields that several tabs use.

import { html } from "./vendor/htm-preact.module.js";

export function Search({ placeholder, label, value, set, field }) {
  const onInput = (event) => set(event.target.value);
  return html`<input ref=${field} type="search" placeholder=${placeholder} aria-label=${label} value=${value} onInput=${onInput} />`;
}

// `options`: pairs of a value and its text.
export function Choice({ label, value, options, set }) {
  return html`<select aria-label=${label} value=${value} onChange=${(event) => set(event.target.value)}>
    ${options.map(([name, text]) => html`<option key=${name} value=${name}>${text}</option>`)}
  </select>`;
}

export function Check({ checked, set, children }) {
  return html`<label class="check">
    <input type="checkbox" checked=${checked} onChange=${(event) => set(event.target.checked)} /> ${children}
  </label>`;
}
