"""Simulate many steps of a run on many GPUs, event by event, to measure waiting times and utilization.

Engines decode all sequences in lockstep, a token each in base_s + sequences * each_s. The schedule decides when groups
are requested, when the trainer may take groups, and whether the engines finish before loading new weights, as
rlhf.controller.batch_queue and rlhf.controller.group_queue do. In flight, rlhf.rollouts.pacing decides how many groups
are requested ahead. A prompt is computed once for a group. A recorded group
may need a service, such as a slow reward, for some time after decoding. Failures, evaluation, checkpoints and other
network traffic are not modelled.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from rlhf.planning.system import Outcome, Schedule, System
from rlhf.rollouts.pacing import Pace

MANY_RESPONSES = 30_000  # per step: fewer steps give the same averages
Kind = Literal["decoded", "answered", "trained", "synced"]


@dataclass(slots=True)
class _Engine:
    """Track sequences decoding in lockstep. `ticks` counts the tokens decoded per sequence since the start."""

    active: list[tuple[float, int, int]] = field(default_factory=list)  # (tick of completion, group, tokens)
    groups: set[int] = field(default_factory=set)  # with undecoded responses on this engine
    waiting: deque[tuple[int, int]] = field(default_factory=deque)  # (tokens, group)
    computed: set[int] = field(default_factory=set)  # groups with a computed prompt
    ticks: float = 0.0
    at: float = 0.0  # time of the last advance; in the future while the engine is paused
    serial: int = 0  # events with an earlier serial are void
    busy_s: float = 0.0


class _Simulation:
    def __init__(self, system: System, schedule: Schedule, seed: int) -> None:
        self.system, self.schedule = system, schedule
        self.seed = seed
        self.engines = [_Engine() for _ in range(system.engines)]
        self.events: list[tuple[float, int, Kind, int, int]] = []
        self.order = 0
        self.now = 0.0
        self.version = 0
        self.issued = 0  # groups
        self.undecoded: dict[int, int] = {}  # by group: number of responses in an engine
        self.attempts: Counter[int] = Counter()  # by group; only groups that are requested again
        self.unanswered: set[int] = set()  # groups
        self.latencies: dict[int, float] = {}  # by group
        self.started: dict[int, int] = {}  # by group: version at its start
        self.tokens: dict[int, float] = {}
        self.ready: dict[int, None] = {}  # answered groups, in the order of completion
        self.answered_in: Counter[int] = Counter()  # by batch, in the order of prompts: answered groups
        self.training: list[int] = []
        self.consumed = 0  # groups of the current step that are trained
        self.syncing = False
        self.work = (0.0, 0.0)  # seconds and tokens of the current update
        self.late = 0.0  # streamed: seconds of the step's updates that await the whole batch
        self.trained_tokens, self.trained_groups, self.lags, self.train_s = 0.0, 0, 0.0, 0.0
        self.next_engine = 0
        self.pace = Pace(
            prompts_per_step=system.prompts_per_step,
            max_staleness=schedule.max_staleness,
            by_completion=schedule.by_completion,
        )
        self.requested_at: dict[int, float] = {}  # by group, in flight
        self.group_s: dict[int, float] = {}  # by answered group, in flight
        self.batch: list[int] = []  # groups of the current step
        self.taken_at = 0.0

    def post(self, time: float, kind: Kind, index: int = 0, serial: int = 0) -> None:
        """Schedule an event. `index` is the number of an engine or a group."""
        self.order += 1
        heapq.heappush(self.events, (time, self.order, kind, index, serial))

    def step_s(self, engine: _Engine) -> float:
        return self.system.base_s + len(engine.active) * self.system.each_s

    def advance(self, engine: _Engine) -> None:
        """Advance the engine to the current time unless paused."""
        passed = self.now - engine.at
        if passed <= 0.0:
            return
        if engine.active:
            engine.ticks += passed / self.step_s(engine)
            engine.busy_s += passed
        engine.at = self.now

    def refill(self, index: int) -> None:
        """Start queued responses and schedule the end of the next response."""
        engine = self.engines[index]
        while engine.waiting and len(engine.active) < self.system.max_num_seqs:
            tokens, group = engine.waiting.popleft()
            if group not in engine.computed:
                engine.computed.add(group)
                self.stall(engine, self.system.prompt_tokens * self.system.prefill_s + self.system.images_s)
            heapq.heappush(engine.active, (engine.ticks + tokens, group, tokens))
        engine.serial += 1
        if engine.active:
            ends = engine.at + max(engine.active[0][0] - engine.ticks, 0.0) * self.step_s(engine)
            self.post(ends, "decoded", index, engine.serial)

    def stall(self, engine: _Engine, seconds: float) -> None:  # busy with something else than decoding
        engine.at = max(engine.at, self.now) + seconds
        engine.busy_s += seconds

    def issue(self) -> None:
        size, last = self.system.prompts_per_step, self.version + self.schedule.max_staleness
        if self.schedule.in_flight:
            self.begin(max(self.version * size + self.pace.num_outstanding - self.issued, 0))
        while not self.schedule.in_flight and self.issued // size <= last:
            if self.unanswered:
                return  # whole batches are collected one after another
            self.begin(size)

    def begin(self, count: int) -> None:
        touched = {self.request(group) for group in range(self.issued, self.issued + count)}
        self.issued += count
        for index in sorted(touched):
            self.advance(self.engines[index])
            self.refill(index)

    def request(self, group: int) -> int:
        """Add a group to an engine's queue. Return the number of the engine.

        The lengths depend on the group and not on the schedule, so that schedules compare.
        """
        system = self.system
        if self.schedule.in_flight:
            index = min(
                range(len(self.engines)), key=lambda i: len(self.engines[i].active) + len(self.engines[i].waiting)
            )
        else:
            index = self.next_engine = (self.next_engine + 1) % len(self.engines)
        if system.recorded:
            recorded = system.recorded[group % len(system.recorded)]
            lengths, latency = list(recorded.lengths), recorded.latency_s
        else:
            random = Random(hash((self.seed, group, self.attempts[group])))
            lengths, latency = [system.lengths.draw(random) for _ in range(system.samples_per_prompt)], 0.0
        self.engines[index].waiting.extend((tokens, group) for tokens in lengths)
        self.engines[index].groups.add(group)
        self.undecoded[group], self.latencies[group] = len(lengths), latency
        self.unanswered.add(group)
        self.started[group] = self.version
        self.requested_at.setdefault(group, self.now)
        self.tokens[group] = sum(lengths) + len(lengths) * system.prompt_tokens
        return index

    def decoded(self, index: int) -> None:
        engine = self.engines[index]
        self.advance(engine)
        engine.ticks = max(engine.ticks, engine.active[0][0])
        while engine.active and engine.active[0][0] <= engine.ticks + 1e-6:
            _, group, _ = heapq.heappop(engine.active)
            self.undecoded[group] -= 1
            if self.undecoded[group] == 0:
                del self.undecoded[group]
                engine.groups.discard(group)
                engine.computed.discard(group)
                self.post(self.now + self.latencies.pop(group), "answered", group, self.attempts[group])
        self.refill(index)
        self.proceed()

    def answered(self, group: int) -> None:
        self.unanswered.discard(group)
        self.group_s[group] = self.now - self.requested_at[group]
        self.ready[group] = None
        self.answered_in[group // self.system.prompts_per_step] += 1
        self.proceed()

    def proceed(self) -> None:
        """Start everything possible now: the next batch, an update or a sync."""
        self.issue()
        if self.training or self.syncing:
            return
        size = self.system.prompts_per_step
        if self.consumed < size:
            self.training = self.take()
            self.batch += self.training
            if self.training:
                self.taken_at = self.now
                self.train()
        elif self.schedule.in_flight or not self.unanswered:  # whole batches end before the engines get new weights
            self.syncing = True
            for index, engine in enumerate(self.engines):
                self.advance(engine)
                if self.schedule.in_flight:
                    self.load(engine)
                    self.refill(index)
            self.post(self.now + self.system.sync_s, "synced")

    def load(self, engine: _Engine) -> None:
        """Pause an engine with responses in flight for new weights."""
        engine.at = max(engine.at, self.now) + self.system.load_s
        if self.system.recomputes:
            decoded = sum(tokens - (end - engine.ticks) for end, _, tokens in engine.active)
            groups = len({group for _, group, _ in engine.active})
            again_s = (decoded + groups * self.system.prompt_tokens) * self.system.prefill_s
            self.stall(engine, again_s + groups * self.system.images_s)

    def take(self) -> list[int]:
        """Return the groups of the next update. Empty until the groups are answered."""
        size, first = self.system.prompts_per_step, self.version * self.system.prompts_per_step
        if self.schedule.streamed:
            groups = [next(iter(self.ready))] if self.ready else []
        elif self.schedule.by_completion:
            groups = list(self.ready)[:size] if len(self.ready) >= size else []
        else:
            groups = list(range(first, first + size)) if self.answered_in[self.version] == size else []
        for group in groups:
            del self.ready[group]
        return groups

    def train(self) -> None:
        system = self.system
        tokens = sum(self.tokens.pop(group) for group in self.training)
        work = tokens / system.train_tokens_per_s
        if self.schedule.streamed:
            self.late += work * (1.0 - system.streamed_share)
            work *= system.streamed_share
            if self.consumed + len(self.training) == system.prompts_per_step:
                work, self.late = work + self.late, 0.0
        self.work = (work, tokens)
        self.post(self.now + work, "trained")

    def trained(self) -> None:
        work, tokens = self.work
        self.train_s += work
        self.trained_tokens += tokens
        self.trained_groups += len(self.training)
        self.lags += sum(self.version - self.started.pop(group) for group in self.training)
        self.consumed += len(self.training)
        self.training = []
        self.proceed()

    def synced(self) -> None:
        is_warm = min(self.requested_at[group] for group in self.batch) > 0.0
        self.pace.trained([self.group_s.pop(group) for group in self.batch], self.now - self.taken_at, is_warm=is_warm)
        for group in self.batch:
            del self.requested_at[group]
        self.batch = []
        self.version += 1
        self.consumed, self.syncing = 0, False
        for engine in self.engines:
            self.advance(engine)
        if self.schedule.by_completion:
            self.renew()
        self.proceed()

    def renew(self) -> None:
        for group in [g for g, version in self.started.items() if self.version - version > self.schedule.max_staleness]:
            self.attempts[group] += 1
            self.ready.pop(group, None)
            for engine in self.engines:
                if group in engine.groups:
                    engine.groups.discard(group)
                    engine.active = [entry for entry in engine.active if entry[1] != group]
                    heapq.heapify(engine.active)
                    engine.waiting = deque(entry for entry in engine.waiting if entry[1] != group)
                    engine.computed.discard(group)
            self.request(group)
        for index in range(len(self.engines)):
            self.refill(index)

    def run_until(self, version: int) -> None:
        while self.version < version:
            self.now, _, kind, index, serial = heapq.heappop(self.events)
            if kind == "trained":
                self.trained()
            elif kind == "synced":
                self.synced()
            elif kind == "answered":
                if serial == self.attempts[index]:
                    self.answered(index)
            elif serial == self.engines[index].serial:
                self.decoded(index)


def simulate(
    system: System, schedule: Schedule, *, steps: int | None = None, seed: int = 0, warm_up: int | None = None
) -> Outcome:
    """Simulate some steps after a warm-up. Equal seeds give equal outcomes.

    `steps`: the number of simulated steps. None: 6, or 2 for large batches.
    `warm_up`: steps to leave out. None: until the pipeline is full.
    """
    if steps is None:
        steps = 2 if system.prompts_per_step * system.samples_per_prompt > MANY_RESPONSES else 6
    run = _Simulation(system, schedule, seed)
    run.issue()
    if warm_up is None:
        warm_up = (1 + schedule.max_staleness) * (2 if schedule.in_flight else 1)  # in flight, all start at once
    run.run_until(warm_up)
    began, busy_s = run.now, _busy_s(run)
    tokens, groups, lags, train_s = run.trained_tokens, run.trained_groups, run.lags, run.train_s
    run.run_until(warm_up + steps)
    passed = run.now - began
    return Outcome(
        step_s=passed / steps,
        tokens_per_s=(run.trained_tokens - tokens) / passed,
        engines_busy=min((_busy_s(run) - busy_s) / (passed * system.engines), 1.0),  # a prefill may pass the end
        trainer_busy=(run.train_s - train_s) / passed,
        lag=(run.lags - lags) / max(run.trained_groups - groups, 1),
    )


def _busy_s(run: _Simulation) -> float:
    for engine in run.engines:
        run.advance(engine)
    return sum(engine.busy_s for engine in run.engines)
