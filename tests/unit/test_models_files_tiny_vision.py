"""Each tiny vision model is an ordinary folder: transformers loads it with its processor and looks at an image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from rlhf.errors import UserError
from rlhf.models.files.tiny import VOCAB_SIZE
from rlhf.models.files.tiny_vision import KINDS, build_tiny_vision
from rlhf.preflight.sources import local_model

PARTS = [{"type": "image"}, {"type": "text", "text": "what?"}]


@pytest.mark.parametrize(
    "kind", [kind if kind in ("qwen3_vl", "gemma3") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_model_of_each_kind_sees_the_image_that_its_template_marks(kind: str, tmp_path: Path) -> None:
    folder = build_tiny_vision(tmp_path / "m", kind, seed=0)
    processor: Any = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    tokenizer = processor.tokenizer
    assert len(tokenizer) == VOCAB_SIZE == model.config.get_text_config().vocab_size
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    render: Callable[..., str] = tokenizer.apply_chat_template
    alone = render([{"role": "user", "content": "what?"}], tokenize=False)
    assert alone == "<|user|>what?<|eos|>"  # a content of text alone is a string too
    text = render([{"role": "user", "content": PARTS}], tokenize=False, add_generation_prompt=True)
    given = processor(text=[text], images=[[Image.new("RGB", (48, 32), "red")]], return_tensors="pt")
    other = processor(text=[text], images=[[Image.new("RGB", (48, 32), "blue")]], return_tensors="pt")
    assert 4 <= given["input_ids"].shape[1] - len(tokenizer(text).input_ids) < 60
    with torch.no_grad():
        logits, others = model(**given).logits[0, -1], model(**other).logits[0, -1]
    assert not torch.allclose(logits, others, rtol=0.0, atol=1e-7)


def test_the_seed_alone_decides_the_weights_of_a_vision_model(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    folders = [
        local_model("tiny:qwen3_vl", tmp_path / part, seed=seed) for part, seed in (("a", 0), ("b", 0), ("a", 1))
    ]
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's randomness was used up
    first, again, other = (load_file(Path(folder) / "model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.visual.patch_embed.proj.weight"], other["model.visual.patch_embed.proj.weight"])
    assert local_model("tiny:qwen3_vl", tmp_path / "a", seed=0) == folders[0]  # kept


def test_an_unknown_tiny_model_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"tiny:owl is not the name of a tiny model\. Use tiny:llama, or a .* " r"tiny:qwen2_vl,"
    ):
        local_model("tiny:owl", tmp_path, seed=0)
