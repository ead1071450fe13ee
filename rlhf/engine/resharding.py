"""Continue a checkpoint, also with a different number of ranks or a different ZeRO stage.

Each rank copies the rank's elements unchanged from the files of the ranks that wrote the checkpoint. The files are
mapped into memory, so a rank never holds more than the rank's state. DeepSpeed's own checkpoints are pickles. Its
universal checkpoints would need a conversion on the disk, and do not know stage 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.engine.engine_record import EngineRecord
from rlhf.engine.partitions import Partition, Piece, elements, partitions_of
from rlhf.engine.rank_files import RankFile, read_own, read_rank
from rlhf.engine.rank_state import RankState, Sharing, sharing_of
from rlhf.errors import RunError, UserError

_BY_ELEMENT = "adamw"  # states have a value for each weight; other optimizers also have values of several


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Neighbouring elements of a parameter: the place in a checkpoint's rank, and the place in this rank."""

    rank: int
    source: Piece
    target: Piece


def take_over(state: RankState, folder: Path, *, saved: EngineRecord, own: EngineRecord) -> None:
    """Replace this rank's state by the rank's part of a checkpoint. Collective.

    The bits are those of the checkpoint. UserError: the files are damaged, or do not fit this engine.
    """
    refuse_other_weights(saved, own, folder)
    rank, there, here = dist.get_rank(), written_partitions(saved), partitions_of(own.groups, own.sharding)
    has_shapes = [record.zero_stage == 0 for record in (saved, own)]  # the masters are flat at the other stages
    comparable = there if has_shapes[0] == has_shapes[1] else []
    alike = [comparable.index(one) if one in comparable else None for one in here]  # ranks with the same masters
    if own.optimizer != _BY_ELEMENT and None in alike:
        saved.refuse_other_decay(own, folder=folder)
        raise UserError(
            f"{folder} was written with {saved.sharding} and cannot be continued with {own.sharding}: "
            f"{own.optimizer} has states of several weights together, which cannot be sharded again. With this "
            "optimizer, only the number of ranks at stage 0 may change, or stage 1 to 2 and 2 to 1. Resume with the "
            "ranks and stage of the checkpoint."
        )
    read: Callable[[int], RankFile] = cache(partial(read_rank, folder))
    source, copies = alike[rank], state.copies()
    if source is None and tuple(master.numel() for master in state.masters()) != here[rank].sizes:
        raise RunError("DeepSpeed divides the trained weights in another way than this program expects.")
    if lacking := sorted(copies.keys() - read(0).tensors.keys()):
        raise UserError(
            f"{folder} has no {lacking[0]}, of {len(lacking)} copies of weights that this run needs. Resume with the "
            "saved values of algorithm.teacher_weights, policy.lora and policy.adapter, or start a new run."
        )
    with explains_damage(folder, saved), torch.no_grad():
        values = state.values()
        for name in values:
            sharing = sharing_of(name)
            if sharing is Sharing.SAME:
                values[name] = read(0).values[name]
            elif sharing is Sharing.UPDATED and source is not None:
                values[name] = read(source).values[name]
            elif sharing is Sharing.OWN and rank < saved.ranks:
                values[name] = read_own(folder, name, rank)
        tensors = {name: x for name, x in state.tensors().items() if sharing_of(name) is Sharing.UPDATED}
        if source is None:
            copy_elements(tensors, overlaps_of(here[rank], there), read)
        else:
            copy_same(tensors, read(source))
        for name, (copy, numel) in copies.items():
            parts = [read(part).tensors[name] for part in Sharing.DIVIDED.writers(saved.sharding)]
            copy_shared(parts, numel, begin=rank * copy.numel() if own.zero_stage == 3 else 0, target=copy)
        state.restore(values)
    state.spread_masters()


def written_partitions(saved: EngineRecord) -> list[Partition]:
    """Return the elements in the files of each rank."""
    return [partitions_of(saved.groups, saved.sharding)[rank] for rank in Sharing.UPDATED.writers(saved.sharding)]


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
            f"{folder} has the states of train.optimizer {saved.optimizer}, not of {own.optimizer}. Resume with "
            "that optimizer."
        )
    there, here = ({weight for group in r.groups for weight in group.items()} for r in (saved, own))
    if there != here:
        names = sorted({name for name, _ in there ^ here})
        raise UserError(
            f"{folder} is of another model: {len(names)} trained weights are missing or have another size "
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


def copy_same(tensors: Mapping[str, Tensor], file: RankFile) -> None:
    """Copy the masters and states of a rank with the same masters. ValueError: the file has other tensors."""
    for name, tensor in tensors.items():
        saved = file.tensors[name]
        if (saved.dtype, saved.shape) != (tensor.dtype, tensor.shape):
            raise ValueError(f"{name} is {saved.dtype} {list(saved.shape)}, not {tensor.dtype} {list(tensor.shape)}")
        tensor.copy_(saved)


def copy_elements(tensors: Mapping[str, Tensor], overlaps: Iterator[Overlap], read: Callable[[int], RankFile]) -> None:
    """Copy tensors with a value for each element of a master, such as the masters and AdamW's states, and counts."""
    of_master: defaultdict[str, list[tuple[str, str, Tensor]]] = defaultdict(list)
    for name, tensor in tensors.items():
        field, master, key = f"{name} ".split(" ", 2)
        of_master[master].append((field, key, tensor))
    for overlap in overlaps:
        file, source, target = read(overlap.rank), overlap.source, overlap.target
        for field, key, tensor in of_master[str(target.master)]:
            saved = file.tensors[f"{field} {source.master} {key}".rstrip()]
            if tensor.dim() == 0:  # the count of steps
                tensor.copy_(saved)
            else:
                elements(tensor, target).copy_(elements(saved, source))


def copy_shared(parts: Sequence[Tensor], numel: int, *, begin: int, target: Tensor) -> None:
    """Copy elements of a flat tensor from equal parts of the ranks, the last part padded, into a rank's tensor.

    numel: of the whole. begin: the first element of the target; padding in the target stays. ValueError: the parts are
    of another tensor.
    """
    size, flat = -(-numel // len(parts)), target.detach().view(-1)
    if any(part.numel() != size for part in parts):
        raise ValueError(f"a copy of {numel} elements is not in {len(parts)} parts of {parts[0].numel()} elements")
    for index, part in enumerate(parts):
        first = index * size
        low, high = max(begin, first), min(begin + len(flat), first + size, numel)
        if low < high:
            flat[low - begin : high - begin].copy_(part.view(-1)[low - first : high - first])
