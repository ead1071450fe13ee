"""Images as token ids and model inputs, against the whole processors of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from rlhf.errors import UserError
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.models.files.tiny_vision import KINDS, build_tiny_vision
from rlhf.vision.processor import ImageProcessing
from rlhf.vision.store import ImageStore
from tests.vision_models import drawn, encoded

SIZES = ((48, 32), (32, 48), (200, 90), (20, 20))


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_vision(tmp_path_factory.getbasetemp() / request.param, request.param, seed=0)


def _processing(model: Path) -> ImageProcessing:
    processing = ImageProcessing.of_model(str(model))
    assert processing is not None
    return processing


def test_expanded_ids_equal_the_processors_ids(model: Path, tmp_path: Path) -> None:
    processing, store = _processing(model), ImageStore(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(model)
    images = [drawn(colour, size) for colour, size in zip(("red", "blue", "green", "grey"), SIZES, strict=True)]
    keys = [store.add(encoded(image)) for image in images]
    content = [part for _ in images for part in ({"type": "text", "text": "See"}, {"type": "image"})]
    text = processor.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    theirs = processor(text=[text], images=images, add_special_tokens=False)["input_ids"][0]
    ours = processing.expand(processor.tokenizer(text, add_special_tokens=False).input_ids, keys, store)
    assert processing.plain_ids(ours) == list(theirs)
    embedded = [token for token in ours if token < 0]
    assert list(dict.fromkeys(embedded)) == [-key for key in keys]
    assert len(embedded) == list(theirs).count(processing.image_token_id)


def test_model_inputs_equal_the_processors_inputs(model: Path) -> None:
    processing, processor = _processing(model), transformers.AutoProcessor.from_pretrained(model)
    images = [drawn("red", (48, 32)), drawn("blue", (48, 32)), drawn("green", (64, 64))]
    text = processing.placeholder * len(images)
    alone = processing.model_type == "llava_onevision"  # several images of one text would lose their tiles
    theirs = processor(text=[text], images=images if alone else [images], return_tensors="pt")
    ours = processing.model_inputs(images)
    assert set(ours) == set(theirs) - {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)
    assert processing.model_inputs([]) == {}


def test_the_expansion_depends_on_the_size_alone(model: Path) -> None:
    processing = _processing(model)
    for size in SIZES:
        expansion = processing.expansion(*size)
        assert expansion == processing.expansion(*size)
        assert processing.image_token_id in expansion
    is_fixed = processing.model_type == "gemma3"  # 256 tokens for each image; here 4
    assert (processing.expansion(200, 90) == processing.expansion(20, 20)) == is_fixed


def test_wrong_counts_and_expanded_ids_are_refused(model: Path, tmp_path: Path) -> None:
    processing, store = _processing(model), ImageStore(tmp_path)
    key = store.add(encoded(drawn()))
    placeholder = processing.placeholder_id
    again = "placeholders .* 1 images" if placeholder == processing.image_token_id else "expanded already"
    for ids, keys, text in (
        ([1, placeholder], [], "1 placeholders .* 0 images"),
        ([1, 2], [key], "0 placeholders .* 1 images"),
        ([placeholder, placeholder], [key], "2 placeholders .* 1 images"),
        (processing.expand([placeholder], [key], store), [key], "expanded already"),
        (processing.plain_ids(processing.expand([placeholder], [key], store)), [key], again),
    ):
        with pytest.raises(UserError, match=text):
            processing.expand(ids, keys, store)
    assert processing.expand([1, 2], [], store) == [1, 2]


def test_a_refused_size_is_the_users_error(tmp_path: Path) -> None:
    processing = _processing(build_tiny_vision(tmp_path / "model", "qwen3_vl", seed=0))
    with pytest.raises(UserError, match=r"refuses an image of 900 x 2 pixels .*aspect ratio"):
        processing.expansion(900, 2)


def test_only_decoded_images_reach_a_processor(model: Path) -> None:
    with pytest.raises(TypeError, match="must be decoded"):
        _processing(model).model_inputs(["/etc/hostname"])  # type: ignore[list-item]


def test_a_text_model_has_no_image_side(tmp_path: Path) -> None:
    assert ImageProcessing.of_model(str(build_tiny_llama(tmp_path / "llama", seed=0))) is None


def test_a_folder_without_processor_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_vision(tmp_path / "model", "qwen2_5_vl", seed=0)
    for file in folder.glob("*processor*"):
        file.unlink()
    with pytest.raises(UserError, match=r"image processor cannot be loaded|has no processor for images"):
        ImageProcessing.of_model(str(folder))


def test_images_of_any_size_are_joined(model: Path) -> None:
    inputs = _processing(model).model_inputs([Image.new("RGB", size) for size in SIZES])
    assert all(value.isfinite().all() for value in inputs.values() if value.is_floating_point())
