"""Read the rows of a source: files, a data set, a preset or a task, as a whole or shard by shard.

This is the first stage of the data flow: rows -> prompts or examples. This module does not use a tokenizer.
"""

from __future__ import annotations

import glob
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rlhf.data.comparisons import preference_prompts, preferences_of
from rlhf.data.files import FILE_SUFFIXES, count_rows_of_file, one_line, rows_at_once, rows_of_file
from rlhf.data.images import RowImages, with_images
from rlhf.data.memory import within_memory
from rlhf.data.presets import LeftOut, PresetSource, presets
from rlhf.data.row import Row
from rlhf.data.tasks import COMPARISONS, TaskSource, make_rows
from rlhf.errors import RunError, UserError

logger = logging.getLogger(__name__)
Source = str | TaskSource | PresetSource

_DATASET_BATCH = 10_000  # rows per decoded batch; fewer if rows hold images


def read_rows(
    source: Source, *, columns: Mapping[str, str] | None = None, images: RowImages | None = None
) -> list[Row]:
    """Return all rows of a file, a saved or named dataset, a preset, or a task.

    `columns` maps our column names to the dataset's names, except in a preset, which has our names. A string with the
    ending .jsonl, .json, .csv or .parquet is a file. An existing folder is a saved dataset, and every remaining string
    is a Hugging Face dataset. Both kinds of dataset take `:SPLIT` after the name. CSV values stay text. With `images`,
    each row's images go into the store as the row is read, so that the rows hold no encoded image.

    UserError: an unreadable source, a missing renamed column, no rows, or a dataset too large for this machine.
    """
    name = source if isinstance(source, str) else source.name
    shards = _shards(source, columns, images, streaming=False)
    return list(within_memory(_chained(shards), name)) or _refuse_no_rows(source)


def count_rows(source: Source) -> int:
    """Return the number of rows of a source as in `read_rows`, without holding the rows. UserError: no rows."""
    files = _files(source) if isinstance(source, str) else []
    rows = (1 for _ in _chained(_shards(source, None, None, streaming=False)))
    return sum(map(count_rows_of_file, files) if files else rows) or _refuse_no_rows(source)


def first_rows(source: Source, count: int, *, columns: Mapping[str, str]) -> list[Row]:
    """Return the first rows of a source as in `read_rows`, without reading the rest. UserError: no rows."""
    rows = list(_first(_shards(source, columns, None, streaming=True), count))
    return rows or _refuse_no_rows(source)


def _refuse_no_rows(source: Source) -> NoReturn:
    raise UserError(f"{source if isinstance(source, str) else source.name} has no rows.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A part of a source, such as a file, read from beginning to end."""

    name: str
    read: Callable[[int], Iterator[Row]]  # the rows after the first rows, whose number is the argument
    size: int = 0  # bytes, to notice a changed file; 0: not known


def open_shards(
    source: Source, *, columns: Mapping[str, str] | None = None, images: RowImages | None = None
) -> list[Shard]:
    """Return the shards of a source as in `read_rows`, without reading rows. A data set of the hub is not downloaded
    as a whole: its rows come over the network.

    UserError: a missing source. The rows of a shard raise UserError for an unreadable part and an invalid row.
    """
    return _shards(source, columns, images, streaming=True)


def _shards(
    source: Source, columns: Mapping[str, str] | None, images: RowImages | None, *, streaming: bool
) -> list[Shard]:
    shards = _shards_of(source, streaming=streaming)
    if columns and not isinstance(source, PresetSource):
        shards = [replace(shard, read=partial(_renamed_after, shard, columns)) for shard in shards]
    if images is not None:
        shards = [replace(shard, read=partial(_with_images_after, shard, images)) for shard in shards]
    if isinstance(source, PresetSource) and source.size is not None:
        return [_whole(source.name, partial(_first, shards, source.size))]
    return shards


def _first(shards: Sequence[Shard], count: int) -> Iterator[Row]:
    return itertools.islice(_chained(shards), count)


def _with_images_after(shard: Shard, images: RowImages, skip: int) -> Iterator[Row]:
    return (with_images(row, images) for row in shard.read(skip))


def _shards_of(source: Source, *, streaming: bool) -> list[Shard]:
    """Return the shards of a source with its columns and all its rows."""
    if isinstance(source, TaskSource):
        return [_whole(source.name, partial(_task_rows, source))]
    if isinstance(source, PresetSource):
        return [_mapped(shard, source) for shard in _shards_of_preset(source, streaming=streaming)]
    if files := _files(source):
        return [_shard_of_file(path) for path in files]
    return _shards_of_dataset(*_named_dataset(source), place=source, streaming=streaming)


def _task_rows(source: TaskSource) -> Iterator[Row]:
    if source.task == COMPARISONS:
        preferences, names = preferences_of(source)
        made = preference_prompts(source, read_rows(preferences, columns=names))
    else:
        made = make_rows(source)
    yield from (Row(file=source.name, line=i, columns=row) for i, row in enumerate(made, start=1))


def _whole(name: str, read: Callable[[], Iterator[Row]]) -> Shard:
    """Return a source as a single shard. Skipping rows reads each skipped row."""
    return Shard(name=name, read=lambda skip: itertools.islice(read(), skip, None))


def _chained(shards: Iterable[Shard]) -> Iterator[Row]:
    return itertools.chain.from_iterable(shard.read(0) for shard in shards)


def _files(source: str) -> list[Path]:
    """Return the files of a source with the ending of a file, in order of their names. Empty: it is a data set."""
    if not source.endswith(FILE_SUFFIXES):
        return []
    if Path(source).exists() or not glob.has_magic(source):
        return [Path(source)]
    paths = [Path(path) for path in sorted(glob.glob(source, recursive=True))]
    if not paths:
        raise UserError(f"{source} is the name of no file; looked for it from {Path.cwd()}.")
    return paths


def _shard_of_file(path: Path) -> Shard:
    return Shard(name=str(path), read=partial(rows_of_file, path), size=path.stat().st_size if path.is_file() else 0)


def _renamed_after(shard: Shard, columns: Mapping[str, str], skip: int) -> Iterator[Row]:
    renamed = {original: current for current, original in columns.items()}
    return (_rename(row, columns, renamed) for row in shard.read(skip))


def _rename(row: Row, columns: Mapping[str, str], renamed: Mapping[str, str]) -> Row:
    moved = {current: _column(row, current, original) for current, original in columns.items()}
    kept = {name: value for name, value in row.columns.items() if name not in {*columns.values(), *columns}}
    return replace(row, columns=kept | moved, renamed=renamed)


def _column(row: Row, current: str, original: str) -> Any:
    """Return a column, or a field inside a column by a path such as `reward_model.ground_truth`."""
    value: Any = row.columns
    for part in (original,) if original in value else original.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise UserError(
                f"{row.place}: data.columns.{current} names `{original}`, which is missing; found {row.present}. "
                "Name one of these."
            )
        value = value[part]
    return value


def _named_dataset(source: str) -> tuple[str, str]:
    """Return name and split of a saved or named data set. UserError: it is a file, or a folder that does not exist."""
    name, colon, split = source.partition(":")
    folder = Path(name)
    if name.lower().endswith(FILE_SUFFIXES) and not folder.is_dir():
        if colon:
            raise UserError(f"{name} is a file, and a file has no splits; leave out `:{split}`.")
        ending = folder.suffix.lower()
        raise UserError(
            f"{name}: the ending of a file name must be in lower case here; rename the file so that it ends in "
            f"{ending}."
        )
    if folder.is_file() or (not folder.is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1)):
        raise UserError(f"{name} is not a folder, nor a file that ends in {', '.join(FILE_SUFFIXES)}.")
    return name, split


def _shards_of_preset(source: PresetSource, *, streaming: bool) -> list[Shard]:
    """Return the shards of a preset's data set, with its own columns, from the hub or from the files in `path`."""
    preset, split = presets()[source.preset], _split_of(source)
    how: dict[str, Any] = {"place": source.name, "streaming": streaming}
    if source.path is None:
        return _shards_of_dataset(preset.hub, split, subset=preset.subset, revision=source.revision, **how)
    if not Path(source.path).is_dir():
        return [_shard_of_file(path) for path in _files(source.path) or [Path(source.path)]]
    folder, subset = _folder_of(Path(source.path), preset.subset)
    return _shards_of_dataset(folder, split, subset=subset, **how)


def _split_of(source: PresetSource) -> str:
    try:
        return presets()[source.preset].split(source.split)
    except ValueError as error:
        raise UserError(f"{error}. Name another split or preset.") from error


def _mapped(shard: Shard, source: PresetSource) -> Shard:
    whole = _whole(shard.name, lambda: _mapped_rows(shard.read(0), source))
    return replace(whole, size=shard.size)


def _mapped_rows(rows: Iterable[Row], source: PresetSource) -> Iterator[Row]:
    """Yield the rows of a preset's data set with our columns, without rows that the preset leaves out."""
    preset = presets()[source.preset]
    left_out: Counter[str] = Counter()
    seen: set[int] = set()
    for row in rows:
        try:
            columns = preset.convert(row.columns)
        except LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{row.place}: is no row of {preset.hub} as preset {preset.name} knows it ({type(error).__name__}: "
                f"{one_line(error)}); found {row.present}. Name another split or revision, or map the columns of the "
                "data set yourself."
            ) from error
        if preset.distinct:
            key = hash(repr(columns))
            if key in seen:
                left_out["the row is a copy of an earlier row"] += 1
                continue
            seen.add(key)
        yield replace(row, columns=columns)
    for text, count in left_out.items():
        logger.info("%s: %d rows are left out: %s", source.name, count, text)


def _folder_of(folder: Path, subset: str | None) -> tuple[str, str | None]:
    """Return the folder to read, and the subset to ask for. A copy of a data set's repository names its subsets."""
    if (folder / "README.md").is_file():
        return str(folder), subset
    return str(folder / subset if subset is not None and (folder / subset).is_dir() else folder), None


def _rows_after(rows: Any, place: str, skip: int) -> Iterator[Row]:
    """Yield the rows of a memory-mapped data set after the first `skip` rows."""
    with _naming_dataset(place):
        size = rows_at_once(rows.data.nbytes, len(rows), most=_DATASET_BATCH)
        for start in range(skip, len(rows), size):
            part = rows.select(range(start, min(start + size, len(rows)))).to_list()  # images stay encoded
            yield from (Row(file=place, line=start + i, columns=columns) for i, columns in enumerate(part, start=1))


def _shards_of_dataset(
    name: str, split: str, *, place: str, streaming: bool, subset: str | None = None, revision: str | None = None
) -> list[Shard]:
    """Return the shards of a data set: with `streaming` the files of the hub or of a folder, otherwise the whole."""
    with _naming_dataset(name):
        rows = _one_split(name, split, _load_dataset(name, subset=subset, revision=revision, streaming=streaming))
        if hasattr(rows, "select"):  # memory-mapped: not streamed, or saved by save_to_disk
            return [Shard(name=place, read=partial(_rows_after, rows, place))]
        names = [place] if rows.num_shards == 1 else [f"{place}, shard {i + 1}" for i in range(rows.num_shards)]
        rows = rows.decode(False)  # images stay encoded
        parts = [rows.shard(num_shards=rows.num_shards, index=index) for index in range(rows.num_shards)]
    return [Shard(name=text, read=partial(_streamed, part, text)) for text, part in zip(names, parts, strict=True)]


def _streamed(rows: Any, place: str, skip: int) -> Iterator[Row]:
    """Yield the rows of a shard after the first `skip` rows. RunError: the network or a disk failed."""
    with _naming_dataset(place):
        try:
            yield from (Row(file=place, line=i, columns=row) for i, row in enumerate(rows.skip(skip), start=skip + 1))
        except OSError as error:
            raise RunError(
                f"Dataset {place} can no longer be read ({type(error).__name__}: {one_line(error)}). A run that has "
                "begun can be resumed with --resume auto."
            ) from error


def _load_dataset(name: str, *, subset: str | None, revision: str | None, streaming: bool) -> Any:
    import datasets  # the import takes seconds, and most runs read a file

    folder = Path(name)
    if folder.is_dir() and any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        return datasets.load_from_disk(name)
    once = datasets.DownloadConfig(max_retries=1)
    return datasets.load_dataset(name, name=subset, revision=revision, download_config=once, streaming=streaming)


@contextmanager
def _naming_dataset(name: str) -> Iterator[None]:
    """Raise UserError with the name of the data set for an error of the data set library."""
    import datasets

    try:
        yield
    except (OSError, ValueError, KeyError, OverflowError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"Dataset {name} cannot be loaded ({type(error).__name__}: {one_line(error)}).") from error


def _one_split(name: str, split: str, loaded: Any) -> Any:
    """Return the rows of the requested split. Without a request, return the only split or `train`."""
    if not isinstance(loaded, dict):  # a dataset saved without splits
        if split:
            raise UserError(f"Dataset {name} has no splits; leave out `:{split}`.")
        return loaded
    wanted = split or (next(iter(loaded)) if len(loaded) == 1 else "train")
    if wanted not in loaded:
        raise UserError(
            f"Dataset {name} has no split `{wanted}`; it has {', '.join(loaded)}. Write {name}:SPLIT, or name the "
            "preset's `split`."
        )
    return loaded[wanted]
