"""Train adapters on the ranks of a gang by real DeepSpeed engines, for tests/integration/test_adapter_ranks.py."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.adapters import AdamStep, AdapterCall, AdapterShape, LossReport, LossRows, NamedLoss
from rlhf.config.adapter_ranks import ranks_config
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.model import PolicyConfig
from rlhf.config.schema.root import Config
from rlhf.config.schema.run import RunConfig
from rlhf.data.packing import balance
from rlhf.engine.swapping import MOMENTS, WholeState
from rlhf.errors import UserError
from rlhf.models.files.weights import saved_name
from rlhf.types import Examples, MinibatchPlan
from rlhf.workers.adapters.adapter_worker import AdapterWorker, merged_report
from rlhf.workers.offline.supervised import SupervisedWorker
from tests.integration.rank_gang import place_of

SHAPES = {
    "one": AdapterShape(rank=4, seed=1),
    "two": AdapterShape(rank=8, alpha=16.0, mlp=False, seed=2),
    "three": AdapterShape(rank=3, attention=False, seed=3),
    "four": AdapterShape(rank=8, seed=4),
}
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "grad_clip": 0.5}
LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo")
Call = tuple[str, str, int]  # adapter, what, number


def config_of(model: str, *, ranks: int, stage: int, dtype: str, whole: bool = False) -> Config:
    lora = None if whole else {"rank": 8}
    policy = PolicyConfig.model_validate({"model": model, "dtype": dtype, "lora": lora})
    cluster = ClusterConfig.model_validate(
        {"device": "cpu", "roles": {"policy": {"workers": ranks, "zero_stage": stage}}}
    )
    return ranks_config(policy, RunConfig(name="tenants"), cluster, max_tokens_per_microbatch=64)


def worker_of(model: str, rank: int, ranks: int, *, stage: int = 0, dtype: str = "float32") -> AdapterWorker:
    config = config_of(model, ranks=ranks, stage=stage, dtype=dtype)
    worker = AdapterWorker(config, replace(place_of(rank, ranks), longest_sequence=40), optimizer_steps=1)
    worker.build()
    return worker


def rows_of(number: int, loss: str = "cross_entropy") -> LossRows:
    """Return 1 to 5 random rows with the columns of a loss."""
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(1, 30, (1 + number % 5,), generator=generator)
    shape = (int(lengths.sum()), 1 if loss == "gspo" else 1 + number % 2)
    columns: dict[str, Tensor] = {"weights": torch.rand(shape, generator=generator)}
    if loss != "cross_entropy":
        columns["advantages"] = torch.rand(shape, generator=generator) - 0.5
        columns["logprobs"] = -torch.rand(shape, generator=generator) - 5.0
    if loss == "gspo":
        columns["sequence_ratio_mask"] = torch.ones(shape)
    tokens, targets = (torch.randint(250, size, generator=generator) for size in (shape[:1], shape))
    return LossRows(token_ids=tokens, lengths=lengths, targets=targets, columns=columns)


def step_of(number: int) -> AdamStep:
    draw = random.Random(number)
    return AdamStep(
        lr=draw.choice([0.0, 1e-3, 1e-2]),
        betas=(draw.choice([0.0, 0.9]), draw.choice([0.95, 0.999])),
        weight_decay=draw.choice([0.0, 0.1]),
        grad_clip=draw.choice([None, 1.0]),
    )


def random_calls(count: int, *, seed: int) -> list[Call]:
    draw = random.Random(seed)
    kinds = ["train"] * 5 + ["forward"] * 2 + ["step"] * 3 + ["bad", "drop", "state", "probe"]
    return [(draw.choice(list(SHAPES)), draw.choice(kinds), number) for number in range(count)]


def results_of(worker: AdapterWorker, calls: Sequence[Call], folder: Path) -> dict[str, list[Any]]:
    """Make the calls in order. Return the results of each adapter's calls, and each adapter's state at the end."""
    names = [name for name in SHAPES if any(call[0] == name for call in calls)]
    found: dict[str, list[Any]] = {name: [] for name in names}
    for name in names:
        worker.create(name, SHAPES[name])
    for name, kind, number in calls:
        found[name].append(_result(worker, name, kind, number, folder))
    for name in names:
        found[name].append(worker.swapping.whole(worker.adapters[name].tenant))
        worker.remove(name)
    return found


def _result(worker: AdapterWorker, name: str, kind: str, number: int, folder: Path) -> Any:
    loss = LOSSES[number % len(LOSSES)]
    try:
        match kind:
            case "train" | "forward":
                rows, named = rows_of(number, loss), NamedLoss(name=loss)
                report = worker.forward_backward(name, rows, named, forward_only=kind == "forward")
                return joined(worker, [report])
            case "bad":
                rows = replace(rows_of(number), columns={"weights": torch.full((1, 1), torch.nan)})
                return worker.forward_backward(name, rows, NamedLoss(name="cross_entropy"))
            case "step":
                return worker.step_adapter(name, step_of(number))
            case "drop":
                return worker.drop_gradient(name, "the client asked")
            case "probe":
                return worker.probe_adapter(name, [1, 2, 3, 4 + number % 100])
            case _:  # leaves and comes back, also with another tenant between
                worker.save_adapter(name, folder / name)
                dist.barrier()
                worker.load_adapter(name, folder / name, optimizer=number % 3 > 0)
                return dist.barrier()
    except UserError as error:
        return str(error)


def joined(worker: AdapterWorker, reports: list[Any]) -> LossReport:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, reports[0])
    return merged_report(parts)


def same(one: Any, two: Any) -> bool:
    """Compare results bit for bit."""
    if isinstance(one, LossReport):
        return one.loss == two.loss and one.metrics == two.metrics and torch.equal(one.logprobs, two.logprobs)
    if isinstance(one, WholeState):
        pairs = [(one.weights, two.weights), *((one.moments[m], two.moments[m]) for m in MOMENTS)]
        return one.steps == two.steps and all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)
    return bool(one == two)


def interleaved(
    rank: int, ranks: int, *, model: str, stage: int, dtype: str, count: int, folder: Path
) -> dict[str, tuple[int, int, int]]:
    """Run random calls of all adapters, and then of each adapter alone. Return for each adapter the numbers of
    results, of different results, and of nonzero padding."""
    worker = worker_of(model, rank, ranks, stage=stage, dtype=dtype)
    calls = random_calls(count, seed=stage)
    together = results_of(worker, calls, folder)
    summary = {}
    for name, results in together.items():
        alone = results_of(worker, [call for call in calls if call[0] == name], folder)[name]
        different = sum(not same(*pair) for pair in zip(results, alone, strict=True))
        state, shape = results[-1], SHAPES[name]
        padding = 0
        for values in (state.weights, *state.moments.values()):
            kept = worker.slot.padded(shape, worker.slot.trimmed(shape, values))
            padding += sum(int((values[key] != kept[key]).sum()) for key in values)
        summary[name] = (len(results), different, padding)
    return summary


def packed_against_turns(rank: int, ranks: int, *, model: str, dtype: str) -> dict[str, tuple[float, float, float]]:
    """Compute calls of all adapters in packed passes and in turns, from equal trained adapters, in two rounds.

    Return for each adapter the largest difference of losses and log-probabilities, the norm of the difference of
    the gradients, and the norm of the gradient.
    """
    worker = worker_of(model, rank, ranks, dtype=dtype)
    of_rounds = [list(SHAPES), ["four", "two"], ["three", "one", "two"]]
    rounds = [
        [
            AdapterCall(adapter=name, rows=rows_of(9 * at + i, loss), loss=NamedLoss(name=loss))
            for i, name in enumerate(names)
            for loss in [LOSSES[(at + i) % len(LOSSES)]]
        ]
        for at, names in enumerate(of_rounds)
    ]
    reports: list[list[Any]] = []
    gradients: list[dict[str, Tensor]] = []
    for packs in (True, False):
        for name, shape in SHAPES.items():
            worker.create(name, shape)
            worker.forward_backward(name, rows_of(3), NamedLoss(name="cross_entropy"))
            worker.step_adapter(name, AdamStep(lr=0.02))
        found: list[Any] = []
        for calls in rounds:
            if packs:
                assert worker.can_pack()
                found += worker.forward_backward_packed(calls)
            else:
                found += [worker.forward_backward(call.adapter, call.rows, call.loss) for call in calls]
        reports.append([joined(worker, [one]) for one in found])
        gradients.append({})
        for name, adapter in list(worker.adapters.items()):
            worker.swapping.use(adapter.tenant)
            parts = [p.grad.flatten() for p in worker.engine.module.parameters() if p.grad is not None]
            gradients[-1][name] = worker.engine.all_reduce_sum(torch.cat(parts).double())
            assert worker.step_adapter(name, AdamStep(lr=0.02)) > 0.0
            worker.remove(name)
    summary = {}
    made = [call for calls in rounds for call in calls]
    for name in SHAPES:
        pairs = [pair for call, *pair in zip(made, *reports, strict=True) if call.adapter == name]
        assert all(one.metrics == two.metrics for one, two in pairs)
        errors = [abs(one.loss - two.loss) / max(1.0, abs(two.loss)) for one, two in pairs]
        errors += [float((one.logprobs - two.logprobs).abs().max()) for one, two in pairs]
        ours, theirs = (of[name] for of in gradients)
        summary[name] = (max(errors), float((ours - theirs).norm()), float(theirs.norm()))
    return summary


def against_supervised(rank: int, ranks: int, *, model: str, stage: int) -> tuple[float, float]:
    """Make two optimizer steps as a client and as a supervised run, on the same batches from the same weights.

    Return the largest difference of the weights, and the largest change of a weight by the steps.
    """
    supervised = supervised_of(model, rank, ranks, stage=stage)
    start = {name: weight.clone() for name, weight in supervised.engine.named_adapter_weights(torch.float32)}
    client = worker_of(model, rank, ranks, stage=stage)
    shape = AdapterShape(rank=8, alpha=supervised.model_config.lora.alpha)  # type: ignore[union-attr]
    client.create("mine", shape)
    blank = client.slot.initial(shape)
    state = WholeState(
        weights={name: start[saved_name(name)] for name in blank},
        moments={m: {name: torch.zeros_like(value) for name, value in blank.items()} for m in MOMENTS},
        steps=0,
    )
    client.adapters["mine"].tenant = client.swapping.made(state)
    train_both(supervised, client, ranks)
    ours = client.swapping.whole(client.adapters["mine"].tenant).weights
    theirs = {name: weight.clone() for name, weight in supervised.engine.named_adapter_weights(torch.float32)}
    difference = max(float((ours[name] - theirs[saved_name(name)]).abs().max()) for name in ours)
    change = max(float((theirs[name] - start[name]).abs().max()) for name in start)
    return difference, change


def supervised_of(model: str, rank: int, ranks: int, *, stage: int, whole: bool = False) -> SupervisedWorker:
    """Return a rank of a supervised run with the weights and settings of clients."""
    config = config_of(model, ranks=ranks, stage=stage, dtype="float32", whole=whole)
    train = config.train.model_copy(update=SETTINGS)
    place = replace(place_of(rank, ranks), longest_sequence=40)
    supervised = SupervisedWorker(config.model_copy(update={"train": train}), place, optimizer_steps=10)
    supervised.build()
    return supervised


def train_both(supervised: SupervisedWorker, client: AdapterWorker, ranks: int) -> None:
    """Make two steps of a supervised run, and of a client's model `mine`, on the same batches."""
    data = examples()
    supervised.load_data(data)
    for step in range(2):
        chosen = [2 * step, 2 * step + 1, 4]
        shares = balance(data.take(chosen).lengths.tolist(), ranks)  # as the controller's plan
        by_rank = tuple(tuple(chosen[row] for row in share) for share in shares)
        num_tokens = int(data.take(chosen).loss_mask.sum())
        plan = MinibatchPlan(sequences_by_rank=by_rank, num_tokens=num_tokens, num_sequences=len(chosen))
        supervised.update_on(plan)
        client.forward_backward("mine", as_rows(data.take(chosen), num_tokens), NamedLoss(name="cross_entropy"))
        client.step_adapter("mine", AdamStep(**SETTINGS))


def examples() -> Examples:
    generator, lengths = torch.Generator().manual_seed(0), torch.tensor([9, 21, 14, 30, 6])
    mask = torch.rand(int(lengths.sum()), generator=generator) < 0.6
    ends = lengths.cumsum(0)
    mask[ends - lengths], mask[ends - 1] = False, True
    token_ids = torch.randint(0, 250, (len(mask),), generator=generator)
    return Examples(sequence_ids=torch.arange(5), lengths=lengths, token_ids=token_ids, loss_mask=mask)


def as_rows(examples: Examples, num_tokens: int) -> LossRows:
    """Return a client's rows: all tokens but the last, and the next tokens as targets."""
    sequences = examples.token_ids.split(examples.lengths.tolist())
    masks = examples.loss_mask.split(examples.lengths.tolist())
    weights = torch.cat([mask[1:] for mask in masks]).float() / num_tokens
    return LossRows(
        token_ids=torch.cat([one[:-1] for one in sequences]),
        lengths=examples.lengths - 1,
        targets=torch.cat([one[1:] for one in sequences])[:, None],
        columns={"weights": weights[:, None]},
    )


def trained_and_exported(
    rank: int, ranks: int, *, model: str, stage: int, folder: Path
) -> tuple[list[float], WholeState, LossReport]:
    """Train an adapter, save and export, and go on. Return a probe, the state, and the report after the save."""
    worker = worker_of(model, rank, ranks, stage=stage)
    worker.create("three", SHAPES["three"])
    worker.create("one", SHAPES["one"])
    for number in range(4):
        worker.forward_backward("three", rows_of(number), NamedLoss(name="cross_entropy"))
        worker.forward_backward("one", rows_of(number), NamedLoss(name="cross_entropy"))
        worker.step_adapter("three", AdamStep(lr=0.02))
    worker.save_adapter("three", folder / "state")
    worker.export_adapter("three", folder / "peft")
    probe = worker.probe_adapter("three", range(1, 30))
    return probe, worker.swapping.whole(worker.adapters["three"].tenant), continued(worker)


def continued(worker: AdapterWorker) -> LossReport:
    worker.forward_backward("three", rows_of(7), NamedLoss(name="cross_entropy"))
    worker.step_adapter("three", AdamStep(lr=0.02))
    return joined(
        worker, [worker.forward_backward("three", rows_of(9), NamedLoss(name="cross_entropy"), forward_only=True)]
    )


def loaded(rank: int, ranks: int, *, model: str, stage: int, folder: Path) -> tuple[WholeState, LossReport, list[str]]:
    """Load the saved adapter into new ranks. Return the state, the report after a further step, and errors."""
    worker = worker_of(model, rank, ranks, stage=stage)
    worker.create("three", SHAPES["three"])
    worker.load_adapter("three", folder / "state", optimizer=True)
    state = worker.swapping.whole(worker.adapters["three"].tenant)
    errors = []
    worker.create("other", SHAPES["two"])
    for place in (folder / "state", folder / "peft", folder / "nothing"):
        try:
            worker.load_adapter("other", place, optimizer=False)
        except UserError as error:
            errors.append(str(error))
    return state, continued(worker), errors


def load_error(rank: int, ranks: int, *, model: str, shape: AdapterShape, folder: Path) -> str | None:
    worker = worker_of(model, rank, ranks)
    worker.create("mine", shape)
    try:
        worker.load_adapter("mine", folder, optimizer=True)
    except UserError as error:
        return str(error)
    return None


def faults(rank: int, ranks: int, *, model: str, stage: int) -> list[Any]:
    """Make a bad adapter fail in several ways beside a good adapter. Return the messages, and the norm of the good."""
    worker = worker_of(model, rank, ranks, stage=stage)
    for name in ("bad", "good"):
        worker.create(name, SHAPES["one"])
    good, bad = rows_of(3), rows_of(6, "importance_sampling")
    worker.forward_backward("good", good, NamedLoss(name="cross_entropy"))
    overflowing = {**bad.columns, "logprobs": torch.full_like(bad.columns["logprobs"], -2e3)}
    before = worker.swapping.whole(worker.adapters["bad"].tenant)

    def message(call: Any) -> str:
        try:
            call()
        except UserError as error:
            return str(error)
        return "no error"

    named, step = NamedLoss(name="importance_sampling"), AdamStep(lr=0.1)
    messages = [
        message(lambda: worker.step_adapter("bad", step)),
        message(lambda: worker.forward_backward("bad", replace(bad, columns=overflowing), named)),
        message(lambda: worker.forward_backward("bad", bad, named)),  # a later part of the same batch
        message(lambda: worker.step_adapter("bad", step)),
        message(lambda: worker.step_adapter("bad", step)),
        message(lambda: worker.forward_backward("bad", bad, named)),
        message(lambda: worker.create("good", SHAPES["one"])),
        message(lambda: worker.step_adapter("nobody", step)),
    ]
    unchanged = same(before, worker.swapping.whole(worker.adapters["bad"].tenant))
    first = message(lambda: worker.step_adapter("bad", step))
    norm = worker.step_adapter("good", step)
    return [*messages, first, unchanged, norm]
