"""Read the images of a row, and put them into the row's messages and tokens.

rows -> rows with keys of images -> messages with parts -> tokens of text with placeholders -> tokens with images

A row names images inside messages, as parts, or in column `images` (or `image`). The column's images fill, in order,
the parts without an image, or the markers `<image>` in the texts. With neither, the images come before the first user's
text. A row with read images holds only keys: the encoded bytes are in the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from rlhf.data.row import Row, shown
from rlhf.errors import UserError, prefix_errors
from rlhf.vision.processor import ImageProcessing
from rlhf.vision.reading import ImageCollector

MARKER = "<image>"  # of an image in a text, as in the data of several other programs
COLUMNS = ("images", "image")
GOLD = "reference"  # column name in public data sets of triples; unrelated to the reference model
_ANSWERS = ("completion", "chosen", "rejected", GOLD)
_CONVERSATIONS = ("messages", "prompt", *_ANSWERS)
_TEXTS = ("prompt", "instruction", "text")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
_PARTS = ("image", "image_url")


@dataclass(frozen=True, slots=True)
class RowImages:
    """The model's image side, and the reader with the store of the run."""

    processing: ImageProcessing
    reader: ImageCollector


class HasColumns(Protocol):
    @property
    def columns(self) -> Mapping[str, Any]: ...


def with_images(row: Row, images: RowImages | None) -> Row:
    """Return the row with the keys of its images in place of their bytes, paths and addresses.

    Column `images` becomes the list of the stored files, for rewards. A row without images, or with images read before,
    is returned unchanged. UserError: a wrong image or number of images, or (`images` is None) a text-only model.
    """
    if row.images is not None or not has_images(row, strict=images is None):
        return row
    if images is None:
        raise UserError(
            f"{row.place}: holds an image, and the model reads only text. Use a model with a vision tower, or remove "
            "the images; if column `image` holds something else, rename it: data.columns: {other: image}."
        )
    return _Filling(row, images).filled()


def has_images(row: HasColumns, *, strict: bool = False) -> bool:
    """Return whether a row names an image. strict: a column of this name counts only if a value looks like an image."""
    for name in COLUMNS:
        value = row.columns.get(name)
        values = value if isinstance(value, list | tuple) else [value]
        if any(item not in (None, "") and (not strict or _is_like_an_image(item)) for item in values):
            return True
    return any(any(_images_in(row.columns.get(name))) for name in _CONVERSATIONS)


def image_files(row: Row) -> Iterator[str]:
    """Yield the paths of files that a row names as images, as written. Whether the files exist is not looked at."""
    columns = (row.columns.get(name) for name in COLUMNS)
    values = [item for value in columns for item in (value if isinstance(value, list | tuple) else [value])]
    values += [part for name in _CONVERSATIONS for part in _images_in(row.columns.get(name))]
    for value in values:
        if isinstance(value, Mapping):  # in an Image column of a data set, the path beside bytes is only a name
            value = None if value.get("bytes") else value.get("image") or value.get("path")
        if isinstance(value, str) and value and value[:5].lower() != "data:" and "://" not in value[:32]:
            yield value


def keys_of(messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Return the keys of the images in read messages, in order."""
    return tuple(part["key"] for part in _images_in(messages))


def text_of(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """Return the text of a message's content, with `<image>` in place of each image."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text", MARKER) for part in content)


def placed(text: str, keys: Sequence[int], place: str) -> str | list[dict[str, Any]]:
    """Return the content of a user's message: the text itself, or with images a list of parts.

    An image replaces each marker `<image>`. Without markers, the images come first. UserError: the numbers differ.
    """
    if not keys:
        return text
    texts = text.split(MARKER) if MARKER in text else [""] * len(keys) + [text]
    if len(texts) - 1 != len(keys):
        raise _miscounted(place, len(texts) - 1, f"markers {MARKER} in the text", len(keys))
    content: list[dict[str, Any]] = []
    for number, between in enumerate(texts):
        content += [{"type": "image", "key": keys[number - 1]}] if number else []
        content += [{"type": "text", "text": between}] if between else []
    return content


def placed_raw(text: str, keys: Sequence[int], images: RowImages | None, place: str) -> str:
    """Return a text without a template, with the model's placeholder in place of each marker `<image>`."""
    content = placed(text, keys, place)
    if isinstance(content, str) or images is None:
        return text
    return "".join(part.get("text", images.processing.placeholder) for part in content)


def expanded(token_ids: Sequence[int], keys: Sequence[int], images: RowImages | None, place: str) -> list[int]:
    """Return the tokens with each placeholder expanded to its image. Without a vision tower, nothing changes."""
    if images is None:
        return list(token_ids)
    with prefix_errors(place):
        return images.processing.expand(token_ids, keys, images.reader.store)


class _Filling:
    """Reads the images of a single row."""

    def __init__(self, row: Row, images: RowImages) -> None:
        self._row, self._images, self._folder = row, images, folder_of(row.file)
        name = next((name for name in COLUMNS if row.columns.get(name) not in (None, "", [])), None)
        if name is not None and all(row.columns.get(other) not in (None, "", []) for other in COLUMNS):
            raise UserError(f"{row.place}: has both columns `images` and `image`; remove one.")
        value = [] if name is None else row.columns[name]
        self._column = name or COLUMNS[0]
        self._given: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
        self._keys: list[int] = []  # of the column
        self._inline: list[int] = []

    def filled(self) -> Row:
        row = self._row
        conversations = self._conversations()
        for name in _ANSWERS if "prompt" in row.columns or "messages" in row.columns else ():
            if any(_images_in(row.columns.get(name))):
                raise UserError(f"{row.place}: column `{name}` holds an image; a row has images in the prompt.")
        most = max((len(list(_images_in(row.columns[name]))) for name in conversations), default=0)
        if (count := max(most, len(self._given))) > (allowed := self._images.reader.limits.max_images):
            raise UserError(
                f"{row.place}: the row has {count} images, more than {allowed}. Raise data.max_images, or use fewer."
            )
        for number, value in enumerate(self._given, start=1):
            place = f"{row.place}: image {number} of column `{self._column}`"
            self._keys.append(self._images.reader.add(value, place=place, folder=self._folder))
        columns = {name: value for name, value in row.columns.items() if name not in COLUMNS}
        for name in conversations:
            columns[name] = self._fill(name, row.columns[name])
        text = next((name for name in _TEXTS if isinstance(columns.get(name), str)), None)
        if not conversations and text is None:
            raise UserError(f"{row.place}: has images and no prompt; found {row.present}.")
        if not conversations and text is not None:
            self._refuse_typed(columns[text].replace(MARKER, ""), f"column `{text}`")
        path = self._images.reader.store.path
        columns["images"] = [str(path(key)) for key in self._keys or self._inline]
        return replace(row, columns=columns, images=() if conversations else tuple(self._keys))

    def _conversations(self) -> list[str]:
        """Return the columns with messages and images: the prompt, or without a prompt the answers."""
        columns = self._row.columns
        if "messages" in columns or "prompt" in columns:
            name = "messages" if "messages" in columns else "prompt"
            return [name] if _messages_of(columns[name]) else []
        return [name for name in _ANSWERS if _messages_of(columns.get(name))]

    def _fill(self, name: str, value: object) -> list[Any]:
        """Return the messages of a column with the key of each image."""
        where = f"{self._row.place}: column `{name}`"
        messages = [dict(message) for message in _messages_of(value)]
        self._inline = []
        images = list(_images_in(messages))
        bare = sum(map(_is_bare, images))
        markers = 0
        if self._keys and not bare:
            if images:
                raise UserError(f"{where} names images in its parts, and column `{self._column}` too; remove one.")
            markers = self._split_markers(messages)
        if (found := bare + markers) != len(self._keys):
            what = "parts of type `image` without an image" if bare or not markers else f"markers {MARKER}"
            raise _miscounted(where, found, what, len(self._keys))
        remaining = iter(self._keys)
        for number, message in enumerate(messages, start=1):
            content = message.get("content")
            if not isinstance(content, list | tuple):
                self._refuse_typed(content, f"message {number} of column `{name}`")
                continue
            parts = []
            for place, part in enumerate(content, start=1):
                at = f"{where}, message {number}, part {place}"
                if _is_image(part):
                    if message.get("role") == "assistant":
                        raise UserError(f"{at} is an image of the assistant, which only writes text. Remove the part.")
                    key = next(remaining) if _is_bare(part) else self._read_part(part, at)
                    parts.append({"type": "image", "key": key})
                else:
                    if isinstance(part, Mapping):
                        self._refuse_typed(part.get("text"), f"message {number}, part {place}, of column `{name}`")
                    parts.append(part)
            message["content"] = parts
        return messages

    def _read_part(self, part: Mapping[str, Any], at: str) -> int:
        key = self._images.reader.add_part(part, place=at, folder=self._folder)
        self._inline.append(key)
        return key

    def _split_markers(self, messages: list[dict[str, Any]]) -> int:
        """Put a part without an image in place of each marker, or else parts before the first user's text."""
        count = 0
        for message in messages:
            content = message.get("content")
            texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
            parts: list[Any] = []
            for part in texts:
                text = part.get("text") if isinstance(part, Mapping) else None
                if not isinstance(text, str) or MARKER not in text:
                    parts.append(part)
                    continue
                count += text.count(MARKER)
                for number, between in enumerate(text.split(MARKER)):
                    parts += [{"type": "image"}] if number else []
                    parts += [{"type": "text", "text": between}] if between else []
            if any(_is_image(part) for part in parts):
                message["content"] = parts
        user = next((message for message in messages if message.get("role") == "user"), None)
        if count or user is None:
            return count
        content = user.get("content")
        texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
        user["content"] = [{"type": "image"} for _ in self._keys] + texts
        return len(self._keys)

    def _refuse_typed(self, text: object, where: str) -> None:
        for token in self._images.processing.typed_tokens if isinstance(text, str) else ():
            if token in str(text):
                raise UserError(
                    f"{self._row.place}: {where} holds the text {token}, which stands for an image in this model. "
                    "Write a part of type `image`, or remove the text."
                )


@lru_cache(maxsize=64)
def folder_of(file: str) -> Path | None:
    """Return the folder in which a source's relative paths begin. None: the source is not on this machine."""
    path = Path(file)
    if path.is_file():
        return path.absolute().parent
    saved = Path(file.partition(":")[0])
    return saved.absolute() if saved.is_dir() else None


def _miscounted(place: str, found: int, what: str, images: int) -> UserError:
    return UserError(f"{place} has {found} {what}, and the row has {images} images. Make the numbers equal.")


def _messages_of(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def _parts_of(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list | tuple) else ()


def _images_in(messages: object) -> Iterator[Mapping[str, Any]]:
    """Yield the parts of messages that are images."""
    for message in _messages_of(messages):
        yield from filter(_is_image, _parts_of(message))


def _is_image(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _PARTS


def _is_bare(part: object) -> bool:
    """Return whether a part of type `image` names no image. Parquet fills absent fields with null."""
    return isinstance(part, Mapping) and _is_image(part) and all(part[name] is None for name in part if name != "type")


def _is_like_an_image(value: object) -> bool:
    if isinstance(value, str):
        return value.startswith("data:image/") or value.lower().endswith(_SUFFIXES)
    return isinstance(value, bytes) or hasattr(value, "getexif") or (isinstance(value, Mapping) and "bytes" in value)


def read_part_text(part: object, where: str) -> str:
    """Return the text of a part. UserError: the part is neither a text nor an image."""
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else None
    what = f"is of type {kind!r:.40}" if isinstance(kind, str) else f"is {shown(part)}"
    raise UserError(f"{where} {what}, expected a part of type `text` with a string, or of type `image`.")
