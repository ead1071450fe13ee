"""Continue a checkpoint with a different number of ranks or a different ZeRO stage.

Each rank copies the rank's elements unchanged from the files of the ranks that wrote the checkpoint. The files are
mapped into memory, so a rank never holds more than the rank's state. DeepSpeed's universal checkpoints would need a
conversion on the disk, do not know stage 0, and run code when read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.engine.engine_record import EngineRecord
from rlhf.engine.partitions import Partition, Piece, Sharding, elements, partitions_of
from rlhf.engine.rank_state import RankState
from rlhf.engine.snapshot_checkpoint import SNAPSHOTS, read_snapshot
from rlhf.errors import RunError, UserError

TAG = "deepspeed"  # folder of DeepSpeed's files in a checkpoint
_BY_ELEMENT = "adamw"  # states have a value for each weight; other optimizers also have values of several


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFile:
    """The state of a rank in a checkpoint: the masters, and the optimizer's state of each master."""

    masters: Sequence[Tensor]
    states: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Neighbouring elements of a parameter: the place in a checkpoint's rank, and the place in this rank."""

    rank: int
    source: Piece
    target: Piece


def take_over(state: RankState, folder: Path, *, saved: EngineRecord, own: EngineRecord) -> None:
    """Replace this rank's state by the rank's part of a checkpoint. Collective.

    folder: holds DeepSpeed's files, or snapshots. Raise UserError for files that do not fit this engine.
    """
    refuse_other_weights(saved, own, folder)
    there, here = written_partitions(saved), partitions_of(own.groups, own.sharding)
    partition = here[dist.get_rank()]
    if tuple(master.numel() for master in state.masters()) != partition.sizes:
        raise RunError("DeepSpeed divides the trained weights in another way than this program expects.")
    alike = [there.index(one) if one in there else None for one in here]  # ranks with the same masters
    if own.optimizer != _BY_ELEMENT and None in alike:
        saved.refuse_other_decay(own, folder=folder.parent)
        raise UserError(
            f"{folder.parent} was written with {saved.sharding} and cannot be continued with {own.sharding}: "
            f"{own.optimizer} has states of several weights together, which cannot be sharded again. With this "
            "optimizer, only the number of ranks at stage 0 may change, or stage 1 to 2 and 2 to 1. Resume with the "
            "ranks and stage of the checkpoint."
        )
    read: Callable[[int], RankFile] = cache(partial(read_rank, folder, saved))
    values = state.values()
    with explains_damage(folder, saved), torch.no_grad():
        copy_elements(state, overlaps_of(partition, there), read, with_states=own.optimizer == _BY_ELEMENT)
        if own.optimizer != _BY_ELEMENT:
            values["states"] = _copy_states(state, read(alike[dist.get_rank()] or 0))
    values["counters"]["global_steps"] = saved.steps
    state.restore(values)


def written_partitions(saved: EngineRecord) -> list[Partition]:
    """Return the elements in the files of each rank. At stage 0 rank 0 writes, for all ranks."""
    written = saved.sharding if saved.zero_stage else Sharding(ranks=1, zero_stage=0)
    return partitions_of(saved.groups, written)


@contextmanager
def explains_damage(folder: Path, saved: EngineRecord) -> Iterator[None]:
    """Raise UserError if the block finds unexpected content in the files of the ranks."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder} does not hold the state of {saved.sharding}: {type(error).__name__}: {error}. Restore the "
            "folder from a copy, or resume from an earlier checkpoint."
        ) from error


def refuse_other_weights(saved: EngineRecord, own: EngineRecord, folder: Path) -> None:
    """Raise UserError if a checkpoint has the states of a different optimizer, or different trained weights."""
    if saved.optimizer != own.optimizer:
        raise UserError(
            f"{folder.parent} has the states of train.optimizer {saved.optimizer}, not of {own.optimizer}. Resume with "
            "that optimizer."
        )
    there, here = ({weight for group in r.groups for weight in group.items()} for r in (saved, own))
    if there != here:
        names = sorted({name for name, _ in there ^ here})
        raise UserError(
            f"{folder.parent} is of another model: {len(names)} trained weights are missing or have another size "
            f"there or here ({', '.join(names[:3])})."
        )


def overlaps_of(partition: Partition, there: Sequence[Partition]) -> Iterator[Overlap]:
    """Yield the elements of a partition as parts of the partitions in a checkpoint."""
    sources: defaultdict[str, list[tuple[int, Piece]]] = defaultdict(list)
    for rank, other in enumerate(there):
        for piece in other.pieces:
            sources[piece.parameter].append((rank, piece))
    for piece in partition.pieces:
        for rank, other_piece in sources[piece.parameter]:
            begin, end = max(piece.start, other_piece.start), min(piece.end, other_piece.end)
            if begin < end:
                yield Overlap(rank=rank, source=other_piece.within(begin, end), target=piece.within(begin, end))


def copy_elements(
    state: RankState, overlaps: Iterator[Overlap], read: Callable[[int], RankFile], *, with_states: bool
) -> None:
    """Copy the masters, together with the optimizer's states of each element."""
    masters, states = state.masters(), list(state.states().values())
    for overlap in overlaps:
        file, source, target = read(overlap.rank), overlap.source, overlap.target
        elements(masters[target.master], target).copy_(elements(file.masters[source.master], source))
        for key, value in states[target.master].items() if with_states else ():
            saved = file.states[source.master][key]
            if value.dim() == 0:  # the count of steps
                value.copy_(saved)
            else:
                elements(value, target).copy_(elements(saved, source))


def _copy_states(state: RankState, file: RankFile) -> dict[str, dict[str, Any]]:
    """Copy the optimizer's states of masters with the same elements. Return all values except tensors."""
    numbers: dict[str, dict[str, Any]] = {}
    for (name, own), saved in zip(state.states().items(), file.states, strict=True):
        ours, theirs = ({key: x for key, x in s.items() if torch.is_tensor(x)} for s in (own, saved))
        if {key: x.shape for key, x in ours.items()} != {key: x.shape for key, x in theirs.items()}:
            raise ValueError(f"the optimizer's {name} has other tensors")
        numbers[name] = {key: value for key, value in saved.items() if key not in theirs}
        for key, value in theirs.items():
            ours[key].copy_(value)
    return numbers


def read_rank(folder: Path, saved: EngineRecord, rank: int) -> RankFile:
    """Return the state of a rank. The tensors are read from the disk on use."""
    if folder.name == SNAPSHOTS:
        snapshot = read_snapshot(folder.parent, rank)
        return RankFile(masters=snapshot.masters, states=snapshot.states)
    from rlhf.engine.checkpoint_files import load_data  # imports DeepSpeed

    if saved.zero_stage == 0:
        content = load_data(folder / "mp_rank_00_model_states.pt", mapped=True)
        optimizer = content["optimizer"]
        if saved.dtype == "float32":  # the masters are the weights
            masters = [content["module"][f"module.{name}"] for group in saved.groups for name in group]
        else:
            masters = [master for group in optimizer["fp32_groups"] for master in group]
            optimizer = optimizer["optimizer_state_dict"]
    else:
        prefix = "bf16_" if saved.dtype == "bfloat16" else ""
        path = folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        content = load_data(path, mapped=True)["optimizer_state_dict"]
        if saved.zero_stage == 3:
            masters, optimizer = content["fp32_flat_groups"], content["optimizer_state_dict"]
        else:
            masters, optimizer = content["single_partition_of_fp32_groups"], content["base_optimizer_state"]
    return RankFile(masters=masters, states=[_flat(optimizer["state"][index]) for index in range(len(masters))])


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a master without the inner dictionary of bitsandbytes."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    return flat
