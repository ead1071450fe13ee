"""Images are exchanged for different images of equal size, and the place of a blind model is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.errors import RunError
from rlhf.vision.sight import exchanged_among, exchanged_images, image_effect, refuse_blindness
from rlhf.vision.store import ImageStore
from tests.vision_models import drawn, encoded


def test_each_image_is_exchanged_for_another_of_its_size(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    red, blue = store.add(encoded(drawn("red"))), store.add(encoded(drawn("blue")))
    ids = (5, -red, -red, 6, -blue, 7, -red)
    other = exchanged_images(ids, store)
    assert [token for token in other if token >= 0] == [5, 6, 7]
    assert other[1] == other[2] == other[6] != other[4]
    assert {other[1], other[4]}.isdisjoint(ids)
    shown = store.image(-other[1])
    assert shown.size == (48, 32)
    assert shown.getpixel((0, 0)) == (218, 218, 218)  # 90 + 128
    assert shown.getpixel((10, 10)) == (127, 128, 128)  # 255 + 128 - 256, and 0 + 128
    assert exchanged_images(ids, store) == other


def test_images_are_exchanged_among_rows_of_equal_size(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    red, blue, green = (store.add(encoded(drawn(colour))) for colour in ("red", "blue", "green"))
    large = store.add(encoded(drawn("red", (64, 64))))
    first, second, third = exchanged_among([(1, -red, 2, -blue), (-green, 3, -large), (-red,)], store)
    assert first == (1, -blue, 2, -green)
    assert second[:2] == (-red, 3)
    assert third == (-blue,)
    assert store.image(-second[2]).size == (64, 64)
    assert second[2] != -large


def test_the_effect_counts_text_behind_the_first_image() -> None:
    """Of the six tokens, the log-probabilities of the 2nd, 4th, 5th and 6th are known; 4th to 6th see the image."""
    ids = (1, 2, -9, 3, 4, 5)
    assert image_effect([0.0, -1.0, -2.0, -3.0], [9.0, -1.5, -2.0, -2.0], ids) == pytest.approx((0.5 + 0.0 + 1.0) / 3)


def test_a_blind_policy_and_a_blind_engine_are_told_apart() -> None:
    ids = (1, -9, 2)
    refuse_blindness(ids, policy=0.3, engine=0.29)
    refuse_blindness(ids, policy=0.3, engine=None)
    with pytest.raises(RunError, match=r"the model cannot see its images: .* 000000000000009, .* in the policy"):
        refuse_blindness(ids, policy=0.0, engine=0.0)
    for engine in (0.0, 0.02):  # rounding, and the rounding of another precision
        with pytest.raises(RunError, match=r"the engine cannot see its images: .* 3.0e-01 nats in the policy"):
            refuse_blindness(ids, policy=0.3, engine=engine)
    with pytest.raises(RunError, match="the model cannot see"):
        refuse_blindness(ids, policy=float("nan"), engine=0.3)
