// Which responses of a step there are, in groups, and which of them pass the filters; and the whole of some.

import { useEffect, useState } from "./vendor/htm-preact.module.js";
import { responsesOf, samplesOf } from "./api.js";

export const NO_FILTER = { scoreFrom: "", scoreTo: "", tokensFrom: "", tokensTo: "", truncated: "", error: false };

export const failed = (errors, step, row) =>
  errors.some(
    (one) =>
      one.step === step &&
      one.prompt_id === row.prompt_id &&
      (one.sample === null || one.sample === undefined || one.sample === row.sample),
  );

export function passes(row, filter, step, errors) {
  const within = (value, from, to) => {
    if (from === "" && to === "") return true;
    if (value === null || value === undefined) return false;
    return (from === "" || value >= Number(from)) && (to === "" || value <= Number(to));
  };
  return (
    within(row.score, filter.scoreFrom, filter.scoreTo) &&
    within(row.tokens, filter.tokensFrom, filter.tokensTo) &&
    (filter.truncated === "" || Boolean(row.truncated) === (filter.truncated === "yes")) &&
    (!filter.error || failed(errors, step, row))
  );
}

// Groups of a step's file that have a response to show, in the file's order.
export function groupsOf(listing, split, filter, step, errors) {
  const groups = new Map();
  listing?.rows.forEach((row, place) => {
    if (row.split !== split) return;
    const key = row.group;
    if (!groups.has(key)) {
      const { preview, hash } = listing.prompts[key];
      groups.set(key, { key, promptId: row.prompt_id, preview, hash, rows: [], places: [], hits: 0 });
    }
    const group = groups.get(key);
    group.rows.push(row);
    group.places.push(place);
    if (passes(row, filter, step, errors)) group.hits += 1;
  });
  return [...groups.values()].filter((group) => group.hits);
}

export const splitsOf = (listing) => [...new Set(listing?.rows.map((row) => row.split) ?? [])];

// The listing of a step; read again when `tick` changes and the step may still be written to.
export function useListing(run, step, tick) {
  const [found, put] = useState({ key: null, listing: null, error: null });
  const key = `${run} ${step}`;
  useEffect(() => {
    if (!run || step === null) return undefined;
    let gone = false;
    samplesOf(run, step).then(
      (listing) => {
        if (gone) return;
        put((before) =>
          before.key === key && before.listing?.version === listing.version ? before : { key, listing, error: null },
        );
      },
      (error) => !gone && put({ key, listing: null, error }),
    );
    return () => {
      gone = true;
    };
  }, [key, tick]);
  return found.key === key ? found : { key, listing: null, error: null };
}

export function useResponses(run, step, listing, group, renew) {
  const [found, put] = useState({ key: null, responses: [] });
  const key = group && listing ? `${run} ${step} ${listing.version} ${group.key}` : null;
  useEffect(() => {
    if (!key) return undefined;
    let gone = false;
    responsesOf(run, step, listing.version, group.places).then(
      (responses) => !gone && put({ key, responses }),
      (error) => {
        if (gone) return;
        if (error.status === 409) renew();
        else put({ key, responses: [], error });
      },
    );
    return () => {
      gone = true;
    };
  }, [key]);
  return found.key === key ? found : { key, responses: null };
}
