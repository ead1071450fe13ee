// The responses of a step in groups, the filters on them, and the full text of some.

import { useEffect, useState } from "./vendor/htm-preact.module.js";
import { responsesOf, samplesOf } from "./api.js";

export const NO_FILTER = { scoreFrom: "", scoreTo: "", tokensFrom: "", tokensTo: "", truncated: "", error: false };

export const isFilter = (filter) => JSON.stringify(filter) !== JSON.stringify(NO_FILTER);

export const failed = (errors, step, row) =>
  errors.some(
    (error) =>
      error.step === step &&
      error.split === row.split &&
      (error.model ?? row.model) === row.model &&
      error.prompt_id === row.prompt_id &&
      (error.sample ?? row.sample) === row.sample,
  );

export function passes(row, filter, step, errors) {
  const within = (value, from, to) =>
    (from === "" && to === "") ||
    (value != null && (from === "" || value >= Number(from)) && (to === "" || value <= Number(to)));
  return (
    within(row.score, filter.scoreFrom, filter.scoreTo) &&
    within(row.tokens, filter.tokensFrom, filter.tokensTo) &&
    (filter.truncated === "" || Boolean(row.truncated) === (filter.truncated === "yes")) &&
    (!filter.error || failed(errors, step, row))
  );
}

// The groups of a step's file with at least one response that passes the filter, in the file's order.
export function groupsOf(listing, split, filter, step, errors) {
  const groups = new Map();
  listing?.rows.forEach((row, place) => {
    if (row.split !== split) return;
    const key = row.group;
    if (!groups.has(key)) {
      const { preview, row: told, hash, images } = listing.prompts[key];
      groups.set(key, { key, promptId: row.prompt_id, preview, told, hash, images, rows: [], places: [], hits: 0 });
    }
    const group = groups.get(key);
    group.rows.push(row);
    group.places.push(place);
    if (passes(row, filter, step, errors)) group.hits += 1;
  });
  return [...groups.values()].filter((group) => group.hits);
}

export const splitsOf = (listing) => [...new Set(listing?.rows.map((row) => row.split) ?? [])];

// The answer of `load` for a key: { value } or { error }, and {} until it comes. `load` is called again when `renewed`
// changes. An answer that comes after the key has changed is dropped.
function useAnswer(key, load, renewed) {
  const [answer, put] = useState({ key: null });
  useEffect(() => {
    if (key === null) return undefined;
    let gone = false;
    load().then(
      (value) => !gone && put((before) => (before.key === key && before.value?.version && before.value.version === value.version ? before : { key, value })),
      (error) => !gone && put({ key, error }),
    );
    return () => {
      gone = true;
    };
  }, [key, renewed]);
  return answer.key === key ? answer : {};
}

// The listing of a step. It is read again when `tick` changes, because the step may still be written.
export function useListing(run, step, tick) {
  const answer = useAnswer(run && step !== null ? `${run} ${step}` : null, () => samplesOf(run, step), tick);
  return { listing: answer.value ?? null, error: answer.error };
}

// The responses of a group. `renew` is called if the file has changed since its listing.
export function useResponses(run, step, listing, group, renew) {
  const key = group && listing ? `${run} ${step} ${listing.version} ${group.key}` : null;
  const answer = useAnswer(key, () => responsesOf(run, step, listing.version, group.places));
  const changed = answer.error?.status === 409;
  useEffect(() => {
    if (changed) renew();
  }, [changed]);
  return { responses: answer.value ?? null, error: changed ? null : answer.error };
}
