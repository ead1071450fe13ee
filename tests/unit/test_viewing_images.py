"""Images of a run's samples: the viewer sends small versions only by name, and a report holds them inside."""

from __future__ import annotations

import base64
import io
import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

import rlhf
from actors.run.evaluate import keep_images
from rlhf.errors import RunError, UserError
from rlhf.tracking.run_folder.samples import samples_path, write_samples
from rlhf.tracking.sinks.backends import TrackedStep
from rlhf.tracking.sinks.wandb_backend import MOST_IMAGES, WandbBackend, tables
from rlhf.viewing import report
from rlhf.viewing.runs import RunPlaces
from rlhf.viewing.server import RunViewer
from rlhf.vision.keys import image_name
from rlhf.vision.store import ImageStore
from rlhf.vision.thumbnails import thumbnail
from tests.fakes.samples import sample_record, sample_tokens


def encoded(colour: str, size: tuple[int, int] = (48, 32)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    """The names of a small red and a large blue image in the store of the run `demo`."""
    store = ImageStore(tmp_path / "demo" / "images")
    return [image_name(store.add(encoded(*one))) for one in (("red",), ("blue", (1200, 600)))]


@pytest.fixture
def run(tmp_path: Path, names: list[str]) -> Path:
    """A run whose two prompts differ only in the image. The second response sees an image in its second turn."""
    folder = tmp_path / "demo"
    (folder / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n')
    red, blue = names
    tokens = sample_tokens(
        "no", f"[image {blue}]", "", "!", ids=(4, None, None, 5), sampled=(True, False, False, False)
    )
    write_samples(
        samples_path(folder, 1),
        [
            sample_record("red", prompt=f"[image {red}]What colour?", images=(red,), group_id=0, prompt_id=0),
            sample_record(
                "no", prompt=f"[image {blue}]What colour?", images=(blue,), group_id=1, prompt_id=1, tokens=tokens
            ),
        ],
    )
    return folder


@pytest.fixture
async def client(run: Path) -> Any:
    async with TestClient(TestServer(RunViewer(RunPlaces([run]), None).application())) as made:
        yield made


async def test_the_results_of_an_evaluation_show_their_images(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "evals" / "demo"
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text("{}\n")
    row = {"model": "m", "set": "heldout", "prompt_id": 0, "sample": 0, "prompt": f"[image {names[0]}]?"}
    row |= {"response": "red", "images": [names[0]]}
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
    keep_images([row], tmp_path / "demo" / "images", folder)
    async with TestClient(TestServer(RunViewer(RunPlaces([folder]), None).application())) as made:
        assert (await (await made.get("/api/runs")).json())["runs"][0]["steps"] == [0]
        assert (await made.get("/api/summary", params={"run": "demo"})).status == 200
        listing = await (await made.get("/api/samples", params={"run": "demo", "step": "0"})).json()
        assert listing["prompts"]["heldout:0"]["images"] == [names[0]]
        answer = await made.get("/api/image", params={"run": "demo", "name": names[0]})
        assert (answer.status, answer.content_type) == (200, "image/webp")
    assert [path.name for path in (folder / "images").iterdir()] == [names[0]]


async def test_the_viewer_scales_images_and_keeps_them(client: TestClient[Any, Any], names: list[str]) -> None:
    for name, size, colour in zip(names, [(48, 32), (256, 128)], [(255, 0, 0), (0, 0, 255)], strict=True):
        answer = await client.get("/api/image", params={"run": "demo", "name": name})
        assert (answer.status, answer.content_type) == (200, "image/webp")
        assert "immutable" in answer.headers["Cache-Control"]
        assert "img-src 'self'" in answer.headers["Content-Security-Policy"]
        shown = Image.open(io.BytesIO(await answer.read())).convert("RGB")
        assert shown.size == size
        found = shown.getpixel((5, 5))
        assert isinstance(found, tuple)
        assert max(abs(a - b) for a, b in zip(found, colour, strict=True)) < 8  # WebP rounds


async def test_only_images_of_the_store_are_sent(client: TestClient[Any, Any], run: Path, names: list[str]) -> None:
    (run / "images" / "0123456789abcde").write_bytes(encoded("green"))  # not its content's name
    (run / "images" / ("f" * 15)).mkdir(parents=True)
    hostile = ["", "../metrics.jsonl", "/etc/passwd", f"../images/{names[0]}", f"{names[0]}/", names[0].upper() + "A"]
    hostile += [names[0] + "\x00", names[0] + "\n", " " + names[0], "0123456789abcde", "f" * 15, "0" * 15, "٣" * 15]
    for name in hostile:
        answer = await client.get("/api/image", params={"run": "demo", "name": name})
        assert (answer.status, await answer.json()) == (404, {"error": "no such image"}), name
    assert (await client.get("/api/image", params={"run": "other", "name": names[0]})).status == 404


async def test_prompts_that_differ_in_their_images_are_told_apart(
    client: TestClient[Any, Any], names: list[str]
) -> None:
    listing = await (await client.get("/api/samples?run=demo&step=1")).json()
    first, second = listing["prompts"].values()
    assert ([names[0]], [names[1]]) == (first["images"], second["images"])
    assert first["hash"] != second["hash"]
    assert first["preview"].strip() == second["preview"].strip() == "What colour?"


def test_a_report_holds_small_images_within_limits(
    run: Path, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inside() -> dict[str, str]:
        page = report.write_report([run], tmp_path / "page.html").html.read_text(encoding="utf-8")
        (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
        assert "img-src data:;" in policy
        assert "default-src 'none'" in policy
        (answers,) = re.findall(r'<script id="answers" type="application/json">(.*?)</script>', page, re.S)
        images: dict[str, str] = json.loads(answers)["images"]
        return images

    images = inside()
    assert set(images) == set(names)
    kind, _, data = images[names[1]].partition(",")
    assert kind == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (160, 80)
    monkeypatch.setattr(report, "MOST_IMAGE_BYTES", 10)
    assert inside() == {}
    monkeypatch.undo()
    monkeypatch.setattr(report, "MOST_IMAGES", 1)
    assert list(inside()) == names[:1]
    monkeypatch.undo()
    (run / "images" / names[0]).unlink()
    assert list(inside()) == names[1:]


def test_python_names_and_opens_the_images(run: Path, names: list[str]) -> None:
    table = rlhf.Run(run).samples
    assert table["images"].tolist() == [[names[0]], [names[1]]]
    assert rlhf.Run(run).image(names[1]).size == (1200, 600)
    tokens = rlhf.Run(run).tokens(1, 1)
    assert tokens["ids"].dtype == "Int64"
    assert tokens["ids"].fillna(-1).tolist() == [4, -1, -1, 5]
    with pytest.raises(UserError, match="is not the name of an image"):
        rlhf.Run(run).image("../metrics.jsonl")
    with pytest.raises(RunError, match="cannot be read"):
        rlhf.Run(run).image("0" * 15)


def test_tables_of_trackers_name_images_only_where_there_are_some(names: list[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"split": "train", "prompt": "a", "response": "b", "images": names},
        {"split": "train", "prompt": "c", "response": "d", "images": []},
        {"split": "text", "prompt": "a", "response": "b", "images": []},
    ]
    made = tables(rows)
    columns, cells = made["train"]
    assert [row[columns.index("images")] for row in cells] == [" ".join(names), ""]
    assert "images" not in made["text"][0]


def test_wandb_shows_the_first_images_of_a_row(run: Path, names: list[str], caplog: pytest.LogCaptureFixture) -> None:
    logged: list[dict[str, Any]] = []
    image_of = partial(thumbnail, run / "images")
    backend = WandbBackend(SimpleNamespace(log=logged.append), run, checkpoints=False, image_of=image_of)
    lost = "0" * 15
    write_samples(
        samples_path(run, 2),
        [
            sample_record("a", images=tuple(names)),
            sample_record("b"),
            sample_record("c", images=(names[0], lost, *names, "1" * 15)),
        ],
    )
    backend.log(TrackedStep(folder=run, step=2, metrics={}, histograms={}))
    table = logged[0]["samples/train"]
    columns = [f"image_{i}" for i in range(1, MOST_IMAGES + 1)]
    shown = [[row[table.columns.index(name)] for name in columns] for row in table.data]
    assert [[None if cell is None else cell._caption for cell in row] for row in shown] == [
        [*names, None, None],
        [None] * 4,
        [names[0], None, *names],
    ]
    assert (shown[0][1].image.width, shown[0][1].image.height) == (256, 128)
    assert f"does not show image {lost}" in caplog.text
