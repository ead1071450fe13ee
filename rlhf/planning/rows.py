"""Count the training rows on this machine and estimate their length. No tokenizer is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.config.derive import sequences_per_row, source_of, train_sets
from rlhf.config.schema.data import DataSource, TaskConfig
from rlhf.config.schema.root import Config
from rlhf.data.files import FILE_SUFFIXES
from rlhf.data.images import RowImages, with_images
from rlhf.data.row import Row
from rlhf.data.sources import count_rows, first_rows
from rlhf.data.tasks import REASONING_GYM
from rlhf.errors import UserError
from rlhf.planning.footprints import Sizes
from rlhf.planning.here import absent_data
from rlhf.planning.shapes import find_config
from rlhf.process.owned_folders import temporary_folder
from rlhf.vision.processor import ImageProcessing
from rlhf.vision.reading import ImageCollector, ImageLimits
from rlhf.vision.store import ImageStore

ROWS_MEASURED = 200  # per data set, for the length of its rows
ROWS_OF_IMAGES = 20  # per data set, with images to decode
CHARACTERS_PER_TOKEN = 4  # customary for English text
LARGEST_FILE_READ = 64 * 2**20


def rows_here(config: Config) -> int | None:
    """Return the number of rows of data.train, or None if a set is not on this machine. UserError for a broken file."""
    sources = {key: source.source for key, source in train_sets(config).items()}
    if list(absent_data(sources)):
        return None
    return sum(s.size if isinstance(s, TaskConfig) else count_rows(source_of(s)) for s in sources.values())


def mean_tokens_here(config: Config) -> float | None:
    """Return the mean length of the texts of a sequence of data.train, from the characters of the first rows.

    Return None if a set is slow to read: a large file, a hub data set, a task of reasoning_gym, or an absent set. Each
    set counts by weight. A row's text is all strings; both sequences of a pair include the prompt.
    """
    per_token = 1 if config.policy.model.startswith("tiny:") else CHARACTERS_PER_TOKEN  # the tiny model reads bytes
    characters = _mean(config, lambda source: _mean_characters(source, config))
    return None if characters is None else characters / per_token


def image_tokens_here(config: Config, sizes: Sizes) -> float | None:
    """Return the mean tokens of the images of a row of data.train, by the model's processor on the first rows.

    Return None if a set is slow to read, if the model's processor is not on this machine, or if an image cannot be read
    here, such as an image of an address.
    """
    with temporary_folder() as folder:
        processing = _processing_here((sizes.made or {}).get(config.policy.model, config.policy.model), sizes, folder)
        if processing is None:
            return None
        limits = ImageLimits(max_images=config.data.max_images, max_pixels=config.data.max_image_pixels)
        images = RowImages(processing, ImageCollector(ImageStore(folder / "images"), limits))
        try:
            return _mean(config, lambda source: _mean_image_tokens(source, config, images))
        except UserError:
            return None  # the checks of the inputs name a broken image


def _processing_here(model: str, sizes: Sizes, folder: Path) -> ImageProcessing | None:
    if model.startswith("tiny:"):
        from rlhf.models.files.tiny_vision import build_tiny_vision  # with tokenizers

        return ImageProcessing.of_model(str(build_tiny_vision(folder / "model", model.removeprefix("tiny:"), seed=0)))
    stored = find_config(model, shapes=sizes.shapes)
    if stored is None:
        return None
    try:
        return ImageProcessing.of_model(str(stored[1].parent))  # a folder of the hub's cache needs no hub
    except UserError:
        return None  # config.json alone


def _mean(config: Config, of_source: Callable[[DataSource], float]) -> float | None:
    """Return the mean over the sets of data.train by weight, or None if a set is slow to read."""
    sets = train_sets(config).values()
    if not all(_reads_quickly(weighted.source) for weighted in sets):
        return None
    total = sum(weighted.weight * of_source(weighted.source) for weighted in sets)
    return total / sum(weighted.weight for weighted in sets)


def _mean_image_tokens(source: DataSource, config: Config, images: RowImages) -> float:
    total, rows = 0, _first_rows(source, config, ROWS_OF_IMAGES)
    for row in rows:
        read = with_images(row, images)
        stored = read.columns["images"] if read.images is not None else ()
        sizes = [images.reader.store.size(int(Path(path).name, 16)) for path in stored]
        total += sum(len(images.processing.expansion(*size)) for size in sizes)
    return total / len(rows)


def _first_rows(source: DataSource, config: Config, count: int) -> Sequence[Row]:
    given = source_of(source)
    if not isinstance(given, str):
        given = replace(given, size=min(given.size or count, count))
    return first_rows(given, count, columns=config.data.columns)


def _reads_quickly(source: DataSource) -> bool:
    if isinstance(source, TaskConfig):
        return REASONING_GYM not in source.task
    name = source if isinstance(source, str) else source.path or ""
    path = Path(name)
    return name.endswith(FILE_SUFFIXES) and path.is_file() and path.stat().st_size <= LARGEST_FILE_READ


def _mean_characters(source: DataSource, config: Config) -> float:
    rows = _first_rows(source, config, ROWS_MEASURED)
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
