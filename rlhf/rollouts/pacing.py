"""Decide from measured durations how many groups in flight are requested ahead of training.

    sync      step s        sync      step s + 1    sync
      |  batch s + 1 is sampled |  batch s + 1 is trained |

A batch should be scored when the trainer takes the batch, so that the trainer never waits. A batch that is scored much
earlier was sampled by older weights than needed. So if the slowest group of a batch takes n steps, the batch is
requested n syncs before its training, with n from 1 to `max_staleness`. A request within a step gains nothing by
waiting, because the weights are the same until the next sync. If rollouts are slower than training, all allowed groups
are requested.

This module reads no clock. The caller measures durations on a clock that stops between steps, because an evaluation
delays both groups and training.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import chain

WINDOW = 16  # batches


class Pace:
    """The measured durations of the newest batches, and the resulting number of outstanding groups.

    num_outstanding: the groups of the batch that is trained next, and the groups ahead. Before any measurement, one
        batch is ahead.
    """

    def __init__(self, *, prompts_per_step: int, max_staleness: int, by_completion: bool) -> None:
        self._per_step, self._most = prompts_per_step, max_staleness
        self._by_completion = by_completion
        self._batches: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._is_warm = False
        self.num_outstanding = 2 * prompts_per_step

    def trained(self, group_s: Sequence[float], step_s: float, *, is_warm: bool) -> None:
        """Add the durations of a trained batch in seconds.

        Args:
            group_s: from the request of each group until the group was scored. A group that replaces a dropped group
                counts from the request of the dropped group.
            step_s: from the end of the wait for the batch until the engines had the next weights.
            is_warm: whether all groups were requested after the start. The first groups begin all at once with cold
                engines, or come from the store of a resumed run. The first warm batch replaces their durations.
        """
        if is_warm and not self._is_warm:
            self._batches.clear()
        if is_warm or not self._is_warm:
            self._batches.append(tuple(group_s))
        self._is_warm |= is_warm
        self._steps.append(step_s)
        if self._by_completion:
            ahead = groups_ahead([*chain(*self._batches)], self._steps, per_step=self._per_step, most=self._most)
        else:
            longest_s = [max(of_batch) for of_batch in self._batches]
            ahead = self._per_step * batches_ahead(longest_s, self._steps, most=self._most)
        self.num_outstanding = self._per_step + ahead


def batches_ahead(longest_s: Sequence[float], step_s: Sequence[float], *, most: int) -> int:
    """Return how many batches are requested before their training, in the order of prompts: from 1 to `most`.

    Args:
        longest_s: seconds of the slowest group of each recent batch.
        step_s: seconds of recent training steps.
    """
    return min(max(math.ceil(_long(longest_s) / _short(step_s)), 1), most)


def groups_ahead(group_s: Sequence[float], step_s: Sequence[float], *, per_step: int, most: int) -> int:
    """Return how many groups are requested ahead, in the order of completion: from one batch to `most` batches.

    Of the groups requested j steps before a batch is taken, the share p_j that needs longer than j steps is unfinished.
    A whole batch must be finished in addition: per_step * (1 + sum of p_j) groups, and two standard deviations of the
    sum.

    Args:
        group_s: seconds of recent groups.
        step_s: seconds of recent training steps.
        per_step: groups of a batch.
    """
    step = _short(step_s)
    shares = [sum(seconds > j * step for seconds in group_s) / len(group_s) for j in range(1, most + 1)]
    spread = math.sqrt(per_step * sum(share * (1.0 - share) for share in shares))
    return min(per_step + math.ceil(per_step * sum(shares) + 2.0 * spread), per_step * most)


def _long(seconds: Sequence[float]) -> float:
    """Return the second longest of at least eight durations, so that a single restart does not count, or the longest.

    A batch is slower than the second longest of 16 in 2 of 17 cases, and training then waits for the difference.
    """
    return sorted(seconds)[-2 if len(seconds) >= WINDOW // 2 else -1]


def _short(seconds: Sequence[float]) -> float:
    """Return the lower quartile of durations, so that an evaluation or a restart makes no step look longer."""
    return max(sorted(seconds)[len(seconds) // 4], 1e-9)
