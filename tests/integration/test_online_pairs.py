"""The worker for pairs of rollouts, without Ray or vLLM, agrees with offline DPO on the same pairs.

The laws: a step does not depend on ranks or micro-batches, not even for a rank without a pair; the step equals offline
DPO's on the same pairs, at temperature 1. A process for each rank is started for each layout and serves all tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.schema.model import ReferenceConfig
from rlhf.config.schema.root import Config
from rlhf.controller.batches import plan_pairs
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.types import Examples, MinibatchPlan, Pairs, RolloutInfo, Rollouts
from rlhf.workers.frozen.reference import ReferenceWorker
from rlhf.workers.offline.pairs import PreferenceWorker
from rlhf.workers.online.pairs import OnlinePreferenceWorker
from tests.fakes.groups import rollout_info
from tests.fixtures.workers import make_update
from tests.integration.gang_workers import (
    GROUPS,
    MOST_NEW,
    PROMPT,
    SAMPLES,
    assert_equal,
    merged,
    rollouts_of,
    worker_config,
)
from tests.integration.rank_gang import Gangs, place_of

CHOSEN, REJECTED = 2, 0  # samples of each group


def config_of(
    algorithm: Mapping[str, Any], model: str, folder: str, *, workers: int, tokens: int, **policy: Any
) -> Config:
    is_online = algorithm["name"] == "online_dpo"
    sections: dict[str, Any] = {"policy": policy, "train": {"sequences_per_update": GROUPS // 2}}
    if is_online:
        sections["rollouts"] = {"temperature": policy.pop("temperature", 1.0)}
    return worker_config(algorithm, model, folder, workers=workers, tokens=tokens, is_online=is_online, **sections)


def pair_of(rollouts: Rollouts) -> tuple[RolloutInfo, RolloutInfo]:
    ids, lengths = rollouts.sequence_ids.tolist(), rollouts.lengths.tolist()
    infos = [
        rollout_info(i, num_prompt_tokens=PROMPT, num_response_tokens=length - PROMPT)
        for i, length in zip(ids, lengths, strict=True)
    ]
    return infos[CHOSEN], infos[REJECTED]


def learn(
    rank: int,
    world_size: int,
    *,
    algorithm: dict[str, Any],
    model: str,
    reference: str | None,
    folder: str,
    tokens: int,
    groups: int,
    options: dict[str, Any],
) -> list[Any]:
    """Run one rank, and return metrics of two updates from the model folder's weights. reference: None disables the
    adapter."""
    config = config_of(algorithm, model, folder, workers=world_size, tokens=tokens, **options)
    assert config.rollouts is not None
    place = place_of(rank, world_size)
    worker = OnlinePreferenceWorker(config, place, optimizer_steps=2)
    worker.build()
    rollouts = [rollouts_of(group) for group in range(groups)]
    pairs = [pair_of(one) for one in rollouts]
    plan = plan_pairs(pairs, step=1, seed=0, num_minibatches=2, num_ranks=world_size, temperatures={})
    references: list[Any] = []
    if reference is not None:
        other = ReferenceWorker(
            ReferenceConfig(model=reference, dtype="float32"),
            place,
            temperature=config.rollouts.temperature,
            samples_per_prompt=SAMPLES,
            max_tokens_per_microbatch=tokens,
        )
        other.start()
        wanted = frozenset(info.sequence_id for pair in pairs for info in pair)
        *references, count = other.logprobs(wanted, {}, *rollouts)
        assert count == sum(info.num_prompt_tokens + info.num_response_tokens for pair in pairs for info in pair)
    worker.prepare(plan, *rollouts, *references)
    found = [make_update(worker, minibatch) for minibatch in range(len(plan.minibatches))]
    own = plan.sequences_of(rank)
    told, _ = worker.token_signals(own)
    for ids, shows in zip([one.sequences_by_rank[rank] for one in plan.minibatches], (True, False), strict=False):
        for i in ids:  # only the first update used the sampling weights
            one = told.take([told.sequence_ids.tolist().index(i)])
            mask = Rollouts.gather(rollouts, [i]).response_mask
            assert bool((one.old_logprobs[mask] < 0.0).all()) == shows
            assert bool((one.ref_logprobs[mask] < 0.0).all())
    return found


def learn_offline(
    rank: int, world_size: int, *, algorithm: dict[str, Any], model: str, folder: str, tokens: int
) -> list[Any]:
    """Make the same updates by the worker of fixed data, from the given pairs."""
    config = config_of(algorithm, model, folder, workers=world_size, tokens=tokens)
    worker = PreferenceWorker(config, place_of(rank, world_size), optimizer_steps=2)
    worker.build()
    rollouts = [rollouts_of(group) for group in range(GROUPS)]
    taken = Rollouts.gather(rollouts, [group * SAMPLES + i for group in range(GROUPS) for i in (CHOSEN, REJECTED)])
    worker.load_data(
        Pairs(
            examples=Examples(
                sequence_ids=taken.sequence_ids,
                lengths=taken.lengths,
                token_ids=taken.token_ids,
                loss_mask=taken.response_mask,
            ),
            prompt_tokens=torch.full((GROUPS,), PROMPT),
            margins=torch.zeros(GROUPS),
            labels=torch.ones(GROUPS, dtype=torch.bool),
        )
    )
    plan = plan_pairs(
        [pair_of(one) for one in rollouts], step=1, seed=0, num_minibatches=2, num_ranks=1, temperatures={}
    )
    minibatches = [
        MinibatchPlan(
            sequences_by_rank=(tuple(i // SAMPLES for i in one.sequences_by_rank[0][::2]),),
            num_tokens=one.num_tokens,
            num_sequences=one.num_sequences // 2,
        )
        for one in plan.minibatches
    ]
    everything = MinibatchPlan(sequences_by_rank=(tuple(range(GROUPS)),), num_tokens=1, num_sequences=GROUPS)
    column, _ = worker.reference_logprobs(0, everything)
    worker.store_reference(0, Path(folder, "reference.safetensors"), column)
    return [worker.update_on(one) for one in minibatches]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A policy, and a second model as the reference."""
    folder = tmp_path_factory.mktemp("models")
    return str(build_tiny_llama(folder / "policy", seed=3)), str(build_tiny_llama(folder / "reference", seed=4))


Learn = Callable[..., list[dict[str, float]]]


@pytest.fixture(scope="module")
def run(gangs: Gangs, models: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Learn:
    """Return metrics of both updates, by 1 rank with all pairs in a micro-batch or by 2 with about one pair."""
    folder = str(tmp_path_factory.mktemp("runs"))

    def run(function: Callable[..., Any], algorithm: dict[str, Any], *, ranks: int, **options: Any) -> Any:
        tokens = 4096 if ranks == 1 else PROMPT + 2 * MOST_NEW
        found = gangs[ranks].run(
            function, algorithm=algorithm, model=models[0], folder=folder, tokens=tokens, **options
        )
        return merged(found)

    return run


LOSSES: list[dict[str, Any]] = [
    {"loss": "sigmoid", "label_smoothing": 0.1},
    {"loss": {"ipo": 0.7, "hinge": 0.3}, "length_normalize": True, "sft_coef": 0.2, "beta": 0.5},
    {"loss": "aot", "length_alpha": 0.5},
    {"loss": "hinge", "wpo": True},
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: str(loss["loss"])[:7])
def test_a_step_depends_on_neither_ranks_nor_microbatches_and_is_offline_dpo_on_the_same_pairs(
    run: Learn, models: tuple[str, str], loss: dict[str, Any]
) -> None:
    algorithm = {"name": "online_dpo", **loss}
    options = {"reference": models[1], "groups": GROUPS, "options": {"temperature": 0.7}}
    one, two = (run(learn, algorithm, ranks=ranks, **options) for ranks in (1, 2))
    assert one[0]["update/grad_norm"] > 0
    assert "experience/kl_ref/mean" in one[0]  # measured with the sampling weights, in the first update
    assert "experience/kl_ref/mean" not in one[1]
    assert_equal(one, two)
    online = run(learn, algorithm, ranks=1, reference=models[0], groups=GROUPS, options={})
    offline = run(learn_offline, {"name": "dpo", **loss}, ranks=1)
    assert online[0]["experience/kl_ref/mean"] < 1e-9  # up to rounding, the reference equals the policy
    assert_equal(online, offline, keys=set(offline[0]))
    assert online[1]["preference/margin/mean"] != 0.0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["workers", "adapter_off"])
def test_a_rank_may_be_without_a_pair(run: Learn, models: tuple[str, str], lora: dict[str, Any] | None) -> None:
    options = {"reference": models[0] if lora is None else None, "groups": 1, "options": {"lora": lora}}
    one, two = (run(learn, {"name": "online_dpo"}, ranks=ranks, **options) for ranks in (1, 2))
    assert len(one) == len(two) == 1
    assert one[0]["update/loss/mean"] == pytest.approx(math.log(2.0))  # the policy equals the reference
    assert one[0]["update/grad_norm"] > 0
    assert_equal(one, two)


@pytest.mark.timeout(600)
def test_logprobs_are_those_of_the_distribution_that_was_sampled(run: Learn, models: tuple[str, str]) -> None:
    options = {"reference": models[1], "groups": GROUPS}
    cold, warm = (
        run(learn, {"name": "online_dpo"}, ranks=1, options={"temperature": temperature}, **options)[0]
        for temperature in (0.5, 1.0)
    )
    # all rollout_logprobs are -5, so the difference of the policy's log-probabilities depends on the temperature
    assert abs(cold["experience/kl_rollout/mean"] - warm["experience/kl_rollout/mean"]) > 0.01
    assert cold["update/loss/mean"] != pytest.approx(warm["update/loss/mean"], rel=1e-3)
