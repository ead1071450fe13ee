"""Credit the step rewards of a session's branches to the calls before them.

A session may have several sequences. A branch begins with tokens that another sequence trains, so a step that ends in
the branch must also be credited there. Responses of one sequence are left as they are.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rlhf.models.branches import Branch, PrefixTree
from rlhf.types import Rollouts


def with_branch_rewards(rewards: Float[Tensor, " N"], rollouts: Rollouts) -> Float[Tensor, " N"]:
    """Add the rewards of each branch to its trunk's last sampled token before the branch.

    The rewards to come of a shared token are then those of all sequences of its sample that begin with it.
    """
    result = rewards.clone()
    lengths = rollouts.lengths.tolist()
    starts = (rollouts.lengths.cumsum(0) - rollouts.lengths).tolist()
    for rows in _rows_by_sample(rollouts):
        branches = _branches(rollouts, [(starts[row], lengths[row]) for row in rows])
        for row, branch in reversed(list(zip(rows, branches, strict=True))):  # branches of a branch come after it
            place = _last_sampled(rollouts, [starts[row] for row in rows], branches, branch)
            if place is not None:
                result[place] += result[starts[row] : starts[row] + lengths[row]].sum()
    return result


def _rows_by_sample(rollouts: Rollouts) -> list[list[int]]:
    """Return the rows of each sample with several sequences."""
    rows: dict[int, list[int]] = {}
    for row, sample in enumerate(rollouts.sequence_ids.tolist()):
        rows.setdefault(sample, []).append(row)
    return [members for members in rows.values() if len(members) > 1]


def _branches(rollouts: Rollouts, spans: list[tuple[int, int]]) -> list[Branch | None]:
    """Return how each sequence of a sample branches off the sequences before it."""
    tree, branches = PrefixTree(), []
    for start, length in spans:
        tokens = rollouts.token_ids[start : start + length].numpy()
        first = int(rollouts.response_mask[start : start + length].int().argmax())
        branches.append(tree.branch(tokens, most=first))
        tree.add(tokens)
    return branches


def _last_sampled(
    rollouts: Rollouts, starts: list[int], branches: list[Branch | None], branch: Branch | None
) -> int | None:
    """Return the index in the batch of the last token before a branch that its trunks train. None: there is none."""
    while branch is not None:
        start = starts[branch.of]
        sampled = rollouts.response_mask[start : start + branch.length].nonzero()
        if len(sampled):
            return start + int(sampled[-1])
        branch = branches[branch.of]
    return None
