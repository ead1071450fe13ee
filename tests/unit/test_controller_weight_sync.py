from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from rlhf.controller.weight_sync import check_probe, sync_weights
from rlhf.errors import RunError, WorkerLost
from rlhf.roles import PolicyProbe
from rlhf.tracking.metrics.reductions import Last
from tests.fakes.roles import FakeEngines, FakePolicy


def test_the_largest_difference_is_reported() -> None:
    found = check_probe([-1.0, -2.0], [-1.0005, -2.001], engine=0, version=1, dtype="float32")
    assert found == pytest.approx(0.001)


def test_rounding_grows_with_the_log_probabilities() -> None:
    ours = [-8.0, -10.0]  # in bfloat16 up to 5 % of the mean of 9, 0.45 nats
    assert check_probe(ours, [-8.4, -9.6], engine=0, version=1, dtype="bfloat16") == pytest.approx(0.4)
    with pytest.raises(RunError, match=r"mean difference 0.5000 nats over 2 probe tokens, at most 0.45 is rounding"):
        check_probe(ours, [-8.5, -9.5], engine=0, version=1, dtype="bfloat16")
    with pytest.raises(RunError, match=r"at most 0.002 is rounding in float32"):
        check_probe(ours, [-8.4, -9.6], engine=0, version=1, dtype="float32")


@pytest.mark.parametrize("theirs", [[-1.0, -2.4], [-1.0, math.nan]])
def test_other_weights_stop_the_run(theirs: list[float]) -> None:
    # mean difference 0.2 nats, or nan
    with pytest.raises(RunError, match="version 3: rollout engine 1 computes different log-probabilities"):
        check_probe([-1.0, -2.0], theirs, engine=1, version=3, dtype="bfloat16")


def sync(engines: Any) -> float | None:
    policy: Any = FakePolicy(engines.calls)

    async def hand_over() -> None:
        engines.calls.append("hand over")

    checksum, metrics = asyncio.run(
        sync_weights(policy, engines, version=4, probe_ids=[1, 2, 3], dtype="float32", hand_over=hand_over)
    )
    assert checksum == "ab"
    assert metrics["weight_sync/version"].result() == 4
    worst = metrics.get("weight_sync/probe_max_diff")
    return None if worst is None else worst.result()


def test_a_sync_is_proven() -> None:
    engines = FakeEngines(worst=-1.0005)
    assert sync(engines) == pytest.approx(0.0005)
    assert engines.loaded == [4]
    assert engines.calls == ["withdraw", "publish", "load", "settle", "policy's probe", "hand over", "engines' probe"]
    assert sync(FakeEngines(worst=None)) is None
    with pytest.raises(RunError, match="rollout engine 1"):
        sync(FakeEngines(worst=-1.5))


@pytest.mark.parametrize("first", ["sender", "receiver"])
def test_the_loss_of_one_end_is_told_before_the_failure_that_it_causes_at_the_other(first: str) -> None:
    lost = WorkerLost("lost", role="policy", rank=0, stage="weight sync", kind="died")

    async def fail(error: Exception, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        raise error

    engines: Any = FakeEngines()
    engines.update_weights = lambda _: fail(RunError("connection closed"), 0.0 if first == "receiver" else 0.02)
    policy: Any = FakePolicy(engines.calls)
    policy.send = lambda _: fail(lost, 0.0 if first == "sender" else 0.02)
    with pytest.raises(WorkerLost):
        asyncio.run(sync_weights(policy, engines, version=4, probe_ids=[1], dtype="float32", hand_over=policy.settle))


@pytest.mark.parametrize("is_lost", [True, False])
def test_engines_that_find_no_weights_show_the_loss_of_the_rank_that_had_sent_them(is_lost: bool) -> None:
    lost = WorkerLost("lost", role="policy", rank=0, stage="memory", kind="died")
    missing = RunError("No such file or directory")

    async def update_weights(manifest: int) -> None:
        raise missing

    async def memory() -> None:
        if is_lost:
            raise lost

    async def hand_over() -> None: ...

    engines: Any = FakeEngines()
    engines.update_weights = update_weights
    policy: Any = FakePolicy(engines.calls)
    policy.memory = memory
    with pytest.raises(RunError) as error:
        asyncio.run(sync_weights(policy, engines, version=4, probe_ids=[1], dtype="float32", hand_over=hand_over))
    assert error.value is (lost if is_lost else missing)


def test_a_proof_that_waits_for_the_weights_of_a_lost_rank_shows_its_loss() -> None:
    lost = WorkerLost("lost", role="policy", rank=0, stage="memory", kind="died")

    async def prove(probe: PolicyProbe) -> float:
        await asyncio.Event().wait()  # waits for an engine's successor, which finds no weights
        return 0.0

    async def weights_are_missing() -> None: ...

    async def memory() -> None:
        raise lost

    engines: Any = FakeEngines()
    engines.prove, engines.weights_are_missing = prove, weights_are_missing
    policy: Any = FakePolicy(engines.calls)
    policy.memory = memory
    with pytest.raises(WorkerLost):
        asyncio.run(sync_weights(policy, engines, version=4, probe_ids=[1], dtype="float32", hand_over=policy.settle))


@pytest.mark.parametrize(
    ("policy_moves", "engine_moves", "why"),
    [
        (0.5, 0.49, None),
        (0.5, None, None),  # no engine works now
        (0.0, 0.0, "the model cannot see its images"),
        (0.5, 0.0, "the engine cannot see its images"),
    ],
)
def test_a_start_ends_if_other_images_change_nothing(
    policy_moves: float, engine_moves: float | None, why: str | None
) -> None:
    """The probe is an image and two tokens behind; the policy's log-probabilities move with the image's key."""
    own, other = (-7, 1, 2), (-8, 1, 2)
    handed_over: list[str] = []

    async def probe(token_ids: Any) -> list[float]:
        assert not handed_over, "the GPU is the engine's already"
        return [-1.0, -1.0] if tuple(token_ids) == own else [-1.0 - policy_moves, -1.0 + policy_moves]

    async def effect(token_ids: Any, other_ids: Any) -> float | None:
        return engine_moves

    async def prove(probe: PolicyProbe) -> float:
        assert probe.logprobs == (-1.0, -1.0)
        return 0.0

    async def hand_over() -> None:
        handed_over.append("")

    engines: Any = FakeEngines()
    engines.prove, engines.image_effect = prove, effect
    policy: Any = FakePolicy(engines.calls)
    policy.probe = probe
    given: Any = {"version": 0, "probe_ids": own, "other_ids": other, "dtype": "float32", "hand_over": hand_over}
    if why is not None:
        with pytest.raises(RunError, match=why):
            asyncio.run(sync_weights(policy, engines, **given))
        return
    _, metrics = asyncio.run(sync_weights(policy, engines, **given))
    assert metrics["weight_sync/image_effect_policy"] == Last(value=pytest.approx(policy_moves))
    assert ("weight_sync/image_effect_engine" in metrics) == (engine_moves is not None)
