"""Self-teaching agrees with a loop over single sequences, over layouts of ranks, and after a resume.

The loop keeps the teacher's weights in a second model of transformers. Each response has a prompt of another length.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.algorithms import ALGORITHMS
from rlhf.config.schema.root import Config
from rlhf.data.packing import balance
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.types import BatchPlan, MinibatchPlan, PrivilegedPrompts, Rollouts
from rlhf.workers.online.policy import PolicyWorker
from rlhf.workers.online.self_taught import SelfTaughtWorker
from tests.fixtures.workers import make_update
from tests.integration.gang_workers import PROMPT, SAMPLES, assert_equal, divergence, merged, rollouts_of, worker_config
from tests.integration.rank_gang import Gangs, place_of

GROUPS, LR, TEMPERATURE, RATE = 2, 1e-2, 0.7, 0.3
EPS = 0.1  # large: otherwise AdamW turns the rounding of small gradients into whole steps
COUNT = GROUPS * SAMPLES
HALVES = (tuple(range(3)), tuple(range(3, 6)))
TEMPLATE = {"privileged": {"template": "{prompt}{answer}"}}
ADVANTAGES = {i: (-1.0) ** i * (1 + 0.2 * i) for i in range(COUNT)}


def prompts_of(group: int) -> PrivilegedPrompts:
    """Return a prompt of 3 to 9 tokens for each response of a group."""
    random = torch.Generator().manual_seed(100 + group)
    sizes = [3 + (5 * group + 2 * sample) % 7 for sample in range(SAMPLES)]
    return PrivilegedPrompts(
        sequence_ids=torch.arange(group * SAMPLES, (group + 1) * SAMPLES),
        lengths=torch.tensor(sizes),
        token_ids=torch.randint(3, 300, (sum(sizes),), generator=random),
    )


def config_of(algorithm: Mapping[str, Any], model: Path, folder: str, *, tokens: int = 4096, **roles: Any) -> Config:
    policy = roles.pop("policy", {})
    return worker_config(
        {**TEMPLATE, **algorithm},
        str(model),
        folder,
        tokens=tokens,
        policy=policy,
        rollouts={"prompts_per_step": GROUPS, "temperature": TEMPERATURE},
        train={"steps": 3, "lr": LR, "eps": EPS, "sequences_per_update": 3},
        cluster={"roles": {"policy": roles}},
    )


def plan_of(given: Rollouts, *, step: int, ranks: int, scores: Mapping[int, float]) -> BatchPlan:
    tokens = [int(mask.sum()) for mask in given.response_mask.split(given.lengths.tolist())]
    halves = [
        MinibatchPlan(
            sequences_by_rank=tuple(tuple(half[i] for i in share) for share in balance([9.0, 1.0, 1.0], ranks)),
            num_tokens=sum(tokens[i] for i in half),
            num_sequences=len(half),
        )
        for half in HALVES
    ]
    return BatchPlan(step=step, minibatches=tuple(halves), scores=scores, kl_coef=0.0)


def built(config: Config, rank: int, world_size: int) -> Any:
    kind: Any = PolicyWorker if config.algorithm.kind == "advantages" else SelfTaughtWorker
    worker = kind(config, place_of(rank, world_size), optimizer_steps=6)
    worker.build()
    return worker


def train(worker: Any, step: int) -> list[Any]:
    """Make a step of two updates. Return their metrics."""
    parts = [rollouts_of(group) for group in range(GROUPS)]
    whole = Rollouts.gather(parts, range(COUNT))
    ranks = worker.config.cluster.roles.policy.data_parallel_ranks
    plan = plan_of(whole, step=step, ranks=ranks, scores=ADVANTAGES if isinstance(worker, PolicyWorker) else {})
    worker.prepare(plan, *parts, *(prompts_of(group) for group in range(GROUPS)))
    if isinstance(worker, PolicyWorker):
        worker.set_advantages(ADVANTAGES)
    return [make_update(worker, half) for half in range(len(HALVES))]


def train_rank(rank: int, world_size: int, *, config: Config, steps: int = 2) -> list[Any]:
    worker = built(config, rank, world_size)
    return [metrics for step in range(1, steps + 1) for metrics in train(worker, step)]


class Loop:
    """Train the same model one sequence at a time, with whole logits, in float64."""

    def __init__(self, model: Path, algorithm: Mapping[str, Any]) -> None:
        self.student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        self.teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        self.section: Any = ALGORITHMS[algorithm["name"]].config_class().model_validate({**TEMPLATE, **algorithm})
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LR, eps=EPS, weight_decay=0.0)
        whole = Rollouts.gather([rollouts_of(group) for group in range(GROUPS)], range(COUNT))
        self.sequences = whole.token_ids.split(whole.lengths.tolist())
        prompts = PrivilegedPrompts.joined([prompts_of(group) for group in range(GROUPS)])
        self.prompts = prompts.token_ids.split(prompts.lengths.tolist())

    def distributions(self, model: Any, prompt: Tensor, response: Tensor) -> Tensor:
        logits: Tensor = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        return (logits / TEMPERATURE).log_softmax(-1)

    def follow(self, share: float) -> None:
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.data.lerp_(theirs.data, share)

    def begin(self, step: int) -> None:
        """Compute the teacher's side before the updates of a step."""
        kind, every = self.section.teacher_weights, self.section.teacher_every
        if kind == "current" or (kind == "snapshot" and every and step > 1 and (step - 1) % every == 0):
            self.follow(1.0)
        responses = [sequence[PROMPT:] for sequence in self.sequences]
        with torch.no_grad():
            pairs = zip(self.prompts, responses, strict=True)
            self.taught = [self.distributions(self.teacher, prompt, response) for prompt, response in pairs]
            self.old = [self.distributions(self.student, s[:PROMPT], s[PROMPT:]) for s in self.sequences]

    def loss(self, half: tuple[int, ...]) -> Tensor:
        losses = []
        for i in half:
            response = self.sequences[i][PROMPT:]
            p, q, old = (
                self.distributions(self.student, self.sequences[i][:PROMPT], response),
                self.taught[i],
                self.old[i],
            )
            of_tokens = [x.gather(-1, response[:, None])[:, 0] for x in (p, q, old)]
            if self.section.name == "rlsd":
                sign = 1.0 if ADVANTAGES[i] > 0 else -1.0
                weights = [0.5 + 0.5 * min(max(float(x.exp()), 0.8), 1.2) for x in sign * (of_tokens[1] - of_tokens[2])]
                advantages = ADVANTAGES[i] * torch.tensor(weights)
            else:
                advantages = of_tokens[1] - of_tokens[2]
            if self.section.kind == "advantages" or self.section.divergence == "sampled_reverse_kl":
                ratio = (of_tokens[0] - of_tokens[2]).exp()
                losses.append(-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages))
            elif self.section.name == "opsd" and self.section.divergence == "forward_kl":
                losses.append((q.exp() * (q - p)).clamp(max=self.section.entry_clip).sum(-1))
            else:
                losses.append(divergence(self.section.divergence, p, q))
        return torch.cat(losses).mean()

    def update(self, half: tuple[int, ...]) -> tuple[float, dict[str, Tensor]]:
        self.optimizer.zero_grad()
        loss = self.loss(half)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.student.named_parameters() if p.grad is not None}
        self.optimizer.step()
        if self.section.teacher_weights == "average":
            self.follow(self.section.teacher_rate)
        return loss.item(), gradients


FORMS: dict[str, dict[str, Any]] = {
    "opsd": {"name": "opsd", "entry_clip": 0.01},
    "sdft": {"name": "sdft", "teacher_rate": RATE},
    "sdpo": {"name": "sdpo", "teacher_rate": RATE},
    "jsd": {"name": "opsd", "divergence": "jsd", "beta": 0.3, "teacher_weights": "current"},
    "snapshot": {"name": "opsd", "divergence": "reverse_kl", "teacher_every": 1},
    "rlsd": {"name": "rlsd"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "policy"
    build_tiny_llama(folder, seed=3)
    return folder


def gradients_rank(rank: int, world_size: int, *, config: Config) -> list[dict[str, Tensor]]:
    """Return the gradients of each update of two steps, in float64."""
    worker = built(config, rank, world_size)
    worker.engine.module.double()
    worker.engine._engine.allreduce_gradients = lambda *_, **__: None  # of one rank; DeepSpeed has none in float64
    for state in worker.engine._optimizer.state.values():
        state.update({name: moment.double() for name, moment in state.items()})
    found: list[dict[str, Tensor]] = []
    make_step = worker.step_optimizer

    def step_optimizer(divisor: float = 1.0) -> Any:
        found.append({name: p.grad.clone() for name, p in worker.engine.module.named_parameters()})
        return make_step(divisor)

    worker.step_optimizer = step_optimizer
    for step in (1, 2):
        train(worker, step)
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_a_loop_over_sequences(form: str, model: Path, gangs: Gangs, tmp_path: Path) -> None:
    config = config_of(FORMS[form], model, str(tmp_path), tokens=24, zero_stage=0)
    (found,) = gangs[1].run(gradients_rank, config=config)
    loop = Loop(model, FORMS[form])
    for update, gradients in enumerate(found):
        if update % 2 == 0:
            loop.begin(1 + update // 2)
        _, plain = loop.update(HALVES[update % 2])
        assert gradients.keys() == plain.keys()
        ours, theirs = (torch.cat([each[name].flatten() for name in plain]) for each in (gradients, plain))
        assert float(theirs.abs().max()) > 1e-3
        assert float((ours - theirs).abs().max()) <= 1e-6, update
        assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm()), update


LAYOUTS = [
    ({"zero_stage": 3}, "sdft"),
    ({"zero_stage": 3, "policy": {"lora": {"rank": 4}}}, "sdpo"),
    ({"zero_stage": 1}, "snapshot"),
    ({"zero_stage": 0, "sequence_parallel": 2}, "opsd"),
    ({"zero_stage": 2}, "rlsd"),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("layout", "form"), [LAYOUTS[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in LAYOUTS[1:])]
)
def test_two_ranks_learn_as_one(layout: dict[str, Any], form: str, model: Path, gangs: Gangs, tmp_path: Path) -> None:
    own = {"policy": layout["policy"]} if "policy" in layout else {}
    one = merged(gangs[1].run(train_rank, config=config_of(FORMS[form], model, str(tmp_path), **own)))
    shared = config_of(FORMS[form], model, str(tmp_path), tokens=24, workers=2, **layout)
    ranks = shared.cluster.roles.policy.data_parallel_ranks
    found = gangs[2].run(train_rank, config=shared)
    two = merged(found if ranks == 2 else [found[0], [{} for _ in found[1]]])
    assert_equal(one, two)


def resume_rank(rank: int, world_size: int, *, config: Config, folder: Path, resume: bool) -> list[Any]:
    """Train two steps and save, then a third; or load, and train the third."""
    worker = built(config, rank, world_size)
    if resume:
        worker.load(folder)
    else:
        train(worker, 1), train(worker, 2)
        worker.save(folder)
    return train(worker, 3)


def late_rank(rank: int, world_size: int, *, config: Config, folder: Path) -> list[dict[str, Tensor]]:
    """Return the trained weights after two steps, and the teacher's in step 4: unbroken, and from a checkpoint."""
    worker = built(config, rank, world_size)
    train(worker, 1), train(worker, 2)
    worker.save(folder)
    found = [{name: p.detach().clone() for name, p in worker.engine.module.named_parameters()}]
    for loads in (False, True):
        if loads:
            worker.load(folder)
        train(worker, 4)  # no response is taught in step 3, so the ranks get no batch
        found.append({name: copy.clone() for name, copy in worker.self_teacher.shadow.copies.items()})
    return found


@pytest.mark.timeout(600)
def test_a_snapshot_due_in_a_skipped_step_is_taken_in_the_next(model: Path, gangs: Gangs, tmp_path: Path) -> None:
    config = config_of(FORMS["snapshot"] | {"teacher_every": 2}, model, str(tmp_path), zero_stage=0)
    ((due, *teachers),) = gangs[1].run(late_rank, config=config, folder=tmp_path / "checkpoint")
    for teacher in teachers:
        assert {name.removeprefix("model.") for name in teacher} == {name.removeprefix("model.") for name in due}
        assert all(torch.equal(a, b) for a, b in zip(teacher.values(), due.values(), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("form", ["sdft", "snapshot"])
def test_a_resumed_teacher_is_the_saved_teacher(
    stage: int, form: str, model: Path, gangs: Gangs, tmp_path: Path
) -> None:
    algorithm = FORMS[form] | ({"teacher_every": None} if form == "snapshot" else {})
    config = config_of(algorithm, model, str(tmp_path), workers=2, zero_stage=stage)
    how: dict[str, Any] = {"folder": tmp_path / "checkpoint"}
    unbroken = merged(gangs[2].run(resume_rank, config=config, resume=False, **how))
    assert merged(gangs[2].run(resume_rank, config=config, resume=True, **how)) == unbroken
    alone = config_of(algorithm, model, str(tmp_path), workers=1, zero_stage=0)
    assert_equal(merged(gangs[1].run(resume_rank, config=alone, resume=True, **how)), unbroken)
