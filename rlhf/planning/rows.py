"""Count the training rows on this machine and estimate their length. No tokenizer is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.config.derive import sequences_per_row, source_of, train_sets
from rlhf.config.schema.data import DataSource, TaskConfig
from rlhf.config.schema.root import Config
from rlhf.data.files import FILE_SUFFIXES
from rlhf.data.sources import count_rows, first_rows
from rlhf.data.tasks import REASONING_GYM
from rlhf.planning.here import absent_data

ROWS_MEASURED = 200  # per data set, for the length of its rows
CHARACTERS_PER_TOKEN = 4  # customary for English text
LARGEST_FILE_READ = 64 * 2**20


def rows_here(config: Config) -> int | None:
    """Return the number of rows of data.train, or None if a set is not on this machine. UserError for a broken file."""
    sources = {key: source.source for key, source in train_sets(config).items()}
    if list(absent_data(sources)):
        return None
    return sum(s.size if isinstance(s, TaskConfig) else count_rows(source_of(s)) for s in sources.values())


def mean_tokens_here(config: Config) -> float | None:
    """Return the mean sequence length of data.train, estimated from the characters of the first rows.

    Return None if a set is slow to read: a large file, a hub data set, a task of reasoning_gym, or an absent set. Each
    set counts by weight. A row's text is all strings; both sequences of a pair include the prompt.
    """
    sets = train_sets(config).values()
    if not all(_reads_quickly(weighted.source) for weighted in sets):
        return None
    per_token = 1 if config.policy.model.startswith("tiny:") else CHARACTERS_PER_TOKEN  # the tiny model reads bytes
    total = sum(weighted.weight * _mean_characters(weighted.source, config) for weighted in sets)
    return total / sum(weighted.weight for weighted in sets) / per_token


def _reads_quickly(source: DataSource) -> bool:
    if isinstance(source, TaskConfig):
        return REASONING_GYM not in source.task
    name = source if isinstance(source, str) else source.path or ""
    path = Path(name)
    return name.endswith(FILE_SUFFIXES) and path.is_file() and path.stat().st_size <= LARGEST_FILE_READ


def _mean_characters(source: DataSource, config: Config) -> float:
    given = source_of(source)
    if not isinstance(given, str):
        given = replace(given, size=min(given.size or ROWS_MEASURED, ROWS_MEASURED))
    rows = first_rows(given, ROWS_MEASURED, columns=config.data.columns)
    count = sequences_per_row(config)
    texts = sum(_characters(dict(row.columns)) for row in rows)
    repeated = sum(_characters(row.columns.get("prompt")) for row in rows) * (count - 1)
    return (texts + repeated) / count / len(rows)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return 0 if value.startswith("data:image/") else len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0
