"""`python -m tests.parity.run FILE`: compare our equations with the results of libraries on the same inputs.

A line per case, in the file's order:
    ok NAME                        every expected value, gradients included, is within the case's tolerance
    differs NAME max_error=E (KEY) the largest difference and the name of the value
    refused NAME: MESSAGE          our function rejects the input on purpose
    unsupported NAME               no equivalent here, or a parameter ignored by our answer (--why says which)
and a last line with the counts. Cases without expected values only lend inputs. The exit code is 0 if no case differs,
1
if a case differs, 2 if the file is no file of cases.
"""

from __future__ import annotations

import argparse
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
from tests.parity.case import Arguments, Case, Unsupported, largest_error

OBJECTIVES = Path(rlhf.objectives.__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of a case."""

    name: str
    kind: Literal["ok", "differs", "refused", "unsupported"]
    detail: str = ""

    def line(self, *, why: bool = False) -> str:
        """As printed."""
        if self.kind == "refused":
            return f"refused {self.name}: {self.detail}"
        if self.kind == "differs" or (self.kind == "unsupported" and why):
            return f"{self.kind} {self.name} {self.detail}"
        return f"{self.kind} {self.name}"


def load(path: Path) -> list[Case]:
    """Return the cases of a file. OSError or ValueError if the file is unreadable or in a different format."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    listed = stored.get("cases") if isinstance(stored, dict) else stored
    if not isinstance(listed, list):
        raise ValueError("expected a list of cases, or an object with the key cases")
    try:
        return [Case.from_json(case) for case in listed]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"a case lacks or mistypes {error}") from error


def judge(cases: Sequence[Case]) -> Iterable[Verdict]:
    """Yield a verdict for each case with expected values."""
    others = {case.name: case for case in cases}
    return (judge_one(case, others) for case in cases if case.expected)


def judge_one(case: Case, others: dict[str, Case]) -> Verdict:
    """Run the case's adapter and compare all expected values."""
    adapter = ADAPTERS.get((case.peer, case.function))
    if adapter is None:
        return Verdict(name=case.name, kind="unsupported", detail=f"no adapter for {case.peer} {case.function}")
    arguments = Arguments(case, others)
    try:
        outputs = adapter(arguments)
        unanswered = [f"expected.{key}" for key in case.expected if key not in outputs]
        if ignored := arguments.unread() + unanswered:
            return Verdict(name=case.name, kind="unsupported", detail=f"{', '.join(ignored)} ignored")
        tol = {**case.tol, "atol": case.tol["atol"] + arguments.rounding}
        errors = {key: largest_error(outputs[key], value, tol) for key, value in case.expected.items()}
    except Unsupported as error:
        return Verdict(name=case.name, kind="unsupported", detail=str(error))
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and raised_by_objectives(error):
            return Verdict(name=case.name, kind="refused", detail=str(error))
        return Verdict(name=case.name, kind="differs", detail=f"max_error=inf ({type(error).__name__}: {error})")
    if all(close for _, close in errors.values()):
        return Verdict(name=case.name, kind="ok")
    worst = max((key for key in errors if not errors[key][1]), key=lambda key: errors[key][0])
    return Verdict(name=case.name, kind="differs", detail=f"max_error={errors[worst][0]:.3g} ({worst})")


def raised_by_objectives(error: ValueError) -> bool:
    """Return whether a line of rlhf.objectives raised the error, not torch underneath."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(OBJECTIVES)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity.run", description="Compare with golden values.")
    parser.add_argument("file", type=Path, help="a JSON file of cases")
    parser.add_argument("--why", action="store_true", help="say why a case is unsupported")
    arguments = parser.parse_args(argv)
    try:
        cases = load(arguments.file)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{arguments.file}: {reason(error)}\n")
        return 2
    counts: Counter[Any] = Counter()
    for verdict in judge(cases):
        counts[verdict.kind] += 1
        sys.stdout.write(verdict.line(why=arguments.why) + "\n")
    sys.stdout.write(
        f"{counts['ok']} ok, {counts['differs']} differ, "
        f"{counts['refused']} refused, {counts['unsupported']} unsupported\n"
    )
    return 1 if counts["differs"] else 0


def reason(error: OSError | ValueError) -> str:
    """Return the message as a single line."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"not valid JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)


if __name__ == "__main__":
    sys.exit(main())
