"""Images of requests reach the engine as keys in the token ids, in every protocol, and nothing is fetched or opened."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import openai
import pytest

from actors.rollout.image_inputs import ImageInputs
from actors.serving.front import FrontSpec
from actors.serving.front_engine import EngineParts
from rlhf.agents.limits import SessionLimits
from rlhf.models.files.tiny_vision import build_tiny_vision
from rlhf.types import Sampling
from rlhf.vision.reading import ImageFolder, ImageLimits
from tests.dummy_engine import DummyLoop, dummy_parts, open_front
from tests.seen_logprobs import BLUE, RED, SeenModel, png


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> SeenModel:
    folder = tmp_path_factory.mktemp("seeing")
    return SeenModel(build_tiny_vision(folder / "model", "qwen3_vl", seed=0), folder / "images")


@pytest.fixture(scope="module")
def parts(seen: SeenModel) -> EngineParts:
    return dummy_parts(seen.folder)


@asynccontextmanager
async def fronted(
    seen: SeenModel, parts: EngineParts, key: str = "key", kept_s: float | None = None
) -> AsyncIterator[tuple[DummyLoop, Any, Any]]:
    """Yield the loop, and the clients of OpenAI and Anthropic. A session with the key `s` is open."""

    def says(prompt: Sequence[int], params: Any) -> list[int]:
        return [*b"yes", seen.tokenizer.eos_token_id]

    loop = DummyLoop(seen.tokenizer, says)
    place = ImageFolder(folder=seen.store.folder, limits=ImageLimits(max_images=3), kept_s=kept_s)
    images = ImageInputs(str(seen.folder), place)
    spec = FrontSpec(name="tiny", own_key="key", turn_ends=(seen.tokenizer.eos_token_id,))
    front = await open_front(loop, parts, spec, images)
    front.sessions.open("s", Sampling(max_new_tokens=9), SessionLimits(max_calls=9, max_tokens=900, seed=1))
    options: Any = {"api_key": key, "max_retries": 0, "timeout": 20.0}
    client = openai.AsyncOpenAI(base_url=f"{front.base_url}/v1", **options)
    try:
        async with client, anthropic.AsyncAnthropic(base_url=front.base_url, **options) as other:
            loop.calls = lambda: front.sessions.close("s")  # type: ignore[attr-defined]
            yield loop, client, other
    finally:
        await front.close()


def uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def address(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def part(data: bytes) -> dict[str, Any]:
    return address(uri(data))


async def test_a_server_removes_images_that_no_request_names_any_more(seen: SeenModel, parts: EngineParts) -> None:
    old, new = seen.store.path(seen.store.add(png(7))), seen.store.path(seen.store.add(RED))
    for path in (old, new):
        os.utime(path, (1.0, 1.0))
    async with fronted(seen, parts, kept_s=60.0) as (_, client, _):
        await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [part(RED)]}])
    assert not old.exists()
    assert new.exists()


async def test_an_image_is_the_same_tokens_in_every_protocol(seen: SeenModel, parts: EngineParts) -> None:
    async with fronted(seen, parts) as (loop, client, other):
        told = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": [part(RED), {"type": "text", "text": "Red?"}]}]
        )
        assert told.choices[0].message.content == "yes"
        await client.responses.create(
            model="tiny",
            input=[
                {
                    "role": "user",
                    "content": [
                        {"type": "input_image", "image_url": uri(RED), "detail": "auto"},
                        {"type": "input_text", "text": "Red?"},
                    ],
                }
            ],
        )
        source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(RED).decode()}
        content = [{"type": "image", "source": source}, {"type": "text", "text": "Red?"}]
        await other.messages.create(model="tiny", max_tokens=9, messages=[{"role": "user", "content": content}])
        await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": [part(RED), part(BLUE), part(RED)]}]
        )
    prompts = [submission.prompt_token_ids for submission in loop.asked]
    assert prompts == [*[seen.prompt(RED, "Red?")] * 3, seen.prompt(RED, BLUE, RED)]


async def test_a_session_goes_on_after_images_of_tools_without_rendering_its_turns_again(
    seen: SeenModel, parts: EngineParts
) -> None:
    async with fronted(seen, parts, key="s") as (loop, client, _):
        messages: list[Any] = [{"role": "user", "content": [part(RED), {"type": "text", "text": "Look."}]}]
        for shown in (BLUE, RED):
            told = await client.chat.completions.create(model="any", messages=messages)
            messages.append({"role": "assistant", "content": told.choices[0].message.content})
            messages.append({"role": "user", "content": [{"type": "text", "text": "Now:"}, part(shown)]})
        await client.chat.completions.create(model="any", messages=messages)
        first, second, third = (list(submission.prompt_token_ids) for submission in loop.asked)
        answer = [*b"yes", seen.tokenizer.eos_token_id]
        assert first == list(seen.prompt(RED, "Look."))
        assert second == [*first, *answer, *seen.prompt("Now:", BLUE)]
        assert third == [*second, *answer, *seen.prompt("Now:", RED)]
        calls = loop.calls()  # type: ignore[attr-defined]
        assert [call.prompt_ids.tolist() for call in calls] == [first, second, third]
        assert [call.broke for call in calls] == [None, None, None]


SVG = f"data:image/svg+xml;base64,{base64.b64encode(b'<svg></svg>').decode()}"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([address("https://example.com/a.png")], "image_hosts|names no host"),
        ([address("http://169.254.169.254/latest")], "http"),
        ([address("file:///etc/hostname")], "never opened"),
        ([address("/etc/hostname")], "expected an https address or a data URI"),
        ([address("data:image/png;base64,%%")], "is not base64"),
        ([address("data:image/png;base64,AAAA")], "no image of a known format"),
        ([address(SVG)], "SVG drawing is no image"),
        ([address(uri(RED[:60]))], "damaged or incomplete"),
        ([part(RED)] * 4, r"hold 4 images, and data\.max_images of the run is 3"),
        ([part(RED), {"type": "text", "text": "<|image_pad|>"}], "stands for an image"),
        ([{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}], "there are text and image_url"),
        ([{"type": "image_url", "image_url": None, "uuid": "0123"}], "the field `uuid`"),
        ([part(RED) | {"uuid": "0123"}], "the field `uuid`"),
    ],
)
async def test_other_images_are_refused(content: list[Any], why: str, seen: SeenModel, parts: EngineParts) -> None:
    async with fronted(seen, parts) as (loop, client, _):
        with pytest.raises(openai.BadRequestError, match=why):
            await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
        assert not loop.asked
