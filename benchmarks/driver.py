"""What the driver does for each rollout, and what each trainer rank receives. Engines, rewards and ranks are dummies.

    python benchmarks/driver.py [--rollouts 10000] [--tokens 256 2048 8192] [--ranks 1 4 16] [--mode in_turns]

The controller, the roles, the record and Ray are real. A dummy engine returns responses with `--tokens` tokens on
average; lengths go from half to one and a half times the average. A dummy reward worker returns scores, and a dummy
rank counts the bytes of received columns.

`us / rollout` is the processor time of all threads of the driver's process, over the rollouts of the run. `received` is
the bytes of a rank's columns over the bytes of the rank's own sequences, for the rank with the largest ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from actors.roles.gang import PolicyGang
from actors.roles.worker_pools import RewardWorkers
from actors.rollout.dispatch import EngineCapacity
from actors.rollout.engine_group import RolloutEngines
from rlhf.config.schema.root import Config
from rlhf.controller.learning import OnlineRoles
from rlhf.controller.loop import sparing_loaded_objects
from rlhf.controller.online import OnlineController
from rlhf.controller.record import RunRecord
from rlhf.controller.supervisor import Supervisor
from rlhf.data.stream import Stream
from rlhf.evaluation.results import Marking
from rlhf.roles import Arithmetic, Metrics
from rlhf.tracking.display.progress_live import open_progress
from rlhf.tracking.metrics.reductions import Mean, Sum
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.tracking.sinks.tracker import Tracker
from rlhf.types import BatchPlan, GroupRequest, GroupScores, MemoryReport, Prompt, RolloutInfo, Rollouts, Sampling
from rlhf.workers.frozen.reward import RewardSettings

GROUP, PROMPT_TOKENS = 8, 100
ENGINES, REWARD_WORKERS = 2, 2
DEADLINE_S = 300.0
PROBE_IDS = (1, 2, 3)
MODES: dict[str, dict[str, Any]] = {
    "in_turns": {},
    "pipelined": {"max_staleness": 1},
    "in_flight": {"max_staleness": 1, "weight_updates": "in_flight", "batch_order": "completion"},
}
NO_MEMORY = MemoryReport(rss_gib=0.0, gpu_gib=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A published version without weights."""

    version: int
    checksum: str = ""


class Worker:
    """Methods common to all dummies."""

    async def memory(self) -> MemoryReport:
        return NO_MEMORY


class Engine(Worker):
    """Returns responses, once the batch is released. Lengths go from a third of the maximum to the maximum."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.version = 0

    async def capacity(self) -> EngineCapacity:
        return EngineCapacity(cache_tokens=10**9, samples=10**6)

    async def hold(self) -> None:
        self.released.clear()

    async def release(self, num_requests: int) -> None:
        self.released.set()

    async def generate(
        self, request: GroupRequest, sampling: Sampling, version: int
    ) -> tuple[Rollouts, tuple[RolloutInfo, ...]]:
        await self.released.wait()
        return self._responses(request, sampling)

    async def answer(
        self, request: GroupRequest, sampling: Sampling, oldest: int
    ) -> tuple[Rollouts, tuple[RolloutInfo, ...]]:
        return self._responses(request, sampling)

    async def cancel(self, group_ids: Sequence[int]) -> None: ...

    async def update_weights(self, manifest: Manifest, version: int) -> Manifest:
        self.version = version
        return manifest

    async def probe(self, token_ids: tuple[int, ...]) -> list[float]:
        return [0.0] * (len(token_ids) - 1)

    def _responses(self, request: GroupRequest, sampling: Sampling) -> tuple[Rollouts, tuple[RolloutInfo, ...]]:
        most = sampling.max_new_tokens
        lengths = [random.Random(seed).randint(most // 3, most) for seed in request.seeds]
        mask = torch.cat([torch.arange(PROMPT_TOKENS + length) >= PROMPT_TOKENS for length in lengths])
        infos = tuple(
            RolloutInfo(
                sequence_id=request.first_sequence_id + sample,
                num_prompt_tokens=PROMPT_TOKENS,
                num_response_tokens=length,
                finish_reason="stop",
                min_version=self.version,
                max_version=self.version,
                mean_logprob=-1.0,
            )
            for sample, length in enumerate(lengths)
        )
        rollouts = Rollouts(
            sequence_ids=torch.tensor([info.sequence_id for info in infos]),
            lengths=torch.tensor(lengths) + PROMPT_TOKENS,
            token_ids=torch.arange(len(mask)),
            response_mask=mask,
            rollout_logprobs=torch.where(mask, -1.0, 0.0),
            versions=torch.where(mask, self.version, -1),
        )
        return rollouts, infos


class Rewarder(Worker):
    """Gives each response a score by its position."""

    def score(self, prompt: Prompt, rollouts: Rollouts, *_: Any) -> GroupScores:
        scores = tuple(float(sample % 2) for sample in range(len(rollouts.lengths)))
        return GroupScores(scores=scores, by_name={"place": scores}, errors=())

    def write_samples(self, path: Path, *_: Any) -> None: ...


class Rank(Worker):
    """Counts the columns that it receives."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.plan: BatchPlan | None = None
        self.step = 0
        self.received = self.share = 0

    def prepare(self, plan: BatchPlan, *parts: Rollouts) -> tuple[tuple[()], Metrics]:
        own = set(plan.sequences_of(self.rank))
        for part in parts:
            size = sum(getattr(part, field.name).nbytes for field in fields(part))
            tokens = zip(part.sequence_ids.tolist(), part.lengths.tolist(), strict=True)
            mine = sum(length for sequence_id, length in tokens if sequence_id in own)
            self.received += size
            self.share += size * mine // int(part.lengths.sum())
        self.plan = plan
        return (), {}

    def set_advantages(self, by_sequence: dict[int, float]) -> tuple[None, tuple[dict[int, float], Metrics]]:
        return None, (by_sequence, {})

    def update(self, minibatch: int) -> Metrics:
        assert self.plan is not None
        return {"update/loss/mean": Mean(total=0.0, count=1), "update/tokens/total": Sum(total=1.0)}

    def token_signals(self, sequences: tuple[int, ...]) -> tuple[None, int]:
        return None, 0

    def bytes(self) -> tuple[int, int]:
        """Return the bytes that the rank has received, and the bytes of the rank's own sequences."""
        return self.received, self.share

    def arithmetic(self) -> Arithmetic:
        return Arithmetic(flops_per_token=1.0, flops_per_token_and_length=0.0, peak_flops=1.0)

    def publish(self, version: int) -> Manifest:
        return Manifest(version=version)

    def send(self, manifest: Manifest) -> None: ...

    def settle(self) -> None: ...

    def probe(self, token_ids: tuple[int, ...]) -> list[float]:
        return [0.0] * (len(token_ids) - 1)

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    def take_snapshot(self, step: int) -> None:
        self.step = step

    def newest_snapshot(self) -> int | None:
        return self.step


class Dummies:
    """The actors of all roles, shared by the measurements."""

    def __init__(self, num_ranks: int) -> None:
        def actors(kind: Any, count: int, *args: Any, concurrency: int | None = None) -> list[Any]:
            remote = ray.remote(kind).options(num_cpus=0, max_concurrency=concurrency)
            return [remote.remote(*args) for _ in range(count)]

        self.engines = actors(Engine, ENGINES, concurrency=10_000)
        self.rewarders = actors(Rewarder, REWARD_WORKERS)
        self.ranks = [handle for rank in range(num_ranks) for handle in actors(Rank, 1, rank)]
        ray.get([h.memory.remote() for h in (*self.engines, *self.rewarders, *self.ranks)], timeout=DEADLINE_S)

    def roles(self) -> OnlineRoles:
        settings = RewardSettings(
            specs=(),
            tokenizer="",
            trust_remote_code=False,
            model=None,
            timeout_s=60.0,
            processes=4,
            memory_gib=1.0,
            max_tokens_per_microbatch=1,
        )
        return OnlineRoles(
            policy=PolicyGang(self.ranks, deadline_s=DEADLINE_S, one_host=True),
            rollout=RolloutEngines(self.engines, deadline_s=DEADLINE_S),
            reward=RewardWorkers(self.rewarders, settings=settings, deadline_s=DEADLINE_S),
        )

    def end(self) -> None:
        for handle in (*self.engines, *self.rewarders, *self.ranks):
            ray.kill(handle)


class MeasuredController(OnlineController):
    """Notes the driver's memory after each step."""

    rss_mib: tuple[float, ...] = ()

    async def train_step(self, step: int) -> None:
        await super().train_step(step)
        self.rss_mib += (psutil.Process().memory_info().rss / 2**20,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The result of one measurement."""

    us_per_rollout: float
    rss_mib: tuple[float, ...]  # of the driver, after each step
    received: float  # bytes of a rank's columns over bytes of its own sequences, largest


def configuration(tokens: int, *, rollouts: int, ranks: int, steps: int, mode: str) -> Config:
    """Return the settings of a run with so many rollouts in flight."""
    keys = MODES[mode]
    prompts = rollouts // GROUP // (1 + keys.get("max_staleness", 0))
    return Config.model_validate(
        {
            "run": {"name": "driver"},
            "policy": {"model": "dummy"},
            "algorithm": {"name": "grpo", "correction": "none"} if keys else {"name": "grpo"},
            "data": {"train": "x.jsonl"},
            "rollouts": {
                "prompts_per_step": prompts,
                "samples_per_prompt": GROUP,
                "max_new_tokens": tokens * 3 // 2,  # the engines' mean is two thirds of the maximum
                **keys,
            },
            "rewards": {"place": {"function": "f"}},
            "train": {"steps": steps, "lr": 1.0, "sequences_per_update": prompts * GROUP},
            "cluster": {"roles": {"policy": {"workers": ranks}}},
            "tracking": {"samples_per_step": GROUP},
        }
    )


async def measure(config: Config, dummies: Dummies, folder: Path, *, profile: bool) -> Cost:
    """Run the steps of a run, and print the profile of the driver's loop if asked."""
    assert config.rollouts is not None
    with RunFolder.open(folder, "driver", resume=False) as opened:
        timeline, tracker = Timeline(opened.timeline), Tracker(opened.path, backends=())
        progress = open_progress(config.train.num_steps, mode="quiet")
        record = RunRecord(folder=opened, tracker=tracker, timeline=timeline, progress=progress)
        prompt = Prompt(prompt_id=0, token_ids=tuple(range(PROMPT_TOKENS)), text="x" * 4 * PROMPT_TOKENS, columns={})
        controller = MeasuredController(
            config,
            dummies.roles(),
            record,
            prompts=Stream([prompt], seed=0, shuffle=False),
            eval_sets={},
            marking=Marking(ks=(), pass_score=None, answers=None),
            probe_ids=PROBE_IDS,
            policy_fingerprint="",
            rewards_fingerprint="",
            supervisor=Supervisor(config.cluster.restarts, record, ()),
        )
        profiler = cProfile.Profile() if profile else nullcontext()
        with sparing_loaded_objects(), profiler:
            began = time.process_time()
            await controller.run()
            seconds = time.process_time() - began
        timeline.close()
        tracker.close(failed=False)
    if isinstance(profiler, cProfile.Profile):
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(40)
    received = await asyncio.gather(*(handle.bytes.remote() for handle in dummies.ranks))
    total = config.train.num_steps * config.rollouts.prompts_per_step * GROUP
    return Cost(
        us_per_rollout=seconds / total * 1e6,
        rss_mib=controller.rss_mib,
        received=max(whole / share for whole, share in received),
    )


def main() -> None:
    """Print one line of the table for each length and number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=10_000, help="in flight")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2048, 8192])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--mode", choices=sorted(MODES), default="in_turns")
    parser.add_argument("--profile", action="store_true", help="print where the driver's loop spends its time")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", object_store_memory=4 * 2**30, include_dashboard=False, log_to_driver=False)
    sys.stdout.write("| mode | tokens | ranks | us / rollout | driver MiB after each step | received |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    try:
        for ranks in arguments.ranks:
            for tokens in arguments.tokens:
                config = configuration(
                    tokens, rollouts=arguments.rollouts, ranks=ranks, steps=arguments.steps, mode=arguments.mode
                )
                dummies = Dummies(ranks)
                with tempfile.TemporaryDirectory() as folder:
                    cost = asyncio.run(measure(config, dummies, Path(folder), profile=arguments.profile))
                dummies.end()
                rss = ", ".join(f"{mib:.0f}" for mib in cost.rss_mib)
                sys.stdout.write(
                    f"| {arguments.mode} | {tokens} | {ranks} | {cost.us_per_rollout:.0f} | {rss} | "
                    f"{cost.received:.3f} |\n"
                )
                sys.stdout.flush()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
