"""Keys of images: the first 60 bits of a sha256, and images in token ids."""

from __future__ import annotations

import torch

from rlhf.vision.keys import image_key, image_keys, image_name


def test_the_key_is_the_first_sixty_bits_of_the_sha256() -> None:
    # sha256(b"abc") = ba7816bf 8f01cfea 414140de ... (FIPS 180-2, B.1)
    assert image_key(b"abc") == 0xBA7816BF8F01CFE
    assert image_name(image_key(b"abc")) == "ba7816bf8f01cfe"


def test_a_negative_key_fits_into_a_token_id() -> None:
    key = image_key(b"abc")
    assert torch.tensor([-key], dtype=torch.int64).tolist() == [-key]
    assert image_name(1) == "000000000000001"


def test_images_of_token_ids_come_once_in_order() -> None:
    ids = [4, -9, -9, 5, -2, 6, -9]
    assert image_keys(ids) == (9, 2)
