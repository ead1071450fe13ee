"""Measure a system from a run in turns, to simulate the same groups with different schedules.

    system = measured_system(config, read_metrics(folder), recorded_groups(folder), after=3)
    simulate(system, Schedule(max_staleness=1), steps=6, seed=0, warm_up=3)

The run has a single engine, which decodes all responses of a batch at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rlhf.config.derive import derive
from rlhf.config.schema.root import Config
from rlhf.errors import UserError
from rlhf.planning.lengths import Lengths
from rlhf.planning.system import RecordedGroup, System
from rlhf.tracking.run_folder.atomic import read_lines


def recorded_groups(folder: Path) -> tuple[RecordedGroup, ...]:
    """Return the groups of a run in order, from samples/. Groups are whole if tracking.samples_per_step allows."""
    groups = []
    for file in sorted((folder / "samples").glob("step_*.jsonl")):
        rows = [row for row in read_lines(file) if row["split"] == "train"]
        for _, samples in groupby(rows, key=lambda row: row["group_id"]):
            groups.append(RecordedGroup(lengths=tuple(row["response_tokens"] for row in samples)))
    return tuple(groups)


def measured_system(
    config: Config, rows: Sequence[Mapping[str, Any]], groups: Sequence[RecordedGroup], *, after: int
) -> System:
    """Return the system of a finished run in turns.

    The time of a batch's rollouts is fitted by base_s for each decoding step and each_s for each token. A token of a
    prompt takes each_s too, as for an engine bounded by arithmetic on a CPU.

    Args:
        rows: the run's metrics.
        groups: all groups of the run.
        after: number of first steps to leave out.
    """
    rollouts, engine = config.rollouts, config.cluster.roles.rollout
    assert rollouts is not None
    prompts, samples = rollouts.prompts_per_step, rollouts.samples_per_prompt
    if engine.workers > 1 or prompts * samples > engine.max_num_seqs:
        raise UserError("the rates of a run can be measured with one engine that decodes a whole batch at once")
    if any(len(group.lengths) != samples for group in groups):
        raise UserError(
            f"tracking.samples_per_step is {config.tracking.samples_per_step}, expected {prompts * samples}: the "
            "lengths of all responses are needed to measure the rates of a run"
        )
    steps = [row for row in rows if row["step"] > after]
    prompt_tokens = sum(row["rollouts/prompt_tokens/mean"] for row in steps) / len(steps)
    decoded = []
    for row in steps:
        batch = groups[(row["step"] - 1) * prompts : row["step"] * prompts]
        tokens = sum(sum(group.lengths) for group in batch) + prompts * prompt_tokens
        decoded.append((float(max(max(group.lengths) for group in batch)), tokens, row["time/rollouts_s"]))
    base_s, each_s = _fitted(decoded)
    sync_s = sum(row["time/weight_sync_s"] + row["time/probe_s"] for row in steps)
    trained_s = sum(row["time/step_s"] - row["time/rollouts_s"] for row in steps) - sync_s
    return System(
        lengths=Lengths(most=rollouts.max_response_tokens),
        recorded=tuple(groups),
        prompts_per_step=prompts,
        samples_per_prompt=samples,
        prompt_tokens=prompt_tokens,
        engines=1,
        gpus_per_engine=1,
        training_gpus=1,
        colocated=False,
        max_num_seqs=engine.max_num_seqs,
        base_s=base_s,
        each_s=each_s,
        train_tokens_per_s=sum(row["rollouts/tokens/total"] for row in steps) / trained_s,
        streamed_share=1.0 / derive(config).updates_per_step,
        sync_s=sync_s / len(steps),
        load_s=sync_s / len(steps) / 2,
        prefill_s=each_s,
        recomputes=rollouts.kv_after_update == "recompute",
    )


def _fitted(decoded: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Return the non-negative base_s and each_s fitted to (decoding steps, tokens, seconds) by least squares."""
    ss = sum(steps * steps for steps, _, _ in decoded)
    st = sum(steps * tokens for steps, tokens, _ in decoded)
    tt = sum(tokens * tokens for _, tokens, _ in decoded)
    sy = sum(steps * seconds for steps, _, seconds in decoded)
    ty = sum(tokens * seconds for _, tokens, seconds in decoded)
    determinant = ss * tt - st * st
    if determinant > 1e-9 * ss * tt:
        base_s, each_s = (sy * tt - ty * st) / determinant, (ty * ss - sy * st) / determinant
        if base_s >= 0.0 and each_s >= 0.0:
            return base_s, each_s
    alone = (0.0, ty / tt), (sy / ss, 0.0)
    return min(alone, key=lambda pair: sum((pair[0] * s + pair[1] * t - y) ** 2 for s, t, y in decoded))
