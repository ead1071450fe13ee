"""The tournament of the examples, as a client of a server with fake ranks and engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.loops import tournament
from tests.integration.test_tinker_client import KEY, Server


async def test_the_faster_player_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal players begin, and only the wins teach. The fakes have 12 tokens and large gradients."""
    rates = {"slow": 0.05, "fast": 0.2}
    monkeypatch.setattr(tournament, "KEY", KEY)
    monkeypatch.setattr(tournament, "RATES", rates)
    monkeypatch.setattr(tournament, "in_tokens", lambda _: ([[1, 2], [3, 4], [5, 1]], {1, 2, 3}))
    server = Server(tmp_path)
    try:
        await tournament.main(server.url, rounds=10)
    finally:
        server.kill()
    lines = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()]
    slow, fast = ([line for line in lines if line[2] == name] for name in rates)
    won, digits = ([[float(line[at]) for line in player] for player in (slow, fast)] for at in (4, -1))
    assert won[1][-1] > 2 * won[0][-1]
    assert abs(digits[1][0] - digits[0][0]) < 0.1
    assert digits[1][-1] > digits[1][0] + 0.1
