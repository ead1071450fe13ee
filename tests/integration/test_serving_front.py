"""The front of a real engine serves OpenAI's and Anthropic's clients, captures during an update, and keeps prefixes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import ray

from actors.rollout.engine_actor import engine_environment
from actors.serving.engine import ServingEngine
from actors.serving.front import FrontSpec
from rlhf.agents.calls import Call
from rlhf.agents.limits import SessionLimits
from rlhf.agents.trees import training_sequences
from rlhf.types import Sampling
from tests.integration.engine_helpers import call, spec

pytestmark = pytest.mark.slow

# Chat templates of five families, with SmolLM2's tokens for the beginning and the end of a turn.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (  # a date that the history changes, and stripped content
    "{{ '<|im_start|>system\n\nCutting Knowledge Date: December 2023\nMessages: ' + (messages | length | string) }}"
    "{{ '<|im_end|>' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
QWEN_3 = (  # reasoning of earlier turns is dropped
    "{% for m in messages %}{% set text = m.content %}{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
GEMMA = (
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<|im_start|>' + role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
MISTRAL = (  # the generation prompt is empty, and roles must alternate
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA_3, "qwen 3": QWEN_3, "gemma": GEMMA, "mistral": MISTRAL}
MODEL = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"
SESSIONS, CALLS = 6, 4


class CapturingEngine(ServingEngine):
    """An engine whose sessions a test opens and closes from another process."""

    front: Any

    async def open_session(self, key: str, sampling: Sampling, limits: SessionLimits) -> None:
        self.front.sessions.open(key, sampling, limits)

    async def close_session(self, key: str) -> list[Call]:
        calls: list[Call] = self.front.sessions.close(key)
        return calls

    async def close_front(self) -> None:
        await self.front.close()


@pytest.fixture(scope="module")
def smollm2_engine(ray_local: None) -> Iterator[Any]:
    if not MODEL.exists():
        pytest.skip("needs the model of `rlhf models fetch smollm2`")
    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    values = spec(MODEL, transport=None, max_model_len=1024, kv_cache_gib=1.0)
    options = {"num_cpus": 1, "max_concurrency": 1000, "runtime_env": {"env_vars": engine_environment(values)}}
    handle = ray.remote(CapturingEngine).options(**options).remote(values)
    call(handle.start.remote())
    yield handle
    call(handle.shutdown.remote())
    ray.kill(handle)


@asynccontextmanager
async def fronted(engine: Any, **settings: Any) -> AsyncIterator[str]:
    here = ray.util.get_node_ip_address()
    yield await engine.open_front.remote(FrontSpec(name="smol", own_key="own", **settings), here)
    await engine.close_front.remote()


async def test_the_clients_of_openai_and_anthropic(smollm2_engine: Any) -> None:
    async with fronted(smollm2_engine) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="own", max_retries=0)
        ask: dict[str, Any] = {"model": "smol", "messages": [{"role": "user", "content": "Say hello."}]}

        async def choices(**more: Any) -> Any:
            values = {"max_tokens": 12, "temperature": 0} | ask | more
            return (await client.chat.completions.create(**values)).choices

        (whole,) = await choices(logprobs=True, top_logprobs=3)
        token = whole.logprobs.content[0]
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(one.logprob for one in token.top_logprobs)
        stream = await client.chat.completions.create(**ask, max_tokens=12, temperature=0, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == whole.message.content
        assert len({choice.message.content for choice in await choices(n=3, seed=5, temperature=1)}) == 3
        letter = text[len(text) // 2]
        assert (await choices(stop=[letter]))[0].message.content == text.partition(letter)[0]
        schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
        form: Any = {"type": "json_schema", "json_schema": {"name": "f", "schema": schema}}
        (told,) = await choices(max_tokens=40, response_format=form)
        assert told.message.content.replace(" ", "").replace("\n", "").startswith('{"a":1')
        response = await client.responses.create(model="smol", input="Say hello.", max_output_tokens=12, temperature=0)
        assert response.output_text == text
        greedy = {"temperature": 0}  # the client has no such argument any more
        other = anthropic.AsyncAnthropic(base_url=url, api_key="own", max_retries=0)
        message = await other.messages.create(**ask, max_tokens=12, extra_body=greedy)
        assert message.content[0].text == text
        async with other.messages.stream(**ask, max_tokens=12, extra_body=greedy) as events:
            assert await events.get_final_text() == text


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("template", TEMPLATES)
async def test_prefixes_hold(smollm2_engine: Any, template: str, temperature: float) -> None:
    """If a client sends the stripped answer back, the next prompt begins with all tokens of the last call."""
    sampling = Sampling(max_new_tokens=24, temperature=temperature)
    parser = {"reasoning_parser": "qwen3"} if template == "qwen 3" else {}
    async with fronted(smollm2_engine, template=TEMPLATES[template], **parser) as url:
        sessions = await asyncio.gather(*[converse(smollm2_engine, url, sampling, seed) for seed in range(SESSIONS)])
    calls = [call for session in sessions for call in session]
    assert len(calls) == SESSIONS * CALLS
    assert [call.broke for call in calls] == [None] * len(calls)
    for session in sessions:
        assert [sequence.calls for sequence in training_sequences(session)] == [tuple(range(CALLS))]


async def converse(engine: Any, url: str, sampling: Sampling, seed: int) -> list[Call]:
    key = f"session-{seed}"
    limits = SessionLimits(max_calls=CALLS, max_tokens=1024, seed=seed)
    await engine.open_session.remote(key, sampling, limits)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    messages: list[Any] = []
    for number in range(CALLS):
        messages.append({"role": "user", "content": f"Tell me about the number {seed + number}."})
        if seed % 2:
            stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
            content = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        else:
            content = (await client.chat.completions.create(model="m", messages=messages)).choices[0].message.content
        messages.append({"role": "assistant", "content": (content or "").strip()})
    calls: list[Call] = await engine.close_session.remote(key)
    return calls
