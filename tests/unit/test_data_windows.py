"""A windowed stream gives every row once an epoch, with few rows in memory, and resumes exactly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import rlhf.data.files
import rlhf.data.sources
from rlhf.data.examples import Example, load_examples
from rlhf.data.presets import PresetSource
from rlhf.data.row import Row
from rlhf.data.sources import Shard, open_shards, read_rows
from rlhf.data.stream import Cursor
from rlhf.data.tasks import TaskSource
from rlhf.data.usable import LoadedRows, NotUsable, Unusable
from rlhf.data.windows import WindowedSet, WindowedStream
from rlhf.errors import RunError, UserError
from tests.fixtures.preset_rows import CASES
from tests.fixtures.rows import reading

held: list[int] = []  # the numbers of rows in memory at once


def write(folder: Path, sizes: Sequence[int], suffix: str = "jsonl") -> str:
    """Write files of numbered rows, and return a pattern of their names. Row 100 * i + j is row j of file i."""
    for file, size in enumerate(sizes):
        rows = [{"number": 100 * file + row} for row in range(size)]
        path = folder / f"part-{file}.{suffix}"
        if suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
        else:
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(folder / f"part-*.{suffix}")


def load(rows: Sequence[Row]) -> LoadedRows[Example]:
    """Make an example with the row's number as its token. Odd multiples of 11 cannot be used."""
    held.append(len(rows))
    items, unusable = [], []
    for row in rows:
        number = int(row.value("number"))
        if number % 22 == 11:
            unusable.append(Unusable(place=row.place, reason="eleven"))
        else:
            items.append(Example(example_id=0, token_ids=(number,), loss_mask=(False,)))
    return LoadedRows(items=tuple(items), unusable=tuple(unusable))


def stream(
    source: str, *, window: int = 4, seed: int = 0, shuffle: bool = True, **more: Any
) -> WindowedStream[Example]:
    sets = [WindowedSet(name="data.train", shards=open_shards(source), load=load)]
    with_id = lambda item, row_id: replace(item, example_id=row_id)  # noqa: E731
    return WindowedStream(sets, seed=seed, shuffle=shuffle, window=window, with_id=with_id, **more)


def numbers(taken: Sequence[tuple[int, Example]]) -> list[int]:
    return [example.token_ids[0] for _, example in taken]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_usable_row_comes_once_an_epoch_in_a_new_order(tmp_path: Path, suffix: str) -> None:
    source = write(tmp_path, [7, 1, 12, 5], suffix)
    everything = {100 * file + row for file, size in enumerate([7, 1, 12, 5]) for row in range(size)} - {209}
    held.clear()
    taken = stream(source).next(3 * len(everything))
    epochs = [numbers(taken[start : start + len(everything)]) for start in range(0, len(taken), len(everything))]
    assert [epoch for epoch, _ in taken] == [epoch for epoch in range(3) for _ in everything]
    assert [Counter(epoch) for epoch in epochs] == [Counter(everything)] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert max(held) == 4  # rows of a window
    assert numbers(stream(source).next(len(taken))) == numbers(taken)
    assert numbers(stream(source, seed=1).next(len(taken))) != numbers(taken)


def test_without_shuffling_the_order_is_that_of_the_files(tmp_path: Path) -> None:
    assert numbers(stream(write(tmp_path, [3, 2]), shuffle=False, window=2).next(7)) == [0, 1, 2, 100, 101, 0, 1]


@pytest.mark.parametrize("given", range(0, 60, 7))
def test_a_cursor_continues_with_the_next_row(tmp_path: Path, given: int) -> None:
    source = write(tmp_path, [7, 1, 12])
    first = stream(source)
    first.next(given)
    cursor = Cursor(**json.loads(json.dumps(asdict(first.state()))))
    rest = numbers(first.next(40))
    resumed = stream(source)
    resumed.restore(cursor)
    assert numbers(resumed.next(40)) == rest
    assert resumed.state() == first.state()
    first.restore(cursor)  # also backwards, while the next window is being read
    assert numbers(first.next(40)) == rest


def test_a_row_is_found_again_by_its_id(tmp_path: Path) -> None:
    one = stream(write(tmp_path, [7, 1, 12]))
    for _, example in one.next(30):
        assert one.at(example.example_id).token_ids == example.token_ids
        assert example.example_id < 2**53
    rows = read_rows(write(tmp_path, [7, 1, 12]))
    assert [row.columns["number"] for row in rows] == [*range(7), 100, *range(200, 212)]
    assert one.at(3).token_ids == (rows[3].columns["number"],)  # a row of the first file has its number there


def test_sets_take_turns_by_weight_and_have_separate_epochs(tmp_path: Path) -> None:
    for name, size in (("a", 4), ("b", 12)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, [size])

    def mixture() -> WindowedStream[Example]:
        sets = [
            WindowedSet(name=name, shards=open_shards(str(tmp_path / name / "*.jsonl")), load=load, weight=weight)
            for name, weight in (("a", 1.0), ("b", 3.0))
        ]
        return WindowedStream(sets, seed=0, shuffle=True, window=3, with_id=lambda e, i: replace(e, example_id=i))

    one = mixture()
    taken = one.next(32)
    of_b = [example.example_id >> 48 for _, example in taken]
    assert [sum(of_b[start : start + 4]) for start in range(0, 32, 4)] == [3] * 8
    assert max(epoch for epoch, example in taken if not example.example_id >> 48) == 1
    other = mixture()
    other.restore(Cursor(**json.loads(json.dumps(asdict(one.state())))))
    assert other.next(20) == one.next(20)


def test_another_file_window_or_seed_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, [7, 3])
    cursor = stream(source).state()
    for other in (stream(source, window=5), stream(source, seed=1), stream(source, shuffle=False)):
        with pytest.raises(UserError, match=r"belongs to other data.*data.stream_window"):
            other.restore(cursor)
    (tmp_path / "part-1.jsonl").write_text('{"number": 7}\n', encoding="utf-8")
    with pytest.raises(UserError, match="belongs to other data"):
        stream(source).restore(cursor)


def test_a_wrong_row_is_named_when_its_window_is_reached(tmp_path: Path) -> None:
    source = write(tmp_path, [6])
    with (tmp_path / "part-0.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"number": 6}\n{"nummer": 7}\n')
    one = stream(source, window=4, shuffle=False)
    assert numbers(one.next(4)) == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"part-0.jsonl:8: column `number` is missing; found `nummer`"):
        one.next(1)
    (tmp_path / "part-0.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"data.train has no rows"):
        stream(source)
    with pytest.raises(UserError, match=r"none-\*.jsonl is the name of no file"):
        open_shards(str(tmp_path / "none-*.jsonl"))


def test_every_source_gives_the_rows_of_read_rows_after_any_number_of_rows(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"number": number} for number in range(9)])
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "repository").mkdir()
    for part in range(2):
        data.select(range(4 * part, 4 * part + 4)).to_parquet(
            tmp_path / "repository" / f"train-0000{part}-of-00002.parquet"
        )
    preset = tmp_path / "gsm8k.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CASES["gsm8k"].rows * 5), preset)
    files = [write(tmp_path, [9], suffix).replace("*", "0") for suffix in ("jsonl", "parquet")]
    (tmp_path / "d.json").write_text(json.dumps([{"number": number} for number in range(9)]), encoding="utf-8")
    (tmp_path / "d.csv").write_text("number\n" + "".join(f"{number}\n" for number in range(9)), encoding="utf-8")
    sources = [
        *files,
        str(tmp_path / "d.json"),
        str(tmp_path / "d.csv"),
        str(tmp_path / "saved"),
        str(tmp_path / "repository"),
        TaskSource(task="running_totals", split="train", size=6),
        PresetSource(preset="gsm8k", path=str(preset)),
        PresetSource(preset="gsm8k", path=str(preset), size=3),
    ]
    for source in sources:
        expected = [row.columns for row in read_rows(source)]
        shards = open_shards(source)
        assert [row.columns for shard in shards for row in shard.read(0)] == expected, source
        assert [row.columns for row in shards[0].read(2)] == expected[2 : len(list(shards[0].read(0)))], source
    (shard,) = open_shards(files[0])
    assert [row.place for row in shard.read(7)] == [f"{files[0]}:8", f"{files[0]}:9"]
    (renamed,) = open_shards(files[0], columns={"answer": "number"})
    assert next(renamed.read(4)).columns == {"answer": 4}


def test_a_row_of_the_present_window_is_not_read_again(tmp_path: Path) -> None:
    one = stream(write(tmp_path, [7]), window=7)
    held.clear()
    assert sorted(one.at(row_id).token_ids[0] for row_id in range(7)) == [*range(7)]
    assert held == []


def test_parquet_rows_are_numbered_on_from_batch_to_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlhf.data.files, "_PARQUET_BATCH", 4)
    path = tmp_path / "d.parquet"
    for rows_per_group in (3, 30):
        table = pyarrow.Table.from_pylist([{"number": number} for number in range(30)])
        pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)
        (shard,) = open_shards(str(path))
        for skip in (0, 3, 4, 9, 17, 29, 30, 31):
            read = [(row.line, row.columns["number"]) for row in shard.read(skip)]
            assert read == [(number + 1, number) for number in range(skip, 30)]


def test_columns_of_a_streamed_task_are_renamed() -> None:
    task = TaskSource(task="running_totals", split="train", size=2)
    (shard,) = open_shards(task, columns={"gold": "answer"})
    assert [row.columns for row in shard.read(0)] == [
        row.columns for row in read_rows(task, columns={"gold": "answer"})
    ]


def test_no_row_is_passed_over_after_an_error() -> None:
    fails = [True]

    def read(skip: int) -> Iterator[Row]:
        for number in range(skip, 9):
            if number == 5 and fails.pop():
                raise UserError("the network is down")
            yield Row(file="f", line=number + 1, columns={"number": number})

    sets = [WindowedSet(name="s", shards=[Shard(name="f", read=read)], load=load)]
    one = WindowedStream(sets, seed=0, shuffle=False, window=3)
    assert numbers(one.next(3)) == [0, 1, 2]
    with pytest.raises(UserError, match="the network is down"):
        one.next(1)
    fails.append(False)
    assert numbers(one.next(3)) == [3, 4, 5]


def test_a_network_that_fails_while_rows_are_read_is_no_error_of_the_user() -> None:
    def generate() -> Iterator[dict[str, int]]:
        yield {"number": 0}
        raise ConnectionError("no route")

    rows = rlhf.data.sources._streamed(datasets.IterableDataset.from_generator(generate), "owner/name", 0)
    assert next(rows).place == "owner/name:1"
    with pytest.raises(RunError, match=r"owner/name can no longer be read \(ConnectionError: no route\)"):
        next(rows)


def test_the_short_last_window_may_lose_as_many_rows_as_a_whole_window(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    texts = ["ab", "cd", "ef", "gh", "i" * 99]
    file.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts), encoding="utf-8")
    how = reading(max_tokens=20, too_long="skip", max_unusable_fraction=0.25, window=4)

    def examples(window: int) -> WindowedStream[Example]:
        read = partial(load_examples, tokenizer=tokenizer, reading=replace(how, window=window))
        sets = [WindowedSet(name="data.train", shards=open_shards(str(file)), load=lambda rows: read(rows))]
        return WindowedStream(sets, seed=0, shuffle=False, window=window)

    assert [epoch for epoch, _ in examples(4).next(9)] == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    file.write_text(f'{{"text": "{texts[-1]}"}}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.train: none of the first 4 rows can be used"):
        examples(4)


def test_a_shard_that_lost_rows_is_an_error() -> None:
    rows = [Row(file="f", line=line, columns={"number": line}) for line in range(1, 4)]
    shards = [Shard(name="f", read=lambda skip: iter(rows[skip:]))]
    one = WindowedStream([WindowedSet(name="s", shards=shards, load=load)], seed=0, shuffle=False, window=2)
    del rows[1:]
    with pytest.raises(UserError, match="f has no row 3, but an earlier part of the run has read this row"):
        one.at(2)


def test_a_window_of_unusable_rows_ends_the_run_as_its_loader_says() -> None:
    def refuse(rows: Sequence[Row]) -> LoadedRows[Example]:
        raise NotUsable(rows[0].place, "nothing here can be used")

    shards = [Shard(name="f", read=lambda skip: iter([Row(file="f", line=1, columns={})][skip:]))]
    with pytest.raises(UserError, match="f:1: nothing here can be used"):
        WindowedStream([WindowedSet(name="s", shards=shards, load=refuse)], seed=0, shuffle=False, window=2)
