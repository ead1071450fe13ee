"""TRL's packing of sequences into rows of equal length, and where verl's responses end."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.data.packing import pack
from tests.parity.case import Adapter, Arguments, Outputs


def trl_pack(arguments: Arguments) -> Outputs:
    """Pack whole sequences (`bfd`), their fragments (`bfd_split`), or single tokens (`wrapped`) into bins."""
    sequences, size = arguments.raw("input_ids"), arguments.whole("seq_length")
    strategy = arguments.choice("strategy", {"bfd": truncated, "bfd_split": split, "wrapped": single_tokens}, "bfd")
    bins, packed = strategy([len(sequence) for sequence in sequences], size)
    for name in arguments.case.inputs:
        column = [token for sequence in arguments.raw(name) for token in sequence]
        packed[name] = [[column[place] for place in places] for places in bins]
    return packed


Packed = tuple[list[list[int]], dict[str, list[list[int]]]]  # tokens of each bin, and what else TRL returns


def truncated(lengths: Sequence[int], size: int) -> Packed:
    """Pack sequences, each cut at the size of a bin."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return best_fit(starts, [min(length, size) for length in lengths], size)


def split(lengths: Sequence[int], size: int) -> Packed:
    """Pack fragments of at most the size of a bin. No token is lost."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    fragments = [
        (start + offset, min(size, length - offset))
        for start, length in zip(starts, lengths, strict=True)
        for offset in range(0, length, size)
    ]
    return best_fit([start for start, _ in fragments], [length for _, length in fragments], size)


def best_fit(starts: Sequence[int], lengths: Sequence[int], size: int) -> Packed:
    """Pack runs of tokens. TRL drops empty runs, and lists the runs of a bin in the order of their placement."""
    kept = [(start, length) for start, length in zip(starts, lengths, strict=True) if length]
    sizes = [length for _, length in kept]
    bins = [sorted(members, key=lambda i: (-sizes[i], i)) for members in pack(sizes, max_tokens=size)]
    tokens = [[place for i in members for place in range(kept[i][0], sum(kept[i]))] for members in bins]
    return tokens, {"seq_lengths": [[sizes[i] for i in members] for members in bins]}


def single_tokens(lengths: Sequence[int], size: int) -> Packed:
    """Fill each bin to its size: a sequence may end in a bin and continue in the next."""
    return pack([1] * sum(lengths), max_tokens=size), {}


def verl_response_mask(arguments: Arguments) -> Outputs:
    """Mask the tokens after the first end token. The source may have one or several end tokens."""
    ends = arguments.param("eos_token", 2)
    ids = arguments.integers("response_id")
    marks = torch.isin(ids, torch.tensor(ends))
    return {"mask": (marks.cumsum(-1) - marks.long() == 0).to(arguments.dtype)}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("trl", "pack_dataset"): trl_pack,
    ("verl", "get_response_mask"): verl_response_mask,
}
