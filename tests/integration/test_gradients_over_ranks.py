"""Several teachers, likeliest tokens, spans of two tokenizers and score centering have one gradient on any ranks.

The norm of the difference is compared with the gradient's norm, so the result does not depend on the scale of inputs.
With a first beta of 0, AdamW's first moment is the gradient as the optimizer saw the gradient: summed over the ranks,
divided by the tokens and clipped. DeepSpeed joins the moment where ranks hold shares of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config.derive import teachers
from rlhf.config.schema.root import Config
from rlhf.data.packing import balance
from rlhf.models.files.tiny import VOCAB_SIZE, build_tiny_llama
from rlhf.tracking.metrics.declarations import results
from rlhf.types import BatchPlan, MinibatchPlan, RankedRollouts, Rollouts, TeacherPrompt
from rlhf.workers.frozen.teacher import OnlineTeacherWorker
from rlhf.workers.frozen.top_settings import spans_of, top_of
from rlhf.workers.online.policy import PolicyWorker
from rlhf.workers.online.student import StudentWorker
from tests.fixtures.other_tokenizer import build_other
from tests.fixtures.workers import make_update
from tests.integration.gang_workers import MOST_NEW, PROMPT, SAMPLES, build_models, rollouts_of, worker_config
from tests.integration.rank_gang import Gangs, place_of

GROUPS, TEMPERATURE, KEPT = 4, 0.7, 8
HALVES = (tuple(range(7)), tuple(range(7, 12)))
OWNERS = {i: ("math", "code")[i // SAMPLES % 2] for i in range(GROUPS * SAMPLES)}
ADVANTAGES = {i: (-1.0) ** i * (1 + 0.2 * i) for i in range(GROUPS * SAMPLES)}
CENTERED = {"name": "grpo", "correction": {"preset": "score_centering", "center_top_k": KEPT, "max_ratio": 1.5}}
TAUGHT = {"name": "on_policy_distillation", "teacher_column": "source"}
FORMS: dict[str, dict[str, Any]] = {
    "sampled": TAUGHT,
    "states": {**TAUGHT, "divergence": "reverse_kl"},
    "top": {**TAUGHT, "divergence": "jsd", "beta": 0.3, "top_k": 5},
    "spans": {**TAUGHT, "divergence": "jsd"},
    "centered": CENTERED,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `student`, `teacher`, `second`, and `other` with another tokenizer."""
    folder = build_models(tmp_path_factory.mktemp("models"))
    build_tiny_llama(folder / "second", seed=9)
    build_other(folder / "other", seed=9)
    return folder


def config_of(form: str, models: Path, folder: str, *, tokens: int = 4096, **layout: Any) -> Config:
    policy = layout.pop("policy", {})
    named = {
        "math": {"model": str(models / "teacher"), "dtype": "float32", "weight": 0.5},
        "code": {"model": str(models / ("other" if form == "spans" else "second")), "dtype": "float32", "weight": 2.0},
    }
    own = {"teacher": named} if form != "centered" else {}
    return worker_config(
        FORMS[form],
        str(models / "student"),
        folder,
        tokens=tokens,
        policy=policy,
        rollouts={"prompts_per_step": GROUPS, "temperature": TEMPERATURE},
        train={"steps": 1, "lr": 1e-2, "eps": 1.0, "betas": (0.0, 0.999), "sequences_per_update": 6},
        cluster={"roles": {"policy": layout}},
        **own,
    )


def ranked(group: int) -> RankedRollouts:
    """Return a group's responses with the likeliest tokens of a random sampler, sharp enough to truncate weights."""
    plain, random = rollouts_of(group), torch.Generator().manual_seed(100 + group)
    sampler = (3.0 * torch.randn(len(plain.token_ids), VOCAB_SIZE, generator=random)).log_softmax(-1)
    top, mask = sampler.topk(KEPT), plain.response_mask
    given = {name: getattr(plain, name) for name in ("sequence_ids", "lengths", *Rollouts.columns())}
    given["rollout_logprobs"] = sampler.gather(1, plain.token_ids[:, None])[:, 0].where(mask, 0.0)
    top_ids, top_logprobs = top.indices.int().where(mask[:, None], 0), top.values.where(mask[:, None], 0.0)
    return RankedRollouts(**given, top_ids=top_ids, top_logprobs=top_logprobs)


def plan_of(given: Rollouts, *, ranks: int, owners: Mapping[int, str]) -> BatchPlan:
    tokens = [int(mask.sum()) for mask in given.response_mask.split(given.lengths.tolist())]
    minibatches = tuple(
        MinibatchPlan(
            sequences_by_rank=tuple(
                tuple(half[i] for i in share) for share in balance([9.0, *[1.0] * (len(half) - 1)], ranks)
            ),
            num_tokens=sum(tokens[i] for i in half),
            num_sequences=len(half),
            teachers=owners,
        )
        for half in HALVES
    )
    return BatchPlan(step=1, minibatches=minibatches, scores={}, kl_coef=0.0)


def gradients_of(worker: Any) -> dict[str, Tensor]:
    """Return the gradients of the last update. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    found = {}
    for name, parameter in worker.engine.module.named_parameters():
        if parameter.requires_grad:
            joined = safe_get_full_optimizer_state(parameter, "exp_avg")  # None at stage 0
            moment = worker.engine._optimizer.state[parameter]["exp_avg"] if joined is None else joined
            found[name] = moment.clone()
    return found


def taught_rank(rank: int, world_size: int, *, config: Config) -> list[dict[str, Tensor]]:
    """Return the gradients of an update on each half of a batch with two teachers."""
    place, algorithm = place_of(rank, world_size), config.algorithm
    worker = StudentWorker(config, place, optimizer_steps=2)
    worker.build()
    options: dict[str, Any] = {"temperature": TEMPERATURE, "samples_per_prompt": SAMPLES}
    options["max_tokens_per_microbatch"] = config.train.max_tokens_per_microbatch
    teacher = OnlineTeacherWorker(teachers(config), place, top=top_of(config), spans=spans_of(config), **options)
    teacher.start()
    for name in teachers(config) if getattr(algorithm, "reads_teacher_heads", False) else ():
        worker.take_teacher(name, teacher.head(teacher=name)[0])
    given = [rollouts_of(group) for group in range(GROUPS)]
    if teacher.translators:  # the sampled tokens are printable characters
        printable = [32 + part.token_ids % 90 for part in given]
        given = [
            replace(part, token_ids=ids.where(part.response_mask, part.token_ids))
            for part, ids in zip(given, printable, strict=True)
        ]
    prompts = {i: TeacherPrompt(token_ids=(2, 70, 71), end=1) for i, name in OWNERS.items() if name == "code"}
    whole = Rollouts.gather(given, range(GROUPS * SAMPLES))
    plan = plan_of(whole, ranks=config.cluster.roles.policy.data_parallel_ranks, owners=OWNERS)
    logprobs: list[Any] = []
    if not worker.algorithm.config.reads_teacher_states:
        for name, own in (("math", given[::2]), ("code", given[1::2])):
            logprobs += teacher.logprobs(None, {}, *own, teacher=name)[:-1]
    worker.prepare(plan, *given, *logprobs)
    found = []
    for half, minibatch in enumerate(plan.minibatches):
        columns: list[Any] = []
        ids = minibatch.sequences_by_rank[worker.data_rank]
        for name in ("math", "code") if not logprobs else ():
            own_ids = [i for i in ids if OWNERS[i] == name]
            columns += teacher.states([own_ids], *given, teacher=name, prompts=prompts)[:-1] if own_ids else []
        metrics = results(make_update(worker, half, *columns))
        assert metrics.get("update/compared/fraction", 1.0) == 1.0
        found.append(gradients_of(worker))
    return found


def centered_rank(rank: int, world_size: int, *, config: Config) -> list[dict[str, Tensor]]:
    """Return the gradients of an update on each half of a batch."""
    worker = PolicyWorker(config, place_of(rank, world_size), optimizer_steps=2)
    worker.build()
    given = [ranked(group) for group in range(GROUPS)]
    whole = Rollouts.gather(given, range(GROUPS * SAMPLES))
    plan = plan_of(whole, ranks=config.cluster.roles.policy.data_parallel_ranks, owners={})
    worker.prepare(replace(plan, scores=ADVANTAGES), *given)
    worker.set_advantages(ADVANTAGES)
    found = []
    for half in range(len(HALVES)):
        make_update(worker, half)
        found.append(gradients_of(worker))
    return found


LORA = {"policy": {"lora": {"rank": 4}}}
QUICK = [("top", {"zero_stage": 3}), ("centered", {"zero_stage": 2})]
CASES = [
    ("sampled", {"zero_stage": 3}),
    ("states", {"zero_stage": 3}),
    ("states", {"zero_stage": 1, **LORA}),
    ("states", {"zero_stage": 0, "sequence_parallel": 2}),
    ("spans", {"zero_stage": 3}),
    ("spans", {"zero_stage": 1, **LORA}),
    ("top", {"zero_stage": 3, **LORA}),
    ("top", {"zero_stage": 0, "sequence_parallel": 2}),
    ("centered", {"zero_stage": 3}),
    ("centered", {"zero_stage": 1, **LORA}),
    ("centered", {"zero_stage": 0, "sequence_parallel": 2}),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("form", "layout"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)],
    ids=["-".join([form, *map(str, layout.values())]) for form, layout in QUICK + CASES],
)
def test_two_ranks_have_the_gradient_of_one(
    form: str, layout: dict[str, Any], models: Path, gangs: Gangs, tmp_path: Path
) -> None:
    learn = centered_rank if form == "centered" else taught_rank
    own = {"policy": layout["policy"]} if "policy" in layout else {}
    (one,) = gangs[1].run(learn, config=config_of(form, models, str(tmp_path), **own))
    shared = config_of(form, models, str(tmp_path), tokens=PROMPT + 2 * MOST_NEW, workers=2, **layout)
    two = gangs[2].run(learn, config=shared)[0]
    assert len(one) == len(two) == len(HALVES)
    for alone, together in zip(one, two, strict=True):
        assert alone.keys() == together.keys()
        whole, shares = (torch.cat([g.flatten() for g in found.values()]) for found in (alone, together))
        assert float(whole.abs().max()) > 1e-3
        assert float((whole - shares).norm()) <= 1e-6 * float(whole.norm())
