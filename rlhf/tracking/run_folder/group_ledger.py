"""groups.jsonl: the groups trained in each step, and the fate of every other group until then.

    {"step": 3, "max_staleness": 1, "trained": {"group_id": [8, 9], "epoch": 0, "prompt_id": [5, 2], "oldest": 1,
     "newest": 1}, "filtered": {...}, "skipped": {"epoch": 0, "prompt_id": [7]}}

One object a step, written before the step's row in metrics.jsonl, and truncated together by a resumed run. A column of
equal values is written as one value, and an outcome without groups has no key. `rlhf doctor RUN` proves from this file
that no prompt was lost or trained twice. The file holds no token and no score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from rlhf.tracking.run_folder.atomic import append_line, read_lines
from rlhf.types import GroupRequest, RolloutInfo, oldest_version

FILE = "groups.jsonl"
OUTCOMES = ("trained", "filtered", "dropped", "asked_again")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecord:
    """A request of a prompt, with the oldest and newest weights of the tokens. None: no token."""

    group_id: int
    epoch: int
    prompt_id: int
    oldest: int | None
    newest: int | None

    @classmethod
    def of(cls, request: GroupRequest, infos: Sequence[RolloutInfo] = ()) -> Self:
        return cls(
            group_id=request.group_id,
            epoch=request.epoch,
            prompt_id=request.prompt.prompt_id,
            oldest=oldest_version(infos),
            newest=max((info.max_version for info in infos if info.num_response_tokens), default=None),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepGroups:
    """The groups of a step by outcome: trained, filtered, dropped or requested again."""

    max_staleness: int  # the bound of the lag
    trained: Sequence[GroupRecord] = ()
    filtered: Sequence[GroupRecord] = ()  # without a learning signal
    dropped: Sequence[GroupRecord] = ()  # a reward failed
    asked_again: Sequence[GroupRecord] = ()  # cancelled or too old: the prompt is requested again, and counts then
    skipped: Sequence[tuple[int, int]] = ()  # epoch and id of the prompts that the curriculum did not request


def append_groups(folder: Path, step: int, groups: StepGroups) -> None:
    """Write the line of a step, and wait for the disk."""
    line: dict[str, Any] = {"step": step, "max_staleness": groups.max_staleness}
    for outcome in OUTCOMES:
        records: Sequence[GroupRecord] = getattr(groups, outcome)
        if records:
            line[outcome] = {
                "group_id": [record.group_id for record in records],
                **{name: _column([getattr(record, name) for record in records]) for name in _SHARED},
            }
    if groups.skipped:
        epochs, prompts = zip(*groups.skipped, strict=True)
        line["skipped"] = {"epoch": _column(epochs), "prompt_id": list(prompts)}
    append_line(folder / FILE, line)


def read_groups(folder: Path) -> list[tuple[int, StepGroups]]:
    """Return the steps of a run's ledger with the groups. ValueError names a line of an invalid form."""
    steps = []
    for number, line in enumerate(read_lines(folder / FILE), start=1):
        try:
            skipped = line.get("skipped", {"epoch": 0, "prompt_id": []})
            prompts = skipped["prompt_id"]
            groups = StepGroups(
                max_staleness=line["max_staleness"],
                **{outcome: _records(line.get(outcome, {"group_id": []})) for outcome in OUTCOMES},
                skipped=tuple(zip(_values(skipped["epoch"], len(prompts)), prompts, strict=True)),
            )
            steps.append((int(line["step"]), groups))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / FILE}:{number}: the line has another form: {error!r}") from error
    return steps


_SHARED = tuple(field.name for field in fields(GroupRecord) if field.name != "group_id")


def _records(columns: Mapping[str, Any]) -> tuple[GroupRecord, ...]:
    ids = columns["group_id"]
    rows = zip(ids, *(_values(columns[name], len(ids)) for name in _SHARED if ids), strict=True)
    return tuple(GroupRecord(**dict(zip(("group_id", *_SHARED), row, strict=True))) for row in rows)


def _column(values: Sequence[int | None]) -> int | list[int | None] | None:
    return values[0] if all(value == values[0] for value in values) else list(values)


def _values(column: Any, count: int) -> Sequence[Any]:
    return column if isinstance(column, list) else [column] * count
