"""Read the rows of a file, each with file and line: JSON lines, JSON, CSV and Parquet.

Every error in a user's file is reported here, with the place.
"""

from __future__ import annotations

import bisect
import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.data.row import Row, shown
from rlhf.errors import UserError

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_PARQUET_BATCH = 4096  # rows per decoded batch; fewer if rows hold images
_BATCH_BYTES = 64 * 2**20  # of a decoded batch


def rows_of_file(path: Path, skip: int = 0) -> Iterator[Row]:
    """Yield the rows of a file after the first `skip` rows."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, but its name ends in {path.suffix} like a file. Rename the folder.")
    if not path.is_file():
        raise UserError(f"{path} does not exist; looked for it from {Path.cwd()}.")
    try:
        if path.suffix in (".jsonl", ".parquet"):  # the formats of large files, without reading what is skipped
            yield from (_read_jsonl if path.suffix == ".jsonl" else _read_parquet)(path, skip)
        else:
            yield from itertools.islice((_read_json if path.suffix == ".json" else _read_csv)(path), skip, None)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {one_line(error.strerror or error)}.") from error


def count_rows_of_file(path: Path) -> int:
    """Return the number of rows of a file, without holding the rows. Of a Parquet file only the metadata is read."""
    if path.suffix == ".parquet":
        import pyarrow.parquet  # type: ignore[import-untyped]

        with suppress(OSError, pyarrow.ArrowException):  # raised again by the reader, with the file's name
            return int(pyarrow.parquet.read_metadata(path).num_rows)
    return sum(1 for _ in rows_of_file(path))


def rows_at_once(num_bytes: int, num_rows: int, *, most: int) -> int:
    """Return how many rows to decode together, given the size of all rows, so that a batch stays small."""
    return max(1, min(most, _BATCH_BYTES * num_rows // max(num_bytes, 1)))


def _read_jsonl(path: Path, skip: int) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if skip > 0:
                skip -= 1
                continue
            try:
                value = _JSON.decode(line.rstrip("\r\n"))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON at character {error.pos + 1}: {error.msg}.") from error
            except (ValueError, RecursionError) as error:
                raise _unrepresentable(path, number, error) from error
            yield _object_row(path, number, value)


def _read_json(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    number = 0
    try:
        for number, item in enumerate(_items(text, path), start=1):
            yield _object_row(path, number, item)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON at column {error.colno}: {error.msg}.") from error
    except (ValueError, RecursionError) as error:
        raise _unrepresentable(path, number + 1, error) from error


def _items(text: str, path: Path) -> Iterator[Any]:
    """Yield the items of a JSON list. UserError if the text is no list. JSON errors are those of `json.loads`."""
    at = _skip_space(text, 0)
    if not text.startswith("[", at):
        value = _JSON.decode(text)
        raise UserError(f"{path} holds {shown(value)}, expected a list of objects; one object a line is .jsonl.")
    at = _skip_space(text, at + 1)
    more = not text.startswith("]", at)
    while more:
        item, at = _JSON.raw_decode(text, at)
        yield item
        at = _skip_space(text, at)
        if more := text.startswith(",", at):
            at = _skip_space(text, at + 1)
        elif not text.startswith("]", at):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    end = _skip_space(text, at + 1)
    if end < len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _skip_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = {sys.intern(key): value for key, value in pairs}  # all rows of a file share the same key strings
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return result


class _DuplicateKey(ValueError): ...


_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys)


_SPACE = re.compile(r"[ \t\n\r]*")


def _unrepresentable(path: Path, number: int, error: ValueError | RecursionError) -> UserError:
    """Return the error for valid JSON without a Python value."""
    if isinstance(error, RecursionError):
        return UserError(f"{path}:{number}: lists or objects are nested too deeply.")
    if isinstance(error, _DuplicateKey):
        return UserError(f"{path}:{number}: an object has the key `{error}` twice.")
    return UserError(f"{path}:{number}: a whole number has more than {sys.get_int_max_str_digits()} digits.")


def one_line(message: object) -> str:
    """Return a library's message on one line and without the full stop."""
    return " ".join(str(message).split())[:300].rstrip(".")


def _object_row(path: Path, number: int, value: object) -> Row:
    if not isinstance(value, dict):
        raise UserError(f'{path}:{number}: found {shown(value)}, expected an object such as {{"prompt": "..."}}.')
    return Row(file=str(path), line=number, columns=value)


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_without_nul(file, path), strict=True)
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
            raise UserError(f"{path}:{reader.line_num}: not CSV: {one_line(error)}.") from error


def _without_nul(file: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if "\0" in line:
            raise UserError(f"{path}:{number}: holds the character NUL, which no text has; the file may be damaged.")
        yield line


def _read_parquet(path: Path, skip: int) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        if len(set(names)) < len(names):
            raise UserError(f"{path}: two columns have the same name in {one_line(', '.join(names))}.")
        with pyarrow.parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            ends = list(itertools.accumulate(sizes))
            first = bisect.bisect_right(ends, skip)  # the row group of the first row that is wanted
            start = ends[first - 1] if first else 0
            numbers = itertools.count(start + 1)
            num_bytes = sum(file.metadata.row_group(group).total_byte_size for group in range(len(sizes)))
            size = rows_at_once(num_bytes, ends[-1] if ends else 0, most=_PARQUET_BATCH)
            for batch in file.iter_batches(batch_size=size, row_groups=range(first, len(sizes))):
                columns = {name: _parquet_column(path, name, batch.column(name)) for name in names}
                for values in zip(*columns.values(), strict=True):
                    if (number := next(numbers)) > skip:
                        yield Row(file=str(path), line=number, columns=dict(zip(columns, values, strict=True)))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file that can be read: {one_line(error)}.") from error


def _parquet_column(path: Path, name: str, column: Any) -> list[Any]:
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, KeyError, OverflowError) as error:  # invalid UTF-8, time zone or time, or duplicate names
        kind = one_line(column.type)[:60]
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{path}: column `{name}` ({kind}) cannot be read: {reason}.") from error
