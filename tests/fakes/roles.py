"""A fake for each role of `rlhf.roles`. Weights are the number of updates, as text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf import roles, types
from rlhf.controller.weight_sync import check_probe
from rlhf.errors import WorkerLost
from rlhf.evaluation.voting import AnswerForm
from rlhf.role_table import Role
from rlhf.tracking.metrics.reductions import Mean
from tests.fakes.groups import completed_group


class FakeMember:
    """A role that records calls. `losses`: the calls in which the role loses a rank, each once."""

    name = "role"

    def __init__(self, calls: list[str] | None = None) -> None:
        self.calls: list[str] = [] if calls is None else calls
        self.losses: list[str] = []
        self.lost_role: str = "policy"

    def note(self, call: str) -> None:
        """Note a call, or lose a rank in the call."""
        if call in self.losses:
            self.losses.remove(call)
            raise WorkerLost(f"{call}: lost", role=self.lost_role, rank=1, stage=call, kind="died")
        self.calls.append(call)

    async def memory(self) -> types.MemoryReport:
        return types.MemoryReport(rss_gib=1.0, gpu_gib=None)

    async def start_profile(self) -> None:
        self.note("profile")

    async def stop_profile(self, folder: Path) -> None:
        self.note(f"profile {folder}")

    async def offload(self) -> None:
        self.note(f"{self.name} leaves")

    async def reload(self) -> None:
        self.note(f"{self.name} comes back")


class FakeTrained(FakeMember, roles.TrainedRole):
    """A trained role whose state is the number of updates."""

    def __init__(self, calls: list[str] | None = None, *, ranks: int = 2) -> None:
        super().__init__(calls)
        self.ranks = ranks
        self.updates: list[int] = []  # minibatches
        self.newest: int | None = None  # the step of the newest snapshot

    @property
    def num_ranks(self) -> int:
        return self.ranks

    async def optim_step(self) -> roles.Metrics:
        return {}

    async def save(self, folder: Path) -> None:
        self.note(f"save {folder}")

    async def load(self, folder: Path) -> None:
        self.note(f"load {folder}")

    async def take_snapshot(self, step: int) -> None:
        self.note(f"snapshot {step}")
        self.newest = step

    async def newest_snapshot(self) -> int | None:
        return self.newest

    async def save_snapshots(self, step: int, folder: Path) -> None:
        self.note(f"save kept {step}")

    async def restart(self) -> None:
        self.note("restart")

    async def restore_snapshot(self, step: int) -> None:
        self.note(f"restore {step}")

    async def export(self, folder: Path) -> None:
        self.note(f"export {folder}")
        if folder.is_dir():
            (folder / "weights").write_text(str(len(self.updates)))

    async def arithmetic(self) -> roles.Arithmetic:
        return roles.Arithmetic(flops_per_token=1.0, flops_per_token_and_length=0.0, peak_flops=1.0)


class FakeManifest(int):
    """The version of published weights, with their checksum."""

    checksum = "ab"


class FakePolicy(FakeTrained, roles.PolicyRole):
    """A policy that remembers its last batch. An update can take two turns of the event loop.

    Args:
        kl: the divergence from the reference in each report of a sequence; None: there are no reports.
    """

    name = "policy"

    def __init__(
        self, calls: list[str] | None = None, *, kl: float | None = None, reports: bool = True, slow: bool = False
    ) -> None:
        super().__init__(calls)
        self.kl, self.reports, self.slow = kl, reports, slow
        self.entropy = 0.5
        self.plan: types.BatchPlan | None = None
        self.portions: list[types.BatchPlan] = []
        self.rollouts: list[Any] = []
        self.references: list[Any] = []
        self.advantages: Mapping[int, float] | None = None

    async def prepare(
        self,
        plan: types.BatchPlan,
        groups: Sequence[roles.CompletedGroup],
        ref_logprobs: Sequence[roles.RemoteColumns[types.TokenValues]],
    ) -> roles.PrepareReport:
        self.plan, self.references = plan, list(ref_logprobs)
        self.rollouts = [group.rollouts for group in groups]
        self.portions.append(plan)
        self.note(f"prepare {', '.join(map(str, self.rollouts))}")
        ids = [i for rank in range(self.ranks) for i in plan.sequences_of(rank)] if self.reports else []
        reports = [
            roles.SequenceReport(sequence_id=i, kl_ref=self.kl, mean_old_logprob=-1.0, mean_ref_logprob=None)
            for i in ids
        ]
        return roles.PrepareReport(sequences=tuple(reports), metrics={})

    async def set_advantages(
        self,
        plan: types.BatchPlan,
        by_sequence: Mapping[int, float] | None,
        values: Sequence[roles.RemoteColumns[types.TokenValues]],
    ) -> roles.AdvantagesReport:
        assert plan == self.plan
        self.advantages = by_sequence
        return roles.AdvantagesReport(mean_advantages=by_sequence or {}, metrics={}, returns=())

    async def forward_backward(
        self,
        minibatch: int,
        inputs: roles.StatesByRank | roles.GivenByRank = (),
        *,
        ends: bool = True,
        loss: types.OwnLoss | None = None,
    ) -> roles.Metrics:
        if not ends:
            self.note(f"accumulate {minibatch}")
            return {}
        self.updates.append(minibatch)
        self.note(f"update {minibatch} by {inputs}" if inputs else f"update {minibatch}")
        if self.slow:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            self.note("updated")
        return {"update/entropy/mean": Mean(total=self.entropy, count=1)}

    async def token_signals(self, sequences: Sequence[int]) -> list[roles.Ref[types.TokenSignals]]:
        return []

    async def empty_cache(self) -> None:
        self.note("empty cache")

    async def publish(self, version: int) -> roles.WeightManifest:
        self.note("publish")
        return FakeManifest(version)

    async def send(self, manifest: roles.WeightManifest) -> None:
        return None

    async def settle(self) -> None:
        self.note("settle")

    async def probe(self, token_ids: Sequence[int]) -> list[float]:
        self.note("policy's probe")
        return [-1.0] * (len(token_ids) - 1)


class FakeReference(FakeMember, roles.ReferenceRole):
    """A reference that holds the weights of the last folder."""

    name = "reference"
    role: Role = "reference"

    def __init__(self, calls: list[str] | None = None) -> None:
        super().__init__(calls)
        self.only: frozenset[int] | None = None
        self.requests: list[list[Any]] = []  # the groups of each call
        self.weights = "initial"

    async def become(self, folder: Path) -> None:
        self.weights = (folder / "weights").read_text()

    async def logprobs(
        self,
        groups: Sequence[roles.CompletedGroup],
        *,
        only: frozenset[int] | None = None,
        temperatures: Mapping[int, float] | None = None,
    ) -> list[Any]:
        self.only = only
        self.requests.append([group.rollouts for group in groups])
        return [f"reference of {group.rollouts}" for group in groups]


class FakeTeacher(FakeMember, roles.OnlineTeacherRole):
    """A teacher. Each result names the input."""

    name = "teacher"
    role: Role = "teacher"

    def __init__(self, calls: list[str] | None = None) -> None:
        super().__init__(calls)
        self.means_of: dict[str, Any] = {}  # the arguments of the last `mean_logprobs`
        self.turns: list[str] = []  # the teachers in the order of their turns on the devices

    @property
    def present(self) -> str | None:
        return self.turns[-1] if self.turns else None

    def take_turn(self, teacher: str) -> None:
        if teacher != self.present:
            self.turns.append(teacher)

    async def logprobs(
        self, groups: Sequence[roles.CompletedGroup], *, temperatures: Mapping[int, float], teacher: str
    ) -> list[Any]:
        self.take_turn(teacher)
        self.note(f"{teacher} of {', '.join(str(group.rollouts) for group in groups)}")
        return [f"{teacher} of {group.rollouts}" for group in groups]

    async def states(self, plan: types.MinibatchPlan, groups: Sequence[roles.CompletedGroup]) -> Any:
        ids = sorted(i for share in plan.sequences_by_rank for i in share)
        self.note(f"teach {ids}")
        return f"states of {ids}"

    async def mean_logprobs(
        self,
        groups: Sequence[roles.CompletedGroup],
        *,
        temperature: float,
        samples_per_prompt: int,
        teacher: str,
    ) -> Mapping[int, float]:
        self.take_turn(teacher)
        self.means_of = {
            "rollouts": [group.rollouts for group in groups],
            "temperature": temperature,
            "samples_per_prompt": samples_per_prompt,
            "teacher": teacher,
        }
        return {i: -2.0 - i for i in range(samples_per_prompt * len(groups))}


def failed_reward(prompt_id: int, reward: str = "r") -> types.RewardError:
    """Return the error of a reward that raised for the first response to a prompt."""
    return types.RewardError(reward=reward, kind="raised", message="no", prompt_id=prompt_id, sample=0)


class FakeRewards(FakeMember, roles.RewardRole):
    """A reward with the scores of a dictionary, by prompt id. A prompt without scores gets 1 for each response."""

    name = "reward"

    def __init__(self, scores: Mapping[int, types.GroupScores | Sequence[float]] | None = None) -> None:
        super().__init__()
        self.by_prompt = dict(scores or {})
        self.fails: set[int] = set()  # ids of groups without a score
        self.scored: list[int] = []  # group ids
        self.written: list[roles.SampleSelection] = []
        self.privileged: dict[int, dict[int, types.PrivilegedContext]] = {}  # of policies that teach themselves

    async def score(self, group: roles.CompletedGroup) -> types.GroupScores:
        self.scored.append(group.request.group_id)
        prompt_id = group.request.prompt.prompt_id
        if group.request.group_id in self.fails:
            return types.GroupScores(scores=(), by_name={}, errors=(failed_reward(prompt_id),))
        given = self.by_prompt.get(prompt_id, (1.0,) * len(group.infos))
        if isinstance(given, types.GroupScores):
            return given
        return types.GroupScores(scores=tuple(given), by_name={"r": tuple(given)}, errors=())

    async def answers(self, group: roles.CompletedGroup, form: AnswerForm) -> tuple[str | None, ...]:
        return (None,) * len(group.infos)

    async def privileged_prompts(
        self, group: roles.CompletedGroup, contexts: Mapping[int, types.PrivilegedContext]
    ) -> roles.RemoteColumns[types.PrivilegedPrompts]:
        self.privileged[group.request.group_id] = dict(contexts)
        return roles.RemoteColumns(ref=object(), sequence_ids=tuple(contexts))

    async def write_samples(
        self,
        path: Path,
        selections: Sequence[roles.SampleSelection],
        signals: Sequence[roles.Ref[types.TokenSignals] | roles.Ref[types.PrivilegedPrompts]] = (),
    ) -> None:
        self.written += selections


class FakeEngines(FakeMember, roles.RolloutRole):
    """Engines that answer at once. The last request is answered first.

    Args:
        worst: the log-probability of each token of a probe by the worst engine; None: no engine works.
    """

    def __init__(self, calls: list[str] | None = None, *, worst: float | None = -1.0, **fields: Any) -> None:
        super().__init__(calls)
        self.worst = worst
        self.fields = fields  # of each `RolloutInfo`
        self.requests: list[list[int]] = []  # prompt ids of each `generate`
        self.samplings: list[types.Sampling] = []
        self.cancelled: set[int] = set()  # group ids
        self.loaded: list[int] = []  # versions

    async def generate(
        self, requests: Sequence[types.GroupRequest], sampling: types.Sampling, *, version: int
    ) -> AsyncIterator[roles.CompletedGroup]:
        self.requests.append([request.prompt.prompt_id for request in requests])
        self.samplings.append(sampling)
        for request in self.order(requests):
            await self.before(request)
            if request.group_id not in self.cancelled:
                yield self.complete(request, version)

    def order(self, requests: Sequence[types.GroupRequest]) -> Sequence[types.GroupRequest]:
        """Return the requests in the order of their answers."""
        return requests[::-1]

    async def before(self, request: types.GroupRequest) -> None:
        """Wait before the answer to a request."""

    def complete(self, request: types.GroupRequest, version: int) -> roles.CompletedGroup:
        """Return the answer to a request."""
        group: roles.CompletedGroup = completed_group(request, min_version=version, max_version=version, **self.fields)
        return group

    async def answer(
        self, request: types.GroupRequest, sampling: types.Sampling, *, oldest: int, urgent: bool = False
    ) -> roles.CompletedGroup | None:
        return self.complete(request, oldest)

    async def restored(self, group: roles.CompletedGroup, sampling: types.Sampling) -> roles.CompletedGroup:
        return group

    async def fronts(self, key: str, name: str) -> Sequence[str]:
        return ()

    @property
    def gives_published(self) -> bool:
        return False

    async def weights_are_missing(self) -> None:
        await asyncio.Event().wait()

    def offer_weights(self, manifest: roles.WeightManifest) -> None:
        self.note("offer weights")

    @property
    def num_working(self) -> int:
        return 1

    async def cancel(self, requests: Sequence[types.GroupRequest]) -> None:
        self.cancelled.update(request.group_id for request in requests)

    async def withdraw_weights(self) -> None:
        self.note("withdraw")

    async def update_weights(self, manifest: roles.WeightManifest) -> None:
        self.note("load")
        self.loaded.append(manifest)

    async def prove(self, probe: roles.PolicyProbe) -> float | None:
        self.note("engines' probe")
        if self.worst is None:
            return None
        logprobs = [self.worst] * (len(probe.token_ids) - 1)
        return check_probe(probe.logprobs, logprobs, engine=1, version=probe.version, dtype=probe.dtype)

    async def image_effect(self, token_ids: Sequence[int], other_ids: Sequence[int]) -> float | None:
        return None

    async def sleep(self, *, keep_weights: bool) -> None:
        self.note("sleep with weights" if keep_weights else "sleep")

    async def wake(self, part: roles.EnginePart) -> None:
        self.note(f"{part} wakes")
