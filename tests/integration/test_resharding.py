"""Other ranks and other ZeRO stages continue checkpoints on real DeepSpeed, and unsuitable checkpoints are refused.

The loaded weights equal the saved weights bit for bit. Later steps differ only in rounding, since sums are
taken over different ranks and in a different order.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.engine.consolidation import load_trained_weights
from rlhf.engine.partitions import Sharding
from rlhf.engine.rank_files import write_snapshot
from rlhf.engine.tensor_files import write_tensors
from rlhf.errors import UserError
from rlhf.models.files.weights import initial_copies, weight_sources
from tests.integration import test_engine_adapters as adapters
from tests.integration.engine_training import OPTIMIZER, batch, distance, loss_of, make_engine, tiny_model, weights_of
from tests.integration.rank_gang import Gangs

pytestmark = pytest.mark.slow

SAVED_STEPS, MORE_STEPS = 2, 3
FROM_TO = {1: (2,), 2: (1, 2, 4), 4: (2,)}  # numbers of ranks, each with every stage
PAIRS = [
    (dtype, Sharding(ranks=ranks, zero_stage=stage))
    for dtype in (torch.float32, torch.bfloat16)
    for ranks in FROM_TO
    for stage in range(4)
    if dtype == torch.float32 or ranks < 4
]


def trained_further(engine: Any, rank: int, world_size: int, steps: range) -> list[float]:
    """Return the loss of each step over all ranks, before the update."""
    losses = []
    for step in steps:
        loss = engine.forward(loss_of, batch(step)[rank::world_size])
        engine.backward(loss, last=True)
        losses.append(float(engine.all_reduce_sum(loss.detach())))
        engine.step()
    return losses


def train_and_save(
    rank: int, world_size: int, *, stage: int, dtype: torch.dtype, folder: Path, name: str, snapshot: bool = False
) -> Any:
    """Return the saved weights, and the losses and weights of the unbroken run.

    snapshot: each rank takes a snapshot, and the checkpoint is made of snapshots.
    """
    engine = make_engine(stage, dtype, optimizer=replace(OPTIMIZER, name=name))
    trained_further(engine, rank, world_size, range(1, SAVED_STEPS + 1))
    torch.rand(1)  # so that the random state differs from a new engine's
    if snapshot:
        save_snapshots(engine, rank, SAVED_STEPS, folder)
    else:
        engine.save(folder)
    saved = weights_of(engine)
    losses = trained_further(engine, rank, world_size, range(SAVED_STEPS + 1, SAVED_STEPS + MORE_STEPS + 1))
    weights = weights_of(engine)
    engine.close()
    return saved, losses, weights


def save_snapshots(engine: Any, rank: int, steps: int, folder: Path) -> None:
    memory = folder.with_name("memory") / str(rank)
    memory.parent.mkdir(exist_ok=True)
    engine.open_snapshots(memory)
    engine.take_snapshot(steps)
    assert engine.newest_snapshot() == steps
    folder.mkdir(exist_ok=True)
    write_snapshot(memory, steps, folder, rank)
    torch.distributed.barrier()


def continued(rank: int, world_size: int, *, stage: int, dtype: torch.dtype, folder: Path, name: str) -> Any:
    """Return the loaded weights, and the losses and weights after more steps, or the reason of a refusal."""
    torch.manual_seed(17 + rank)
    engine = make_engine(stage, dtype, optimizer=replace(OPTIMIZER, name=name))
    state = torch.get_rng_state()
    own_draw = torch.rand(3)
    torch.set_rng_state(state)
    try:
        engine.load(folder)
        drew_own = torch.equal(torch.rand(3), own_draw)
        loaded = weights_of(engine)
        losses = trained_further(engine, rank, world_size, range(SAVED_STEPS + 1, SAVED_STEPS + MORE_STEPS + 1))
        return loaded, losses, weights_of(engine), drew_own
    except UserError as error:
        return str(error)
    finally:
        engine.close()


def named(value: Any) -> str:
    return f"{value.ranks}rank_stage{value.zero_stage}" if isinstance(value, Sharding) else str(value)


@pytest.mark.parametrize(
    ("dtype", "there", "snapshot"),
    [(*pair, False) for pair in PAIRS] + [(*pair, True) for pair in PAIRS if pair[1].ranks < 4],
    ids=named,
)
def test_other_ranks_and_stages_continue_the_run(
    gangs: Gangs, dtype: torch.dtype, there: Sharding, snapshot: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "folder": tmp_path / "saved", "name": "adamw"}
    unbroken = gangs[there.ranks].run(train_and_save, stage=there.zero_stage, snapshot=snapshot, **options)
    (saved, losses, weights), *_ = unbroken
    assert_consolidated(tiny_model(dtype), saved, options["folder"], dtype=dtype)
    for ranks in FROM_TO[there.ranks]:
        for stage in range(4):
            results = gangs[ranks].run(continued, stage=stage, **options)
            for rank, (loaded, losses_again, weights_again, drew_own) in enumerate(results):
                assert all(torch.equal(loaded[name], weight) for name, weight in saved.items()), (ranks, stage)
                assert drew_own == (rank >= there.ranks), (ranks, stage)
                if dtype == torch.float32:
                    # A sum over ranks in another order is off by 1e-7 of the gradient. Adam's moments keep it small.
                    assert losses_again == pytest.approx(losses, rel=1e-6), (ranks, stage)
                    torch.testing.assert_close(weights_again, weights, rtol=1e-4, atol=2e-6)
                else:  # bfloat16 gradients are off by 4e-3, and Adam still moves a weight by the learning rate
                    assert losses_again == pytest.approx(losses, rel=1e-2), (ranks, stage)
                    assert distance(weights_again, weights) < 0.2 * distance(weights, saved), (ranks, stage)


def assert_consolidated(module: Any, saved: Mapping[str, Any], folder: Path, *, dtype: torch.dtype) -> None:
    """Load a checkpoint into a whole model in this process, and compare the model with the weights of the ranks."""
    load_trained_weights(module, folder, dtype=dtype)
    whole = {name: weight for source in weight_sources(module) for name, weight in source.published()}
    assert whole.keys() == saved.keys()
    assert all(torch.equal(whole[name].to(weight.dtype), weight) for name, weight in saved.items())


ALIKE = [
    ("muon", Sharding(ranks=1, zero_stage=0), Sharding(ranks=2, zero_stage=0)),
    ("adafactor", Sharding(ranks=2, zero_stage=0), Sharding(ranks=1, zero_stage=0)),
    ("adafactor", Sharding(ranks=1, zero_stage=0), Sharding(ranks=4, zero_stage=0)),
    ("adamw_8bit", Sharding(ranks=2, zero_stage=0), Sharding(ranks=1, zero_stage=0)),
    ("adamw_8bit", Sharding(ranks=2, zero_stage=1), Sharding(ranks=2, zero_stage=2)),
    ("adamw_8bit", Sharding(ranks=2, zero_stage=2), Sharding(ranks=2, zero_stage=1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "there", "here"), ALIKE)
def test_states_of_several_weights_are_taken_over_whole(
    gangs: Gangs, name: str, there: Sharding, here: Sharding, dtype: torch.dtype, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "folder": tmp_path / "saved", "name": name}
    (saved, losses, weights), *_ = gangs[there.ranks].run(train_and_save, stage=there.zero_stage, **options)
    for loaded, losses_again, weights_again, _ in gangs[here.ranks].run(continued, stage=here.zero_stage, **options):
        assert all(torch.equal(loaded[key], weight) for key, weight in saved.items())
        assert losses_again == pytest.approx(losses, rel=1e-2)
        # Muon's products are in bfloat16, and 8-bit states round again: both amplify rounding of the gradient.
        assert distance(weights_again, weights) < 0.1 * distance(weights, saved)


def adapter_saved(
    rank: int, world_size: int, *, model: Path, kind: str, stage: int, folder: Path, snapshot: bool = False
) -> Any:
    engine = adapters.started(model, kind, stage)
    adapters.updated(engine, rank % 2, 1)
    if snapshot:
        save_snapshots(engine, rank, 1, folder)
    else:
        engine.save(folder)
    weights = weights_of(engine)
    engine.close()
    return weights


def adapter_continued(
    rank: int, world_size: int, *, model: Path, kind: str, stage: int, folder: Path, changed: bool = False
) -> Any:
    engine = adapters.started(model, kind, stage)
    if changed:
        adapters.change_base(engine)
    try:
        engine.load(folder)
        weights = weights_of(engine)
        adapters.updated(engine, rank % 2, 2)
        return weights
    except UserError as error:
        return str(error)
    finally:
        engine.close()


ADAPTERS = [("lora", 2, 3), ("lora", 3, 0), ("dora with embedding", 2, 3), ("4 bits", 1, 2)]
ADAPTERS += [("pissa", 3, 2), ("pissa", 2, 3)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.build_base(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1), (4, 2)], ids=str)
@pytest.mark.parametrize(("kind", "there", "here"), ADAPTERS)
def test_adapters(
    gangs: Gangs, base: Path, kind: str, there: int, here: int, ranks: tuple[int, int], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"model": base, "kind": kind, "folder": tmp_path / "saved"}
    saved, *_ = gangs[ranks[0]].run(adapter_saved, stage=there, **options)
    assert_consolidated(other_adapter(base, kind), saved, tmp_path / "saved", dtype=torch.float32)
    for loaded in gangs[ranks[1]].run(adapter_continued, stage=here, **options):
        assert all(torch.equal(loaded[name], weight) for name, weight in saved.items())
    if kind == "lora":
        for message in gangs[ranks[1]].run(adapter_continued, stage=here, changed=True, **options):
            assert "was trained on other frozen weights" in message
    if kind == "pissa" and there >= 2:
        options["folder"] = tmp_path / "of snapshots"
        saved, *_ = gangs[ranks[0]].run(adapter_saved, stage=there, snapshot=True, **options)
        assert_consolidated(other_adapter(base, "pissa"), saved, options["folder"], dtype=torch.float32)
        for loaded in gangs[ranks[1]].run(adapter_continued, stage=here, **options):
            assert all(torch.equal(loaded[name], weight) for name, weight in saved.items())


def other_adapter(base: Path, kind: str) -> Any:
    """Return a model with a different adapter, also in the frozen copies of the initial state."""
    module = adapters.loaded(base, kind)
    with torch.no_grad():
        for parameter in (*filter(lambda p: p.requires_grad, module.parameters()), *initial_copies(module).values()):
            parameter.add_(0.01)
    return module


STATE = "state_00001.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path, dict[str, Any]], Any], str]] = {  # damage to a rank's file, or to the record
    "missing": (lambda file, record: file.unlink(), f"{STATE} cannot be read"),
    "truncated": (lambda file, record: os.truncate(file, 1000), f"{STATE} cannot be read"),
    "of another program": (
        lambda file, record: write_tensors(file, {"master 0": torch.zeros(5)}, {"states": {}}),
        "does not hold the state of 2 ranks at ZeRO stage 2: RuntimeError",
    ),
    "float16": (
        lambda file, record: record.update(dtype="float16"),
        "cannot be continued by this run: dtype float16 there, float32 here",
    ),
    "another model": (
        lambda file, record: record["groups"][0].popitem(),
        "is of another model: 1 trained weights are missing or have another size",
    ),
    "another size": (
        lambda file, record: record["groups"][1].update({next(iter(record["groups"][1])): 5}),
        "is of another model: 1 trained weights are missing or have another size",
    ),
    "another optimizer": (
        lambda file, record: record.update(optimizer="muon"),
        "has the states of train.optimizer muon, not of adamw",
    ),
    "no groups": (
        lambda file, record: record.pop("groups"),
        "engine.json does not hold the state of a training engine: groups: Field required",
    ),
    "no stage": (
        lambda file, record: record.update(zero_stage=4),
        "engine.json does not hold the state of a training engine: zero_stage: Input should be",
    ),
}


def test_what_cannot_be_continued(gangs: Gangs, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "name": "adamw", "stage": 2}
    gangs[2].run(train_and_save, folder=tmp_path / "saved", **options)
    for how, (damage, message) in DAMAGES.items():
        folder = shutil.copytree(tmp_path / "saved", tmp_path / how)
        record = json.loads((folder / "engine.json").read_text())
        damage(folder / STATE, record)
        (folder / "engine.json").write_text(json.dumps(record))
        (said,) = gangs[1].run(continued, folder=folder, **options)
        assert message in said, how
