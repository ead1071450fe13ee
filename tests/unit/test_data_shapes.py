"""Task `shapes`: the images show the answers, rows repeat for a seed, and no split shares a question with another."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlhf.data.tasks import Split, TaskSource, make_rows
from rlhf.errors import UserError

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (235, 200, 40)}


def shapes(split: Split = "train", *, size: int = 60, seed: int = 0, **args: Any) -> list[dict[str, Any]]:
    return make_rows(TaskSource(task="shapes", split=split, size=size, seed=seed, args=args))


def pixels(row: dict[str, Any]) -> np.ndarray[Any, Any]:
    (image,) = row["images"]
    return np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")).astype(int)


def parts(shown: np.ndarray[Any, Any]) -> list[set[tuple[int, int]]]:
    """Return the connected areas that differ from the corner's grey."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero((shown != (200, 200, 200)).any(-1)), strict=True)}
    found = []
    while left:
        area, edge = set(), {left.pop()}
        while edge:
            area |= edge
            edge = {(y + dy, x + dx) for y, x in edge for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= edge
        found.append(area)
    return found


def test_each_image_shows_its_answer() -> None:
    for row in shapes(size=60, ask="colour"):
        (area,) = parts(pixels(row))
        y, x = next(iter(area))
        assert tuple(pixels(row)[y, x]) == COLOURS[row["answer"]]
    for row in shapes(size=60, ask="count"):
        assert len(parts(pixels(row))) == int(row["answer"])
    for row in shapes(size=60, ask="place", pixels=48):
        (area,) = parts(pixels(row))
        down, across = (np.mean([place[axis] for place in area]) / 48 - 0.5 for axis in (0, 1))
        word = ("left" if across < 0 else "right") if abs(across) > abs(down) else "top" if down < 0 else "bottom"
        assert row["answer"] == word


def test_rows_are_light_balanced_and_the_same_for_a_seed() -> None:
    rows = shapes(size=600)
    assert rows == shapes(size=600)
    assert rows[:20] != shapes(size=20, seed=1)
    assert max(len(row["images"][0]["bytes"]) for row in rows) < 400
    assert Counter(row["prompt"] for row in rows).most_common()[-1][1] > 150
    assert min(Counter(row["answer"] for row in rows).values()) > 30  # of 50
    assert set(rows[0]) == {"prompt", "images", "answer", "task"}


def test_splits_share_no_question_for_any_seeds() -> None:
    splits: tuple[Split, ...] = ("sft", "train", "eval")
    seen = [
        {(row["prompt"], row["images"][0]["bytes"]) for row in shapes(split, size=400, seed=seed)}
        for seed, split in enumerate(splits)
    ]
    assert [len(questions) for questions in seen] == [400, 400, 400]
    assert len(set.union(*seen)) == 1200


def test_responses_are_right_and_wrong() -> None:
    assert all(row["completion"] == row["answer"] for row in shapes("sft"))
    for row in shapes("pairs"):
        assert row["chosen"] == row["reference"] == row["answer"] != row["rejected"]
        assert row["rejected"].isdigit() == row["answer"].isdigit()
    for index, row in enumerate(shapes("labelled")):
        assert row["label"] == (row["completion"] == row["answer"]) == (index % 2 == 0)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"ask": "shade"}, "ask is 'shade', expected one or a list of colour, count, place"),
        ({"ask": []}, "args.ask"),
        ({"pixels": 8}, "pixels is 8, expected a whole number from 16 to 1024"),
        ({"pixels": True}, "args.pixels"),
        ({"colour": "red"}, "takes the args ask and pixels; found colour"),
        ({"split": "steps"}, "answers have no steps"),
        ({"split": "eval", "ask": "place", "pixels": 16, "size": 100_000}, "distinct images with these args"),
    ],
)
def test_a_wrong_request_is_refused(more: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.data.tasks._DRAWS_A_ROW", 1)
    with pytest.raises(UserError, match=named):
        shapes(**{"size": 5, **more})
