"""Throughput of `math_answer` in the reward pool, with responses mixed in that would hang a checker.

    python benchmarks/rewards.py [--checks 10000] [--processes 1 2] [--hostile-every 0 100]

Each group has eight responses to one prompt, scored as in a run: in reward processes with their limits. One in every
`--hostile-every` responses is an expression that nobody should evaluate. Each response must get a score: 1 if right,
and 0 if wrong or hostile.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from rlhf.extensions import CodeSource
from rlhf.rewards.processes.pool import RewardPool

GROUP = 8
LIMIT_S = 1.0
HOSTILE = ("$9^{9^{9^9}}$", "$100000000!$", "$\\binom{1000000}{500000}$", "$\\sum_{k=1}^{10^9} \\frac{1}{k!}$")
FORMS = (
    "so \\boxed{{{}}}", "The answer is {}.", "\\boxed{{\\frac{{{}}}{{1}}}}", "Therefore $x = {}$.", "#### {}",
)  # fmt: skip


def main() -> None:
    """Print the table. The exit code is 1 if a check had a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", type=int, default=10_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--hostile-every", type=int, nargs="+", default=[0, 100], help="0: none")
    parser.add_argument("--seed", type=int, default=0, help="of the answers and responses")
    arguments = parser.parse_args()
    sys.stdout.write("| processes | checks | hostile | seconds | checks / s | failures | wrong results |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|\n")
    bad = 0
    for processes in arguments.processes:
        for every in arguments.hostile_every:
            bad += measure(arguments.checks, processes=processes, hostile_every=every, seed=arguments.seed)
    sys.exit(1 if bad else 0)


def measure(checks: int, *, processes: int, hostile_every: int, seed: int) -> int:
    """Print one line. Return the number of checks that failed or had a wrong result."""
    groups = list(itertools.islice(make_groups(hostile_every, seed), checks // GROUP))
    source = CodeSource(path=None, name="math_answer", args={"limit_s": LIMIT_S})
    made = RewardPool([source], timeout_s=10.0, processes=processes)
    with closing(made) as pool, ThreadPoolExecutor(processes) as threads:
        began = time.monotonic()
        outcomes = list(threads.map(lambda group: pool.score(0, "p", group[0], {"answer": group[1]}), groups))
        seconds = time.monotonic() - began
    failures = sum(len(outcome.failures) for outcome in outcomes)
    wrong = sum(
        outcome.scores != expected for outcome, (_, _, expected) in zip(outcomes, groups, strict=True) if outcome.scores
    )
    hostile = sum(response in HOSTILE for responses, _, _ in groups for response in responses)
    count = len(groups) * GROUP
    sys.stdout.write(
        f"| {processes} | {count} | {hostile} | {seconds:.1f} | {count / seconds:.0f} | {failures} | {wrong} |\n"
    )
    sys.stdout.flush()
    return failures + wrong


def make_groups(hostile_every: int, seed: int) -> Iterator[tuple[list[str], str, tuple[float, ...]]]:
    """Return responses, the answer, and the scores that the responses must get."""
    draw = random.Random(seed)
    number = itertools.count(1)
    while True:
        answer = draw.randrange(2, 10_000)
        responses, scores = [], []
        for _ in range(GROUP):
            if hostile_every and next(number) % hostile_every == 0:
                responses.append(draw.choice(HOSTILE))
                scores.append(0.0)
                continue
            right = draw.random() < 0.5
            responses.append(draw.choice(FORMS).format(answer if right else answer + draw.randrange(1, 100)))
            scores.append(float(right))
        yield responses, str(answer), tuple(scores)


if __name__ == "__main__":
    main()
