"""groups.jsonl: compact, read back as written, and a damaged line is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.tracking.run_folder.atomic import append_line
from rlhf.tracking.run_folder.group_ledger import FILE, GroupRecord, StepGroups, append_groups, read_groups


def record(group_id: int, *, oldest: int | None = 2, newest: int | None = 2, epoch: int = 0) -> GroupRecord:
    return GroupRecord(group_id=group_id, epoch=epoch, prompt_id=group_id % 7, oldest=oldest, newest=newest)


def test_a_ledger_is_read_back_as_written(tmp_path: Path) -> None:
    steps = [
        StepGroups(
            max_staleness=1,
            trained=(record(0), record(1, oldest=1), record(9, epoch=1)),
            dropped=(record(4),),
            asked_again=(record(5, oldest=None, newest=None),),
            skipped=((0, 6), (1, 3)),
        ),
        StepGroups(max_staleness=2, trained=(record(10),), filtered=(record(11), record(12))),
    ]
    for number, groups in enumerate(steps, start=1):
        append_groups(tmp_path, number, groups)
    assert read_groups(tmp_path) == [(1, steps[0]), (2, steps[1])]


def test_a_step_of_ten_thousand_groups_stays_small(tmp_path: Path) -> None:
    groups = tuple(record(1_000_000 + number) for number in range(10_000))
    append_groups(tmp_path, 1, StepGroups(max_staleness=0, trained=groups))
    assert (tmp_path / FILE).stat().st_size < 150_000  # the ids of groups and prompts, and one number for the rest


def test_a_line_of_another_form_is_named(tmp_path: Path) -> None:
    append_groups(tmp_path, 1, StepGroups(max_staleness=0))
    append_line(tmp_path / FILE, {"step": 2, "max_staleness": 0, "trained": {"group_id": [1, 2], "epoch": [0]}})
    with pytest.raises(ValueError, match=r"groups\.jsonl:2: the line has another form"):
        read_groups(tmp_path)
