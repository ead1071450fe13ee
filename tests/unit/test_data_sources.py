"""Every file format gives the same rows, and every mistake is named with its place."""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import psutil
import pyarrow
import pyarrow.parquet
import pytest

from rlhf.data.row import Row
from rlhf.data.sources import count_rows, first_rows, read_rows
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


def test_every_format_gives_the_same_rows_and_a_split_is_named_behind_the_folder(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "d.parquet")
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "splits")
    plain, splits = str(tmp_path / "plain"), str(tmp_path / "splits")
    in_json = jsonl(tmp_path / "d.jsonl", *ROWS), save(tmp_path / "d.json", json.dumps(ROWS, indent=1))
    in_csv = save(tmp_path / "d.csv", 'prompt,answer\n"a,\nb",007\nzwei ü,2\n')
    for source in (*in_json, in_csv, str(tmp_path / "d.parquet"), plain, splits):
        rows = read_rows(source)
        assert [dict(r.columns) for r in rows] == ROWS
        assert count_rows(source) == 2
        assert first_rows(source, 1, columns={}) == rows[:1]
        assert [r.place for r in rows] == [f"{source}:{line}" for line in ((2, 4) if source == in_csv else (1, 2))]
    assert [r.columns["answer"] for r in read_rows(splits + ":test")] == ["2"]
    with pytest.raises(UserError, match="no split `eval`; it has train, test"):
        read_rows(splits + ":eval")
    with pytest.raises(UserError, match="has no splits"):
        read_rows(plain + ":train")


def test_counting_a_parquet_file_reads_no_row(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"image": bytes(range(256)) * 64}] * 3), path)
    data = bytearray(path.read_bytes())
    data[4:100] = bytes(96)  # of the rows; the metadata is at the end
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"d\.parquet cannot be read"):
        read_rows(str(path))
    assert count_rows(str(path)) == 3
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="is not a Parquet file that can be read"):
        count_rows(str(path))


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    source = save(tmp_path / "d.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert [(r.line, r.columns) for r in read_rows(source)] == [(1, {"prompt": "a"}), (3, {"prompt": "b"})]
    assert read_rows(TaskSource(task="running_totals", split="eval", size=2))[1].place == "running_totals[eval]:2"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"d.jsonl:2: not JSON at character 12: Expecting value"),
        ("d.jsonl", '{"prompt": "a"}\n["b"]\n', r"d.jsonl:2: found a list, expected an object"),
        ("d.jsonl", "", r"d.jsonl has no rows"),
        ("d.jsonl", b'{"prompt": "\xff"}', r"d.jsonl is not UTF-8 text"),
        ("d.json", '[{"prompt": "a"},\n {"prompt" "b"}]', r"d.json:2: not JSON at column 12"),
        ("d.json", '{"prompt": "a"}', r"d.json holds an object, expected a list"),
        ("d.csv", 'prompt,answer\n"a\nb\0",1\n', r"d.csv:3: .*NUL"),
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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.jsonl", '{"a": 1}\n{"a": %s', "d.jsonl:2: %s"),
        ("d.json", '[{"a": 1}, {"a": %s', "d.json:2: %s"),
        ("d.json", "%s", "d.json:1: %s"),
    ],
)
@pytest.mark.parametrize("fault", ["deep", "digits", "twice"])
def test_json_that_cannot_be_held_is_named(tmp_path: Path, name: str, text: str, message: str, fault: str) -> None:
    value, said = {
        "deep": ("[" * 100_000, r"lists or objects are nested too deeply\."),
        "digits": ("-" + "1" * 5000, r"a whole number has more than 4300 digits\."),
        "twice": ('{"b": {"c": 1, "d": 2, "c": 1}}', r"an object has the key `c` twice\."),
    }[fault]
    with pytest.raises(UserError, match=message % said + "$"):
        read_rows(save(tmp_path / name, text % value + "}]"[: 0 if text == "%s" else 1 if name == "d.jsonl" else 2]))


@pytest.mark.parametrize(
    "text",
    ["[]", " [ ]\n", '[{"a": [1, 2]} , {}]\r\n', "[{}", "[{}}", "[{} {}]", "[{},]", "[,{}]", "[", "[{}] x", "[{},", ""],
)
def test_a_list_is_read_as_json_reads_it(tmp_path: Path, text: str) -> None:
    source = save(tmp_path / "d.json", text)
    try:
        expected, message = json.loads(text), "has no rows"
    except json.JSONDecodeError as error:
        expected, message = [], f"d.json:{error.lineno}: not JSON at column {error.colno}: {error.msg}"
    if expected:
        assert [r.columns for r in read_rows(source)] == expected
        return
    with pytest.raises(UserError, match=message):
        read_rows(source)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pyarrow.array([0, 2**62], pyarrow.timestamp("us")), r"`a` \(timestamp\[us\]\).*out of range"),
        (pyarrow.array([2**30], pyarrow.date32()), r"`a` \(date32\[day\]\).*magnitude"),
        (pyarrow.array([2**62], pyarrow.duration("s")), r"`a` \(duration\[s\]\)"),
        (pyarrow.array([1], pyarrow.timestamp("us", tz="Mars/Olympus")), r"`a` .*tz=Mars/Olympus.*UnknownTimeZone"),
        (pyarrow.array([b"\xff"]).view(pyarrow.string()), r"`a` \(string\) cannot be read: UnicodeDecodeError"),
        (pyarrow.StructArray.from_arrays([pyarrow.array([1])] * 2, names=["x", "x"]), r"`a` .*duplicate field names"),
    ],
)
def test_a_parquet_value_that_python_cannot_hold_is_named(tmp_path: Path, values: Any, message: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"b": [1] * len(values), "a": values}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=rf"d.parquet: column {message}"):
        read_rows(str(tmp_path / "d.parquet"))


def test_a_datasets_value_that_python_cannot_hold_and_a_column_twice_are_named(tmp_path: Path) -> None:
    values = pyarrow.table({"a": pyarrow.array([2**62], pyarrow.timestamp("us"))})
    datasets.Dataset(datasets.table.InMemoryTable(values)).save_to_disk(tmp_path / "plain")
    with pytest.raises(UserError, match=r"plain cannot be loaded \(OverflowError: date value out of range\)\.$"):
        read_rows(str(tmp_path / "plain"))
    table = pyarrow.Table.from_arrays([pyarrow.array([1])] * 2, names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d.parquet: two columns have the same name in a, a\."):
        read_rows(str(tmp_path / "d.parquet"))


@pytest.mark.parametrize("fault", ["page", "footer", "half", "empty"])
def test_a_corrupt_parquet_file_gets_one_short_line(tmp_path: Path, fault: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a": ["ab"] * 9}), tmp_path / "d.parquet")
    whole = (tmp_path / "d.parquet").read_bytes()
    # the first page's header is behind the file's magic word, the footer's length and another magic word at its end
    broken = {
        "page": whole[:4] + b"\xff\x0f" + whole[6:],
        "footer": whole[:-9] + b"\xff" + whole[-8:],
        "half": whole[: len(whole) // 2],
        "empty": b"",
    }
    with pytest.raises(UserError) as caught:
        read_rows(save(tmp_path / "d.parquet", broken[fault]))
    said = str(caught.value).removeprefix(str(tmp_path))
    assert re.fullmatch(r"/d.parquet (is not a Parquet file that can be read|cannot be read): .{1,300}[^.]\.", said)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("FOLDER/nowhere", "nowhere is not a folder"),
        ("FOLDER/prompts.txt", "prompts.txt is not a folder, nor a file that ends in .jsonl"),
        ("FOLDER/ok.jsonl:train", "ok.jsonl is a file, and a file has no splits; leave out `:train`\\."),
        (
            "FOLDER/X.JSONL",
            "the ending of a file name must be in lower case here; rename the file so that it ends in .jsonl\\.",
        ),
        ("FOLDER/dir.jsonl", "dir.jsonl is a folder, but its name ends in .jsonl like a"),
    ],
)
def test_a_name_that_is_no_source_is_refused(tmp_path: Path, source: str, message: str) -> None:
    for name in ("prompts.txt", "ok.jsonl", "X.JSONL"):
        jsonl(tmp_path / name, *ROWS)
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(UserError, match=message):
        read_rows(source.replace("FOLDER", str(tmp_path)))


def test_an_unreachable_dataset_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, **_: object) -> None:
        raise ConnectionError(f"Couldn't reach\n{path} on the Hub")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", refuse)
    with pytest.raises(UserError, match=r"Dataset some/name cannot be loaded \(ConnectionError: Couldn't reach some/"):
        read_rows("some/name:train")


def test_columns_are_renamed_and_the_old_name_is_gone(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "d.jsonl", {"question": "q", "prompt": "old", "answer": "a"})
    (renamed,) = read_rows(source, columns={"prompt": "question"})
    assert renamed.columns == {"prompt": "q", "answer": "a"}
    (swapped,) = read_rows(source, columns={"prompt": "answer", "answer": "prompt"})
    assert swapped.columns == {"question": "q", "prompt": "a", "answer": "old"}
    nested = jsonl(tmp_path / "n.jsonl", {"q": "x", "judge": {"truth": "7", "more": {"a.b": 1}}, "a.b": "flat"})
    (inner,) = read_rows(nested, columns={"answer": "judge.truth", "prompt": "a.b"})
    assert (inner.columns["answer"], inner.columns["prompt"]) == ("7", "flat")
    assert inner.columns["judge"] == {"truth": "7", "more": {"a.b": 1}}
    for path in ("judge.lie", "q.truth", "judge.truth.deeper"):
        with pytest.raises(UserError, match=f"names `{path}`, which is missing"):
            read_rows(nested, columns={"answer": path})
    with pytest.raises(UserError, match=r"d.jsonl:1: data.columns.prompt names `frage`.*found `question`, `prompt`"):
        read_rows(source, columns={"prompt": "frage"})
    (found,) = read_rows(jsonl(tmp_path / "d.jsonl", {"prompt": "a"}), columns={"promt": "prompt"})
    for column, alternative in (("prompt", ""), ("messages", "prompt")):
        with pytest.raises(UserError, match=r"found `promt`\. data.columns has renamed `prompt` to `promt`\.$"):
            found.text(column, alternative=alternative)
    with pytest.raises(UserError, match=r"f.jsonl:3: column `prompt` \(or `messages`\) is missing; found `q`, `a`"):
        row(q="q", a=1).text("prompt", alternative="messages")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "`prompt` is null, expected a string"),
        (7, "`prompt` is the number 7, expected a string"),
        ("", "`prompt` is the string '', expected a string that is not empty"),
        (" \n", "not empty"),
        ("ab\ud800", r"`prompt` holds `\\ud800` at character 3, which is only half of a character"),
        ({"a": 1}, "`prompt` is an object, expected a string"),
        ([{"role": "user"}], r"`prompt` is a list, expected a string; for chat messages set data.columns: {messages"),
    ],
)
def test_an_empty_or_non_string_value_is_an_error(value: object, message: str) -> None:
    with pytest.raises(UserError, match=f"f.jsonl:3: column .*{message}"):
        row(prompt=value).text("prompt")
    assert row(prompt="ok").text("prompt") == "ok"


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_small_file_of_very_many_rows_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("rlhf.data.memory.free_bytes", lambda: 64 * 2**20)
    path = tmp_path / f"d.{kind}"
    if kind == "parquet":
        text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 400_000, pyarrow.int32()), ["x" * 1000])
        pyarrow.parquet.write_table(pyarrow.table({"prompt": text}), path)
        assert path.stat().st_size < 2**20  # of 400 MB
    else:
        path.write_text((json.dumps({"prompt": "x" * 1000}) + "\n") * 100_000)
    ctypes.CDLL(None).malloc_trim(0)  # memory freed by earlier tests would hold the rows
    before = psutil.Process().memory_info().rss
    with pytest.raises(UserError, match=rf"{path} is too large for this machine: its first [0-9,]+ rows take 0\.0 GiB"):
        read_rows(str(path))
    assert psutil.Process().memory_info().rss - before < 150 * 2**20
