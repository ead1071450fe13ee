"""Images in a packed row: a position that holds `-key` gets its embedding from the image of that key.

The images of a row are read, processed and moved to the device here, at the micro-batch. An image token that the policy
sampled by itself is text like any other token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn

from rlhf.errors import RunError
from rlhf.models.packed.branches import Branches, positions
from rlhf.vision.kinds import is_vision_weight
from rlhf.vision.processor import ImageProcessing, joined_inputs
from rlhf.vision.store import ImageStore

CACHED_BYTES = 256 * 2**20  # of processed images in a process; an image of one megapixel takes up to 25 MB
# Images of noise, by key: width and height in pixels. The key of an image from data is as small once in 2**59 images.
DRAWN = {1: (48, 32), 2: (32, 32)}

ModelInputs = Mapping[str, Tensor]


class ImageReader:
    """Reads the images of a model's rows. Holds at most `cached_bytes` of processed images, the last ones used."""

    def __init__(self, processing: ImageProcessing, *, cached_bytes: int = CACHED_BYTES) -> None:
        self.processing = processing
        self.store: ImageStore | None = None  # set by a worker of a run
        self._cached_bytes = cached_bytes
        self._inputs: OrderedDict[int, ModelInputs] = OrderedDict()
        self._num_positions: dict[int, int] = {}

    def inputs(self, key: int) -> ModelInputs:
        """Return the arguments of the model's forward pass for one image, on the host."""
        if key not in self._inputs:
            image = _drawn(key) if key in DRAWN else self._opened_store().image(key)
            self._inputs[key] = self.processing.model_inputs([image])
            while len(self._inputs) > 1 and sum(map(_num_bytes, self._inputs.values())) > self._cached_bytes:
                self._inputs.popitem(last=False)
        self._inputs.move_to_end(key)
        return self._inputs[key]

    def expansion(self, key: int) -> list[int]:
        """Return the token ids of one image, with `-key` at positions whose embedding comes from the image."""
        width, height = DRAWN[key] if key in DRAWN else self._opened_store().size(key)
        ids = self.processing.expansion(width, height)
        return [-key if token == self.processing.image_token_id else token for token in ids]

    def keys_in(self, token_ids: Int[Tensor, " n"]) -> list[int]:
        """Return the key of each image in token ids, in order. An image next to its copy counts twice.

        Raise ValueError if a part of an image is missing.
        """
        keys: list[int] = []
        runs, counts = torch.unique_consecutive(token_ids[token_ids < 0], return_counts=True)
        for token, count in zip(runs.tolist(), counts.tolist(), strict=True):
            num_images, rest = divmod(count, self.num_positions(-token))
            if rest:
                raise ValueError(f"a row holds {count} positions of an image of {self.num_positions(-token)}")
            keys += [-token] * num_images
        return keys

    def num_positions(self, key: int) -> int:
        """Return the number of positions whose embedding comes from the image."""
        if key not in self._num_positions:
            self._num_positions[key] = self.expansion(key).count(-key)
        return self._num_positions[key]

    def _opened_store(self) -> ImageStore:
        if self.store is None:
            raise RunError("The tokens hold an image, but this model was loaded without the run's folder of images.")
        return self.store


def set_image_reader(model: Any, reader: ImageReader) -> None:
    """Let the model see the images of its rows through the reader."""
    model.rlhf_images = reader


def image_reader(model: Any) -> ImageReader | None:
    """Return the reader set by `set_image_reader`. None: the model reads only text."""
    reader: ImageReader | None = vars(model).get("rlhf_images")
    return reader


def open_images(model: Any, folder: Path | None) -> None:
    """Let a vision model read images from a run's folder. Nothing changes for other models, or without a folder."""
    reader = image_reader(model)
    if reader is not None and folder is not None:
        reader.store = ImageStore(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenRow:
    """A row with its images, as the model takes it."""

    token_ids: Int[Tensor, " N"]  # with image tokens in place of keys
    is_image: Tensor  # [N], bool: positions whose embedding comes from an image
    sampled: Tensor | None  # [N], bool: image tokens that are text. None: there are none
    images: ModelInputs  # on the row's device; empty: the row has no images
    keys: Sequence[int]  # of the images, in order


def seen_row(reader: ImageReader, token_ids: Int[Tensor, " N"]) -> SeenRow:
    """Read and process the images of a row."""
    device = token_ids.device
    is_image = token_ids < 0
    keys = reader.keys_in(token_ids.cpu())
    inputs = joined_inputs([reader.inputs(key) for key in keys])
    image_token = reader.processing.image_token_id
    sampled = token_ids == image_token if keys else None
    plain = token_ids.masked_fill(is_image, image_token)
    if sampled is not None and bool(sampled.any()):
        plain = plain.masked_fill(sampled, 0)  # else the model would expect the embedding of an image there
    else:
        sampled = None
    on_device = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
    return SeenRow(token_ids=plain, is_image=is_image, sampled=sampled, images=on_device, keys=keys)


@contextmanager
def sampled_tokens(body: Any, row: SeenRow, image_token_id: int) -> Iterator[None]:
    """Give sampled image tokens their own embedding inside, which the model would replace by an image's."""
    if row.sampled is None:
        yield
        return
    sampled = row.sampled

    def restored(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0].masked_fill(sampled.view_as(given[0]), image_token_id), *given[1:])

    hook = body.get_input_embeddings().register_forward_pre_hook(restored)
    try:
        yield
    finally:
        hook.remove()


def token_types(body: Any, row: SeenRow) -> dict[str, Tensor]:
    """Return the argument that tells a single sequence's image tokens from text, for a model with such an argument."""
    if not row.keys:
        return {}
    accepted = signature(type(body).forward).parameters
    names = [name for name in ("mm_token_type_ids", "token_type_ids") if name in accepted]
    return {name: row.is_image[None].long() for name in names[:1]}


def image_positions(
    body: Any,
    reader: ImageReader,
    row: SeenRow,
    token_ids: Int[Tensor, " N"],
    lengths: Sequence[int],
    tree: Branches | None,
) -> Int[Tensor, "axes 1 N"]:
    """Return each token's position in the token's whole sequence: one axis, or three for rotary positions of images.

    Text behind the shared tokens of a branch continues after their largest position.
    """
    flat = positions(lengths, tree, device=token_ids.device)
    if not row.keys or not hasattr(body, "get_rope_index"):
        return flat[None]
    parts = token_ids.cpu().split(list(lengths))
    whole: list[Tensor] = []  # the token ids of each sequence with its trunk
    places: list[Tensor] = []  # the positions of the same tokens, [3, n]
    for ids, branch in zip(parts, tree or [None] * len(lengths), strict=True):
        shared = ids[:0] if branch is None else whole[branch.of][: branch.length]
        before = torch.zeros(3, 0, dtype=torch.int64) if branch is None else places[branch.of][:, : branch.length]
        whole.append(torch.cat([shared, ids]))
        if bool((ids < 0).any()):
            places.append(_rope_index(body, reader, whole[-1]))
        else:
            start = int(before.max()) + 1 if before.numel() else 0
            places.append(torch.cat([before, (torch.arange(len(ids)) + start).expand(3, -1)], 1))
    own = [place[:, -len(ids) :] for place, ids in zip(places, parts, strict=True)]
    return torch.cat(own, 1)[:, None].to(token_ids.device)


def _rope_index(body: Any, reader: ImageReader, token_ids: Int[Tensor, " n"]) -> Int[Tensor, "3 n"]:
    """Return the positions of a whole sequence, image by image: transformers takes adjacent images for one."""
    keys = reader.keys_in(token_ids)
    last = torch.tensor([reader.num_positions(key) for key in keys]).cumsum(0) - 1
    ends = ((token_ids < 0).nonzero()[:, 0][last] + 1).tolist()
    parts, start, place = [], 0, 0
    for key, end in zip(keys, ends, strict=True):
        ids = token_ids[None, start:end]
        grid = reader.inputs(key)["image_grid_thw"]
        index = body.get_rope_index(ids, mm_token_type_ids=(ids < 0).int(), image_grid_thw=grid)[0][:, 0] + place
        parts.append(index)
        start, place = end, int(index.max()) + 1
    return torch.cat([*parts, (torch.arange(len(token_ids) - start) + place).expand(3, -1)], 1)


def needs_tower(model: nn.Module) -> bool:
    """Return whether a row without an image must pass the tower too, since other ranks wait for this rank there.

    Ranks gather sharded weights together (ZeRO-3), and reduce the gradients of a trained tower together.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return False
    tower = [parameter for name, parameter in model.named_parameters() if is_vision_weight(name)]
    is_sharded = any(hasattr(parameter, "ds_id") for parameter in tower)  # set by DeepSpeed
    return is_sharded or (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower))


def _drawn(key: int) -> Any:
    from PIL import Image

    width, height = DRAWN[key]
    generator = torch.Generator().manual_seed(key)
    pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _num_bytes(inputs: ModelInputs) -> int:
    return sum(value.nbytes for value in inputs.values())
