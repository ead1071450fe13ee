"""Samples of a step: a short line for each response, and some whole responses by their place in the file.

A file's index is made at the first request for the file, without reading tokens, and forgotten later.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

MOST_WHOLE = 16  # responses in one answer
_MOST_INDEXED = 20_000  # indexed responses, over all files
_TOKENS = b', "tokens": {"texts": '  # cannot occur within a JSON string, where quotes are escaped
_SHORT = ("group_id", "prompt_id", "sample", "model", "score", "scores", "advantage", "preferred", "truncated")
_IMAGE = re.compile(r"\[image [0-9a-f]{15}\]")  # in the text of a prompt
_PREVIEW = 160  # characters of a prompt
_SEEN = 60  # characters at the beginning of a preview, enough to distinguish prompts
_COLUMN = 40  # characters of a column behind the preview of a prompt that other groups have too


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPreview:
    """The part of a prompt that differs from the remaining prompts of the file."""

    preview: str
    row: str  # the part of the data row that other groups with this prompt lack; empty: none
    hash: str  # of the whole prompt, to compare the prompts of two steps
    images: tuple[str, ...]  # names of the distinct images


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleIndex:
    """The index of a samples file. `version` changes with the file."""

    version: str
    spans: tuple[tuple[int, int], ...]  # of each line, begin and length in bytes
    rows: tuple[dict[str, Any], ...]  # of each line, in short
    prompts: dict[str, PromptPreview]  # of each group
    bad_lines: int


class SampleFiles:
    """Indexes of the files asked for last. Safe to ask from several threads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Path, SampleIndex] = OrderedDict()
        self._lock = threading.Lock()

    def index(self, path: Path) -> SampleIndex:
        """Return the index of a step's file. FileNotFoundError: the step has no file."""
        version = _version(path)
        with self._lock:
            made = self._kept.get(path)
        if made is None or made.version != version:
            made = _read_index(path, version)
        with self._lock:
            self._kept[path] = made
            self._kept.move_to_end(path)
            while len(self._kept) > 1 and sum(len(index.rows) for index in self._kept.values()) > _MOST_INDEXED:
                self._kept.popitem(last=False)
        return made

    def whole(self, path: Path, version: str, rows: Sequence[int]) -> bytes | None:
        """Return lines of the file unchanged. None: the file has changed. IndexError: no such line."""
        index = self.index(path)
        if index.version != version:
            return None
        with path.open("rb") as file:
            spans = [index.spans[row] for row in rows]
            return b"".join(os.pread(file.fileno(), length, begin) for begin, length in spans)


def _version(path: Path) -> str:
    status = path.stat()
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


def _read_index(path: Path, version: str) -> SampleIndex:
    spans, rows, bad, begin = [], [], 0, 0
    prompts: dict[str, str] = {}
    images: dict[str, tuple[str, ...]] = {}
    columns: dict[str, dict[str, str]] = {}
    with path.open("rb") as file:
        for line in file:
            row = _short(line)
            if row is None:
                bad += 1
            else:
                prompts.setdefault(row["group"], row.pop("prompt"))
                columns.setdefault(row["group"], row.pop("columns"))
                images.setdefault(row["group"], row.pop("images"))
                rows.append(row)
                spans.append((begin, len(line)))
            begin += len(line)
    previews = _previews(prompts, columns, images)
    return SampleIndex(version=version, spans=tuple(spans), rows=tuple(rows), prompts=previews, bad_lines=bad)


def _previews(
    whole: Mapping[str, str], columns: Mapping[str, Mapping[str, str]], images: Mapping[str, tuple[str, ...]]
) -> dict[str, PromptPreview]:
    """Return for each prompt the distinctive part of its text.

    The common beginning of all prompts, such as a system prompt, is left out. Prompts that still begin with the same
    words are shown from the first different word. Groups with equal texts are shown by the columns of the rows.
    """
    prompts = {group: _IMAGE.sub(" ", prompt) for group, prompt in whole.items()}
    texts = sorted(set(prompts.values()))
    start = _differing_word(texts[0], texts[-1]) if len(texts) > 1 else 0
    starts = dict.fromkeys(texts, start)
    for one, other in pairwise(texts):
        if one[start : start + _SEEN] == other[start : start + _SEEN]:
            word = _differing_word(one, other)
            starts |= {one: max(starts[one], word), other: word}
    if len(texts) == 1 and len(texts[0]) > _PREVIEW:
        starts[texts[0]] = texts[0].find(" ", len(texts[0]) - _PREVIEW) + 1  # of a single prompt the end
    rows: dict[str, list[Mapping[str, str]]] = {}
    for group, prompt in prompts.items():
        rows.setdefault(prompt, []).append(columns[group])
    previews = {}
    for group, prompt in prompts.items():
        begin = starts[prompt]
        shown = ("…" if begin else "") + prompt[begin : begin + _PREVIEW]
        content = " ".join([whole[group], *images[group]])
        digest = sha256(content.encode("utf-8", "replace")).hexdigest()[:16]
        row = _differing_columns(columns[group], rows[prompt])
        previews[group] = PromptPreview(preview=shown, row=row, hash=digest, images=images[group])
    return previews


def _differing_word(one: str, other: str) -> int:
    differs = next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    return one.rfind(" ", 0, differs) + 1


def _differing_columns(columns: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    """Return the columns with different values among the rows. Empty: a single row, or equal rows."""
    names = [name for name, value in columns.items() if any(row.get(name) != value for row in rows)]
    return ", ".join(f"{name}: {columns[name]}" for name in names)


def _short(line: bytes) -> dict[str, Any] | None:
    """Return a line without the text. None: the line is truncated, or is no response."""
    head, separator, _ = line.rpartition(_TOKENS)
    try:
        row = json.loads(head + b"}" if separator else line)
    except (ValueError, RecursionError):  # a line nested too deep is not a run's response
        return None
    if not line.endswith(b"\n") or not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        return None
    short = {name: row[name] for name in _SHORT if row.get(name) is not None}
    split = str(row.get("split", row.get("set", "")))
    group = f"{split}:{row.get('group_id', row.get('prompt_id', ''))}"
    tokens, given = row.get("response_tokens"), row.get("columns")
    columns = {name: str(value)[:_COLUMN] for name, value in given.items()} if isinstance(given, dict) else {}
    images = tuple(map(str, row["images"])) if isinstance(row.get("images"), list) else ()
    own = {"split": split, "group": group, "tokens": tokens, "prompt": row["prompt"], "columns": columns}
    return {**short, **own, "images": images}
