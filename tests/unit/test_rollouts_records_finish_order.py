"""Who was first in a race of requests: written down once, and read again by the same run alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.rollouts.records.finish_order import FinishOrderLedger, request_set_digest
from rlhf.types import GroupRequest, Prompt, Sampling

REQUESTS = [
    GroupRequest(
        group_id=i, prompt=Prompt(prompt_id=i, token_ids=(1, i), text="", columns={}), seeds=(7,), first_sequence_id=i
    )
    for i in range(3)
]
SAMPLING = Sampling(max_new_tokens=4)


def test_it_is_there_for_the_same_rewards_until_it_is_cleared(tmp_path: Path) -> None:
    ledger = FinishOrderLedger(tmp_path, rewards="f")
    assert ledger.get("race") is None
    ledger.put("race", [2, 0])
    ledger.put("other", [])
    assert FinishOrderLedger(tmp_path, rewards="f").get("race") == {0, 2}
    assert FinishOrderLedger(tmp_path, rewards="g").get("race") is None
    again = FinishOrderLedger(tmp_path, rewards="f")
    assert again.get("other") == frozenset()
    again.clear()
    assert again.get("race") is None
    assert not list(tmp_path.iterdir())


def test_lines_that_cannot_be_read_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    FinishOrderLedger(tmp_path, rewards="f").put("race", [1])
    path = tmp_path / "firsts.jsonl"
    path.write_bytes(b'{"race": 1}\n\xff\n[1]\n' + path.read_bytes() + path.read_bytes()[:-5])
    ledger = FinishOrderLedger(tmp_path, rewards="f")
    assert ledger.known == {"race": {1}}
    assert caplog.text.count("a line cannot be read; its batch is drawn again") == 4
    ledger.put("next", [3])
    assert FinishOrderLedger(tmp_path, rewards="f").known == {"race": {1}, "next": {3}}


def test_a_race_is_of_what_was_asked_by_which_weights_and_rule() -> None:
    found = {
        request_set_digest(requests, sampling, version=version, rule=rule)
        for requests, sampling, version, rule in [
            (REQUESTS, SAMPLING, 0, "2"),
            (REQUESTS[:2], SAMPLING, 0, "2"),
            ([replace(REQUESTS[0], seeds=(8,)), *REQUESTS[1:]], SAMPLING, 0, "2"),
            ([replace(REQUESTS[0], group_id=9), *REQUESTS[1:]], SAMPLING, 0, "2"),
            (REQUESTS, replace(SAMPLING, top_p=0.5), 0, "2"),
            (REQUESTS, SAMPLING, 1, "2"),
            (REQUESTS, SAMPLING, 0, "1"),
        ]
    }
    assert len(found) == 7
    assert request_set_digest(list(REQUESTS), SAMPLING, version=0, rule="2") in found
