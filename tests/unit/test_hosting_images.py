"""Images of the official client reach ranks and engines, are logged by name, and are refused in the request's turn."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tinker import types
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.request_conv import forward_backward_request_to_proto

from rlhf.adapters import LossReport, LossRows, NamedLoss, SampleAnswer, SampleRequest
from rlhf.errors import UserError
from rlhf.hosting import bodies, protobuf, service
from rlhf.hosting.images import KEPT_S, ClientImages
from rlhf.hosting.service import TinkerService
from rlhf.models.files.tiny_vision import build_tiny_vision
from rlhf.vision.keys import image_key, image_name
from rlhf.vision.processor import ImageProcessing
from tests.fakes.adapters import VOCABULARY, FakeAdapters, FakeEngines
from tests.fakes.tinker_server import opened
from tests.seen_logprobs import BLUE, RED, png
from tests.unit.test_hosting_service import Client, Model

NUM = 6  # tokens of an image
SEEN = (-image_key(RED),) * NUM
Chunks = Sequence[list[int] | types.ModelInputChunk]


class SeeingAdapters(FakeAdapters):
    """Ranks with the rows that came. A position of an image counts as a token that depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[int]] = []

    async def forward_backward(
        self, adapter: str, rows: LossRows, loss: NamedLoss, *, forward_only: bool = False
    ) -> LossReport:
        self.rows.append(rows.token_ids.tolist())
        ids = torch.where(rows.token_ids < 0, -rows.token_ids % VOCABULARY, rows.token_ids)
        seen = replace(rows, token_ids=ids)
        report: LossReport = await super().forward_backward(adapter, seen, loss, forward_only=forward_only)
        return report


class SeeingEngines(FakeEngines):
    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[tuple[int, ...]] = []

    async def sample(self, adapter: str | None, request: SampleRequest) -> SampleAnswer:
        self.prompts.append(request.token_ids)
        plain = tuple(-token % VOCABULARY if token < 0 else token for token in request.token_ids)
        return await super().sample(adapter, replace(request, token_ids=plain))


@pytest.fixture(scope="module")
def processing(tmp_path_factory: pytest.TempPathFactory) -> ImageProcessing:
    folder = build_tiny_vision(tmp_path_factory.mktemp("models") / "qwen", "qwen2_5_vl", seed=0)
    made = ImageProcessing.of_model(str(folder))
    assert made is not None
    return made


@asynccontextmanager
async def seeing(
    folder: Path, processing: ImageProcessing | None, **changes: Any
) -> AsyncIterator[tuple[TinkerService, SeeingAdapters, SeeingEngines]]:
    policy, engines = SeeingAdapters(), SeeingEngines()
    async with opened(folder, policy, engines, processing, **changes) as made:
        yield made, policy, engines


def image(data: bytes = RED, expected: int | None = NUM, form: Any = "png") -> types.ImageChunk:
    return types.ImageChunk(data=data, format=form, expected_tokens=expected)


def model_input(chunks: Chunks) -> types.ModelInput:
    return types.ModelInput(
        chunks=[types.EncodedTextChunk(tokens=chunk) if isinstance(chunk, list) else chunk for chunk in chunks]
    )


def message(chunks: Chunks, length: int, *, model_id: str = "m", seq_id: int = 1) -> pb.ForwardBackwardRequest:
    inputs: Any = {"target_tokens": [1] * length, "weights": [0.0] * (length - 1) + [1.0]}
    datum = types.Datum(model_input=model_input(chunks), loss_fn_inputs=inputs)
    given = types.ForwardBackwardInput(data=[datum], loss_fn="cross_entropy")
    asked = types.ForwardBackwardRequest(forward_backward_input=given, model_id=model_id, seq_id=seq_id)
    return forward_backward_request_to_proto(asked)


async def forward_backward(model: Model, chunks: Chunks, length: int) -> dict[str, Any]:
    model.seq_id += 1
    body = message(chunks, length, model_id=model.model_id, seq_id=model.seq_id).SerializeToString()
    return await model.client.service.models.forward_backward("alice", body)


async def sample(client: Client, sampler: str, seq_id: int, chunks: Chunks) -> dict[str, Any]:
    asked = types.SampleRequest(
        prompt=model_input(chunks),
        sampling_params=types.SamplingParams(max_tokens=2),
        sampling_session_id=sampler,
        seq_id=seq_id,
    )
    return await client.service.samplers.sample("alice", asked.model_dump_json(exclude_none=True).encode())


async def test_rows_and_prompts_hold_images_by_key_and_logs_by_name(
    tmp_path: Path, processing: ImageProcessing
) -> None:
    async with seeing(tmp_path, processing) as (made, policy, engines):
        client = Client(made)
        model = await client.create()
        for _ in range(2):
            await model.loss(await forward_backward(model, [[1, 2], image(), [3], image(BLUE)], 3 + 2 * NUM))
        blue = -image_key(BLUE)
        assert policy.rows == [[1, 2, *SEEN, 3, *[blue] * NUM]] * 2
        asked = {"sampling_session_seq_id": 0}
        sampler = (await client.json(await model.post("save_weights_for_sampler", **asked)))["sampling_session_id"]
        result = await client.result(await sample(client, sampler, 0, [[1], image(expected=None), [2]]))
        assert result.failure is None, result.body
        assert engines.prompts == [(1, *SEEN, 2)]
        await client.json(await model.optim_step())
        folder = tmp_path / model.model_id.replace(":", "-")
        (shown,) = map(json.loads, (folder / "samples" / "step_000001.jsonl").read_text().splitlines())
        assert shown["images"] == [image_name(image_key(RED))]
        assert (folder / "images" / shown["images"][0]).read_bytes() == RED
    stored = {path.name: path.read_bytes() for path in (tmp_path / "service" / "images").iterdir()}
    assert stored == {image_name(image_key(data)): data for data in (RED, BLUE)}
    logs = [path.read_bytes() for path in tmp_path.rglob("*.log")]
    assert sum(name.encode() in log for log in logs for name in stored) == 3
    assert not any(b"PNG" in log or b"iVBOR" in log for log in logs)


async def test_requests_with_images_are_repeated_after_a_kill(tmp_path: Path, processing: ImageProcessing) -> None:
    async def losses(model: Model, images: Sequence[bytes]) -> list[float]:
        found = []
        for data in images:
            found.append(await model.loss(await forward_backward(model, [[1], image(data), [2]], 2 + NUM)))
            await model.client.json(await model.optim_step())
        return found

    async with seeing(tmp_path / "quiet", processing) as (made, policy, _):
        expected = await losses(await Client(made).create(), [RED, BLUE, RED, BLUE])
        rows = policy.rows
    async with seeing(tmp_path / "killed", processing) as (made, _, _):
        model = await Client(made).create()
        before = await losses(model, [RED, BLUE])
    async with seeing(tmp_path / "killed", processing) as (made, policy, _):
        again = Model(Client(made), model.model_id, model.seq_id)
        assert before + await losses(again, [RED, BLUE]) == expected
        assert policy.rows == rows  # the first two are repeated
    assert len(set(expected)) == 4


@pytest.mark.parametrize(
    ("chunks", "text"),
    [
        ([[1], image(expected=5)], "the client expects 5 tokens for an image of 48x32 pixels .* processor gives 6"),
        ([image(b"no image", None)], "Data of 8 bytes beginning with b'no image' is no image of a known format"),
        ([image(RED[:200])], "The image is damaged or incomplete"),
        ([image(form="jpeg")], "The image is image/png, and the chunk's format is 'jpeg'"),
        ([image()] * 9, "has 9 images, and this server takes 8"),
        ([image()] * 8 + [[1] * 17], "has 65 tokens, and this server takes 1 to 6"),
        ([types.DmelChunk(dmel=b"")], "has a chunk of the kind dmel; this server takes encoded_text and image"),
    ],
)
async def test_unusable_images_fail_in_their_turn(
    tmp_path: Path, processing: ImageProcessing, chunks: Chunks, text: str
) -> None:
    async with seeing(tmp_path, processing) as (made, policy, _):
        client = Client(made)
        model = await client.create()
        answers = await forward_backward(model, chunks, 1), await sample(client, client.sampler(), 0, chunks)
        for place, answer in zip(("datum 0", "prompt"), answers, strict=True):
            error = await client.json(answer)
            assert error["category"] == "user"
            assert error["error"].startswith(place)
            with pytest.raises(UserError, match=text):
                raise UserError(error["error"])
        assert policy.rows == []
        assert (await client.json(await model.optim_step()))["category"] == "user"
        await model.loss(await forward_backward(model, [image(), [1]], 1 + NUM))  # the model goes on


async def test_a_text_model_refuses_and_keeps_no_image(tmp_path: Path) -> None:
    async with seeing(tmp_path, None) as (made, _, _):
        client = Client(made)
        for answer in (
            await forward_backward(await client.create(), [image()], NUM),
            await sample(client, client.sampler(), 0, [image()]),
        ):
            assert "has an image, and the model of this server reads text alone" in (await client.json(answer))["error"]
    assert not (tmp_path / "service" / "images").exists()


def test_what_the_client_cannot_send_is_refused(tmp_path: Path, processing: ImageProcessing) -> None:
    images = ClientImages(tmp_path, processing)
    sized, negative = message([image()], NUM), message([[1]], 1)
    sized.data[0].model_input[0].image.override_dimensions.width = 9
    negative.data[0].model_input[0].encoded_text.tokens = torch.tensor([-1], dtype=torch.int32).numpy().tobytes()
    for bad, text in ((sized, "override_dimensions"), (negative, "has the token -1, expected 0 or more")):
        protobuf.store_images(bad, images)
        with pytest.raises(UserError, match=f"datum 0: .*{text}"):
            protobuf.loss_call(bad, images, max_length=64)
    prompt = {"prompt": {"chunks": [{"type": "image", "data": "%%%", "format": "png"}]}}
    with pytest.raises(UserError, match=r"the body: .*base64"):
        bodies.canonical(json.dumps(prompt).encode(), images)


def test_the_address_of_an_image_is_never_opened(tmp_path: Path, processing: ImageProcessing) -> None:
    images = ClientImages(tmp_path, processing)
    for location in ("file:///etc/passwd", "http://169.254.169.254/a.png"):
        pointer = types.ImageAssetPointerChunk(format="png", location=location, expected_tokens=NUM)
        sent = {"prompt": {"chunks": [pointer.model_dump()]}}
        body = bodies.Sample.read(bodies.canonical(json.dumps(sent).encode(), images))
        with pytest.raises(UserError, match=r"prompt: has the address of an image .* send its bytes as an ImageChunk"):
            bodies.sample_request(body, images, seed=0, max_length=64)


async def test_images_without_requests_are_removed(
    tmp_path: Path, processing: ImageProcessing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image stays as long as a request may be repeated, or a proof of a checkpoint shows the image."""
    monkeypatch.setattr(service, "IMAGES_S", -1.0)
    probe, unused, new = (image_key(png(seed)) for seed in (5, 6, 7))
    async with seeing(tmp_path, processing) as (made, _, _):
        client = Client(made)
        for seed in (5, 6, 7):
            made.images.keep(png(seed))
        object.__setattr__(made.settings, "probe_ids", (1, -probe))
        model = await client.create()
        await model.loss(await forward_backward(model, [image(), [1]], 1 + NUM))
        folder = tmp_path / "service" / "images"
        for path in folder.iterdir():
            if path.name != image_name(new):
                os.utime(path, (time.time() - 2 * KEPT_S,) * 2)
        await made.keep_house()
        assert {path.name for path in folder.iterdir()} == {image_name(k) for k in (image_key(RED), probe, new)}
        await model.client.service.models.finish(made.sessions.sessions[client.session_id])
        await made.keep_house()
        assert {path.name for path in folder.iterdir()} == {image_name(k) for k in (probe, new)}
    assert image_name(unused) not in {path.name for path in folder.iterdir()}
