"""Token ids with images become vLLM's input: ranges from the runs of keys, each image rendered once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.rollout import image_inputs as module
from actors.rollout.image_inputs import ImageInputs
from rlhf.errors import RunError
from rlhf.vision.keys import image_name
from rlhf.vision.reading import ImageFolder, ImageLimits
from tests.vision_models import drawn, encoded

MARK, PAD, NEWLINE = 200, 201, 202


class Renderer:
    """Stands for vLLM's: an image is a mark, a row of two embeddings, a newline, and another row."""

    def __init__(self, *, plain: bool = False) -> None:
        self.plain = plain
        self.rendered: list[Any] = []

    def render_cmpl(self, prompts: list[Any]) -> list[Any]:
        (prompt,) = prompts
        (image,) = prompt["multi_modal_data"]["image"]
        assert prompt["prompt_token_ids"] == [MARK]
        self.rendered.append(image.getpixel((10, 10)))
        mask = torch.tensor([False, True, True, False, True, True])
        ids = [MARK, PAD, PAD, NEWLINE, PAD, PAD]
        place = SimpleNamespace(offset=0, length=6, is_embed=mask)
        if self.plain:
            ids, place = [MARK, PAD, PAD], SimpleNamespace(offset=1, length=2, is_embed=None)
        tensors = {"pixels": SimpleNamespace(data=torch.tensor(image.getpixel((10, 10))))}
        return [{"prompt_token_ids": ids, "mm_placeholders": {"image": [place]}, "mm_kwargs": {"image": [tensors]}}]


@pytest.fixture
def inputs(tmp_path: Path) -> ImageInputs:
    made = ImageInputs("org/model", ImageFolder(folder=tmp_path, limits=ImageLimits()))
    made.__dict__["processing"] = SimpleNamespace(placeholder_id=MARK)
    return made


def image(key: int) -> tuple[int, ...]:
    return (MARK, -key, -key, NEWLINE, -key, -key)


def test_ranges_come_from_the_keys_also_of_equal_images_in_a_row(inputs: ImageInputs) -> None:
    red, blue = (inputs.store.add(encoded(drawn(colour))) for colour in ("red", "blue"))
    engine: Any = SimpleNamespace(renderer=Renderer())
    made = inputs.input_of(engine, (7, *image(red), *image(red), 8, *image(blue), 9))
    assert made["type"] == "multimodal"
    assert made["prompt_token_ids"] == [7, *image(-PAD), *image(-PAD), 8, *image(-PAD), 9]
    assert made["mm_hashes"] == {"image": [image_name(red), image_name(red), image_name(blue)]}
    places = made["mm_placeholders"]["image"]
    assert [(place.offset, place.length, place.get_num_embeds()) for place in places] == [
        (1, 6, 4),
        (7, 6, 4),
        (14, 6, 4),
    ]
    pixels = [tensors["pixels"].data.tolist() for tensors in made["mm_kwargs"]["image"]]
    assert pixels == [[255, 0, 0], [255, 0, 0], [0, 0, 255]]
    assert inputs.input_of(engine, (1, 2)) == {"type": "token", "prompt_token_ids": [1, 2]}
    inputs.input_of(engine, image(blue))
    assert engine.renderer.rendered == [(255, 0, 0), (0, 0, 255)]  # once each


def test_a_range_without_other_tokens(inputs: ImageInputs) -> None:
    red = inputs.store.add(encoded(drawn("red")))
    made = inputs.input_of(SimpleNamespace(renderer=Renderer(plain=True)), (MARK, -red, -red, -red, -red))
    assert [(place.offset, place.length) for place in made["mm_placeholders"]["image"]] == [(1, 2), (3, 2)]


def test_the_images_used_last_are_kept(inputs: ImageInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENDERED_BYTES", 2 * 3 * 8)  # two images of three int64
    keys = [inputs.store.add(encoded(drawn(colour))) for colour in ("red", "green", "blue")]
    engine: Any = SimpleNamespace(renderer=Renderer())
    for key in (*keys, keys[1], keys[0]):
        inputs.input_of(engine, image(key))
    assert [pixel.index(max(pixel)) for pixel in engine.renderer.rendered] == [0, 1, 2, 0]


@pytest.mark.parametrize("cut", [slice(1, None), slice(0, 4), slice(0, 3)])
def test_another_expansion_is_refused(inputs: ImageInputs, cut: slice) -> None:
    red = inputs.store.add(encoded(drawn("red")))
    why = rf"image {image_name(red)} \(48x32 pixels\): vLLM expands the image to 6 tokens, 4 of them embedded"
    with pytest.raises(RunError, match=why + r".*org/model"):
        inputs.input_of(SimpleNamespace(renderer=Renderer()), image(red)[cut])
