"""Choose the data set of each turn: weighted interleaving, as even as whole items allow.

The stream uses this module. The order is pure arithmetic on weights, without items or random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


class Turns:
    """The endless order of turns of several sets.

    After any n turns, a set with share w (the set's weight among all weights) has had n * w turns, within less than one
    turn. Turn j of a set is due by (j + 1) / w and not given before j / w. The earliest deadline goes first, and the
    earlier set wins a tie. Earliest deadline first meets all deadlines of unit jobs on one processor (Liu and Layland,
    1973).

    Example: weights 2 and 1 give 0 0 1, 0 0 1, ...
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]  # exact decimal: 0.1 is a tenth
        scale = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        common = math.gcd(*whole)
        self._weights = [weight // common for weight in whole]
        self._period = sum(self._weights)
        self.counts = [0] * len(whole)  # number of turns of each set so far

    def next(self) -> int:
        """Return the set of the next turn, and count the turn."""
        turn = sum(self.counts)
        ready = (i for i, weight in enumerate(self._weights) if self.counts[i] * self._period < weight * (turn + 1))
        chosen = min(ready, key=lambda i: Fraction(self.counts[i] + 1, self._weights[i]))
        self.counts[chosen] += 1
        return chosen

    def go_to(self, turn: int) -> None:
        """Move to the state after `turn` turns. After whole periods each set has had exactly the set's share."""
        periods, rest = divmod(turn, self._period)
        self.counts = [weight * periods for weight in self._weights]
        for _ in range(rest):
            self.next()
