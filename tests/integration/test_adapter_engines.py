"""A real engine samples from a base model and from several LoRA adapters at once, as transformers and peft would."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import ray
import torch
import xxhash
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from actors.cluster.placement import reserve_roles
from actors.roles.adapters import create_adapters_gang
from actors.roles.group import ending
from actors.rollout.adapter_engines import AdapterEngine, AdapterEngines
from rlhf.adapters import (
    AdamStep,
    AdapterShape,
    LossRows,
    NamedLoss,
    SampleAnswer,
    SampledSequence,
    SampleRequest,
)
from rlhf.config.adapter_ranks import ranks_config
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.model import PolicyConfig
from rlhf.config.schema.run import RunConfig
from rlhf.errors import RunError, UserError
from rlhf.roles import AdapterEnginesRole, AdaptersRole, PolicyProbe
from tests.fakes.engine_handles import supervisor
from tests.integration.engine_helpers import DEADLINE_S, engine, logprobs_of, spec

T = TypeVar("T")
LENGTH = 160  # longest prompt with its sample
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROBE = tuple(65 + (11 * i) % 57 for i in range(40))
LONG = tuple(65 + (7 * i) % 57 for i in range(70))  # more than two blocks of the prefix cache
SHORT = LONG[:5]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An exported adapter, with the same model in transformers and peft."""

    folder: Path
    model: Any

    @property
    def checksum(self) -> str:
        return xxhash.xxh3_64((self.folder / "adapter_model.safetensors").read_bytes()).hexdigest()

    @property
    def probe(self) -> PolicyProbe:
        logprobs = logprobs_of(self.model, torch.tensor(PROBE))[1:].tolist()
        return PolicyProbe(version=1, token_ids=PROBE, logprobs=tuple(logprobs), dtype="float32")

    async def load(self, engines: AdapterEngines, name: str, **changes: Any) -> float:
        given = {"checksum": self.checksum, "probe": self.probe, **changes}
        return await engines.load(name, self.folder, **given)


def make_adapter(base: Path, folder: Path, *, seed: int, rank: int, layers: list[str] = LAYERS) -> Adapter:
    """Make an adapter with a large effect, so that no mix-up hides in rounding."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft: Any = get_peft_model(model, LoraConfig(r=rank, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    peft.save_pretrained(folder)
    loaded: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    return Adapter(folder=folder, model=loaded.eval())


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    place = tmp_path_factory.mktemp("adapters")
    shapes: dict[str, dict[str, Any]] = {"a": {"rank": 4}, "b": {"rank": 8}, "c": {"rank": 1, "layers": LAYERS[:4]}}
    return {
        name: make_adapter(tiny_model, place / name, seed=seed, **shape)
        for seed, (name, shape) in enumerate(shapes.items())
    }


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engines(
    tiny_model: Path, adapters: dict[str, Adapter], runner: asyncio.Runner, ray_local: None
) -> Iterator[AdapterEngines]:
    """One engine with room for two adapters, and all three adapters loaded."""
    values = spec(tiny_model, transport=None, max_model_len=LENGTH, lora_rank=8, max_adapters=2, top_logprobs=128)
    with engine(values, worker=AdapterEngine) as handle:
        engines = AdapterEngines([handle], deadline_s=DEADLINE_S)
        engines.vocabulary = 320  # of the tiny model
        for name, adapter in adapters.items():
            assert runner.run(within(adapter.load(engines, name))) < 1e-4
        yield engines


async def within(work: Awaitable[T]) -> T:
    return await asyncio.wait_for(work, DEADLINE_S)


@pytest.fixture
def drawn(engines: AdapterEngines, runner: asyncio.Runner) -> Any:
    """Return a function that answers requests, all at once."""

    def drawn(*asked: tuple[str | None, SampleRequest]) -> list[SampleAnswer]:
        async def answers() -> list[SampleAnswer]:
            return await asyncio.gather(*[engines.sample(name, request) for name, request in asked])

        return runner.run(within(answers()))

    return drawn


@pytest.fixture(scope="module")
def models(tiny_model: Path, adapters: dict[str, Adapter]) -> dict[str | None, Any]:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    return {None: base, **{name: adapter.model for name, adapter in adapters.items()}}


def request(prompt: tuple[int, ...] = SHORT, **values: Any) -> SampleRequest:
    return SampleRequest(token_ids=prompt, **{"max_tokens": 12, "seed": 7, **values})


def difference(model: Any, prompt: tuple[int, ...], sequence: SampledSequence) -> float:
    """Return the largest |transformers - engine| over the sampled tokens."""
    ours = logprobs_of(model, torch.tensor(prompt + sequence.token_ids))[len(prompt) :]
    return float((ours - torch.tensor(sequence.logprobs)).abs().max())


def logits_of(model: Any, token_ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].float()


def test_adapters_in_one_batch_answer_as_alone_and_as_peft(drawn: Any, models: dict[str | None, Any]) -> None:
    asked = [(name, request(prompt, num_samples=3)) for prompt in (LONG, SHORT) for name in ("a", "b", None)]
    alone = [drawn(one)[0] for one in asked]  # the adapters share a prompt, whose keys and values are cached
    together = drawn(*asked)
    for (name, given), one, beside in zip(asked, alone, together, strict=True):
        for sequence, same in zip(one.sequences, beside.sequences, strict=True):
            assert sequence.token_ids == same.token_ids
            torch.testing.assert_close(sequence.logprobs, same.logprobs, rtol=0.0, atol=1e-5)
            assert difference(models[name], given.token_ids, sequence) < 1e-4
    assert len({answer.sequences for answer in alone}) == len(asked)


def test_more_adapters_than_the_engine_has_room_for(drawn: Any, models: dict[str | None, Any]) -> None:
    asked = [(name, request(LONG[i:], max_tokens=30)) for i in range(4) for name in ("a", "b", "c", None)]
    for _ in range(2):
        for (name, given), answer in zip(asked, drawn(*asked), strict=True):
            assert difference(models[name], given.token_ids, answer.sequences[0]) < 1e-4


def test_prompts_are_scored(drawn: Any, models: dict[str | None, Any]) -> None:
    given = request(LONG, max_tokens=1, prompt_logprobs=True, top_prompt_logprobs=5, num_samples=2)
    asked = [(name, given) for name in ("b", None, "a")]
    for (name, _), answer in zip(asked, drawn(*asked), strict=True):
        logprobs = logits_of(models[name], LONG).log_softmax(-1)[:-1]
        chosen = logprobs.gather(1, torch.tensor(LONG)[1:, None])[:, 0]
        assert answer.prompt_logprobs[0] is None
        torch.testing.assert_close(torch.tensor(answer.prompt_logprobs[1:]), chosen, rtol=0.0, atol=1e-4)
        best = logprobs.topk(5)
        assert answer.top_prompt[0] is None
        assert [[token for token, _ in place] for place in answer.top_prompt[1:]] == best.indices.tolist()
        found = torch.tensor([[logprob for _, logprob in place] for place in answer.top_prompt[1:]])
        torch.testing.assert_close(found, best.values, rtol=0.0, atol=1e-4)
    (plain,) = drawn(("a", request()))
    assert (plain.prompt_logprobs, plain.top_prompt, plain.sequences[0].top) == (None, None, None)


def test_a_sample_depends_on_seed_and_place(drawn: Any) -> None:
    (answer,) = drawn(("a", request(num_samples=4, seed=40)))
    alone = drawn(*[("a", request(seed=40 + sample)) for sample in range(4)])
    assert [one.sequences[0].token_ids for one in alone] == [s.token_ids for s in answer.sequences]
    assert len({s.token_ids for s in answer.sequences}) == 4
    assert drawn(("a", request(seed=-1))) == drawn(("a", request(seed=-1)))


@pytest.mark.parametrize("rules", [{"temperature": 0.5}, {"temperature": 2.0, "top_k": 7}, {"top_p": 0.6}])
def test_logprobs_are_of_the_sampling_distribution(
    drawn: Any, models: dict[str | None, Any], rules: dict[str, Any]
) -> None:
    (answer,) = drawn(("b", request(LONG, top_logprobs=20, num_samples=4, **rules)))
    for sequence in answer.sequences:
        logits = logits_of(models["b"], LONG + sequence.token_ids)[len(LONG) - 1 : -1]
        scaled = logits / rules.get("temperature", 1.0)
        if "top_k" in rules:
            scaled[scaled < scaled.topk(rules["top_k"]).values[:, -1:]] = -torch.inf
        best = scaled.softmax(-1).sort(descending=True)
        outside = best.values.cumsum(-1) - best.values > rules.get("top_p", 1.0)
        scaled[outside.gather(1, best.indices.argsort(-1))] = -torch.inf
        expected = scaled.log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(sequence.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sequence.logprobs), chosen, rtol=0.0, atol=1e-4)
        assert sequence.top is not None
        for place, there in zip(sequence.top, expected, strict=True):
            assert len(place) == min(20, int((there > -torch.inf).sum()))
            best_there = there.topk(len(place))
            assert [token for token, _ in place] == best_there.indices.tolist()
            found = torch.tensor([logprob for _, logprob in place])
            torch.testing.assert_close(found, best_there.values, rtol=0.0, atol=1e-4)


def test_temperature_zero_takes_the_likeliest_token(drawn: Any, models: dict[str | None, Any]) -> None:
    (greedy, _) = drawn(("b", request(LONG, temperature=0.0, num_samples=2)), ("a", request()))
    first, second = greedy.sequences
    assert first.token_ids == second.token_ids
    logits = logits_of(models["b"], LONG + first.token_ids)[len(LONG) - 1 : -1]
    assert list(first.token_ids) == logits.argmax(-1).tolist()
    assert difference(models["b"], LONG, first) < 1e-4


def test_stop_rules(drawn: Any, tiny_model: Path, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    hot = request(num_samples=48, max_tokens=40, temperature=2.0)
    (ends, goes_on) = drawn(("a", hot), ("a", replace(hot, ends_at_eos=False)))
    stopped = [s for s in ends.sequences if s.finish_reason == "stop"]
    assert stopped
    assert all(s.token_ids.index(eos) == len(s.token_ids) - 1 == len(s.logprobs) - 1 for s in stopped)
    assert {(len(s.token_ids), s.finish_reason) for s in goes_on.sequences} == {(40, "length")}
    for short, whole in zip(ends.sequences, goes_on.sequences, strict=True):
        assert whole.token_ids[: len(short.token_ids)] == short.token_ids
    (plain,) = drawn(("a", request(max_tokens=30, ends_at_eos=False)))
    tokens = plain.sequences[0].token_ids
    letters = [place for place, token in enumerate(tokens) if 33 <= token < 127]
    chosen = next(place for place in letters if place > 3)
    first = tokens.index(tokens[chosen])
    text = tokenizer.decode([tokens[chosen]])
    for rule in ({"stop_token_ids": (tokens[chosen],)}, {"stop": ("never", text)}):
        (answer,) = drawn(("a", request(max_tokens=30, ends_at_eos=False, **rule)))
        sequence = answer.sequences[0]
        assert (sequence.token_ids, sequence.finish_reason) == (tokens[: first + 1], "stop")
        assert sequence.logprobs == pytest.approx(plain.sequences[0].logprobs[: first + 1], abs=1e-5)
    (special,) = drawn(("a", replace(hot, ends_at_eos=False, stop=(tokenizer.eos_token,))))
    assert [s.token_ids for s in special.sequences] == [s.token_ids for s in ends.sequences]


def test_the_longest_sample_fills_the_engine(drawn: Any) -> None:
    (answer,) = drawn(("a", request(LONG, max_tokens=LENGTH - len(LONG), ends_at_eos=False)))
    assert len(answer.sequences[0].token_ids) == LENGTH - len(LONG)


def test_bad_requests_take_nobody_down(engines: AdapterEngines, runner: asyncio.Runner, drawn: Any) -> None:
    expected = drawn(("a", request()))
    bad: list[tuple[str | None, SampleRequest]] = [
        ("unknown", request()),
        ("b", request((3, 100_000))),
    ]

    async def answers() -> list[Any]:
        asked = [engines.sample(*one) for one in (*bad, ("a", request()))]
        return await asyncio.gather(*asked, return_exceptions=True)

    *refused, answered = runner.run(within(answers()))
    assert [type(error) for error in refused] == [UserError] * len(bad)
    assert "No adapter named unknown" in str(refused[0])
    assert [answered] == expected


def test_an_adapter_must_be_the_policys(
    engines: AdapterEngines, adapters: dict[str, Adapter], runner: asyncio.Runner, drawn: Any, tmp_path: Path
) -> None:
    def load(adapter: Adapter, name: str, **changes: Any) -> float:
        return runner.run(within(adapter.load(engines, name, **changes)))

    expected = drawn(("a", request()))
    with pytest.raises(UserError, match="An adapter named a is loaded already"):
        load(adapters["a"], "a")
    with pytest.raises(RunError, match="with adapter new computes different log-probabilities than the policy"):
        load(adapters["a"], "new", probe=adapters["b"].probe)
    copied = Adapter(folder=tmp_path / "copy", model=adapters["a"].model)
    shutil.copytree(adapters["a"].folder, copied.folder)
    checksum, weights = copied.checksum, copied.folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RunError, match=f"with checksum .*, but the policy wrote {checksum}"):
        load(copied, "new", checksum=checksum)
    weights.write_bytes(whole)
    assert load(copied, "new") < 1e-4
    assert drawn(("new", request())) == expected
    drawn(("b", request()), ("c", request()))  # now the engine holds these two
    weights.unlink()
    with pytest.raises(RunError, match="with adapter new cannot read"):
        drawn(("new", request()))
    assert drawn(("a", request())) == expected
    runner.run(within(engines.unload("new")))
    with pytest.raises(UserError, match="No adapter named new"):
        drawn(("new", request()))


def test_no_adapter_gets_the_cached_keys_of_another_one_in_its_place(
    engines: AdapterEngines,
    adapters: dict[str, Adapter],
    models: Any,
    runner: asyncio.Runner,
    drawn: Any,
    tmp_path: Path,
) -> None:
    for name in ("a", "b"):
        shutil.copytree(adapters[name].folder, tmp_path / "same", dirs_exist_ok=True)
        runner.run(within(Adapter(folder=tmp_path / "same", model=adapters[name].model).load(engines, "same")))
        (answer,) = drawn(("same", request(LONG)))
        assert difference(models[name], LONG, answer.sequences[0]) < 1e-4
        runner.run(within(engines.unload("same")))


def test_unload_waits_for_running_samples(
    engines: AdapterEngines, adapters: dict[str, Adapter], runner: asyncio.Runner
) -> None:
    async def unloaded() -> SampleAnswer:
        await adapters["c"].load(engines, "again")
        long = asyncio.create_task(engines.sample("again", request(max_tokens=LENGTH - len(SHORT), ends_at_eos=False)))
        await asyncio.sleep(0.05)
        assert not long.done()
        await engines.unload("again")
        assert long.done()
        return await long

    answer = runner.run(within(unloaded()))
    assert len(answer.sequences[0].token_ids) == LENGTH - len(SHORT)


@pytest.mark.slow
def test_a_successor_answers_with_the_adapters_of_a_killed_engine(
    tiny_model: Path, adapters: dict[str, Adapter], ray_local: None
) -> None:
    async def run() -> tuple[list[SampleAnswer], list[SampleAnswer]]:
        cluster = ClusterConfig.model_validate({"start_timeout_s": DEADLINE_S, "roles": {"rollout": {"engines": 2}}})
        placement = await reserve_roles(["rollout"], cluster, with_reward_model=False)
        engines = AdapterEngines.create(
            str(tiny_model), cluster, placement, dtype="float32", max_length=2000, rank=8, max_adapters=2
        )
        try:
            await engines.start(deadline_s=DEADLINE_S)
            engines.supervisor = supervisor()
            for name in ("a", "b"):
                await adapters[name].load(engines, name)
            asked = [(name, request(LONG, max_tokens=1500, ends_at_eos=False)) for name in ("a", "b", None, "a")]
            whole = [await engines.sample(name, given) for name, given in asked]
            running = [asyncio.create_task(engines.sample(name, given)) for name, given in asked]
            await asyncio.sleep(0.5)
            assert not any(task.done() for task in running)
            ray.kill(engines.handles[0])
            return whole, await asyncio.gather(*running)
        finally:
            engines.end()
            placement.release()

    whole, again = asyncio.run(run())
    tokens = [[answer.sequences[0].token_ids for answer in answers] for answers in (whole, again)]
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_engines_and_ranks_agree_about_trained_adapters(tiny_model: Path, tmp_path: Path, ray_local: None) -> None:
    policy = PolicyConfig.model_validate({"model": str(tiny_model), "dtype": "float32", "lora": {"rank": 8}})
    cluster = ClusterConfig.model_validate({"start_timeout_s": DEADLINE_S})
    config = ranks_config(policy, RunConfig(name="joined", dir=tmp_path), cluster, max_tokens_per_microbatch=512)
    shapes = {
        "a": AdapterShape(rank=4, seed=1),
        "b": AdapterShape(rank=8, seed=2),
        "c": AdapterShape(rank=2, mlp=False),
    }

    async def run() -> list[float]:
        placement = await reserve_roles(["policy", "rollout"], config.cluster, with_reward_model=False)
        gang = create_adapters_gang(config, placement, longest_sequence=LENGTH)
        engines = AdapterEngines.create(
            str(tiny_model), config.cluster, placement, dtype="float32", max_length=LENGTH, rank=8, max_adapters=2
        )
        async with ending([gang, engines], placement.release, heartbeat_timeout_s=120.0):
            await asyncio.gather(*[role.start(deadline_s=DEADLINE_S) for role in (gang, engines)])
            return list(await asyncio.gather(*[client(name, shape, gang, engines) for name, shape in shapes.items()]))

    async def client(name: str, shape: AdapterShape, gang: AdaptersRole, engines: AdapterEnginesRole) -> float:
        """Train on a text, then sample, and score the sample by ranks. Return the largest difference."""
        await gang.create(name, shape)
        text = PROBE[shape.rank :] + PROBE
        for step in range(3):
            assert (await gang.forward_backward(name, rows(text), NamedLoss(name="cross_entropy"))).loss > 0.0
            await gang.optim_step(name, AdamStep(lr=0.05))
            folder = tmp_path / f"{name}{step}"
            checksum = await gang.export(name, folder)
            logprobs = tuple(await gang.probe(name, PROBE))
            probe = PolicyProbe(version=step, token_ids=PROBE, logprobs=logprobs, dtype="float32")
            assert await engines.load(f"{name}.{step}", folder, checksum=checksum, probe=probe) < 1e-4
        (sequence,) = (await engines.sample(f"{name}.2", request(LONG, max_tokens=60))).sequences
        report = await gang.forward_backward(
            name, rows(LONG + sequence.token_ids), NamedLoss(name="cross_entropy"), forward_only=True
        )
        theirs = torch.tensor(sequence.logprobs)
        return float((report.logprobs[-len(theirs) :, 0] - theirs).abs().max())

    def rows(text: tuple[int, ...]) -> LossRows:
        ids = torch.tensor(text)
        return LossRows(token_ids=ids[:-1], lengths=torch.tensor([len(text) - 1]), targets=ids[1:, None])

    assert max(asyncio.run(run())) < 1e-4
