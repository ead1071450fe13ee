"""TRL's packing of sequences into rows of equal length, and where verl's responses end."""

from __future__ import annotations

import torch

from rlhf.data.packing import pack
from tests.parity.case import Adapter, Arguments, Outputs, Ragged


def trl_pack(arguments: Arguments) -> Outputs:
    """Pack whole sequences, each cut at the size of a bin (`bfd`), fragments (`bfd_split`), or tokens (`wrapped`).

    TRL lists the runs of a bin in the order of their placement.
    """
    lengths, size = [len(sequence) for sequence in arguments.raw("input_ids")], int(arguments.number("seq_length"))
    strategy, packed = arguments.param("strategy", "bfd"), {}
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    if strategy == "wrapped":
        bins: Ragged = pack([1] * sum(lengths), max_tokens=size)
    else:
        runs = [
            (start + offset, min(size, length - offset))
            for start, length in zip(starts, lengths, strict=True)
            for offset in range(0, length, {"bfd": length, "bfd_split": size}[strategy] or 1)
        ]
        sizes = [length for _, length in runs]
        members = [sorted(row, key=lambda i: (-sizes[i], i)) for row in pack(sizes, max_tokens=size)]
        bins = [[place for i in row for place in range(runs[i][0], sum(runs[i]))] for row in members]
        packed["seq_lengths"] = [[sizes[i] for i in row] for row in members]
    for name in arguments.case.inputs:
        column = [token for sequence in arguments.raw(name) for token in sequence]
        packed[name] = [[column[place] for place in places] for places in bins]
    return packed


def verl_response_mask(arguments: Arguments) -> Outputs:
    """Mask the tokens after the first end token."""
    marks = torch.isin(arguments.integers("response_id"), torch.tensor(arguments.param("eos_token")))
    return {"mask": (marks.cumsum(-1) - marks.long() == 0).to(arguments.dtype)}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("trl", "pack_dataset"): trl_pack,
    ("verl", "get_response_mask"): verl_response_mask,
}
