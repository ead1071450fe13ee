"""Reading images: every form, each hostile or broken input as one error, and addresses fetched under all limits."""

from __future__ import annotations

import base64
import http.client
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from rlhf.errors import UserError
from rlhf.vision import fetching, reading
from rlhf.vision.keys import image_key
from rlhf.vision.reading import ImageCollector, ImageLimits
from rlhf.vision.store import ImageStore
from tests.vision_models import drawn, encoded

PNG = encoded(drawn())
HOST = "images.example.org"


def _reader(folder: Path, **limits: Any) -> ImageCollector:
    return ImageCollector(ImageStore(folder / "store"), ImageLimits(**limits))


def _uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _add(reader: ImageCollector, value: object, folder: Path | None = None) -> int:
    return reader.add(value, place="d.jsonl:3: image 1 of column `images`", folder=folder)


def test_each_form_of_an_image_gives_the_same_key(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(PNG)
    text = base64.b64encode(PNG).decode()
    values: list[object] = [
        *("sub/a.png", str(tmp_path / "sub" / "a.png"), "sub/../sub/a.png"),
        *(_uri(PNG), _uri(PNG, "application/octet-stream"), PNG, bytearray(PNG)),
        *({"bytes": PNG, "path": "gone.png"}, {"bytes": None, "path": "sub/a.png"}, {"base64": text}),
        *({"base64": f"{text[:40]}\n{text[40:]}"}, {"path": "sub/a.png"}, {"url": _uri(PNG)}),
    ]
    parts: list[dict[str, Any]] = [
        *({"type": "image", "image": "sub/a.png"}, {"type": "image", "image": {"bytes": PNG, "path": None}}),
        *({"type": "image", "path": "sub/a.png"}, {"type": "image", "base64": text, "url": None}),
        *({"type": "image", "bytes": PNG}, {"type": "image_url", "image_url": {"url": _uri(PNG), "detail": "low"}}),
        {"type": "image_url", "image_url": _uri(PNG)},
    ]
    reader = _reader(tmp_path)
    assert {_add(reader, value, tmp_path) for value in values} == {image_key(PNG)}
    assert {reader.add_part(part, place="p", folder=tmp_path) for part in parts} == {image_key(PNG)}
    assert [path.name for path in (tmp_path / "store").iterdir()] == [f"{image_key(PNG):015x}"]
    decoded = _add(reader, Image.open(tmp_path / "sub" / "a.png"))  # as a data set's Image column gives images
    assert reader.store.image(decoded).tobytes() == reader.store.image(image_key(PNG)).tobytes()


def test_an_image_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = reading.decode

    def counting(data: bytes, **limits: Any) -> Image.Image:
        decoded.append(len(data))
        return decode(data, **limits)

    monkeypatch.setattr(reading, "decode", counting)
    (tmp_path / "a.png").write_bytes(PNG)
    reader = _reader(tmp_path)
    for value in ("a.png", _uri(PNG), PNG, "a.png", {"bytes": PNG}):
        _add(reader, value, tmp_path)
    assert len(decoded) == 1
    reader.store.size(image_key(PNG))
    assert len(decoded) == 1


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + b"".join(chunks) + _chunk(b"IEND", b"")


def _text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "A" * 2**22, zip=True)  # Pillow allows 1 MiB of decompressed text
    return encoded(drawn(), pnginfo=info)


JPEG = encoded(drawn(size=(200, 200)), "JPEG")
BAD_EXIF = encoded(drawn(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xf0" + b"\0" * 8)

# value -> words of the error; none of these may read or fetch anything beyond the named file
BROKEN: dict[str, tuple[object, str]] = {
    "bomb of one colour": (encoded(Image.new("1", (20_000, 20_000))), "too many to decode"),
    "bomb in the header": (_png(60_000, 60_000, _chunk(b"IDAT", zlib.compress(b"\0"))), "too many to decode"),
    "bomb of a GIF": (
        b"GIF89a\xff\xff\xff\xff\x80\0\0" + b"\0" * 6 + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;",
        "too many",
    ),
    "bomb of text": (_text_bomb(), "damaged or incomplete"),
    "more pixels than allowed": (encoded(drawn(size=(400, 300))), r"400 x 300 pixels, more than 100,000"),
    "no pixels": (_png(0, 10, _chunk(b"IDAT", zlib.compress(b"\0"))), "damaged or incomplete|nothing to see|no image"),
    "half a PNG": (PNG[: len(PNG) // 2], "damaged or incomplete"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "damaged or incomplete"),
    "a JPEG's header": (JPEG[:100], "damaged or incomplete|no image of a known format"),
    "a PNG with a wrong check sum": (PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:], "damaged or incomplete"),
    "a PNG without pixels": (_png(10, 10), "damaged or incomplete"),
    "an SVG": (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "An SVG drawing is no image"),
    "an SVG that names a file": (b"<svg><image href='file:///etc/hostname'/></svg>", "An SVG drawing is no image"),
    "a page": (b"<!doctype html><h1>404</h1>", "A text, such as the page of an error, is no image"),
    "a TIFF": (encoded(drawn(), "TIFF"), "no image of a known format"),
    "an EPS": (encoded(drawn(), "EPS"), "no image of a known format"),
    "a PDF": (encoded(drawn(), "PDF"), "no image of a known format"),
    "an ICO": (encoded(drawn(), "ICO"), "no image of a known format"),
    "nothing": (b"", "An empty file is no image"),
    "noise": (bytes(range(256)), "no image of a known format"),
    "too many bytes": (PNG + b"\0" * fetching.MAX_BYTES, "more than 33,554,432"),
    "a number": (7, "Found the int 7, expected a path"),
    "a list": ([PNG], "Found the list"),
    "base64 with a wrong letter": ({"base64": "!!!!"}, "is not base64"),
    "base64 cut short": ({"base64": base64.b64encode(PNG).decode()[:-3]}, "is not base64|damaged"),
    "a data URI as text": ("data:image/svg+xml,<svg/>", "is not in base64"),
    "a data URI without data": ("data:image/png;base64", "is not in base64"),
    "a data URI of an SVG": (_uri(b"<svg/>", "image/svg+xml"), "An SVG drawing is no image"),
    "no field": ({"type": "image"}, "has none of `image`"),
    "two fields": ({"path": "a.png", "url": "https://a.b/c"}, "has `path`, `url` of"),
    "a wish for another size": (
        {"image": "a.png", "resized_height": 900},
        "field `resized_height`, which has no effect",
    ),
    "a missing file": ("gone.png", r"gone\.png cannot be read: No such file"),
    "a folder": (".", "is not a file"),
    "a device": ("/dev/zero", "is not a file"),
    "a pipe": ("pipe", "is not a file"),
    "a name with NUL": ("a\0.png", "cannot be read"),
    "a name too long": ("a" * 5000, "cannot be read.*begin it with `data:image/png;base64,`"),
    "a large file": ("large.png", "more than 33,554,432 bytes"),
    "a file that is no image": ("notes.txt", r"notes\.txt: .*no image of a known format"),
    "a link to such a file": ("link.png", r"link\.png: .*no image of a known format"),
    "an address of a file": ("file:///etc/hostname", "address of a local file, which is never opened"),
    "an address in `path`": ({"path": "https://a.b/c.png"}, "expected the path of a file"),
    "a path in `url`": ({"url": "/etc/hostname"}, "expected an https address or a data URI"),
    "plain http": ("http://images.example.org/a.png", "only https addresses"),
    "ftp": ("ftp://images.example.org/a.png", "only https addresses"),
    "a user in the address": ("https://me:secret@images.example.org/a.png", "only https addresses without a user name"),
    "a host that is not allowed": ("https://example.net/a.png", r"not in data\.image_hosts .*Add example\.net"),
    "a host that only ends so": ("https://evil-images.example.org/a.png", "not in data.image_hosts"),
    "the metadata address": ("https://169.254.169.254/latest/meta-data", "not in data.image_hosts"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_or_hostile_image_is_one_error(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "link.png").symlink_to(tmp_path / "notes.txt")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(fetching.MAX_BYTES + 1)
    value, words = BROKEN[case]
    begun = time.monotonic()
    with pytest.raises(UserError, match=words) as failure:
        _add(_reader(tmp_path, max_pixels=100_000, hosts=(HOST,)), value, tmp_path)
    assert str(failure.value).startswith("d.jsonl:3: image 1 of column `images`: ")
    assert len(str(failure.value)) < 700
    assert "secret" not in str(failure.value)
    assert not (tmp_path / "store").exists()
    assert time.monotonic() - begun < 5


def test_exif_data_without_a_meaning_changes_nothing(tmp_path: Path) -> None:
    reader = _reader(tmp_path)
    upside_down = Image.Exif()
    upside_down[0x0112] = 9  # the orientations of EXIF are 1 to 8
    for data in (BAD_EXIF, encoded(drawn(), "JPEG", exif=upside_down)):
        key = _add(reader, data)
        assert reader.store.size(key) == reader.store.image(key).size == (48, 32)


def test_data_from_elsewhere_may_not_name_files(tmp_path: Path) -> None:
    for value in (str(tmp_path / "a.png"), "a.png", {"bytes": None, "path": "/etc/hostname"}):
        with pytest.raises(UserError, match="only a file of this machine may name files"):
            _add(_reader(tmp_path), value, None)


class _Server(BaseHTTPRequestHandler):
    asked: list[str]
    gate: threading.Event

    def do_GET(self) -> None:
        self.asked.append(self.path)
        answer: Callable[[], None] = getattr(self, f"_{self.path.strip('/').partition('?')[0]}")
        answer()

    def _send(self, data: bytes, *, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def _image(self) -> None:
        self._send(PNG)

    def _short(self) -> None:
        self._send(PNG[:50], length=len(PNG))

    def _page(self) -> None:
        self._send(b"<html>")

    def _absent(self) -> None:
        self.send_error(404)

    def _large(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(64):
            self.wfile.write(b"\0" * 2**20)

    def _slow(self) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.gate.wait(0.02):  # a byte now and then, so that no time limit of a socket is reached
            self.wfile.write(b"\0")

    def _redirect(self, target: str) -> None:
        self.send_response(302)
        self.send_header("Location", target)
        self.end_headers()

    def _moved(self) -> None:
        self._redirect("/image")

    def _circle(self) -> None:
        self._redirect(f"https://{HOST}/circle")

    def _elsewhere(self) -> None:
        self._redirect("https://example.net/image")

    def _downgrade(self) -> None:
        self._redirect(f"http://{HOST}/image")

    def _metadata(self) -> None:
        self._redirect("https://169.254.169.254/latest/meta-data")

    def _to_file(self) -> None:
        self._redirect("file:///etc/hostname")

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Answer https://HOST from a server here. Only the last step, the connection to a checked address, is replaced."""
    handler = type("Handler", (_Server,), {"asked": [], "gate": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def connect(host: str, port: int, address: str, timeout: float) -> http.client.HTTPConnection:
        assert (host, port, address) == (HOST, 443, "93.184.216.34")
        return http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=timeout)

    monkeypatch.setattr(fetching, "_Pinned", connect)
    resolved = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 443))]
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: resolved if host == HOST else real(host, *a, **k))
    yield handler.asked
    handler.gate.set()
    server.shutdown()
    server.server_close()


def test_an_address_is_fetched_once_also_after_a_restart(tmp_path: Path, asked: list[str]) -> None:
    for _ in range(2):
        reader = _reader(tmp_path, hosts=(HOST,))
        for _ in range(2):
            assert _add(reader, f"https://{HOST}/image?size=3") == image_key(PNG)
    assert asked == ["/image?size=3"]
    assert _add(_reader(tmp_path, hosts=(HOST,)), f"https://{HOST.upper()}/moved") == image_key(PNG)
    assert asked == ["/image?size=3", "/moved", "/image"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("absent", "answers with status 404"),
        ("page", "A text, such as the page of an error, is no image"),
        ("short", "ended early|IncompleteRead"),
        ("large", "sends more than 32 MiB"),
        ("circle", "redirects more than 3 times"),
        ("elsewhere", r"redirects to .*example\.net.* not in data\.image_hosts"),
        ("downgrade", "redirects to .*only https addresses"),
        ("metadata", r"redirects to .*169\.254\.169\.254.* not in data\.image_hosts"),
        ("to_file", "redirects to .*only https addresses"),
    ],
)
def test_an_answer_that_is_no_allowed_image_is_one_error(
    path: str, words: str, tmp_path: Path, asked: list[str]
) -> None:
    with pytest.raises(UserError, match=words):
        _add(_reader(tmp_path, hosts=(HOST,)), f"https://{HOST}/{path}")
    assert len(asked) == (4 if path == "circle" else 1)


def test_a_slow_answer_ends_at_the_deadline(tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "DEADLINE_S", 0.5)
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"no whole answer in 0\.5 s"):
        _add(_reader(tmp_path, hosts=(HOST,)), f"https://{HOST}/slow")
    assert time.monotonic() - begun < 5
    assert asked == ["/slow"]


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("::1", "fd00:ec2::254", "fe80::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1"),
    ],
)
def test_a_name_with_an_address_inside_the_cluster_is_not_asked(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 443))
    inside = (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [public, inside])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(UserError, match="not of the public internet"):
        _add(_reader(tmp_path, hosts=(HOST,)), f"https://{HOST}/image")


def test_the_connection_goes_to_the_checked_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["93.184.216.34", "127.0.0.1"])  # a second look-up would lead inside
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(2, 1, 6, "", (next(answers), 443))])
    connected: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], *_: object) -> socket.socket:
        connected.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(UserError, match="cannot be fetched: no network here"):
        _add(_reader(tmp_path, hosts=(HOST,)), f"https://{HOST}/image")
    assert connected == [("93.184.216.34", 443)]
