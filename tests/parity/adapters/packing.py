"""TRL's packing of sequences into rows of equal length, and where verl's responses end."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.data.packing import pack
from rlhf.objectives.masking import through_first
from tests.parity.case import Adapter, Arguments, Outputs


def trl_pack(arguments: Arguments) -> Outputs:
    """Whole sequences, or (`wrapped`) single tokens, as members of bins."""
    sequences, size = arguments.raw("input_ids"), arguments.whole("seq_length")
    strategy = arguments.choice("strategy", {"bfd": best_fit, "wrapped": single_tokens}, "bfd")
    bins, found = strategy([len(sequence) for sequence in sequences], size)
    for name in ("input_ids", "labels"):
        column = [token for sequence in arguments.raw(name) for token in sequence]
        found[name] = [[column[place] for place in places] for places in bins]
    return found


def best_fit(lengths: Sequence[int], size: int) -> tuple[list[list[int]], dict[str, list[list[int]]]]:
    """(tokens of each bin, lengths within it). TRL cuts what is too long, and lists a bin in the order of placement."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    kept = [min(length, size) for length in lengths]
    bins = [sorted(members, key=lambda i: (-kept[i], i)) for members in pack(kept, max_tokens=size)]
    tokens = [[place for i in members for place in range(starts[i], starts[i] + kept[i])] for members in bins]
    return tokens, {"seq_lengths": [[kept[i] for i in members] for members in bins]}


def single_tokens(lengths: Sequence[int], size: int) -> tuple[list[list[int]], dict[str, list[list[int]]]]:
    """A sequence ends in one bin and goes on in the next, where it sees what stands before it."""
    return pack([1] * sum(lengths), max_tokens=size), {}


def verl_response_mask(arguments: Arguments) -> Outputs:
    """Up to the first end token, one of one or several."""
    ends = arguments.param("eos_token", 2)
    ids = arguments.integers("response_id")
    return {"mask": through_first(torch.isin(ids, torch.tensor(ends))).to(arguments.dtype)}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("trl", "pack_dataset"): trl_pack,
    ("verl", "get_response_mask"): verl_response_mask,
}
