"""`python -m tests.parity.run FILE`: compare our equations with the results of libraries on the same inputs.

A line per case, in the file's order:
    ok NAME                        every expected value, gradients included, is within the case's tolerance
    differs NAME max_error=E (KEY) the largest difference and the name of the value
    refused NAME MESSAGE           our function rejects the input on purpose
    unsupported NAME REASON        no equivalent here, or a parameter ignored by our answer
and a last line with the counts. Cases without expected values only lend inputs. The exit code is 1 if a case differs.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import rlhf.objectives
from tests.parity.adapters import ADAPTERS
from tests.parity.case import Arguments, Case, largest_error

OBJECTIVES = Path(rlhf.objectives.__file__).parent


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a case."""

    kind: Literal["ok", "differs", "refused", "unsupported"]
    name: str
    detail: str = ""

    def line(self) -> str:
        return f"{self.kind} {self.name} {self.detail}".rstrip()


def load(path: Path) -> list[Case]:
    return [Case.from_json(case) for case in json.loads(path.read_text(encoding="utf-8"))["cases"]]


def judge(cases: Sequence[Case]) -> Iterable[Verdict]:
    """Yield a verdict for each case with expected values."""
    others = {case.name: case for case in cases}
    return (judge_one(case, others) for case in cases if case.expected)


def judge_one(case: Case, others: dict[str, Case]) -> Verdict:
    """Run the case's adapter and compare all expected values."""
    arguments = Arguments(case, others)
    try:
        outputs = ADAPTERS[case.peer, case.function](arguments)
        unanswered = [f"expected.{key}" for key in case.expected if key not in outputs]
        if ignored := arguments.unread() + unanswered:
            return Verdict("unsupported", case.name, f"{', '.join(ignored)} ignored")
        tol = {**case.tol, "atol": case.tol["atol"] + arguments.rounding}
        errors = {key: largest_error(outputs[key], value, tol) for key, value in case.expected.items()}
    except LookupError as error:
        return Verdict("unsupported", case.name, f"{error} unknown")
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and raised_by_objectives(error):
            return Verdict("refused", case.name, str(error))
        return Verdict("differs", case.name, f"max_error=inf ({type(error).__name__}: {error})")
    if all(close for _, close in errors.values()):
        return Verdict("ok", case.name)
    worst = max((key for key in errors if not errors[key][1]), key=lambda key: errors[key][0])
    return Verdict("differs", case.name, f"max_error={errors[worst][0]:.3g} ({worst})")


def raised_by_objectives(error: ValueError) -> bool:
    """Return whether a line of rlhf.objectives raised the error, not torch underneath."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(OBJECTIVES)


def main(path: str) -> int:
    counts: Counter[Any] = Counter()
    for verdict in judge(load(Path(path))):
        counts[verdict.kind] += 1
        sys.stdout.write(verdict.line() + "\n")
    ok, differ, refused, unsupported = (counts[kind] for kind in ("ok", "differs", "refused", "unsupported"))
    sys.stdout.write(f"{ok} ok, {differ} differ, {refused} refused, {unsupported} unsupported\n")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
