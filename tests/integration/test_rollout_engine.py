"""The rollout worker with real vLLM in a separate process samples correctly, in order, and fails with a reason."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from peft import LoraConfig, get_peft_model
from ray.exceptions import RayTaskError
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.weights.adapter import AdapterSender
from actors.weights.shm import ShmSender
from rlhf.errors import RunError
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.models.files.weights import adapter_sources
from rlhf.types import GroupRequest, RolloutInfo, Rollouts, Sampling
from tests.integration.engine_helpers import (
    SAMPLING,
    call,
    engine,
    logprobs_of,
    model_like,
    request,
    sequences,
    spec,
    sync,
    worst_difference,
)

Group = tuple[Rollouts, tuple[RolloutInfo, ...]]
END = byte_tokenizer().eos_token_id


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spool")


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return model_like(tiny_model, seed=1)


@pytest.fixture(scope="module")
def synced(tiny_model: Path, spool: Path, ray_local: None, model: Any) -> Iterator[Any]:
    with engine(spec(tiny_model, spool=spool)) as handle:
        with pytest.raises(RunError, match="has not received the policy's weights yet, so it cannot generate"):
            call(handle.generate.remote(request(0), SAMPLING))
        sender = ShmSender(rank=0)
        sync(handle, sender.publish(model.named_parameters(), 1))
        yield handle
        sender.close()


def answer(handle: Any, requests: list[GroupRequest], sampling: Sampling = SAMPLING) -> dict[int, Group]:
    """Return all groups, admitted together."""
    call(handle.hold.remote())
    refs = [handle.generate.remote(r, sampling) for r in requests]
    call(handle.release.remote(len(requests)))
    return {r.group_id: group for r, group in zip(requests, ray.get(refs, timeout=120), strict=True)}


def test_rollouts_carry_what_was_sampled(synced: Any, model: Any) -> None:
    asked = request(3, samples=5)
    rollouts, infos = call(synced.generate.remote(asked, SAMPLING))
    assert rollouts.sequence_ids.tolist() == [15, 16, 17, 18, 19]
    assert worst_difference(model, rollouts) < 1e-4
    for sequence, info in zip(sequences(rollouts), infos, strict=True):
        prompt, response = info.num_prompt_tokens, info.num_response_tokens
        assert sequence["token_ids"][:prompt].tolist() == list(asked.prompt.token_ids)
        assert sequence["response_mask"].tolist() == [False] * prompt + [True] * response
        assert sequence["versions"].tolist() == [-1] * prompt + [1] * response
        assert not sequence["rollout_logprobs"][:prompt].any()
        assert info.mean_logprob == pytest.approx(float(sequence["rollout_logprobs"][prompt:].mean()))


def test_seeds_name_their_samples(synced: Any) -> None:
    """The same seed gives the same tokens in every batch; different seeds give different tokens."""
    alone = call(synced.generate.remote(request(5, samples=1), SAMPLING))[0]
    together = answer(synced, [request(i, samples=6) for i in range(8)])[5][0]
    first, second, *_ = sequences(together)
    assert alone.token_ids.tolist() == first["token_ids"].tolist()
    assert first["token_ids"].tolist() != second["token_ids"].tolist()


def test_held_batches_are_bitwise_equal_whatever_the_order_of_arrival(synced: Any) -> None:
    """The last of three runs has stop strings that end samples in the middle of the batch."""
    requests = [request(i, samples=4, prompt_tokens=5 + i) for i in range(12)]
    for sampling in (SAMPLING, dataclasses.replace(SAMPLING, stop=("a", "7"))):
        runs = [answer(synced, order, sampling) for order in (requests, requests[::-1], requests[6:] + requests[:6])]
        for other in runs[1:]:
            for group_id, (rollouts, infos) in runs[0].items():
                assert infos == other[group_id][1]
                assert torch.equal(rollouts.token_ids, other[group_id][0].token_ids)
                assert torch.equal(rollouts.rollout_logprobs, other[group_id][0].rollout_logprobs)


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.0}, {"temperature": 0.5}, {"top_k": 2}, {"min_p": 0.5}, {"repetition_penalty": 1.5}]
)
def test_logprobs_are_of_the_distribution_that_was_sampled_from(
    synced: Any, model: Any, changes: dict[str, Any]
) -> None:
    sampling = dataclasses.replace(SAMPLING, **changes)
    rollouts, _ = call(synced.generate.remote(request(7), sampling))
    for sequence in sequences(rollouts):
        ids, mask = sequence["token_ids"], sequence["response_mask"][1:]
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].float()
        if sampling.temperature == 0.0:
            assert ids[1:][mask].tolist() == logits.argmax(-1)[mask].tolist()
            continue
        for place in range(len(logits) if sampling.repetition_penalty != 1.0 else 0):
            seen = ids[: place + 1].unique()
            at = logits[place, seen]
            logits[place, seen] = torch.where(at > 0, at / 1.5, at * 1.5)
        logits /= sampling.temperature
        if sampling.min_p:
            likeliest = logits.softmax(-1).max(-1, keepdim=True).values
            logits = logits.masked_fill(logits.softmax(-1) < sampling.min_p * likeliest, -torch.inf)
        if sampling.top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
        expected = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(sequence["rollout_logprobs"][1:][mask], expected[mask], atol=1e-4, rtol=0)


def test_stop_strings_end_the_response_and_stay_in_it(synced: Any, tiny_model: Path) -> None:
    """The untrained model samples reserved tokens at random. `stop` names such tokens, also behind another token."""
    tokenizer, reserved = AutoTokenizer.from_pretrained(tiny_model), list(range(261, 320))
    rollouts, infos = call(synced.generate.remote(request(9, samples=8), Sampling(max_new_tokens=200, stop=("e",))))
    stopped = 0
    for sequence, info in zip(sequences(rollouts), infos, strict=True):
        text = tokenizer.decode(sequence["token_ids"][sequence["response_mask"]], skip_special_tokens=True)
        assert "e" not in text[:-1]
        stopped += text.endswith("e") and info.finish_reason == "stop"
    assert stopped > 0
    names = tokenizer.convert_ids_to_tokens(reserved)
    assert _ends_at(synced, request(50, samples=8), Sampling(max_new_tokens=200, stop=tuple(names)), reserved) > 0
    pairs = Sampling(max_new_tokens=200, stop=tuple(a + b for a in names for b in names))
    rollouts, _ = call(synced.generate.remote(request(50, samples=8), pairs))
    last = [sequence["token_ids"][-2:].tolist() for sequence in sequences(rollouts)]
    assert any(set(two) <= set(reserved) for two in last)


def test_a_token_by_its_id_ends_a_response_and_so_do_the_models_and_the_templates_end(synced: Any) -> None:
    by_id = Sampling(max_new_tokens=200, stop_token_ids=(101, 102, 103))
    assert _ends_at(synced, request(51, samples=8), by_id, [101, 102, 103]) > 0
    asked = request(52, samples=8)
    chat = dataclasses.replace(asked, prompt=dataclasses.replace(asked.prompt, is_chat=True, turn_end=104))
    assert _ends_at(synced, chat, Sampling(max_new_tokens=200), [104]) > 0
    assert _ends_at(synced, request(54, samples=64), Sampling(max_new_tokens=64), [END]) > 0


def _ends_at(handle: Any, asked: GroupRequest, sampling: Sampling, ends: list[int]) -> int:
    """Count the responses ended by a token of `ends`; no response has an end before its last token."""
    rollouts, infos = call(handle.generate.remote(asked, sampling))
    stopped = 0
    for sequence, info in zip(sequences(rollouts), infos, strict=True):
        ids = sequence["token_ids"][sequence["response_mask"]].tolist()
        assert not set(ids[:-1]) & {*ends, END}
        assert (info.finish_reason == "stop") == (ids[-1] in {*ends, END})
        assert info.finish_reason == "stop" or len(ids) == sampling.max_new_tokens
        stopped += ids[-1] in ends
    return stopped


def test_finished_groups_are_spooled_and_speak_for_their_request_alone(synced: Any, spool: Path) -> None:
    asked = request(20)
    rollouts, infos = call(synced.generate.remote(asked, SAMPLING))
    assert (spool / "group_00000020_v000001.safetensors").is_file()
    read = call(synced.read_spooled.remote(asked, SAMPLING, 1))
    assert read is not None
    assert read[1] == infos
    assert torch.equal(read[0].token_ids, rollouts.token_ids)
    assert torch.equal(read[0].rollout_logprobs, rollouts.rollout_logprobs)
    assert call(synced.read_spooled.remote(asked, SAMPLING, 2)) is None


def test_cancelled_groups_leave_the_engine_to_the_others(synced: Any, spool: Path) -> None:
    long = dataclasses.replace(SAMPLING, max_new_tokens=480)
    call(synced.hold.remote())
    running = {group_id: synced.generate.remote(request(group_id), long) for group_id in (2, 22, 222)}
    health = call(synced.health.remote())
    assert (health.requests_in_flight, health.rss_gib > 0.1) == (0, True)  # held back: not in the engine yet
    call(synced.release.remote(3))
    while call(synced.health.remote()).requests_in_flight != 12:
        pass
    assert call(synced.cancel.remote([22, 2000])) == 4
    assert call(running[22]) == (None, None)
    assert not (spool / "group_00000022_v000001.safetensors").exists()
    alone = call(synced.generate.remote(request(2), long))
    assert call(running[2])[0].token_ids.tolist() == alone[0].token_ids.tolist()
    assert call(running[222])[1][0].num_response_tokens > 0
    health = call(synced.health.remote())
    assert (health.requests_in_flight, health.version) == (0, 1)
    rollouts, _ = call(synced.generate.remote(request(22), SAMPLING))
    assert rollouts.sequence_ids.tolist() == [88, 89, 90, 91]


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ((1, 2), dataclasses.replace(SAMPLING, temperature=3.0), r"temperature must be in \[0, 2\]"),
        (
            (1,) * 500,
            SAMPLING,
            "has 500 tokens. With max_new_tokens 24, this is more than the engine's limit of 512 tokens",
        ),
        ((1, 10**6), SAMPLING, "out of vocabulary"),
    ],
    ids=["temperature", "length", "token"],
)
def test_what_the_engine_refuses_ends_the_wait_at_once(
    synced: Any, prompt: tuple[int, ...], sampling: Sampling, message: str
) -> None:
    bad = dataclasses.replace(request(24), prompt=dataclasses.replace(request(24).prompt, token_ids=prompt))
    call(synced.hold.remote())
    groups = [synced.generate.remote(r, s) for r, s in ((bad, sampling), (request(25), SAMPLING))]
    released = synced.release.remote(2)
    for group in groups:
        with pytest.raises(RayTaskError, match=message):
            ray.get(group, timeout=30)
    ray.wait([released], timeout=30)
    assert call(synced.health.remote()).requests_in_flight == 0
    call(synced.generate.remote(request(26), SAMPLING))


def test_an_adapter_is_loaded_over_the_one_before_also_for_running_samples(
    tiny_model: Path, ray_local: None, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    modules = ["q_proj", "v_proj", "o_proj", "up_proj"]  # vLLM fuses q, k, v and gate, up: an adapter may lack parts
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM")
    policy = get_peft_model(base, config).eval()
    fields = json.loads(json.dumps(config.to_dict(), default=sorted))
    sender = AdapterSender(tmp_path / "adapter", fields, base="tiny", rank=0)
    running = None  # a group still in the engine when the second adapter comes
    with engine(spec(tiny_model, lora_rank=4)) as handle:
        for version in (1, 2):
            with torch.no_grad():
                for name, parameter in policy.named_parameters():
                    if "lora_" in name:
                        generator = torch.Generator().manual_seed(version)
                        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
            weights = ((source.name, source.make()) for source in adapter_sources(policy))
            receipt = sync(handle, sender.publish(weights, version))
            assert receipt.version == version
            rollouts, _ = call(handle.generate.remote(request(version), SAMPLING))
            assert worst_difference(policy, rollouts) < 1e-4
            with policy.disable_adapter():
                assert worst_difference(policy, rollouts) > 1e-2
            if running is None:
                long = dataclasses.replace(SAMPLING, max_new_tokens=400)
                running = handle.answer.remote(request(9, samples=8), long, 1)
                assert not ray.wait([running], timeout=0.2)[0]

        worst = {1: 0.0, 2: 0.0}
        for sequence in sequences(call(running)[0]):
            differences = (logprobs_of(policy, sequence["token_ids"]) - sequence["rollout_logprobs"]).abs()
            for version in worst:
                by_it = sequence["versions"] == version
                worst[version] = max([worst[version], *differences[by_it].tolist()])
        assert worst[1] > 1e-2
        assert 0.0 < worst[2] < 1e-3

        def load_again(*args: Any) -> None:
            raise ValueError("an engine step loaded the adapter again")

        call(handle.replace.remote("vllm.lora.worker_manager.WorkerLoRAManager", "_load_adapter", load_again))
        call(handle.generate.remote(request(3), SAMPLING))
        call(handle.replace.remote("vllm.lora.worker_manager.WorkerLoRAManager", "_load_adapter", None))
    sender.close()


def test_a_dead_engine_names_itself_and_its_requests(synced: Any) -> None:
    """The step raises in the middle of a rollout; everything after says so too. No later test can use the engine."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("a broken kernel")

    call(synced.replace.remote("vllm.v1.worker.gpu_model_runner.GPUModelRunner", "execute_model", broken))
    for _ in range(2):
        with pytest.raises(RayTaskError, match="died with 4 requests in flight: ValueError: a broken kernel") as caught:
            call(synced.generate.remote(request(1), SAMPLING))
        assert isinstance(caught.value.cause, RunError)
