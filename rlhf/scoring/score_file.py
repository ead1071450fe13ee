"""Score the responses in a file with the rewards of a configuration, without a run (`rlhf reward`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf.config.derive import source_of
from rlhf.data.images import RowImages, has_images, with_images
from rlhf.data.row import Row, shown
from rlhf.data.sources import read_rows
from rlhf.errors import UserError
from rlhf.evaluation.scored import RowError, ScoredFile, ScoredRow
from rlhf.preflight.exchanged import SUFFIX
from rlhf.preflight.sources import check_rewards
from rlhf.process.owned_folders import temporary_folder
from rlhf.rewards.scoring import asks_in_flight
from rlhf.rewards.services.images import IMAGES, stored_images
from rlhf.scoring.scorer import Group, Scorer, Scoring
from rlhf.tracking import logs
from rlhf.types import RESULT_COLUMN, GroupScores, Prompt

logger = logging.getLogger(__name__)

MOST_BAD_ROWS = 5  # most invalid rows named in a message
_RESERVED = ("prompt", "response", "truncated")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A row, with the columns the rewards may read besides prompt and response."""

    row: Row
    columns: Mapping[str, Any]
    group: str  # lines with the same key form a group


@dataclass(frozen=True, slots=True, kw_only=True)
class FileGroup(Group):
    """The responses of the file to the same prompt."""

    rows: tuple[int, ...]  # indices in the file's rows


def score_file(scoring: Scoring, file: Path) -> ScoredFile:
    """Return the scores of every row, including failed rewards. UserError names each invalid line."""
    logs.configure("WARNING")
    rows = read_rows(str(file))
    with temporary_folder() as images:
        groups = _groups(_lines(rows, scoring, images))
        with Scorer(scoring) as scorer:
            scored = _score(scorer, groups, scoring)
    scored_rows: dict[int, ScoredRow] = {}
    for number, (group, scores) in enumerate(zip(groups, scored, strict=True)):
        for sample, place in enumerate(group.rows):
            scored_rows[place] = _row(rows[place], number, sample, scores)
    return ScoredFile(rows=tuple(scored_rows[place] for place in range(len(rows))))


def _row(row: Row, group: int, sample: int, scores: GroupScores) -> ScoredRow:
    failed = [error for error in (*scores.errors, *scores.scored_errors) if error.sample == sample]
    return ScoredRow(
        place=row.place,
        group=group,
        score=scores.scores[sample] if scores.scores else None,
        scores={name: values[sample] for name, values in scores.measured.items()},
        errors=tuple(RowError(reward=error.reward, kind=error.kind, message=error.message) for error in failed),
    )


def _score(scorer: Scorer, groups: Sequence[FileGroup], scoring: Scoring) -> list[GroupScores]:
    """Score the groups. Services receive many groups at once, and functions a group per process."""
    asking = ThreadPoolExecutor(max(asks_in_flight(scoring.specs), 1))
    scores = ThreadPoolExecutor(scoring.policy.processes)

    def score(group: Group, asked: Future[Any]) -> GroupScores:
        return scorer.score(group, asked.result())

    with asking, scores:
        try:
            asked = [asking.submit(scorer.ask, group) for group in groups]
            futures = [scores.submit(score, group, future) for group, future in zip(groups, asked, strict=True)]
            return [future.result() for future in futures]
        except BaseException:
            asking.shutdown(cancel_futures=True, wait=False)
            scores.shutdown(cancel_futures=True, wait=False)
            scorer.rewards.close()  # ends the calls in progress
            raise


def _lines(rows: Sequence[Row], scoring: Scoring, images: Path) -> list[Line]:
    """Return the rows with the columns for the rewards. UserError names the invalid lines.

    images: the folder that gets the images of rows.
    """
    bad = [text for row in rows if (text := _problem(row)) is not None]
    if bad:
        more = f"\nand {len(bad) - MOST_BAD_ROWS} more" if len(bad) > MOST_BAD_ROWS else ""
        raise UserError("\n".join(bad[:MOST_BAD_ROWS]) + more)
    data = _DataOfRun(scoring, images)
    lines = [data.line_of(row) for row in rows]
    reward_rows = [Row(file=line.row.file, line=line.row.line, columns=line.columns) for line in lines]
    _refuse_unseen(scoring, lines)
    of_sessions = (RESULT_COLUMN,) if all(_has_result(row) for row in rows) else ()
    check_rewards(scoring.specs, reward_rows, rows[0].file, key=scoring.reward_key, of_sessions=of_sessions)
    return lines


def _refuse_unseen(scoring: Scoring, lines: Sequence[Line]) -> None:
    """Raise UserError for the first row with images, if a reward model would score the row's text alone."""

    def has_images(line: Line) -> bool:  # a sample names images of turns too
        return bool(stored_images(line.columns) or (_is_sample(line.row.columns) and line.row.columns.get(IMAGES)))

    seen = next((line for line in lines if has_images(line)), None)
    blind = next((spec.name for spec in scoring.specs if spec.is_model), None)
    if seen is not None and blind is not None:
        raise UserError(
            f"{seen.row.place}: has images, and the reward model of {blind} gets only the text here. Score the row "
            "with functions or judges, or let a run or `rlhf eval` score responses with the reward model."
        )


def _is_sample(columns: Mapping[str, Any]) -> bool:
    """Return whether a row is a response written by a run or `rlhf eval`."""
    split, number = columns.get("split", columns.get("set")), columns.get("prompt_id")
    return isinstance(split, str) and isinstance(number, int) and "response_tokens" in columns


def _has_result(row: Row) -> bool:
    """Return whether a row is a sample of an agent with the agent's result unchanged."""
    columns = row.columns
    has_result = _is_sample(columns) and columns.get(RESULT_COLUMN) is not None
    changed = {*(columns.get("shortened") or ()), *(columns.get("masked") or ())}
    return has_result and RESULT_COLUMN not in changed


def _problem(row: Row) -> str | None:
    """Return why a row is not a prompt with a response, or None."""
    wanted = {"prompt": (str, "a string"), "response": (str, "a string"), "truncated": (bool, "a boolean")}
    for name, (kind, word) in wanted.items():
        if not isinstance(row.columns.get(name, False if name == "truncated" else None), kind):
            shown_value = shown(row.columns[name]) if name in row.columns else "missing"
            return f"{row.place}: column `{name}` is {shown_value}, expected {word}"
    return None


class _DataOfRun:
    """The data sets of a run's samples, each read on first use."""

    def __init__(self, scoring: Scoring, images: Path) -> None:
        self.scoring = scoring
        self.folder = images
        self.sets: dict[str, list[Row]] = {}

    def line_of(self, row: Row) -> Line:
        """Return a row with the row's columns or, for a sample of a run, with the columns of the data row."""
        present = row.columns
        if not _is_sample(present):
            present = self._seen(row).columns
            columns = {name: value for name, value in present.items() if name not in _RESERVED}
            return Line(row=row, columns=columns, group=repr((present["prompt"], columns)))
        split, number = str(present.get("split", present.get("set"))), int(present["prompt_id"])
        is_known = split in self.scoring.eval_sets
        data = self._set(split if is_known else split.removesuffix(SUFFIX), row)  # the exchanged set has the same rows
        if not 0 <= number < len(data):
            name = self.scoring.name
            raise UserError(f"{row.place}: prompt_id is {number}, and {split} has {len(data)} rows in {name}")
        columns = {name: value for name, value in data[number].columns.items() if name not in _RESERVED}
        key = (split, present.get("group_id", number), present.get("model"))
        return Line(row=row, columns=columns, group=repr(key))

    def _set(self, split: str, row: Row) -> list[Row]:
        if split not in self.sets:
            scoring = self.scoring
            if split != "train" and split not in scoring.eval_sets:
                sets = f"the evaluation sets of {scoring.name} are {', '.join(scoring.eval_sets) or 'none'}"
                raise UserError(f"{row.place}: belongs to the set {split}, but {sets}")
            sources = scoring.train_sets if split == "train" else [scoring.eval_sets[split]]
            files = [read_rows(source_of(source), columns=scoring.columns) for source in sources]
            self.sets[split] = [self._seen(row) for rows in files for row in rows]
        return self.sets[split]

    def _seen(self, row: Row) -> Row:
        """Return the row with its images as files, as rewards get them in a run. UserError: the images are wrong."""
        if self.scoring.images is None or not has_images(row, strict=True):
            return row
        return with_images(row, self._images)

    @cached_property
    def _images(self) -> RowImages | None:
        assert self.scoring.images is not None
        return self.scoring.images(self.folder)


def _groups(lines: Sequence[Line]) -> list[FileGroup]:
    """Group the lines, in the order of the first line of each group."""
    places: dict[str, list[int]] = {}
    for place, line in enumerate(lines):
        places.setdefault(line.group, []).append(place)
    groups = []
    for members in places.values():
        first, columns = lines[members[0]], [lines[place].row.columns for place in members]
        has_results = all(_has_result(lines[place].row) for place in members)
        text = columns[0]["prompt"]
        groups.append(
            FileGroup(
                prompt=Prompt(prompt_id=first.row.line, token_ids=(), text=text, columns=first.columns),
                rows=tuple(members),
                responses=tuple(of_row["response"] for of_row in columns),
                truncated=tuple(of_row.get("truncated", False) for of_row in columns),
                results=tuple(of_row[RESULT_COLUMN] for of_row in columns) if has_results else (),
            )
        )
    return groups
