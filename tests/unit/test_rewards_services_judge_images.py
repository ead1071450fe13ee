"""A judge is shown the images of a row where the prompt names them."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from rlhf.errors import RunError
from rlhf.rewards.services.judge import JudgeSpec, question
from tests.vision_models import drawn, encoded


def _content(prompt: str, images: list[str]) -> object:
    spec = JudgeSpec(
        model="m", prompt=prompt, system=None, pattern="(.)", scale=(0, 1), choices={}, request={"temperature": 0}
    )
    return question(spec, {"images": images, "response": "red"})["messages"][0]["content"]


def test_images_stand_where_the_prompt_names_them(tmp_path: Path) -> None:
    forms = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}
    files = {name: tmp_path / name for name in forms}
    for name, form in forms.items():
        files[name].write_bytes(encoded(drawn(), form))
    content = _content("See {images}: {response}? {{images}}", [str(path) for path in files.values()])
    assert isinstance(content, list)
    assert content[0] == {"type": "text", "text": "See "}
    assert content[-1] == {"type": "text", "text": ": red? {images}"}
    for part, (name, path) in zip(content[1:-1], files.items(), strict=True):
        head, _, data = part["image_url"]["url"].partition(",")
        assert (part["type"], head) == ("image_url", f"data:image/{name};base64")
        assert base64.b64decode(data) == path.read_bytes()


def test_a_prompt_without_images_stays_a_text() -> None:
    assert _content("{response} {{images}}", ["gone"]) == "red {images}"
    with pytest.raises(RunError, match="The image gone for a service cannot be read"):
        _content("{images}", ["gone"])
