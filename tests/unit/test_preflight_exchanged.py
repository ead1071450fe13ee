"""Held-out sets are measured once more with exchanged images, and a model with the same results is called blind."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.run.evaluate import _warn_of_blindness
from rlhf.data.examples import Example
from rlhf.errors import UserError
from rlhf.preflight.exchanged import with_exchanged
from rlhf.preflight.training_data import PROBE_TAIL, _probe_ids
from rlhf.types import Prompt
from rlhf.vision.store import ImageStore
from tests.vision_models import drawn, encoded


def prompt(*token_ids: int) -> Prompt:
    return Prompt(prompt_id=0, token_ids=token_ids, text="", columns={"answer": "red"})


def test_sets_with_images_are_measured_once_more(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    images: Any = SimpleNamespace(reader=SimpleNamespace(store=store))
    red, blue = (store.add(encoded(drawn(colour))) for colour in ("red", "blue"))
    seen, text = (prompt(1, -red), prompt(2, -blue)), (prompt(3),)
    sets = with_exchanged({"seen": seen, "text": text}, images, key="eval.exchange_images")
    assert list(sets) == ["seen", "text", "seen.exchanged"]
    assert [row.token_ids for row in sets["seen.exchanged"]] == [(1, -blue), (2, -red)]
    assert sets["seen.exchanged"][0].columns == {"answer": "red"}
    example = Example(example_id=0, token_ids=(-red, 1), loss_mask=(False, True))
    (other,) = with_exchanged({"seen": (example,)}, images, key="")["seen.exchanged"]
    assert other.token_ids[0] not in (-red, -blue)
    assert other.loss_mask == example.loss_mask
    with pytest.raises(UserError, match=r"eval\.exchange_images: has no effect, since no held-out set has images"):
        with_exchanged({"text": text}, images, key="eval.exchange_images")
    with pytest.raises(UserError, match="and this set has pairs"):
        with_exchanged({"seen": (SimpleNamespace(token_ids=(-red,)),)}, images, key="")


def test_equal_results_with_exchanged_images_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def lines(name: str, *responses: str) -> list[dict[str, str]]:
        return [{"model": "m", "set": name, "response": response} for response in responses]

    with caplog.at_level(logging.WARNING):
        _warn_of_blindness([*lines("a", "red", "blue"), *lines("a.exchanged", "red", "red"), *lines("b", "red")])
        assert not caplog.messages
        _warn_of_blindness([*lines("a", "red", "blue"), *lines("a.exchanged", "red", "blue")])
    (message,) = caplog.messages
    assert message.startswith("m cannot see its images: all results on a are the same with exchanged images")


def test_the_probe_of_a_sync_has_an_image_whole_and_text_behind() -> None:
    long, short = (5, *[-9] * 80, 6), (5, *[-7] * 30, 6)
    probe = _probe_ids([prompt(1, 2), prompt(*long), prompt(*short)], 200, None)
    assert probe == (*short, *range(PROBE_TAIL))
    assert _probe_ids([prompt(*short)], 36, None) == (*short, 0, 1, 2)  # the engine has room for 35 and a response
    assert _probe_ids([prompt(1, 2), prompt(3)], 200, None) == (1, 2, 3)
