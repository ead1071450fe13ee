"""Credit the step rewards of a session's branches to the earlier calls.

A session may have several sequences. A branch begins with tokens trained in another sequence, so a step that ends in
the branch must also be credited there. Responses of a single sequence do not change.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rlhf.data.prefix_tree import SharedPrefix
from rlhf.rollouts.records.spans import shared_in_sample
from rlhf.types import Rollouts


def with_branch_rewards(rewards: Float[Tensor, " N"], rollouts: Rollouts) -> Float[Tensor, " N"]:
    """Add the rewards of each branch to the trunk's last sampled token before the branch."""
    result = rewards.clone()
    lengths = rollouts.lengths.tolist()
    starts = (rollouts.lengths.cumsum(0) - rollouts.lengths).tolist()
    for rows in _rows_by_sample(rollouts):
        prefixes = shared_in_sample(rollouts.take(rows))
        for row, prefix in reversed(list(zip(rows, prefixes, strict=True))):  # a branch's branches come later
            place = _last_sampled(rollouts, [starts[row] for row in rows], prefixes, prefix)
            if place is not None:
                result[place] += result[starts[row] : starts[row] + lengths[row]].sum()
    return result


def _rows_by_sample(rollouts: Rollouts) -> list[list[int]]:
    """Return the rows of each sample with several sequences."""
    rows: dict[int, list[int]] = {}
    for row, sample in enumerate(rollouts.sequence_ids.tolist()):
        rows.setdefault(sample, []).append(row)
    return [members for members in rows.values() if len(members) > 1]


def _last_sampled(
    rollouts: Rollouts, starts: list[int], prefixes: list[SharedPrefix | None], prefix: SharedPrefix | None
) -> int | None:
    """Return the index in the batch of the last trained token of the trunks before a branch. None: there is no such
    token."""
    while prefix is not None:
        start = starts[prefix.of]
        sampled = rollouts.response_mask[start : start + prefix.length].nonzero()
        if len(sampled):
            return start + int(sampled[-1])
        prefix = prefixes[prefix.of]
    return None
