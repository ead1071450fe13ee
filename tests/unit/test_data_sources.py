"""rlhf/data/sources.py: every format gives the same rows, and every mistake is named with its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf.data.sources import Row, read_rows
from rlhf.data.tasks import TaskSource
from rlhf.errors import UserError

ROWS = [{"prompt": "a,\nb", "answer": "007"}, {"prompt": "zwei ü", "answer": "2"}]


def save(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def jsonl(path: Path, *rows: object) -> str:
    return save(path, "".join(json.dumps(row) + "\n" for row in rows))


def row(**columns: Any) -> Row:
    return Row(file="f.jsonl", line=3, columns=columns)


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, str]:
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "d.parquet")
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "splits")
    return {
        "jsonl": jsonl(tmp_path / "d.jsonl", *ROWS),
        "json": save(tmp_path / "d.json", json.dumps(ROWS, indent=1)),
        "csv": save(tmp_path / "d.csv", 'prompt,answer\n"a,\nb",007\nzwei ü,2\n'),
        "parquet": str(tmp_path / "d.parquet"),
        "folder": str(tmp_path / "plain"),
        "splits": str(tmp_path / "splits"),
    }


@pytest.mark.parametrize(
    ("kind", "lines"),
    [("jsonl", [1, 2]), ("json", [1, 2]), ("csv", [2, 4]), ("parquet", [1, 2]), ("folder", [1, 2]), ("splits", [1, 2])],
)
def test_every_format_gives_the_same_rows(saved: dict[str, str], kind: str, lines: list[int]) -> None:
    rows = read_rows(saved[kind])
    assert [dict(r.columns) for r in rows] == ROWS
    assert [r.line for r in rows] == lines
    assert rows[0].place == f"{saved[kind]}:{lines[0]}"


def test_a_split_is_named_behind_the_folder(saved: dict[str, str]) -> None:
    assert [r.columns["answer"] for r in read_rows(saved["splits"] + ":test")] == ["2"]
    with pytest.raises(UserError, match="no split `eval`; it has train, test"):
        read_rows(saved["splits"] + ":eval")
    with pytest.raises(UserError, match="has no splits"):
        read_rows(saved["folder"] + ":train")


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    source = save(tmp_path / "d.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert [(r.line, r.columns) for r in read_rows(source)] == [(1, {"prompt": "a"}), (3, {"prompt": "b"})]


def test_a_task_is_a_source_too() -> None:
    rows = read_rows(TaskSource(task="running_totals", split="eval", size=2))
    assert rows[1].place == "running_totals[eval]:2"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"d.jsonl:2: not JSON at character 12: Expecting value"),
        ("d.jsonl", '{"prompt": "a"}\n["b"]\n', r"d.jsonl:2: found a list, expected an object"),
        ("d.jsonl", "", r"d.jsonl has no rows"),
        ("d.jsonl", b'{"prompt": "\xff"}', r"d.jsonl is not UTF-8 text"),
        ("d.json", '[{"prompt": "a"},\n {"prompt" "b"}]', r"d.json:2: not JSON at column 12"),
        ("d.json", '{"prompt": "a"}', r"d.json holds an object, expected a list"),
        ("d.csv", "prompt,answer\na,1\nb\n", r"d.csv:3: 1 values under 2 columns"),
        ("d.csv", 'prompt\n"a', r"d.csv:2: not CSV: unexpected end of data"),
        ("d.csv", "prompt,prompt\na,b\n", r"d.csv:1: two columns have the same name"),
        ("d.csv", "prompt,answer\n", r"d.csv has no rows"),
        ("d.parquet", "prompt", r"d.parquet is not a Parquet file"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_rows(save(tmp_path / name, text))


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.jsonl does not exist"):
        read_rows("nowhere.jsonl")
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        read_rows(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"prompts.txt is not a folder, nor a file that ends in .jsonl"):
        read_rows(save(tmp_path / "prompts.txt", "a"))


def test_an_unreachable_dataset_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **_: object) -> None:
        raise ConnectionError(f"Couldn't reach\n{name} on the Hub")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", refuse)
    with pytest.raises(
        UserError, match=r"Dataset some/name cannot be loaded \(ConnectionError: Couldn't reach some/name"
    ):
        read_rows("some/name:train")


def test_columns_are_renamed_and_the_old_name_is_gone(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "d.jsonl", {"question": "q", "prompt": "old", "answer": "a"})
    (renamed,) = read_rows(source, columns={"prompt": "question"})
    assert renamed.columns == {"prompt": "q", "answer": "a"}
    (swapped,) = read_rows(source, columns={"prompt": "answer", "answer": "prompt"})
    assert swapped.columns == {"question": "q", "prompt": "a", "answer": "old"}
    with pytest.raises(UserError, match=r"d.jsonl:1: data.columns.prompt names `frage`.*found `question`, `prompt`"):
        read_rows(source, columns={"prompt": "frage"})


def test_a_missing_column_is_an_error_with_the_columns_found() -> None:
    with pytest.raises(
        UserError, match=r"f.jsonl:3: column `prompt` \(or `messages`\) is missing; found `question`, `a`"
    ):
        row(question="q", a=1).text("prompt", alternative="messages")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "`prompt` is null, expected a string"),
        (7, "`prompt` is the number 7, expected a string"),
        ("", "`prompt` is the string '', expected a string that is not empty"),
        (" \n", "not empty"),
        ("ab\ud800", r"`prompt` holds `\\ud800` at character 3, half of a character"),
        ({"a": 1}, "`prompt` is an object, expected a string"),
        (
            [{"role": "user"}],
            r"`prompt` is a list, expected a string; for chat messages set data.columns: {messages: prompt}",
        ),
    ],
)
def test_an_empty_or_non_string_value_is_an_error(value: object, message: str) -> None:
    with pytest.raises(UserError, match=f"f.jsonl:3: column .*{message}"):
        row(prompt=value).text("prompt")
    assert row(prompt="ok").text("prompt") == "ok"
