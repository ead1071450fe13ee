"""Print a table at the end of a session: each fault, whether the run survived, and the time until the run was back at
work.
"""

from __future__ import annotations

import pytest

from tests.chaos.survival import Outcome

OUTCOMES = pytest.StashKey[list[Outcome]]()


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> list[Outcome]:
    """Return the outcomes of this session. Each test adds its outcomes."""
    return request.config.stash.setdefault(OUTCOMES, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = terminalreporter.config.stash.get(OUTCOMES, [])
    if found:
        terminalreporter.section("faults")
    for outcome in found:
        back = "-" if outcome.back_s is None else f"{outcome.back_s:.1f} s"
        word = "survived" if not outcome.contradictions else f"LOST: {outcome.contradictions[0].splitlines()[0]}"
        terminalreporter.write_line(f"{outcome.fault!s:60} {back:>8}  {word}")
