"""A student learns from its teachers in every sequence of an agent's session, with the model itself as the engine.

The expected gradients are those of a plain loop over unpacked sequences.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf.agents.trees import assemble_sessions
from rlhf.config import derive
from rlhf.controller.batches import with_given
from rlhf.controller.rollout_scorer import request_for
from rlhf.models.packed.row_layout import row_layout
from rlhf.objectives.distillation import Divergence, forward_kl, generalized_jsd, reverse_kl
from rlhf.rollouts.records.given import given_sequence
from rlhf.tracking.metrics.declarations import merge_metrics, results
from rlhf.types import BatchPlan, GivenResponse, MinibatchPlan, Prompt, RolloutInfo, Rollouts
from rlhf.workers.frozen.teacher import OnlineTeacherWorker
from rlhf.workers.frozen.top_settings import top_of
from rlhf.workers.online.student import StudentWorker
from tests.agent_sessions import call, session
from tests.fakes.configs import online_config
from tests.fixtures.workers import PLACE, assert_same_gradient, engine_of, gradient, make_update
from tests.tiny_architectures import tiny_model

PROMPT = Prompt(prompt_id=0, token_ids=(1, 2), text="", columns={})
BRANCHED = session(  # sequences of 9, 6 and 4 tokens, of which 4, 1 and 2 are sampled; the rest are tools' results
    call([1, 2], [3, 4]),
    call([1, 2, 3, 4, 5, 6, 7], [8, 9]),
    call([1, 2, 3, 4, 10], [11]),
    call([12, 13], [14, 15]),
)
SINGLE = session(call([1, 2], [16, 17, 18]))
OWNERS = {0: "math", 1: "code"}
WEIGHTS = {"math": 2.0, "code": 0.5}
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": lambda p, q: generalized_jsd(p, q, beta=0.5),
}


class Worker(StudentWorker):
    """A worker on one rank with the model as the engine."""

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__(config, PLACE, optimizer_steps=1)
        self.layout, self.engine = row_layout(model), engine_of(model)


GIVEN = (
    GivenResponse(token_ids=(1, 2, 20, 21, 22), loss_mask=(False, False, True, True, True)),
    GivenResponse(token_ids=(5, 6, 7, 8, 9), loss_mask=(False, True, False, False, True)),  # a demonstration of 2 turns
)


def given(number: int) -> tuple[Rollouts, RolloutInfo]:
    """Return a given response of the prompt, with the id -1 - number."""
    prompt = replace(PROMPT, given=GIVEN[number])
    request = request_for(prompt, group_id=number, first_sequence_id=number, samples=1, run_seed=0)
    return given_sequence(request)


def rollouts(*sessions: Any) -> Rollouts:
    request = request_for(PROMPT, group_id=0, first_sequence_id=0, samples=2, run_seed=0)
    return assemble_sessions(request, sessions or [BRANCHED, SINGLE])[0]


def plan(*minibatches: MinibatchPlan) -> BatchPlan:
    whole = MinibatchPlan(sequences_by_rank=((0, 1),), num_tokens=10, num_sequences=2, teachers=OWNERS)
    return BatchPlan(step=1, minibatches=minibatches or (whole,), scores={}, kl_coef=0.0)


def workers(tokens: int, **algorithm: Any) -> tuple[Worker, dict[str, Any], OnlineTeacherWorker, dict[str, Any]]:
    """Return a student with its model, and two teachers of another size with their models."""
    config = online_config(
        policy={"model": "student"},
        teacher={name: {"model": name, "dtype": "float32", "weight": weight} for name, weight in WEIGHTS.items()},
        algorithm={"name": "on_policy_distillation", "teacher_column": "source", **algorithm},
        rollouts={"prompts_per_step": 1, "max_new_tokens": 8, "samples_per_prompt": 2, "temperature": 0.7},
        rewards={},
        train={"steps": 1, "lr": 1e-2, "sequences_per_update": 2, "max_tokens_per_microbatch": tokens},
    )
    student = tiny_model("llama").double()
    torch.manual_seed(5)
    models = {name: type(student)(student.config).eval().double() for name in ("math", "code")}
    models["code"].requires_grad_(False)
    teacher = OnlineTeacherWorker(
        derive.teachers(config),
        PLACE,
        top=top_of(config),
        temperature=0.7,
        samples_per_prompt=2,
        max_tokens_per_microbatch=tokens,
    )
    teacher.student_rows = student.config.vocab_size
    teacher.present, teacher.model, teacher.host_weights = "math", models["math"].requires_grad_(False), []
    teacher.parked = {"code": (models["code"], [])}
    worker = Worker(config, student)
    for name in WEIGHTS if derive.reads_teacher_heads(config) else ():
        worker.take_teacher(name, teacher.head(teacher=name)[0])
    return worker, {"model": student}, teacher, models


def distributions(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of the predictions of tokens[1:], at the temperature of the samples."""
    model.set_attn_implementation("eager")
    logprobs: torch.Tensor = (model(tokens[None]).logits[0, :-1] / 0.7).log_softmax(-1)
    return logprobs


def divergences(ours: torch.Tensor, theirs: torch.Tensor, name: str, top_k: int | None) -> torch.Tensor:
    """Return the divergence of each row, over the teacher's likeliest tokens if top_k is given."""
    if top_k is not None:
        kept = theirs.topk(top_k).indices
        pair = [x.exp().gather(-1, kept) for x in (ours, theirs)]
        ours, theirs = (torch.cat([x, 1.0 - x.sum(-1, keepdim=True)], -1).log() for x in pair)
    return DIVERGENCES[name](ours, theirs)


@pytest.mark.parametrize("tokens", [100, 9])
@pytest.mark.parametrize(
    ("divergence", "top_k"),
    [("sampled_reverse_kl", None), ("forward_kl", None), ("reverse_kl", 4), ("jsd", 4), ("jsd", None)],
)
def test_every_sampled_token_of_a_session_learns_from_the_teacher_of_its_row(
    divergence: str, top_k: int | None, tokens: int
) -> None:
    settings = {} if top_k is None else {"top_k": top_k}
    worker, held, teacher, models = workers(tokens, divergence=divergence, **settings)
    student, batch = held["model"], rollouts()
    if divergence == "sampled_reverse_kl":
        told = [teacher.logprobs(None, {}, batch.of_samples([i]), teacher=name)[0] for i, name in OWNERS.items()]
        worker.prepare(plan(), batch, *told)  # type: ignore[arg-type]
        metrics = results(make_update(worker, 0))
    else:
        states = [teacher.states([(i,)], batch, teacher=name)[0] for i, name in OWNERS.items()]
        worker.prepare(plan(), batch)
        metrics = results(make_update(worker, 0, *states))  # type: ignore[arg-type]
    found = gradient(student)
    student.zero_grad(set_to_none=True)
    gaps: dict[str, list[float]] = {"math": [], "code": []}
    for row, sample in enumerate(batch.sequence_ids.tolist()):  # one sequence at a time
        alone, name = batch.take([row]), OWNERS[sample]
        places = alone.response_mask.nonzero()[:, 0] - 1
        ours, theirs = (distributions(model, alone.token_ids)[places] for model in (student, models[name]))
        sampled = alone.token_ids[places + 1]
        own, other = (x.gather(-1, sampled[:, None])[:, 0] for x in (ours, theirs))
        gaps[name] += (own - other).tolist()
        if divergence == "sampled_reverse_kl":
            terms = -(other - own.detach()) * own
        else:
            terms = divergences(ours, theirs, divergence, top_k)
        (WEIGHTS[name] / 10 * terms.sum()).backward()
    assert_same_gradient(found, gradient(student))
    whole = gaps["math"] + gaps["code"]
    assert metrics["experience/kl_teacher/mean"] == pytest.approx(sum(whole) / 10, rel=1e-3, abs=1e-4)
    for name, own_gaps in gaps.items():
        mean = sum(own_gaps) / len(own_gaps)
        assert metrics[f"experience/kl_by_teacher/{name}/mean"] == pytest.approx(mean, rel=1e-3, abs=1e-4)


def test_a_rank_without_a_sequence_of_a_minibatch_passes_no_token() -> None:
    worker, held, teacher, _ = workers(100, divergence="reverse_kl")
    there = MinibatchPlan(sequences_by_rank=((), (1,)), num_tokens=3, num_sequences=1, teachers=OWNERS)
    here = MinibatchPlan(sequences_by_rank=((0,), ()), num_tokens=7, num_sequences=1, teachers=OWNERS)
    worker.engine.max_over_ranks = lambda value: 1  # type: ignore[method-assign]
    worker.prepare(plan(there, here), rollouts())
    make_update(worker, 0)
    assert not gradient(held["model"]).any()
    make_update(worker, 1, teacher.states([(0,)], rollouts(), teacher="math")[0])  # type: ignore[arg-type]
    assert gradient(held["model"]).any()


def test_a_minibatch_restricted_by_a_grammar_makes_no_optimizer_step() -> None:
    worker, held, _, _ = workers(100, divergence="reverse_kl")
    restricted = session(call([1, 2], [16, 17, 18], fixed=range(3)))
    empty = MinibatchPlan(sequences_by_rank=((1,),), num_tokens=0, num_sequences=1, teachers=OWNERS)
    worker.prepare(plan(empty), rollouts(BRANCHED, restricted))
    assert results(make_update(worker, 0)) == {"update/without_tokens/total": 1.0}
    assert all(p.grad is None for p in held["model"].parameters())


@pytest.mark.parametrize(("tokens", "ranks"), [(100, 1), (9, 1), (9, 2)])
@pytest.mark.parametrize(("divergence", "top_k"), [("forward_kl", None), ("reverse_kl", 4), ("jsd", None)])
def test_given_responses_have_their_share_of_the_loss(
    divergence: str, top_k: int | None, tokens: int, ranks: int
) -> None:
    settings = {"on_policy_share": 0.3} if top_k is None else {"on_policy_share": 0.3, "top_k": top_k}
    sampled, pairs = rollouts(), [given(0), given(1)]
    owners = {**OWNERS, -1: "code", -2: "math"}
    whole = plan().minibatches[0]
    shares = ((0, 1), ()) if ranks == 2 else ((0, 1),)
    planned = with_given(plan(replace(whole, sequences_by_rank=shares)), [info for _, info in pairs], share=0.7, seed=0)
    planned = replace(planned, minibatches=tuple(replace(one, teachers=owners) for one in planned.minibatches))
    (minibatch,) = planned.minibatches
    assert (minibatch.num_tokens, minibatch.num_given_tokens) == (15, 5)
    parts = [sampled, *(batch for batch, _ in pairs)]
    total, seen = torch.zeros(()), []
    for rank in range(ranks):
        worker, held, teacher, models = workers(tokens, divergence=divergence, **settings)
        worker.data_rank = rank
        if ranks == 2:
            worker.engine.max_over_ranks = lambda value: 4  # type: ignore[method-assign]
        ids = planned.sequences_of(rank)
        own = {name: [i for i in ids if owners[i] == name] for name in WEIGHTS}
        states: list[Any] = [teacher.states([one], *parts, teacher=name)[0] for name, one in own.items() if one]
        worker.prepare(planned.for_rank(rank), *parts)
        seen.append(make_update(worker, 0, *states))
        total = total + gradient(held["model"])
        assert worker.token_signals([0])[1] == (19 if 0 in ids else 0)  # a samples file has no given response
    student = held["model"]
    student.zero_grad(set_to_none=True)
    nll = 0.0
    for batch, share, count in ((sampled, 0.3, 10), (parts[1], 0.7, 5), (parts[2], 0.7, 5)):
        for row, sample in enumerate(batch.sequence_ids.tolist()):
            alone, name = batch.take([row]), owners[sample]
            places = alone.response_mask.nonzero()[:, 0] - 1
            ours, theirs = (distributions(model, alone.token_ids)[places] for model in (student, models[name]))
            if sample < 0:
                nll -= float(ours.gather(-1, alone.token_ids[places + 1][:, None]).sum().detach()) / 5
            (share / count * WEIGHTS[name] * divergences(ours, theirs, divergence, top_k).sum()).backward()
    assert_same_gradient(total, gradient(student))
    metrics = results(merge_metrics(seen))
    assert metrics["update/given_share"] == 0.7
    assert metrics["update/given_nll/mean"] == pytest.approx(nll, rel=1e-4)
