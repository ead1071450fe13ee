"""Conversations with real vLLM and real environment processes sample, observe and mask turns correctly."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.weights.shm import ShmSender
from rlhf.extensions import CodeSource
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.rollouts.environments.conversations import EnvironmentSpec
from rlhf.rollouts.records.spans import token_spans
from rlhf.types import GroupRequest, Prompt, Sampling
from tests.integration import engine_helpers
from tests.integration.engine_helpers import call, engine, logprobs_of, model_like, sequences, sync, worst_difference

pytestmark = pytest.mark.slow
MOODY = Path(__file__).parents[1] / "fixtures" / "environments" / "moody.py"
SAMPLING = Sampling(max_new_tokens=12)
CHAT = "<|user|>{observation}<|eos|><|assistant|>"
EOS = 257


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spool")


@pytest.fixture(scope="module")
def played(tiny_model: Path, ray_local: None, spool: Path) -> Iterator[tuple[Any, Any]]:
    """An engine for conversations, and the model with the engine's weights."""
    limits: dict[str, Any] = {"max_turns": 4, "max_tokens": 200, "step_timeout_s": 3.0, "memory_gib": 4.0}
    how = {"processes": 6, "tool_parser": "hermes", "tokenizer": str(tiny_model), "trust_remote_code": False}
    source = CodeSource(path=str(MOODY), name="Moody", args={"rounds": 3})
    environment = EnvironmentSpec(source=source, **limits, **how)
    model = model_like(tiny_model, seed=1)
    sender = ShmSender(rank=0)
    with engine(engine_helpers.spec(tiny_model, environment=environment, spool=spool)) as handle:
        sync(handle, sender.publish(model.named_parameters(), 1))
        yield handle, model
    sender.close()


def game(group_id: int, *, samples: int = 4, **columns: Any) -> GroupRequest:
    asked = engine_helpers.request(group_id, samples=samples)
    ids = tuple(byte_tokenizer()(CHAT, add_special_tokens=False).input_ids)
    return replace(asked, prompt=Prompt(prompt_id=group_id, token_ids=ids, text=CHAT, columns=columns, is_chat=True))


def test_sampled_tokens_are_trained_and_the_environments_are_not(played: Any) -> None:
    handle, model = played
    asked = game(3)
    rollouts, infos = call(handle.generate.remote(asked, SAMPLING))
    assert worst_difference(model, rollouts) < 1e-4  # of every turn, given the whole conversation before
    tokenizer = byte_tokenizer()
    for spans, info, columns in zip(token_spans(rollouts), infos, sequences(rollouts), strict=True):
        assert [sampled for sampled, _ in spans] == [False, True, False, True, False, True]
        assert tokenizer.decode(spans[0][1]) == CHAT.format(observation=f"game {asked.seeds[0]}")
        for (_, turn), (_, told) in zip(spans[1::2], spans[2::2], strict=False):
            ended = turn[-1] == EOS
            assert ended or len(turn) == 12
            # Cut at its limit, a turn is ended by a token that the policy did not sample.
            assert tokenizer.decode(told) == ("" if ended else "<|eos|>") + "<|user|>go on<|eos|><|assistant|>"
        mask = columns["response_mask"]
        assert (set(columns["versions"][mask].tolist()), set(columns["versions"][~mask].tolist())) == ({1}, {-1})
        assert not columns["rollout_logprobs"][~mask].any()
        assert (info.num_turns, info.num_response_tokens, info.num_tokens) == (3, int(mask.sum()), len(mask))
        assert (info.environment_reward, info.finish_reason, info.environment_error) == (1.5, "stop", None)


def test_the_same_request_is_the_same_conversation_held_or_not(played: Any) -> None:
    handle, _ = played
    alone = call(handle.generate.remote(game(4), SAMPLING))[0]
    call(handle.hold.remote())
    refs = [handle.generate.remote(game(i), SAMPLING) for i in (5, 4, 6)]  # 12 conversations, at most 6 at a time
    call(handle.release.remote(3))
    among = ray.get(refs, timeout=120)[1][0]
    assert among.token_ids.tolist() == alone.token_ids.tolist()


def test_a_failure_is_an_error_and_never_a_reward(played: Any, spool: Path) -> None:
    handle, _ = played
    before = set(spool.iterdir())
    _, infos = call(handle.generate.remote(game(100, samples=2, mood="raise"), SAMPLING))
    for info in infos:
        assert (info.environment_error.kind, info.environment_reward) == ("raised", None)
        assert "step: ValueError: out of order" in info.environment_error.message
    assert set(spool.iterdir()) == before


def test_a_spooled_group_is_taken_up_with_its_reward(played: Any, spool: Path, tmp_path: Path) -> None:
    handle, _ = played
    asked = game(13)
    first = call(handle.generate.remote(asked, SAMPLING))
    assert (spool / "group_00000013_v000001.safetensors").is_file()
    trace = tmp_path / "trace"
    traced = game(14, samples=1, trace=str(trace))
    again = call(handle.generate.remote(traced, SAMPLING))
    assert trace.read_text(encoding="utf-8") == "begins\nends\n" * 3
    assert call(handle.generate.remote(traced, SAMPLING))[1] == again[1]
    assert trace.read_text(encoding="utf-8") == "begins\nends\n" * 3  # the conversation was not played again
    read = call(handle.read_spooled.remote(asked, SAMPLING, 1))
    assert read[1] == first[1]
    assert read[0].token_ids.tolist() == first[0].token_ids.tolist()
    other = game(13, rounds=2)
    assert call(handle.read_spooled.remote(replace(other, seeds=(1, 2, 3, 4)), SAMPLING, 1)) is None


def test_a_cancelled_group_ends_at_once_wherever_its_turns_are(played: Any, tmp_path: Path) -> None:
    handle, _ = played
    trace = tmp_path / "trace"
    asked = game(20, samples=3, sleep_s=2.5, trace=str(trace))
    slow = handle.generate.options(num_returns=2).remote(asked, SAMPLING)
    other = handle.generate.remote(game(21), SAMPLING)
    deadline = time.monotonic() + 60.0
    while not trace.exists():
        assert time.monotonic() < deadline, "no environment is at work"
        time.sleep(0.02)
    call(handle.cancel.remote([20]))
    assert call(*slow) == [None, None]
    assert "ends" not in trace.read_text(encoding="utf-8")  # the cancellation did not even wait for the first step
    assert call(other)[1][0].environment_reward == 1.5
    assert call(handle.generate.remote(game(20), SAMPLING))[1][0].num_turns == 3  # the group may be requested again


def test_a_conversation_goes_on_with_new_weights(played: Any, tiny_model: Path, tmp_path: Path) -> None:
    """This is the last test of the engine, because the weights differ afterwards."""
    handle, old = played
    new = model_like(tiny_model, seed=2)
    sender = ShmSender(rank=0)
    trace = tmp_path / "trace"
    running = handle.answer.remote(game(17, sleep_s=2.0, trace=str(trace)), SAMPLING, 1)
    while not ray.wait([running], timeout=0.05)[0]:
        if trace.exists() and trace.read_text(encoding="utf-8").count("begins") == 4:
            break
    sync(handle, sender.publish(new.named_parameters(), 2))
    rollouts, infos = call(running)
    assert {(info.min_version, info.max_version) for info in infos} == {(1, 2)}
    for sequence in sequences(rollouts):
        for version, model in ((1, old), (2, new)):
            by_it = sequence["versions"] == version
            differences = (logprobs_of(model, sequence["token_ids"]) - sequence["rollout_logprobs"])[by_it].abs()
            assert 0.0 < float(differences.max()) < 1e-3
    sender.close()
