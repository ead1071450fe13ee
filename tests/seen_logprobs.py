"""Log-probabilities of token ids with images by transformers alone, and small images and prompts for the tests."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

from rlhf.vision.processor import ImageProcessing
from rlhf.vision.reading import ImageFolder, ImageLimits
from rlhf.vision.store import ImageStore


def png(seed: int, width: int = 48, height: int = 32) -> bytes:
    """Return an image of 16 coloured fields."""
    draw = random.Random(seed)
    fields = Image.new("RGB", (4, 4))
    fields.putdata([(draw.randrange(256), draw.randrange(256), draw.randrange(256)) for _ in range(16)])
    encoded = io.BytesIO()
    fields.resize((width, height)).save(encoded, "PNG")
    return encoded.getvalue()


RED, BLUE = png(1), png(2)


@contextmanager
def _masked_by_position(model: Any, is_image: Tensor) -> Iterator[None]:
    """Let transformers put images at these positions alone: a sampled token may be the image's token by chance."""
    name = "inputs_merger" if hasattr(model, "inputs_merger") else "get_placeholder_mask"  # Idefics3 has the first
    original = getattr(model, name)

    def mask(input_ids: Tensor, *args: Any, **options: Any) -> Any:
        return original(torch.where(is_image, input_ids, 0), *args, **options)

    setattr(model, name, mask)
    try:
        yield
    finally:
        delattr(model, name)


class SeenModel:
    """The processor, the tokenizer and the store of a model's folder."""

    def __init__(self, folder: Path, images: Path) -> None:
        processing = ImageProcessing.of_model(str(folder))
        assert processing is not None
        self.folder, self.processing, self.store = folder, processing, ImageStore(images)
        self.place = ImageFolder(folder=images, limits=ImageLimits())
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def prompt(self, *parts: str | bytes) -> tuple[int, ...]:
        """Return the token ids of a user's turn, with texts and encoded images."""
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]
        messages = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        keys = [self.store.add(part) for part in parts if isinstance(part, bytes)]
        return tuple(self.processing.expand(ids, keys, self.store))

    def model(self, *, seed: int, std: float = 0.08) -> Any:
        """Return the model after a random step of all weights, so that stale weights and exchanged images show."""
        model = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(std * torch.randn(weight.shape, generator=generator))
        return model

    def logprobs(self, model: Any, token_ids: Sequence[int]) -> Tensor:
        """Return the log-probability of each token given the tokens before, by transformers on a single sequence."""
        plain = torch.tensor([self.processing.plain_ids(token_ids)])
        kinds = torch.tensor([[int(token < 0) for token in token_ids]])
        accepted = signature(type(model.model).forward).parameters  # positions of Qwen, and what Gemma sees both ways
        names = [name for name in ("mm_token_type_ids", "token_type_ids") if name in accepted]
        marks = {name: kinds for name in names[:1] if bool(kinds.any())}
        images = [self.store.image(key) for key in self._keys(token_ids)]
        with torch.no_grad(), _masked_by_position(model.model, kinds.bool()):
            logits = model(input_ids=plain, **marks, **self.processing.model_inputs(images), use_cache=False).logits
        after_first = logits[0, :-1].float().log_softmax(-1).gather(1, plain[0, 1:, None])[:, 0]
        return torch.cat([torch.zeros(1), after_first])

    def _keys(self, token_ids: Sequence[int]) -> list[int]:
        """Return the key of each image in order, also of equal images in a row."""
        keys, left = [], 0
        for token in token_ids:
            if token >= 0:
                continue
            if not left:
                keys.append(-token)
                left = self.processing.expansion(*self.store.size(-token)).count(self.processing.image_token_id)
            left -= 1
        return keys
