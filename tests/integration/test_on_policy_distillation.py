"""Learning from a teacher on rollouts agrees with plain torch on whole logits, over layouts of ranks without Ray, and
in a run with Ray.

The teacher is wider than the student, and the teacher's head has rows without a token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.config.derive import teachers
from rlhf.config.schema.root import Config
from rlhf.data.packing import balance
from rlhf.models.files.tiny import VOCAB_SIZE, byte_tokenizer
from rlhf.tracking.metrics.declarations import expected_metrics
from rlhf.tracking.run_folder.atomic import read_lines
from rlhf.types import ONLY_TEACHER, BatchPlan, MinibatchPlan, Rollouts
from rlhf.workers.frozen.teacher import OnlineTeacherWorker
from rlhf.workers.online.student import StudentWorker
from tests.fixtures.workers import make_update
from tests.integration.faults import kill_all, wait_for
from tests.integration.gang_workers import (
    BETA,
    PROMPT,
    SAMPLES,
    PlainTraining,
    assert_equal,
    build_models,
    divergence,
    merged,
    rollouts_of,
    worker_config,
)
from tests.integration.rank_gang import Gangs, place_of
from tests.integration.recipes import merge, one_thread, rlhf, rows, start, train, without_clocks, write_config
from tests.integration.test_reward_services import running, wait_for_url

GROUPS, LR, TEMPERATURE = 4, 1e-3, 0.7
HALVES = (tuple(range(6)), tuple(range(6, 12)))  # sequences in each of the two minibatches
REWARD = {i: 0.5 * (i % SAMPLES - 1) for i in range(GROUPS * SAMPLES)}  # what rewards add to advantages
Algorithm = Mapping[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `student` and `teacher`."""
    return build_models(tmp_path_factory.mktemp("models"))


def config_of(algorithm: Algorithm, models: Path, folder: str, *, tokens: int, epochs: int, **roles: Any) -> Config:
    policy = roles.pop("policy", {})
    return worker_config(
        {"name": "on_policy_distillation", **algorithm},
        str(models / "student"),
        folder,
        tokens=tokens,
        policy=policy,
        teacher={"model": str(models / "teacher"), "dtype": "float32"},
        rollouts={"prompts_per_step": GROUPS, "temperature": TEMPERATURE},
        train={"steps": 1, "lr": LR, "sequences_per_update": len(HALVES[0]), "epochs_per_batch": epochs},
        cluster={"roles": {"policy": roles}},
    )


def plan_of(given: Rollouts, *, ranks: int, scores: Mapping[int, float]) -> BatchPlan:
    tokens = [int(mask.sum()) for mask in given.response_mask.split(given.lengths.tolist())]
    return BatchPlan(
        step=1,
        minibatches=tuple(
            MinibatchPlan(
                sequences_by_rank=tuple(tuple(half[i] for i in share) for share in balance([1.0] * 6, ranks)),
                num_tokens=sum(tokens[i] for i in half),
                num_sequences=len(half),
            )
            for half in HALVES
        ),
        scores=scores,
        kl_coef=0.0,
    )


def train_rank(rank: int, world_size: int, *, config: Config) -> list[Any]:
    """Run one rank with a separate teacher: the metrics of an update on each half, in all epochs."""
    place = place_of(rank, world_size)
    tokens = config.train.max_tokens_per_microbatch
    worker = StudentWorker(config, place, optimizer_steps=4)
    worker.build()
    teacher = OnlineTeacherWorker(
        teachers(config),
        place,
        temperature=TEMPERATURE,
        samples_per_prompt=SAMPLES,
        max_tokens_per_microbatch=tokens,
    )
    teacher.start()
    worker.take_teacher(ONLY_TEACHER, teacher.head()[0])
    ranks = config.cluster.roles.policy.data_parallel_ranks
    given = [rollouts_of(group) for group in range(GROUPS)]
    sampled = not worker.algorithm.config.reads_teacher_states
    whole = Rollouts.gather(given, range(GROUPS * SAMPLES))
    plan = plan_of(whole, ranks=ranks, scores=REWARD if sampled else {})
    told = [one for one in teacher.logprobs(None, {}, *given) if not isinstance(one, int)] if sampled else []
    worker.prepare(plan, *given, *told)
    found = []
    for half in list(range(len(HALVES))) * config.train.epochs_per_batch:
        own = plan.minibatches[half].sequences_by_rank[worker.data_rank]
        # each of two teachers has every second sequence
        states = [] if sampled else [teacher.states([own[n::2]], *given)[0] for n in (0, 1)]
        found.append(make_update(worker, half, *states))
    first = plan.minibatches[0].sequences_by_rank[worker.data_rank]
    signals, _ = worker.token_signals(first)  # the first update at least saw every value
    mask = Rollouts.gather(given, first).response_mask
    assert bool((signals.old_logprobs[mask] < 0.0).all() and (signals.teacher_logprobs[mask] < 0.0).all())
    if sampled:
        gaps = signals.teacher_logprobs - signals.old_logprobs
        added = torch.cat([torch.full((n,), REWARD[i]) for i, n in zip(first, signals.lengths.tolist(), strict=True)])
        torch.testing.assert_close(signals.advantages[mask], (gaps + added)[mask])
    return found if rank % config.cluster.roles.policy.sequence_parallel == 0 else [{}] * len(found)


class Dense:
    """Train the same in plain torch: whole logits, one sequence at a time."""

    def __init__(self, models: Path, algorithm: Algorithm) -> None:
        self.student = AutoModelForCausalLM.from_pretrained(models / "student")
        self.teacher = AutoModelForCausalLM.from_pretrained(models / "teacher")
        self.training = PlainTraining(self.student, lr=LR)
        self.algorithm = algorithm
        whole = Rollouts.gather([rollouts_of(group) for group in range(GROUPS)], range(GROUPS * SAMPLES))
        self.sequences = whole.token_ids.split(whole.lengths.tolist())
        with torch.no_grad():
            self.old = [self.sampled(self.distributions(self.student, i), i) for i in range(GROUPS * SAMPLES)]

    def distributions(self, model: Any, i: int) -> Tensor:
        """Return the distributions at sequence i's sampled tokens, over common rows for whole comparisons."""
        rows = VOCAB_SIZE if "divergence" in self.algorithm else None
        logits: Tensor = model(self.sequences[i][None]).logits[0, PROMPT - 1 : -1, :rows]
        return (logits / TEMPERATURE).log_softmax(-1)

    def sampled(self, log_p: Tensor, i: int) -> Tensor:
        return log_p.gather(-1, self.sequences[i][PROMPT:, None])[:, 0]

    def step(self, half: tuple[int, ...]) -> dict[str, float]:
        """Return the measurements before an optimizer step, and the norm of the gradient."""
        losses, entropies, gaps, advantages = [], [], [], []
        for i in half:
            log_p = self.distributions(self.student, i)
            with torch.no_grad():
                log_q = self.distributions(self.teacher, i)
            gaps.append(self.old[i] - self.sampled(log_q, i))
            advantages.append(REWARD[i] - gaps[-1])
            entropies.append(-(log_p.exp() * log_p).sum(-1).detach())
            if "divergence" in self.algorithm:
                losses.append(divergence(self.algorithm["divergence"], log_p, log_q))
                continue
            ratio = (self.sampled(log_p, i) - self.old[i]).exp()
            low, high = 1 - self.algorithm.get("clip_low", 0.2), 1 + self.algorithm.get("clip_high", 0.2)
            losses.append(-torch.minimum(ratio * advantages[-1], ratio.clamp(low, high) * advantages[-1]))
        loss = torch.cat(losses).mean()
        norm = self.training.step(loss)
        found = {"update/loss/mean": loss.item(), "update/entropy/mean": torch.cat(entropies).mean().item()}
        found |= {"update/grad_norm": norm, "experience/kl_teacher/mean": torch.cat(gaps).mean().item()}
        if "divergence" not in self.algorithm:
            found["advantages/mean"] = torch.cat(advantages).mean().item()
            found["advantages/std"] = torch.cat(advantages).std(correction=0).item()
        return found


Train = Callable[..., list[dict[str, float]]]


@pytest.fixture(scope="module")
def run(gangs: Gangs, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return the metrics of each update."""
    folder = str(tmp_path_factory.mktemp("runs"))

    def run(algorithm: Algorithm, *, tokens: int = 4096, epochs: int = 1, **roles: Any) -> list[dict[str, float]]:
        config = config_of(algorithm, models, folder, tokens=tokens, epochs=epochs, **roles)
        workers = config.cluster.roles.policy.workers
        found = gangs[workers].run(train_rank, config=config)
        return merged(found)

    return run


SAMPLED = {"clip_low": 0.001, "clip_high": 0.002}
JSD = {"divergence": "jsd", "beta": BETA}
REVERSE = {"divergence": "reverse_kl"}
QUICK = [(SAMPLED, {"workers": 2, "tokens": 20}), (REVERSE, {"workers": 2, "tokens": 20, "zero_stage": 3})]
CASES = [
    (SAMPLED, {"workers": 1}),
    (SAMPLED, {"workers": 2, "tokens": 20, "sequence_parallel": 2}),
    (JSD, {"workers": 1}),
    (REVERSE, {"workers": 2, "tokens": 20, "sequence_parallel": 2}),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("algorithm", "layout"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)],
    ids=["-".join([a.get("divergence", "sampled"), *layout, str(layout["workers"])]) for a, layout in QUICK + CASES],
)
def test_updates_are_those_of_whole_logits(
    run: Train, models: Path, algorithm: Algorithm, layout: Mapping[str, int]
) -> None:
    ours, dense = run(algorithm, epochs=2, **layout), Dense(models, algorithm)
    for update, half in enumerate([*HALVES, *HALVES]):
        plain = dense.step(half)
        for key, value in plain.items():
            if key.startswith("update/") or (update < 2 and algorithm == SAMPLED) or update == 0:
                assert ours[update][key] == pytest.approx(value, rel=2e-4, abs=2e-6), (update, key)
            else:
                assert key not in ours[update]
    if algorithm == SAMPLED:
        assert ours[0]["update/clip_fraction/mean"] == 0.0
        assert ours[3]["update/clip_fraction/mean"] > 0.0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("algorithm", [{}, JSD], ids=["sampled", "jsd"])
def test_an_adapter_learns_from_the_teacher(run: Train, models: Path, algorithm: Algorithm) -> None:
    policy = {"lora": {"rank": 4}}
    one, two = (run(algorithm, policy=policy, workers=workers, tokens=20) for workers in (1, 2))
    plain = Dense(models, algorithm).step(HALVES[0])
    assert one[0]["update/loss/mean"] == pytest.approx(plain["update/loss/mean"], rel=1e-5)  # adapter = identity
    assert 0.0 < one[0]["update/grad_norm"] < plain["update/grad_norm"]
    assert_equal(one, two)


RUN: dict[str, Any] = {
    "train": {"steps": 6, "sequences_per_update": 16, "lr": 3e-3, "checkpoint_every": 3},
    "eval": {"every": 3},
    "tracking": {"samples_per_step": 4},
}
BESIDE: dict[str, Any] = {
    "roles": {
        "policy": {"cpus": 0.5},
        "rollout": {"cpus": 0.5},
        "teacher": {"workers": 2, "cpus": 0.5, "colocate_with": None},
    }
}


def config_file(folder: Path, name: str, models: Path, algorithm: Algorithm, **changes: Any) -> Path:
    """A run without rewards."""
    tree = {
        **RUN,
        "run": {"name": name, "dir": str(folder), "seed": 3},
        "policy": {"model": str(models / "student"), "dtype": "float32"},
        "teacher": {"model": str(models / "teacher"), "dtype": "float32"},
        "algorithm": {"name": "on_policy_distillation", **algorithm},
        **changes,
    }
    return write_config(folder / f"{name}.yaml", tree)


MIXTURE = {"divergence": "jsd", "top_k": 8, "on_policy_share": 0.5}
GIVEN = {"train": {"split": "sft"}}  # rows with answers


def samples(run: Path, step: int) -> list[dict[str, Any]]:
    text = (run / "samples" / f"step_{step:06d}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


FORMS: dict[str, tuple[Algorithm, dict[str, Any]]] = {"sampled": ({}, {}), "reverse_kl": (REVERSE, {"cluster": BESIDE})}


@pytest.fixture(scope="module", params=list(FORMS))
def unbroken(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of each form."""
    algorithm, changes = FORMS[request.param]
    folder = tmp_path_factory.mktemp("taught")
    train(config_file(folder, request.param, models, algorithm, **changes))
    return folder / str(request.param)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_teacher_behind_rlhf_serve_teaches_as_one_in_the_run(models: Path, tmp_path: Path) -> None:
    port, log, teacher_folder = "18741", tmp_path / "serve.log", tmp_path / "teacher"
    model = AutoModelForCausalLM.from_pretrained(models / "teacher")
    model.resize_token_embeddings(VOCAB_SIZE)  # a served teacher may name no token that the student lacks
    model.save_pretrained(teacher_folder)
    byte_tokenizer().save_pretrained(teacher_folder)
    held = {"teacher": {"model": str(teacher_folder), "dtype": "float32"}}
    words = [*rlhf(), "serve", str(teacher_folder), "--name", "t", "--port", port, "--max-length", "256"]
    overrides = ["rollouts.temperature=1.0", "eval.temperature=0.0", "train.checkpoint_every=1"]
    with running(words, log, OMP_NUM_THREADS="1") as process:
        wait_for_url(f"http://127.0.0.1:{port}/health", process, log, timeout_s=400)
        teacher = {"url": f"http://127.0.0.1:{port}/v1", "model": "t", "http": {"deadline_s": 5, "timeout_s": 5}}
        served = config_file(tmp_path, "served", models, {}, teacher=teacher)
        train(served, *overrides, "train.steps=2")
        mixed = config_file(tmp_path, "served-mixture", models, MIXTURE, teacher=teacher, data=GIVEN)
        train(mixed, *overrides, "train.steps=2")
    train(config_file(tmp_path, "held", models, {}, **held), *overrides, "train.steps=2")
    train(config_file(tmp_path, "held-mixture", models, MIXTURE, data=GIVEN, **held), *overrides, "train.steps=2")
    compared = {"experience/kl_teacher/mean", "eval/heldout/kl_teacher", "update/given_nll/mean", "update/loss/mean"}
    for name in ("", "-mixture"):
        for ours, theirs in zip(rows(tmp_path / f"served{name}"), rows(tmp_path / f"held{name}"), strict=True):
            for metric in theirs.keys() & compared:
                assert ours[metric] == pytest.approx(theirs[metric], abs=1e-3), (name, metric)
    assert rows(tmp_path / "served-mixture")[-1]["update/given_share"] == 0.5
    with pytest.raises(AssertionError, match=r"exit 1[\s\S]*no answer within 5 s"):  # the server is gone
        train(config_file(tmp_path, "gone", models, {}, teacher=teacher), *overrides, "train.steps=2")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_mixture_repeats_its_steps_with_shared_weights(models: Path, tmp_path: Path) -> None:
    """The given responses of a resumed step are those of the killed run, for a student on two ranks with ZeRO-3."""
    roles = one_thread("rollout", "teacher") | {"policy": {"workers": 2, "zero_stage": 3, "cpus": 0.5, "threads": 1}}
    changes: dict[str, Any] = {"data": {**GIVEN, "eval": None}, "eval": None, "cluster": {"roles": roles}}
    changes["train"] = merge(RUN["train"], {"steps": 100, "checkpoint_every": 2})
    config, run = config_file(tmp_path, "mixture", models, MIXTURE, **changes), tmp_path / "mixture"
    process = start(config)
    wait_for(run / "metrics.jsonl", 4, timeout_s=300)  # a step after the first checkpoint at least
    kill_all(process.pid)
    process.wait(timeout=30)
    before = without_clocks(read_lines(run / "metrics.jsonl"))
    for row in before:
        assert row["update/given_share"] == 0.5
        assert row["experience/rollout_logprob_diff/max"] < 1e-3
    train(config, "--resume", "step_000002", f"train.steps={len(before)}")
    assert without_clocks(rows(run)) == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_without_rewards_comes_nearer_to_its_teacher(unbroken: Path) -> None:
    found = rows(unbroken)
    always = {metric for metric in expected_metrics(["online", "teacher", "eval"]) if "<" not in metric}
    if unbroken.name == "sampled":
        always |= {metric for metric in expected_metrics(["online", "teacher", "advantages"]) if "<" not in metric}
    assert always <= set(found[3]), sorted(always - set(found[3]))
    assert not [key for key in found[3] if key.startswith("rewards/") and key != "rewards/errors/total"]
    assert found[-1]["eval/heldout/kl_teacher"] < found[0]["eval/heldout/kl_teacher"]
    assert found[-1]["memory/teacher_rss_gib"] > 0.0
    assert all(row["experience/rollout_logprob_diff/max"] < 1e-3 for row in found[1:])
    trained = [one for one in samples(unbroken, 3) if one["split"] == "train"]
    assert len(trained) == 4
    assert all(one["score"] is None and one["mean_teacher_logprob"] < 0.0 for one in trained)
    state = json.loads((unbroken / "checkpoints" / "step_000006" / "controller.json").read_text())
    assert state["best"]["value"] == min(row["eval/heldout/kl_teacher"] for row in found if row["step"] in (3, 6))
    assert (unbroken / "final" / "model.safetensors").exists()
