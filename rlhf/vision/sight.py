"""Check that a model sees its images: another image must change the log-probabilities of the text behind.

A model that got pixels of zeros, the wrong positions or no pixels at all still trains without an error. So a run
compares the log-probabilities of given text once with the text's images and once with other images of equal size.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.errors import RunError
from rlhf.vision.keys import image_keys, image_name
from rlhf.vision.store import ImageStore

if TYPE_CHECKING:
    from PIL.Image import Image

UNSEEN = 1e-6  # nats. A model that sees differs by more than rounding, a blind model's passes are equal bit for bit.
SHARE = 0.1  # of the policy's difference. An engine in another precision differs by rounding even if blind.


def exchanged_images(token_ids: Sequence[int], store: ImageStore) -> tuple[int, ...]:
    """Return the token ids with another image in place of each image, of the same size and so with as many tokens.

    In the other image each value of a pixel is moved by half of the range. The store gets the other images.
    """
    others = {key: _other_image(key, store) for key in image_keys(token_ids)}
    return tuple(-others[-token] if token < 0 else token for token in token_ids)


def exchanged_among(rows: Sequence[Sequence[int]], store: ImageStore) -> list[tuple[int, ...]]:
    """Return the token ids of all rows with each image exchanged for the next image of equal size in the rows.

    Equal images are exchanged for equal images. A size with one image gets another image as in `exchanged_images`.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for key in image_keys(itertools.chain.from_iterable(rows)):
        by_size.setdefault(store.size(key), []).append(key)
    others: dict[int, int] = {}
    for keys in by_size.values():
        following = [*keys[1:], keys[0]] if len(keys) > 1 else [_other_image(keys[0], store)]
        others |= zip(keys, following, strict=True)
    return [tuple(-others[-token] if token < 0 else token for token in row) for row in rows]


def small_image() -> bytes:
    """Return a small image of many colours, for a check without images of the data."""
    from PIL import Image

    colours = [(4 * x, 4 * y, 255 - 4 * x) for y in range(64) for x in range(64)]
    image = Image.new("RGB", (64, 64))
    image.putdata(colours)
    return _encoded(image)


def _encoded(image: Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def _other_image(key: int, store: ImageStore) -> int:
    moved = store.image(key).point([(value + 128) % 256 for value in range(256)] * 3)
    return store.add(_encoded(moved))


def image_effect(own: Sequence[float], other: Sequence[float], token_ids: Sequence[int]) -> float:
    """Return the mean |difference| in nats between log-probabilities of text with its own and with other images.

    Only text behind the first image counts. `own` and `other` have the log-probabilities of token_ids[1:] without the
    positions of images.
    """
    behind = [any(token < 0 for token in token_ids[:i]) for i in range(1, len(token_ids)) if token_ids[i] >= 0]
    differences = [abs(a - b) for a, b, counts in zip(own, other, behind, strict=True) if counts]
    return sum(differences) / len(differences)


def refuse_blindness(token_ids: Sequence[int], *, policy: float, engine: float | None) -> None:
    """Raise RunError if the policy or an engine gives equal log-probabilities for different images.

    policy, engine: results of `image_effect`, the engine's the smallest of all engines. None: there is no engine.
    """
    images = ", ".join(image_name(key) for key in image_keys(token_ids))
    what = f"with another image in place of {images}, the log-probabilities of the text behind"
    if not policy > UNSEEN:
        raise RunError(
            f"the model cannot see its images: {what} differ by {policy:.1e} nats in the policy, which is rounding. "
            "The images are lost between the data and the trained model. Check the model's vision tower and processor: "
            "a tower of zeros, or a folder whose weights lack the tower, gives such a model."
        )
    if engine is not None and not engine > max(UNSEEN, SHARE * policy):
        raise RunError(
            f"the engine cannot see its images: {what} differ by {policy:.1e} nats in the policy, but by only "
            f"{engine:.1e} in a rollout engine. The images, or the weights of the vision tower, are lost on the way to "
            "the engine, and every response would be a guess."
        )
