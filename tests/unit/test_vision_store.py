"""The store of images: content-addressed files, read and verified by key, and the decoder."""

from __future__ import annotations

import io
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from rlhf.errors import RunError, UserError
from rlhf.vision import store as store_module
from rlhf.vision.decoding import decode, image_size
from rlhf.vision.keys import image_key, image_name
from rlhf.vision.store import PASSING, ImageStore, PassingImages, keep_passing
from tests.vision_models import drawn, encoded


def test_an_image_is_stored_once_under_its_key(tmp_path: Path) -> None:
    store, data = ImageStore(tmp_path / "images"), encoded(drawn())
    key = store.add(data)
    written = (tmp_path / "images" / image_name(key)).stat().st_mtime_ns
    assert store.add(data) == key == image_key(data)
    assert store.read(key) == data
    assert [path.name for path in (tmp_path / "images").iterdir()] == [image_name(key)]
    assert store.path(key).stat().st_mtime_ns == written


def test_a_file_becomes_a_hard_link_or_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encoded(drawn()))
    (tmp_path / "link.png").symlink_to(file)
    linked = ImageStore(tmp_path / "linked")
    assert linked.path(linked.add_file(tmp_path / "link.png")).stat().st_ino == file.stat().st_ino

    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(store_module.os, "link", refuse)
    copied = ImageStore(tmp_path / "copied")
    key = copied.add_file(file)
    assert copied.path(key).stat().st_ino != file.stat().st_ino
    assert copied.read(key) == file.read_bytes()


def test_a_changed_file_is_noticed_and_written_again(tmp_path: Path) -> None:
    store, data = ImageStore(tmp_path), encoded(drawn())
    key = store.add(data)
    store.path(key).write_bytes(b"")
    with pytest.raises(RunError, match="no longer holds the image"):
        store.read(key)
    assert store.add(data) == key
    assert store.read(key) == data
    store.path(key).unlink()
    with pytest.raises(RunError, match="cannot be read"):
        store.read(key)


def test_another_image_with_the_same_key_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "image_key", lambda data: 7)
    store = ImageStore(tmp_path)
    store.add(b"one")
    with pytest.raises(RunError, match="same first 60 bits"):
        store.add(b"two")


def test_several_threads_add_the_same_image(tmp_path: Path) -> None:
    data = encoded(drawn(size=(200, 200)))
    stores = [ImageStore(tmp_path / "images") for _ in range(8)]
    threads = [threading.Thread(target=store.add, args=(data,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in (tmp_path / "images").iterdir()] == [image_name(image_key(data))]


def test_an_image_is_decoded_once_while_the_cache_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def counting(data: bytes) -> Image.Image:
        decoded.append(len(data))
        return decode(data)

    monkeypatch.setattr(store_module, "decode", counting)
    store = ImageStore(tmp_path, cached_bytes=2 * 3 * 48 * 32)  # room for two images
    keys = [store.add(encoded(drawn(colour))) for colour in ("red", "blue", "green")]
    for key in (keys[0], keys[1], keys[0], keys[2], keys[0], keys[1]):
        assert store.size(key) == store.image(key).size == (48, 32)
    assert len(decoded) == 4  # the second image was dropped for the third
    assert store.image(keys[0]).getpixel((10, 10)) == (255, 0, 0)
    assert pickle.loads(pickle.dumps(store)).read(keys[0]) == store.read(keys[0])


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_each_format_decodes_to_rgb(form: str) -> None:
    data = encoded(drawn(size=(40, 30)), form)
    image = decode(data)
    assert (image.mode, image.size, image_size(data)) == ("RGB", (40, 30), (40, 30))
    red, green, blue = image.getpixel((12, 12))
    assert red > 200 > 80 > max(green, blue)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_upright_as_its_exif_data_says(orientation: int) -> None:
    # a row of red, green, blue; where red and blue stand after each orientation of EXIF 2.3, table 6
    red_blue = {1: "left right", 2: "right left", 3: "right left", 4: "left right"}
    red_blue |= {5: "top bottom", 6: "top bottom", 7: "bottom top", 8: "bottom top"}
    image = Image.new("RGB", (3, 1))
    for x, colour in enumerate(((255, 0, 0), (0, 255, 0), (0, 0, 255))):
        image.putpixel((x, 0), colour)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif)
    upright = decode(data)
    assert upright.size == image_size(data) == ((1, 3) if orientation > 4 else (3, 1))
    first, last = upright.getpixel((0, 0)), upright.getpixel((upright.width - 1, upright.height - 1))
    places = red_blue[orientation].split()
    assert (first[0] > 200) == (places[0] in ("left", "top"))
    assert (last[2] > 200) == (places[1] in ("right", "bottom"))


def test_transparent_pixels_become_white() -> None:
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 0, 255))
    image = decode(encoded(clear))
    assert (image.getpixel((0, 0)), image.getpixel((1, 0))) == ((255, 255, 255), (0, 0, 0))
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    assert decode(encoded(palette, "GIF", transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_a_pixel_keep_their_upper_half() -> None:
    grey = Image.fromarray(numpy.array([[0x0000, 0x8000, 0xFFFF]], dtype=numpy.uint16))
    assert [decode(encoded(grey)).getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]


def test_a_moving_image_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((0, 0)) == (255, 0, 0)


def test_the_size_of_an_image_is_read_without_its_pixels() -> None:
    data = encoded(drawn(size=(64, 48)))
    with pytest.raises(UserError, match="damaged or incomplete"):
        decode(data[: len(data) // 2])
    assert image_size(data[: len(data) // 2]) == (64, 48)


def test_too_many_pixels_are_refused_from_the_header() -> None:
    data = encoded(Image.new("1", (30_000, 30_000)))  # 900 million pixels in 110 kB
    assert len(data) < 200_000
    with pytest.raises(UserError, match="too many to decode"):
        decode(data)
    with pytest.raises(UserError, match=r"48 x 32 pixels, more than 1,000.*data\.max_image_pixels"):
        decode(encoded(drawn()), max_pixels=1000)


def test_what_is_no_image_is_described() -> None:
    for data, text in ((b"", "An empty file"), (b"<svg xmlns='x'/>", "An SVG drawing"), (b"<html>", "A text")):
        with pytest.raises(UserError, match=text):
            decode(data)
    tiff = io.BytesIO()
    drawn().save(tiff, "TIFF")
    with pytest.raises(UserError, match=r"no image of a known format\. Use PNG, JPEG, WEBP, GIF, BMP\."):
        decode(tiff.getvalue())


def _age(folder: Path, key: int, seconds: float) -> None:
    """Move the last time when a conversation added an image into the past."""
    mark = folder / PASSING / image_name(key)
    before = mark.stat().st_mtime - seconds
    os.utime(mark, (before, before))


def test_images_of_conversations_are_removed_once_no_step_needs_them(tmp_path: Path) -> None:
    of_data, engine = ImageStore(tmp_path), pickle.loads(pickle.dumps(ImageStore(tmp_path, passing=True)))
    prompt, shown, kept, again, late = (encoded(drawn(size=(side, 9))) for side in range(11, 16))
    own = of_data.add(prompt)
    old, named, repeated = (engine.add(image) for image in (shown, kept, again))
    images = PassingImages(tmp_path, steps=1)  # a start keeps the images of earlier starts
    assert not list((tmp_path / PASSING).iterdir())
    for path in (old, named, repeated):
        engine.path(path).unlink()
    old, named, repeated = (engine.add(image) for image in (shown, kept, again))
    assert engine.add(prompt) == own
    assert not (tmp_path / PASSING / image_name(own)).exists()  # an image of the data, also shown in a conversation
    images.begin_step()
    for key in (old, named, repeated):
        _age(tmp_path, key, 100.0)
    images.remove()
    assert engine.path(old).exists()  # no step has passed
    images.begin_step()
    engine.add(again)
    new = engine.add(late)
    keep_passing(tmp_path, [image_name(named)])
    images.remove()
    found = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert found == {image_name(key) for key in (own, named, repeated, new)}
    _age(tmp_path, new, 100.0)
    images.remove()
    assert not engine.path(new).exists()
    assert engine.add(late) == new
    assert engine.read(new) == late


@pytest.mark.parametrize("keeps", [True, False])
def test_an_image_that_is_added_or_kept_while_it_is_removed_stays(
    keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, data = ImageStore(tmp_path, passing=True), encoded(drawn())
    key, images = engine.add(data), None
    images = PassingImages(tmp_path, steps=0)
    engine.path(key).unlink()
    engine.add(data)
    _age(tmp_path, key, 100.0)
    images.begin_step()
    looks = 0
    looked = PassingImages._is_old

    def look(self: Any, mark: Path) -> bool:
        nonlocal looks
        looks += 1
        if looks == 2:
            keep_passing(tmp_path, [mark.name]) if keeps else engine.add(data)
        return looked(self, mark)

    monkeypatch.setattr(PassingImages, "_is_old", look)
    images.remove()
    assert looks == 2
    assert engine.read(key) == data
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [image_name(key)]
