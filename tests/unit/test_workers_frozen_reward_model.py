"""The reward worker in this process combines a service, a function and a reward model over the tokens of one group."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from rlhf.config.schema.model import RewardModelConfig, StepScores
from rlhf.rewards.loading import load_reward
from rlhf.rewards.scoring import RewardSpec
from rlhf.rewards.services.client import ServiceSpec
from rlhf.rewards.services.remote import RemoteReward
from rlhf.types import Prompt, Rollouts
from rlhf.workers.frozen.reward import RewardSettings, RewardWorker
from rlhf.workers.frozen.reward_model import RewardModel
from tests.fakes.services import served
from tests.fixtures.workers import PLACE, rollouts_of


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head of one label."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def group(tokenizer: Any, prompt: str, responses: list[str]) -> Rollouts:
    """Return the tokens of a prompt with each response."""
    start, *ends = (tokenizer.encode(one, add_special_tokens=False) for one in (prompt, *responses))
    places = (range(len(start), len(start) + len(end)) for end in ends)
    return rollouts_of(*((i, start + end, sampled) for i, (end, sampled) in enumerate(zip(ends, places, strict=True))))


def settings_of(tokenizer: Path, specs: tuple[RewardSpec, ...], model: RewardModelConfig, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "trust_remote_code": False,
        "timeout_s": 10.0,
        "processes": 1,
        "memory_gib": 8.0,
        "max_tokens_per_microbatch": 64,
    }
    return RewardSettings(specs=specs, tokenizer=str(tokenizer), model=model, **{**values, **changes})


@contextmanager
def started(settings: RewardSettings) -> Iterator[RewardWorker]:
    worker = RewardWorker(settings, PLACE)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def test_a_group_by_all_kinds_of_rewards(tiny_model: Path, reward_model: Path) -> None:
    async def handler(request: web.Request) -> web.Response:
        if request.method == "GET":
            return web.Response(status=405)
        body = await request.json()
        return web.json_response({"scores": [float(len(one)) for one in body["responses"]]})

    with served(handler) as url:
        service = ServiceSpec(url=url, timeout_s=5.0, deadline_s=5.0, max_in_flight=6)
        specs = (
            RewardSpec(name="length", weight=1.0, function=None, remote=RemoteReward(service=service, judge=None)),
            RewardSpec(
                name="exact",
                weight=10.0,
                function=load_reward("exact_match", args={}, folders=[], key="exact"),
                gate="length",
            ),
            RewardSpec(name="taste", weight=100.0, function=None, only={"kind": ("tasted",)}),
        )
        model = RewardModelConfig(model=str(reward_model), dtype="float32")
        settings = settings_of(tiny_model, specs, model, processes=2)
        assert settings.concurrency == 2 + 6 + 1
        assert pickle.loads(pickle.dumps(settings)) == settings
        with started(settings) as worker:
            rollouts = group(worker.tokenizer, "ab", ["xy", "xyz"])
            plain = Prompt(prompt_id=0, token_ids=(1, 2), text="ab", columns={"answer": "xyz"})
            tasted = Prompt(prompt_id=1, token_ids=(1, 2), text="ab", columns={"answer": "xyz", "kind": "tasted"})
            cut = (False, False)
            asked = worker.ask(plain, rollouts, cut)
            assert pickle.loads(pickle.dumps(asked)) == asked
            found = worker.score(plain, rollouts, cut, asked)
            # 2 + 10 * 0 * 2 and 3 + 10 * 1 * 3
            assert (found.scores, found.by_name) == ((2.0, 33.0), {"length": (2.0, 3.0), "exact": (0.0, 1.0)})
            other = worker.score(tasted, rollouts, cut, worker.ask(tasted, rollouts, cut))
            assert set(other.by_name) == {"length", "exact", "taste"}
            taste = other.by_name["taste"]
            assert taste[0] != taste[1]
            assert other.scores == pytest.approx((2.0 + 100 * taste[0], 33.0 + 100 * taste[1]))


def test_an_ensemble_scores_by_the_mean_and_its_deviation(tiny_model: Path, reward_model: Path, tmp_path: Path) -> None:
    """Scores, steps and disagreement equal a plain loop over the single models."""
    from transformers import AutoModelForSequenceClassification

    folders = [reward_model, tmp_path / "b", tmp_path / "c"]
    for seed, folder in enumerate(folders[1:], start=1):
        torch.manual_seed(seed)
        AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(folder)
    specs = (
        RewardSpec(name="taste", weight=1.0, function=None),
        RewardSpec(name="sound", weight=0.0, function=None, by_step=True),
    )
    prompt, responses = Prompt(prompt_id=0, token_ids=(1,), text="ab", columns={}), ["1;22", "4;"]

    def scored(model: RewardModelConfig) -> Any:
        with started(settings_of(tiny_model, specs, model)) as worker:
            return worker.score(prompt, group(worker.tokenizer, "ab", responses), [False, False], {})

    settings: dict[str, Any] = {"dtype": "float32", "steps": StepScores(separator=";")}
    single = [scored(RewardModelConfig(model=str(folder), **settings)) for folder in folders]
    assert all(not one.parts for one in single)
    members = {name: {"model": str(folder)} for name, folder in zip("bc", folders[1:], strict=True)}
    whole = scored(
        RewardModelConfig.model_validate(
            {"model": str(folders[0]), "members": members, "disagreement_coef": 0.5, **settings}
        )
    )
    for sample in range(2):
        values = [one.by_name["taste"][sample] for one in single]
        mean = sum(values) / 3
        std = (sum((value - mean) ** 2 for value in values) / 3) ** 0.5
        assert std > 1e-4
        assert whole.parts["taste/disagreement"][sample] == pytest.approx(std, rel=1e-4)
        assert whole.scores[sample] == pytest.approx(mean - 0.5 * std, rel=1e-4)
        stds = []
        for place, step in enumerate(whole.steps["sound"][sample]):
            steps = [one.steps["sound"][sample][place] for one in single]
            assert {one.end for one in steps} == {step.end}
            mean = sum(one.value for one in steps) / 3
            stds.append((sum((one.value - mean) ** 2 for one in steps) / 3) ** 0.5)
            assert step.value == pytest.approx(mean - 0.5 * stds[-1], rel=1e-4)
        assert whole.parts["sound/disagreement"][sample] == pytest.approx(sum(stds) / len(stds), rel=1e-4)


def test_a_process_reward_model_scores_by_its_steps(tiny_model: Path, reward_model: Path) -> None:
    """The least probability of a response's steps is the probability of the worst prefix with a step at the end."""
    config = RewardModelConfig(model=str(reward_model), dtype="float32")
    specs = (RewardSpec(name="taste", weight=1.0, function=None),)

    def scored(responses: list[str], steps: StepScores | None) -> tuple[float, ...]:
        model = config.model_copy(update={"steps": steps})
        prompt = Prompt(prompt_id=0, token_ids=(1,), text="ab", columns={})
        with started(settings_of(tiny_model, specs, model, max_tokens_per_microbatch=16)) as worker:
            return worker.score(prompt, group(worker.tokenizer, "ab", responses), [False], {}).scores

    response = "1;22;3"
    prefixes = scored(["1;", "1;22;", "1;22;3"], None)
    right = torch.tensor(prefixes).sigmoid()
    for combine, expected in (("min", right.min()), ("mean", right.mean()), ("product", right.prod())):
        steps = StepScores(combine=combine, separator=";")  # type: ignore[arg-type]
        assert scored([response], steps) == pytest.approx([expected.item()], rel=1e-5)


def test_a_process_reward_model_gives_each_step_its_probability(tiny_model: Path, reward_model: Path) -> None:
    """A response's probabilities stand at the ends of steps, and agree with the probabilities of the prefixes there."""
    config = RewardModelConfig(model=str(reward_model), dtype="float32", steps=StepScores(separator=";"))
    specs = (
        RewardSpec(name="sound", weight=1.0, function=None, by_step=True),
        RewardSpec(name="least", weight=1.0, function=None),
    )
    with started(settings_of(tiny_model, specs, config, max_tokens_per_microbatch=10)) as worker:  # a response a pass
        prompt = Prompt(prompt_id=0, token_ids=(1,), text="ab", columns={})
        rollouts = group(worker.tokenizer, "ab", ["1;22;3", "4;"])
        found = worker.score(prompt, rollouts, [True, False], {})
        bare = RewardModel(config, PLACE, max_tokens_per_microbatch=64)
        prefixes = group(worker.tokenizer, "ab", ["1;", "1;22;", "1;22;3", "4;"])
        logits = bare.scores(prefixes.token_ids, prefixes.lengths, None)
    first, second = found.steps["sound"]
    assert [step.end for step in first] == [3, 6, 7]  # behind `ab`: `1;` to 3, `22;` to 6, what was cut to 7
    assert [step.end for step in second] == [3]
    values = [step.value for step in (*first, *second)]
    assert values == pytest.approx(torch.tensor(logits).sigmoid().tolist(), rel=1e-5)
    assert found.by_name["sound"] == pytest.approx((sum(values[:3]), values[3]))
    assert found.by_name["least"] == pytest.approx((min(values[:3]), values[3]), rel=1e-5)
