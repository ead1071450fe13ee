"""Turn images into token ids and into the inputs of a model, by the model's own processor.

The processor of transformers resizes images, and decides how many positions an image takes. Only decoded images reach
the processor: a string in place of an image would make the processor open a file or an address.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rlhf.deferred import Tensor, torch, transformers
from rlhf.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from rlhf.vision.store import ImageStore

_TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
_FAILURES = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)


class ImageProcessing:
    """The image side of a model: the tokens of an image, and the inputs of the model's forward pass.

    Each image is processed separately, so tokens and pixels of an image never depend on a prompt's further images.
    """

    def __init__(self, name: str, processor: Any, config: Any) -> None:
        """Create from a processor of transformers and the model's config. UserError: no single placeholder token."""
        self.name = name
        self.model_type = str(config.model_type)
        self._processor = processor
        self.placeholder = str(processor.image_token)
        """The text of an image as written by the chat template: a single special token."""
        self.placeholder_id = int(processor.tokenizer.convert_tokens_to_ids(self.placeholder))
        has_id = hasattr(config, "image_token_id")  # transformers has two names for the token of embedded positions
        self.image_token_id = int(config.image_token_id if has_id else config.image_token_index)
        self._sized = lru_cache(maxsize=4096)(self._expansion)
        if self.placeholder_id in (None, processor.tokenizer.unk_token_id):
            raise UserError(f"The tokenizer of {name} has no token {self.placeholder}, which stands for an image.")

    @classmethod
    def of_model(cls, name: str) -> ImageProcessing | None:
        """Return the image side of a model's folder or name on the hub, NAME or NAME@REVISION.

        None: the model reads only text. UserError: the files of the processor are missing or damaged.
        """
        folder = Path(name)
        if folder.is_dir():
            path = folder / "config.json"
            with _naming(name):
                written = json.loads(path.read_text()) if path.is_file() else {}
            if not isinstance(written, dict) or not written.get("vision_config"):
                return None
            options: dict[str, Any] = {"local_files_only": True}
        else:
            name, _, revision = name.partition("@")
            options = {"revision": revision or None}
        with _naming(name):
            config = transformers.AutoConfig.from_pretrained(name, **options)
            if getattr(config, "vision_config", None) is None:
                return None
            processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False, **options)
        if not hasattr(processor, "image_processor") or not hasattr(processor, "image_token"):
            raise UserError(
                f"{name} has a vision tower, but its folder has no processor for images: it lacks "
                "preprocessor_config.json or processor_config.json. Download or copy the whole model again."
            )
        return cls(name, processor, config)

    @property
    def typed_tokens(self) -> tuple[str, ...]:
        """Return the texts of an image's tokens. No text of a data set may hold such a text."""
        tokenizer = self._processor.tokenizer
        return tuple(dict.fromkeys((self.placeholder, str(tokenizer.convert_ids_to_tokens(self.image_token_id)))))

    def expansion(self, width: int, height: int) -> tuple[int, ...]:
        """Return the token ids in place of the placeholder, for an image of this size in pixels.

        The embedded positions of the image hold `image_token_id`. The tokens before, between and behind are ordinary.
        UserError: the processor refuses the size.
        """
        return self._sized(width, height)

    def expand(self, token_ids: Sequence[int], images: Sequence[int], store: ImageStore) -> list[int]:
        """Return the token ids with each placeholder replaced by its image: `-key` where the image is embedded.

        `images` are the keys in order. UserError: the numbers of placeholders and images differ, a size is refused, or
        the ids are expanded already.
        """
        if any(token < 0 for token in token_ids) or (
            self.placeholder_id != self.image_token_id and self.image_token_id in token_ids
        ):
            raise UserError("The tokens hold an image that is expanded already. An image is expanded once.")
        found = sum(token == self.placeholder_id for token in token_ids)
        if found != len(images):
            raise UserError(
                f"The text has {found} placeholders {self.placeholder} and the row has {len(images)} images. Each "
                "image needs one placeholder; write no placeholder as text."
            )
        remaining = iter(images)
        expanded: list[int] = []
        for token in token_ids:
            if token != self.placeholder_id:
                expanded.append(token)
                continue
            key = next(remaining)
            expanded += (-key if token == self.image_token_id else token for token in self.expansion(*store.size(key)))
        return expanded

    def model_inputs(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """Return the arguments of the model's forward pass for images in order, such as `pixel_values`.

        Pixels are float32 on the host. Without images the result is empty.
        """
        outputs = [self._called(image) for image in images]
        return joined_inputs([{name: of[name] for name in of if name not in _TEXT_INPUTS} for of in outputs])

    def plain_ids(self, token_ids: Sequence[int]) -> list[int]:
        """Return the token ids with `image_token_id` in place of images, as a model's embedding takes them."""
        return [self.image_token_id if token < 0 else token for token in token_ids]

    def save(self, folder: Path) -> None:
        """Write the settings of the processor into a model's folder, without its tokenizer and chat template."""
        with TemporaryDirectory() as aside:
            self._processor.save_pretrained(aside)
            for path in Path(aside).glob("*processor_config.json"):
                shutil.copyfile(path, folder / path.name)

    def _expansion(self, width: int, height: int) -> tuple[int, ...]:
        from PIL import Image

        ids = tuple(self._called(Image.new("RGB", (width, height)))["input_ids"][0].tolist())
        if self.image_token_id not in ids:
            raise UserError(f"The processor of {self.name} writes no image token {self.image_token_id} for an image.")
        return ids

    def _called(self, image: Image) -> Mapping[str, Tensor]:
        """Return all outputs of the processor for a text of one placeholder and its image."""
        from PIL import Image as pillow

        if not isinstance(image, pillow.Image):  # a string would be opened as a path or an address
            raise TypeError(f"an image must be decoded, not {type(image).__name__}")
        how = {"add_special_tokens": False, "return_tensors": "pt"}
        try:
            called: Mapping[str, Tensor] = self._processor(text=[self.placeholder], images=[image], **how)
        except _FAILURES as error:
            raise UserError(
                f"The processor of {self.name} refuses an image of {image.width} x {image.height} pixels "
                f"({type(error).__name__}: {str(error)[:200]}). Use another image."
            ) from error
        return called


def joined_inputs(each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the model's inputs for several images in order, from the inputs of each."""
    return {name: _joined([inputs[name] for inputs in each], _axis(each[0])) for name in (each[0] if each else ())}


def _axis(inputs: Mapping[str, Tensor]) -> int:
    """Return the axis of images or tiles. Idefics3 and SmolVLM put a batch of one in front."""
    return 1 if "pixel_attention_mask" in inputs else 0


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Return inputs of several images along `axis`. Smaller images are padded with zeros at the end of other axes."""
    if len(parts) == 1:
        return parts[0]
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [0 if i == axis else shape[i] - part.shape[i] for i in range(part.ndim)]
        pads = [size for amount in reversed(missing) for size in (0, amount)]
        padded.append(torch.nn.functional.pad(part, pads) if any(missing) else part)
    return torch.cat(padded, dim=axis)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name} has a vision tower, but its image processor cannot be loaded ({type(error).__name__}: {reason}). "
            "Download or copy the whole model again, or install the named package."
        ) from error
