"""Sync the weights to the engines and verify the result.

    publish (trainer) -> send and receive, together -> probe

Three checks can each stop the run. The engines' version must be the published version, and the checksum of the bytes
read must match the bytes written (the rollout role checks both). Trainer and engine must agree on the logprobs of a
fixed probe, which has an image if the prompts have images. The first sync of a start also exchanges the probe's images,
so that a policy or an engine that sees no images is noticed. A shared GPU passes from trainer to engine between the two
probes: the trainer's probe needs the weights there, the engine's probe the cache. An engine that replaces a lost engine
between two syncs passes the same checks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from rlhf.errors import RunError, WorkerLost
from rlhf.roles import Metrics, PolicyProbe, PolicyRole, RolloutRole
from rlhf.tracking.metrics.reductions import Last, Max, Reduction, Sum
from rlhf.vision.sight import image_effect, refuse_blindness

# Largest accepted mean |difference| per token between kernels of one dtype. In bfloat16, correct engines differ by
# about 0.04; one stale matrix after a large update gives 0.4 or more. Rounding hides small updates, but version and
# checksum detect them.
PROBE_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15}
# Rounding in bfloat16 grows with the log-probabilities: 2.2 to 2.7 % of the mean, for adapters under which the probe's
# text was unlikely (-3.2 to -8.9 nats per token). Twice this share is accepted.
PROBE_SHARE = {"float32": 0.0, "bfloat16": 0.05}
LOSS_SHOWS_WITHIN_S = 4.0  # after the trainers' or the engines' end of a transfer failed


async def sync_weights(
    policy: PolicyRole,
    rollout: RolloutRole,
    *,
    version: int,
    probe_ids: Sequence[int],
    dtype: str,
    hand_over: Callable[[], Awaitable[None]],
    other_ids: Sequence[int] = (),
) -> tuple[str, Metrics]:
    """Send the policy's weights to the engines. RunError: the engines hold different weights afterwards. Return the
    checksum and the metrics.

    Args:
        hand_over: is called when the policy no longer needs a shared GPU.
        other_ids: probe_ids with other images. RunError: policy or engines do not tell the images apart.
    """
    began = time.perf_counter()
    await rollout.withdraw_weights()
    manifest = await policy.publish(version)
    try:
        await _both(policy.send(manifest), rollout.update_weights(manifest))
    except RunError as error:
        await _show_loss(policy, error)
        raise
    await policy.settle()
    synced = time.perf_counter()
    logprobs = tuple(await policy.probe(probe_ids))  # sequential: both may share their cores
    other_logprobs = await policy.probe(other_ids) if other_ids else []
    await hand_over()
    probe = PolicyProbe(version=version, token_ids=tuple(probe_ids), logprobs=logprobs, dtype=dtype)
    worst = await _prove(policy, rollout, probe)
    checksum: str = manifest.checksum
    metrics: dict[str, Reduction] = {
        "weight_sync/version": Last(value=version),
        "time/weight_sync_s": Sum(total=synced - began),
        "time/probe_s": Sum(total=time.perf_counter() - synced),
    }
    if worst is not None:
        metrics["weight_sync/probe_max_diff"] = Max(value=worst)
    if other_ids:
        policy_effect = image_effect(logprobs, other_logprobs, probe_ids)
        engine_effect = await rollout.image_effect(probe_ids, other_ids)
        refuse_blindness(probe_ids, policy=policy_effect, engine=engine_effect)
        metrics["weight_sync/image_effect_policy"] = Last(value=policy_effect)
        if engine_effect is not None:
            metrics["weight_sync/image_effect_engine"] = Last(value=engine_effect)
    return checksum, metrics


async def _both(sending: Coroutine[Any, Any, None], receiving: Coroutine[Any, Any, None]) -> None:
    """Wait for the sender and the receivers. If both fail, raise the loss of a worker, because that loss made the
    second end fail."""
    ends = [asyncio.ensure_future(end) for end in (sending, receiving)]
    try:
        _, pending = await asyncio.wait(ends, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            await asyncio.wait(pending, timeout=LOSS_SHOWS_WITHIN_S)
        failures = [failure for end in ends if end.done() and (failure := end.exception()) is not None]
        if failures:
            raise min(failures, key=lambda failure: not isinstance(failure, WorkerLost))
    finally:
        for end in ends:
            end.cancel()


async def _prove(policy: PolicyRole, rollout: RolloutRole, probe: PolicyProbe) -> float | None:
    """Return the largest difference of the log-probabilities. If a lost rank of the policy keeps an engine's successor
    from getting the weights, raise the loss of the rank."""
    proving = asyncio.ensure_future(rollout.prove(probe))
    missing = asyncio.ensure_future(rollout.weights_are_missing())
    try:
        await asyncio.wait({proving, missing}, return_when=asyncio.FIRST_COMPLETED)
        if not proving.done():
            await policy.memory()
        return await proving
    finally:
        for wait in (proving, missing):
            wait.cancel()
        await asyncio.gather(proving, missing, return_exceptions=True)


async def _show_loss(policy: PolicyRole, error: RunError) -> None:
    """Raise the loss of a rank of the policy, if any: published weights in memory are gone with the first rank."""
    if not isinstance(error, WorkerLost):
        with suppress(TimeoutError):
            await asyncio.wait_for(policy.memory(), LOSS_SHOWS_WITHIN_S)


def check_probe(ours: Sequence[float], theirs: Sequence[float], *, engine: int, version: int, dtype: str) -> float:
    """Return the largest |difference| in nats. RunError: the mean exceeds numerical differences or is not finite."""
    return compare_probe(ours, theirs, who=f"weight sync to version {version}: rollout engine {engine}", dtype=dtype)


def compare_probe(ours: Sequence[float], theirs: Sequence[float], *, who: str, dtype: str) -> float:
    """Return the largest |difference| in nats, as `check_probe`. `who` names the engine in the error."""
    diffs = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    mean, size = sum(diffs) / len(diffs), sum(map(abs, ours)) / len(diffs)
    limit = max(PROBE_TOLERANCE[dtype], PROBE_SHARE[dtype] * size)
    if not mean <= limit:
        raise RunError(
            f"{who} computes different log-probabilities than the policy (mean difference {mean:.4f} nats over "
            f"{len(diffs)} probe tokens, at most {limit:.3g} is rounding in {dtype}). The engine's "
            "weights are not the policy's, so its samples are not used."
        )
    return max(diffs)
