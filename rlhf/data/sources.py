"""Rows of a dataset, each knowing the file and line it came from.

First stage of the data flow: rows -> prompts or examples. Everything that can be wrong with a user's file is said here
or through `Row`, with its place. Nothing here knows a tokenizer.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.tasks import TaskSource, make_rows
from rlhf.errors import UserError

Source = str | TaskSource

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: what is in it and where it stands."""

    file: str  # path, dataset name or task
    line: int  # counted from 1: a line of the file, or a row where the format has no lines
    columns: Mapping[str, Any]

    @property
    def place(self) -> str:
        """`file:line`, as error messages begin."""
        return f"{self.file}:{self.line}"

    def text(self, column: str, *, alternative: str = "") -> str:
        """The column's value. UserError if it is missing, not a string, or blank."""
        value = self.value(column, alternative=alternative)
        if not isinstance(value, str):
            hint = ""
            if isinstance(value, list) and value and isinstance(value[0], Mapping):
                hint = "; for chat messages set data.columns: {messages: " + column + "}"
            raise UserError(f"{self.place}: column `{column}` is {shown(value)}, expected a string{hint}.")
        if not value.strip():
            raise UserError(f"{self.place}: column `{column}` is {shown(value)}, expected a string that is not empty.")
        refuse_half_characters(value, f"{self.place}: column `{column}`")
        return value

    def truth(self, column: str) -> bool:
        """A boolean, or the word `true` or `false` in any case, as CSV has it. UserError if it is anything else."""
        value = self.value(column)
        words = {"true": True, "false": False}
        found = words.get(value.strip().lower()) if isinstance(value, str) else value
        if not isinstance(found, bool):
            raise UserError(f"{self.place}: column `{column}` is {shown(value)}, expected true or false.")
        return found

    def number(self, column: str) -> float:
        """A finite number, or its digits as text, as CSV has it. UserError if it is anything else."""
        value = self.value(column)
        try:
            found = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
        except (ValueError, OverflowError):
            found = math.nan
        if not math.isfinite(found):
            raise UserError(f"{self.place}: column `{column}` is {shown(value)}, expected a finite number.")
        return found

    def value(self, column: str, *, alternative: str = "") -> Any:
        """The column's value, whatever it is. UserError if it is missing; `alternative` is what would do as well."""
        if column not in self.columns:
            also = f" (or `{alternative}`)" if alternative else ""
            found = ", ".join(f"`{name}`" for name in self.columns) or "nothing"
            raise UserError(
                f"{self.place}: column `{column}`{also} is missing; found {found}. "
                f"If it has another name, set data.columns: {{{column}: ITS_NAME}}."
            )
        return self.columns[column]


def read_rows(source: Source, *, columns: Mapping[str, str] | None = None) -> list[Row]:
    """All rows of a file, a saved or named dataset, or a task. `columns` maps our column name to the dataset's.

    A string that ends in .jsonl, .json, .csv or .parquet is a file, an existing folder is a saved dataset, anything
    else a Hugging Face dataset; the last two take `:SPLIT` behind the name. CSV values stay text.
    UserError for whatever cannot be read, a renamed column that is not there, and a dataset without rows.
    """
    if isinstance(source, TaskSource):
        name = source.name
        rows = [Row(file=name, line=i, columns=row) for i, row in enumerate(make_rows(source), start=1)]
    elif source.endswith(FILE_SUFFIXES):
        rows = list(_read_file(Path(source)))
    else:
        rows = _read_dataset(source)
    if not rows:
        raise UserError(f"{source if isinstance(source, str) else source.name} has no rows.")
    return [_rename(row, columns) for row in rows] if columns else rows


def refuse_half_characters(text: str, what: str) -> None:
    """UserError for a lone surrogate, which JSON can write (`\\ud800`) and which is no character of any text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise UserError(f"{what} holds `{half}` at character {error.start + 1}, half of a character.") from error


def _rename(row: Row, columns: Mapping[str, str]) -> Row:
    moved = {ours: row.value(theirs) for ours, theirs in columns.items() if theirs in row.columns}
    if len(moved) < len(columns):
        ours, theirs = next((o, t) for o, t in columns.items() if t not in row.columns)
        found = ", ".join(f"`{name}`" for name in row.columns) or "nothing"
        raise UserError(f"{row.place}: data.columns.{ours} names `{theirs}`, which is missing; found {found}.")
    gone = {*columns.values(), *columns}
    kept = {name: value for name, value in row.columns.items() if name not in gone}
    return Row(file=row.file, line=row.line, columns=kept | moved)


def _read_file(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; looked for it from {Path.cwd()}.")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        yield from readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.rstrip("\r\n"))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON at character {error.pos + 1}: {error.msg}.") from error
            yield _object_row(path, number, value)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON at column {error.colno}: {error.msg}.") from error
    if not isinstance(value, list):
        raise UserError(f"{path} holds {shown(value)}, expected a list of objects; one object a line is .jsonl.")
    for number, item in enumerate(value, start=1):
        yield _object_row(path, number, item)


def _object_row(path: Path, number: int, value: object) -> Row:
    if not isinstance(value, dict):
        raise UserError(f'{path}:{number}: found {shown(value)}, expected an object such as {{"prompt": "..."}}.')
    return Row(file=str(path), line=number, columns=value)


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise UserError(f"{path}:1: two columns have the same name in {', '.join(header)}.")
            end = reader.line_num
            for values in reader:
                first, end = end + 1, reader.line_num  # a quoted value may span lines
                if not values:
                    continue
                if len(values) != len(header):
                    raise UserError(f"{path}:{first}: {len(values)} values under {len(header)} columns.")
                yield Row(file=str(path), line=first, columns=dict(zip(header, values, strict=True)))
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not CSV: {error}.") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}.") from error
    for number, columns in enumerate(table.to_pylist(), start=1):
        yield Row(file=str(path), line=number, columns=columns)


def _read_dataset(source: str) -> list[Row]:
    import datasets  # seconds to import, and most runs read a file

    name, _, split = source.partition(":")
    folder = Path(name)
    if folder.is_file() or (not folder.is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1)):
        raise UserError(f"{name} is not a folder, nor a file that ends in {', '.join(FILE_SUFFIXES)}.")
    try:
        if folder.is_dir() and any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, download_config=datasets.DownloadConfig(max_retries=1))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Dataset {name} cannot be loaded ({type(error).__name__}: {reason[:300]}).") from error
    return [
        Row(file=source, line=i, columns=columns) for i, columns in enumerate(_one_split(name, split, loaded), start=1)
    ]


def _one_split(name: str, split: str, loaded: Any) -> Sequence[Mapping[str, Any]]:
    """The rows of the wanted split. Without a wish: of the only one, or of `train`."""
    if not isinstance(loaded, dict):  # saved without splits
        if split:
            raise UserError(f"Dataset {name} has no splits; leave out `:{split}`.")
        return loaded.to_list()  # type: ignore[no-any-return]
    wanted = split or (next(iter(loaded)) if len(loaded) == 1 else "train")
    if wanted not in loaded:
        raise UserError(f"Dataset {name} has no split `{wanted}`; it has {', '.join(loaded)}. Write {name}:SPLIT.")
    return loaded[wanted].to_list()  # type: ignore[no-any-return]


def shown(value: object) -> str:
    """A value from a file as error messages write it."""
    kinds = {str: "the string", int: "the number", float: "the number", bool: "the truth value", list: "a list"}
    if value is None:
        return "null"
    if isinstance(value, str | int | float):
        text = repr(value)
        return f"{kinds[type(value)]} {text if len(text) <= 40 else text[:37] + '...'}"
    return kinds.get(type(value), "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}")
