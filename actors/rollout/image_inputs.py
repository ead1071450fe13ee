"""Turn token ids with images into vLLM's input, in the thread of the engine.

In token ids, `-key` stands for a position whose embedding comes from an image of the run's store. vLLM renders each
image once, from one placeholder token, and its expansion must equal the ids. Ids are never given to vLLM as text with
placeholders, because vLLM expands already expanded ids again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlhf.data.images import RowImages
from rlhf.errors import RunError
from rlhf.vision.keys import image_name
from rlhf.vision.processor import ImageProcessing
from rlhf.vision.reading import ImageFolder

RENDERED_BYTES = 2**29  # of images kept in vLLM's form; the images of running samples are held in any case


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedImage:
    """An image in vLLM's form, without a place in a prompt."""

    ids: tuple[int, ...]  # token ids of vLLM's range in a prompt
    embedded: tuple[bool, ...]  # which of the ids the tower replaces
    mask: Any  # `embedded` as vLLM gives it
    tensors: Any  # the tower's arguments

    @property
    def num_bytes(self) -> int:
        return sum(element.data.nbytes for element in self.tensors.values() if hasattr(element.data, "nbytes"))


class ImageInputs:
    """Renders the images of an engine's prompts. Not for several threads at once."""

    def __init__(self, model: str, place: ImageFolder) -> None:
        self.model = model
        self.place = place
        self.reader = place.reader()
        self.store = self.reader.store
        self._rendered: OrderedDict[int, RenderedImage] = OrderedDict()  # by key, the last used image at the end
        self._num_bytes = 0

    @cached_property
    def processing(self) -> ImageProcessing:
        processing = ImageProcessing.of_model(self.model)
        if processing is None:
            raise RunError(f"a prompt has an image, but {self.model} has no image processor")
        return processing

    @property
    def of_rows(self) -> RowImages:
        """Return the reader of images that arrive while the engine runs, with the model's image side."""
        return RowImages(self.processing, self.reader)

    def input_of(self, engine: Any, token_ids: Sequence[int]) -> dict[str, Any]:
        """Return vLLM's input for token ids in which `-key` stands for an embedded position of an image.

        RunError: vLLM expands an image to different token ids.
        """
        from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

        ids = list(token_ids)
        places: list[PlaceholderRange] = []
        keys: list[int] = []
        at = 0
        while (at := next((i for i in range(at, len(ids)) if ids[i] < 0), len(ids))) < len(ids):
            key = -ids[at]
            image = self._render(engine, key)
            start = at - image.embedded.index(True)
            end = start + len(image.ids)
            ours = [-key if is_embedded else i for i, is_embedded in zip(image.ids, image.embedded, strict=True)]
            if start < 0 or ids[start:end] != ours:
                raise self._differ(key, image, list(token_ids[max(0, start) : end]))
            ids[start:end] = image.ids
            places.append(PlaceholderRange(offset=start, length=len(image.ids), is_embed=image.mask))
            keys.append(key)
            at = end
        if not keys:
            return {"type": "token", "prompt_token_ids": ids}
        return {
            "type": "multimodal",
            "prompt_token_ids": ids,
            "mm_kwargs": MultiModalKwargsItems({"image": [self._render(engine, key).tensors for key in keys]}),
            "mm_hashes": {"image": [image_name(key) for key in keys]},
            "mm_placeholders": {"image": places},
        }

    def _render(self, engine: Any, key: int) -> RenderedImage:
        """Return an image in vLLM's form. The images used last are kept."""
        image = self._rendered.pop(key, None)
        if image is None:
            image = self._rendered_anew(engine, key)
            self._num_bytes += image.num_bytes
        self._rendered[key] = image
        while self._num_bytes > RENDERED_BYTES and len(self._rendered) > 1:
            _, oldest = self._rendered.popitem(last=False)
            self._num_bytes -= oldest.num_bytes
        return image

    def _rendered_anew(self, engine: Any, key: int) -> RenderedImage:
        images = {"image": [self.store.image(key)]}  # decoded: vLLM would open a string as a file or an address
        prompt = {"prompt_token_ids": [self.processing.placeholder_id], "multi_modal_data": images}
        (rendered,) = engine.renderer.render_cmpl([prompt])
        (place,) = rendered["mm_placeholders"]["image"]
        ids = rendered["prompt_token_ids"][place.offset : place.offset + place.length]
        embedded = [True] * place.length if place.is_embed is None else place.is_embed.tolist()
        (tensors,) = rendered["mm_kwargs"]["image"]
        return RenderedImage(ids=tuple(ids), embedded=tuple(embedded), mask=place.is_embed, tensors=tensors)

    def _differ(self, key: int, image: RenderedImage, ours: list[int]) -> RunError:
        size = "x".join(map(str, self.store.image(key).size))
        num_ours = sum(token == -key for token in ours)
        return RunError(
            f"image {image_name(key)} ({size} pixels): vLLM expands the image to {len(image.ids)} tokens, "
            f"{sum(image.embedded)} of them embedded, and the prompt has {num_ours} embedded tokens there, or other "
            f"tokens between them. The image processor of {self.model} and vLLM's differ, so the policy and the engine "
            "would see different prompts. Use another model."
        )
