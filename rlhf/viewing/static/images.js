// Images in texts. A mark in a text names an image by the first digits of the hash of its content.

import { html } from "./vendor/htm-preact.module.js";
import { imageSource } from "./api.js";
import { visible } from "./format.js";

const MARK = /\[image ([0-9a-f]{15})\]/;

// The name of the image that a text begins with. Null: the text begins with no mark.
export const nameIn = (text) => (text.startsWith("[image ") ? (MARK.exec(text)?.[1] ?? null) : null);

const titleOf = (name) => `image ${name}, by the first 60 bits of the sha256 of its file`;

function Image({ run, name }) {
  const source = imageSource(run, name);
  return html`<span class="image" title=${titleOf(name)}>
    ${source && html`<img loading="lazy" src=${source} alt="" onError=${(event) => event.target.remove()} />`}
    <small>${name}</small>
  </span>`;
}

// The first images of a prompt, beside its preview.
export function SmallImages({ run, names = [] }) {
  const shown = names.slice(0, 3).map((name) => [name, imageSource(run, name)]);
  return shown.map(
    ([name, source]) => source && html`<img key=${name} class="small" loading="lazy" src=${source} alt=${titleOf(name)} />`,
  );
}

// A text with images in place of the marks of `names`. In a text without such a mark, `before` puts all images first.
export function TextWithImages({ run, text, names = [], before = false }) {
  if (!names.length) return visible(text);
  const parts = text.split(new RegExp(MARK, "g")); // a text and a name in turns
  const first = before && !parts.some((part, i) => i % 2 && names.includes(part)) ? names : [];
  return html`${first.map((name) => html`<${Image} key=${name} run=${run} name=${name} />`)}
  ${parts.map((part, i) => {
    if (i % 2 === 0) return visible(part);
    return names.includes(part) ? html`<${Image} key=${i} run=${run} name=${part} />` : `[image ${part}]`;
  })}`;
}

// An image among the tokens of a response, as an element of the page.
export function imageElement(run, name, count) {
  const span = Object.assign(document.createElement("span"), { className: "image", title: titleOf(name) });
  const source = imageSource(run, name);
  if (source) {
    const image = Object.assign(document.createElement("img"), { loading: "lazy", src: source, alt: "" });
    image.addEventListener("error", () => image.remove());
    span.append(image);
  }
  span.append(Object.assign(document.createElement("small"), { textContent: `${name} x ${count} tokens` }));
  return span;
}
