"""Run all roles of an online run in this process: the run's own workers and controller, without Ray and vLLM.

The engine is a second copy of the model. It answers by transformers' `generate` and gets the policy's weights at each
sync, so that the controller's proof of the sync stands.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.run.own_loop import read_prompt
from actors.run.run_record import recording
from actors.run.train import write_final
from rlhf.config import derive
from rlhf.config.files.load import LoadedConfig
from rlhf.config.schema.root import Config
from rlhf.controller.learning import OnlineRoles
from rlhf.controller.online import OnlineController
from rlhf.controller.own_loop import OwnLoop
from rlhf.controller.supervisor import Supervisor
from rlhf.controller.weight_sync import check_probe
from rlhf.data.stream import Stream
from rlhf.engine.distributed import RankContext, init_distributed
from rlhf.evaluation.voting import AnswerForm
from rlhf.models.files.loading import load_tokenizer
from rlhf.models.packed.forward import hidden_states, lm_head_weight
from rlhf.preflight.inputs import StageInputs, load_inputs
from rlhf.preflight.sources import served_models
from rlhf.preflight.training_data import OnlineInputs
from rlhf.rewards.scoring import fingerprint
from rlhf.role_table import Role
from rlhf.roles import (
    AdvantagesReport,
    CompletedGroup,
    Metrics,
    PolicyProbe,
    PrepareReport,
    RemoteColumns,
    SampleSelection,
    teacher_prompts,
)
from rlhf.rollouts.environments.conversations import Conversations, EnvironmentSpec
from rlhf.rollouts.records.spans import Played, Sampled, assemble
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.types import (
    BatchPlan,
    GroupRequest,
    GroupScores,
    MinibatchPlan,
    PrivilegedContext,
    PrivilegedPrompts,
    Sampling,
    TokenValues,
)
from rlhf.workers.frozen.reference import ReferenceWorker
from rlhf.workers.frozen.reward import RewardSettings, RewardWorker
from rlhf.workers.frozen.served_teacher import ServedOnlineTeacherWorker
from rlhf.workers.frozen.teacher import OnlineTeacherWorker
from rlhf.workers.frozen.top_settings import spans_of, top_of
from rlhf.workers.online.critic import CriticWorker
from rlhf.workers.online.pairs import OnlinePreferenceWorker
from rlhf.workers.online.policy import PolicyWorker
from rlhf.workers.online.self_taught import SelfTaughtWorker
from rlhf.workers.online.streamed import StreamedPolicyWorker
from rlhf.workers.online.student import StudentWorker
from rlhf.workers.trained import TrainedWorker
from tests.fakes.roles import FakeEngines, FakeManifest, FakePolicy, FakeReference, FakeRewards, FakeTrained
from tests.integration.rank_gang import free_port

PLACE = RankContext(rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu", threads=1, deadline_s=120.0)
WORKERS: Any = {
    "advantages": PolicyWorker,
    "sampled_pairs": OnlinePreferenceWorker,
    "sampled_distillation": StudentWorker,
    "self_distillation": SelfTaughtWorker,
}


def join_alone() -> None:
    """Join a gang of one, shared by all trained workers of this process."""
    init_distributed(PLACE, "127.0.0.1", free_port())


def awaited(call: Callable[..., Any]) -> Any:
    """Return a role's method that calls the worker's method."""

    async def method(*arguments: Any) -> Any:
        return call(*arguments)

    return method


class Trained(FakeTrained):
    """A trained role in this process: the common part of policy and critic."""

    def __init__(self, worker: Any) -> None:
        super().__init__()
        self.ranks, self.worker = 1, worker
        self.memory_folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        for name in ("take_snapshot", "newest_snapshot", "restore_snapshot", "save", "load", "export", "optim_step"):
            setattr(self, name, awaited(getattr(worker, name)))
        self.build()

    def build(self) -> None:
        self.worker.build()
        self.worker.open_snapshots(Path(self.memory_folder.name))

    async def restart(self) -> None:
        self.build()


class Policy(Trained, FakePolicy):
    """The policy role."""

    async def prepare(
        self, plan: BatchPlan, groups: Sequence[CompletedGroup], columns: Sequence[RemoteColumns[Any]]
    ) -> PrepareReport:
        parts: list[Any] = [group.rollouts for group in groups] + [column.ref for column in columns]
        sequences, metrics = self.worker.prepare(plan, *parts)
        return PrepareReport(sequences=sequences, metrics=metrics)

    async def set_advantages(
        self, plan: BatchPlan, by_sequence: Mapping[int, float] | None, values: Sequence[RemoteColumns[TokenValues]]
    ) -> AdvantagesReport:
        returns, (means, metrics) = self.worker.set_advantages(by_sequence, *(column.ref for column in values))
        column = RemoteColumns(ref=returns, sequence_ids=plan.sequences_of(0))
        return AdvantagesReport(mean_advantages=means, metrics=metrics, returns=(column,))

    async def forward_backward(self, minibatch: int, states: Sequence[Any] = (), **options: Any) -> Metrics:
        return merge_metrics([self.worker.forward_backward(minibatch, *(states[0] if states else ()), **options)])

    async def token_signals(self, sequences: Sequence[int]) -> list[Any]:
        return [self.worker.token_signals(sequences)[0]]

    async def probe(self, token_ids: Sequence[int]) -> list[float]:
        return list(self.worker.probe(token_ids))


class Critic(Trained):
    """The critic role."""

    async def values(self, plan: BatchPlan, groups: Sequence[CompletedGroup]) -> list[RemoteColumns[TokenValues]]:
        rollouts: list[Any] = [group.rollouts for group in groups]
        column, _ = self.worker.values(plan, *rollouts)
        return [RemoteColumns(ref=column, sequence_ids=plan.sequences_of(0))]

    async def prepare(self, plan: BatchPlan, returns: Sequence[RemoteColumns[TokenValues]]) -> None:
        columns: list[Any] = [column.ref for column in returns]
        self.worker.prepare(*columns)

    async def forward_backward(self, minibatch: int) -> Metrics:
        return merge_metrics([self.worker.forward_backward(minibatch)])


class Reference(FakeReference):
    """The reference role."""

    def __init__(self, worker: ReferenceWorker) -> None:
        super().__init__()
        self.worker = worker
        worker.start()

    async def become(self, folder: Path) -> None:
        self.worker.become(str(folder))

    async def logprobs(
        self,
        groups: Sequence[CompletedGroup],
        *,
        only: frozenset[int] | None = None,
        temperatures: Mapping[int, float] | None = None,
        **options: Any,
    ) -> list[RemoteColumns[TokenValues]]:
        rollouts: list[Any] = [group.rollouts for group in groups]
        *columns, _ = self.worker.logprobs(only, temperatures or {}, *rollouts, **options)
        return [replace(group.columns, ref=column) for group, column in zip(groups, columns, strict=True)]

    async def offload(self) -> None:
        self.worker.move_to_host()

    async def reload(self) -> None:
        self.worker.reload()


class Teacher(Reference):
    """The teacher role."""

    role: Role = "teacher"

    worker: OnlineTeacherWorker

    @property
    def present(self) -> str | None:
        return self.worker.present

    async def states(self, plan: MinibatchPlan, groups: Sequence[CompletedGroup]) -> Any:
        found: list[Any] = []
        for teacher in sorted({plan.teacher_of(i) for i in plan.sequences_by_rank[0]}):
            own = [i for i in plan.sequences_by_rank[0] if plan.teacher_of(i) == teacher]
            rollouts: list[Any] = [group.rollouts for group in groups]
            prompts = teacher_prompts(groups)
            found.append(self.worker.states([own], *rollouts, teacher=teacher, prompts=prompts)[0])
        return [found]

    async def mean_logprobs(
        self, groups: Sequence[CompletedGroup], *, temperature: float, samples_per_prompt: int, teacher: str
    ) -> Mapping[int, float]:
        rollouts: list[Any] = [group.rollouts for group in groups]
        options: Any = {"teacher": teacher, "prompts": teacher_prompts(groups)}
        return self.worker.mean_logprobs(temperature, samples_per_prompt, *rollouts, **options)


class Reward(FakeRewards):
    """The reward role."""

    def __init__(self, worker: RewardWorker) -> None:
        super().__init__()
        self.worker = worker
        worker.start()

    async def score(self, group: CompletedGroup) -> GroupScores:
        truncated = [info.finish_reason == "length" for info in group.infos]
        rollouts: Any = group.rollouts
        assert not [info for info in group.infos if info.environment_error is not None]
        environment = [info.environment_rewards for info in group.infos]
        return self.worker.score(group.request.prompt, rollouts, truncated, {}, environment)

    async def answers(self, group: CompletedGroup, form: AnswerForm) -> tuple[str | None, ...]:
        rollouts: Any = group.rollouts
        return self.worker.answers(rollouts, form)

    async def privileged_prompts(
        self, group: CompletedGroup, contexts: Mapping[int, PrivilegedContext]
    ) -> RemoteColumns[PrivilegedPrompts]:
        rollouts: Any = group.rollouts
        prompts, _ = self.worker.privileged_prompts(group.request.prompt, rollouts, contexts)
        return RemoteColumns(ref=prompts, sequence_ids=tuple(contexts))

    async def write_samples(
        self, path: Path, selections: Sequence[SampleSelection], signals: Sequence[Any] = ()
    ) -> None:
        rollouts: list[Any] = [selection.rollouts for selection in selections]
        self.worker.write_samples(path, [selection.records for selection in selections], *rollouts, *signals)


class Engine(FakeEngines):
    """The rollout role."""

    gives_published = True

    def __init__(self, model: str, policy: TrainedWorker) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.policy = policy
        self.version = -1

    async def update_weights(self, manifest: FakeManifest) -> None:
        weights = {name: weight.clone() for name, weight in self.policy.engine.named_weights(torch.float32)}
        ends = self.model.generation_config
        self.model, report = type(self.model).from_pretrained(  # which stacks the experts of a mixture
            None, config=self.model.config, state_dict=weights, output_loading_info=True
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        self.model.eval()
        self.model.generation_config = ends
        self.version = int(manifest)

    async def prove(self, probe: PolicyProbe) -> float:
        ids = torch.tensor([probe.token_ids])
        with torch.no_grad():
            logprobs = self.model(ids).logits[0, :-1].log_softmax(-1)
        theirs = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
        return check_probe(probe.logprobs, theirs, engine=0, version=probe.version, dtype=probe.dtype)

    async def generate(
        self, requests: Sequence[GroupRequest], sampling: Sampling, *, version: int
    ) -> AsyncIterator[CompletedGroup]:
        asked = [(one.prompt.token_ids, seed, one.drawn_by(sampling)) for one in requests for seed in one.seeds]
        turns = iter(self.sample(asked))
        for request in requests:
            prompt = request.prompt.token_ids
            answers = [
                Played(prompt_token_ids=prompt, spans=(turn,), finish_reason=turn.finish_reason)
                for turn in islice(turns, len(request.seeds))
            ]
            rollouts, infos = assemble(request, answers)
            yield CompletedGroup(request=request, rollouts=rollouts, infos=infos)

    async def answer(
        self, request: GroupRequest, sampling: Sampling, *, oldest: int, urgent: bool = False
    ) -> CompletedGroup | None:
        (group,) = [group async for group in self.generate([request], sampling, version=self.version)]
        return group

    def next_logits(self, rows: Sequence[list[int]]) -> Tensor:
        """Return the logits of the token after each row."""
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        logits: Tensor = self.model(ids).logits[range(len(rows)), [len(row) - 1 for row in rows]]
        return logits

    def sample(self, asked: Sequence[tuple[tuple[int, ...], int, Sampling]]) -> list[Sampled]:
        """Sample a turn after each token, by the token's seed. All turns are one batch, padded on the right."""
        end = self.model.generation_config.eos_token_id
        drawn: list[list[tuple[int, float]]] = [[] for _ in asked]
        likeliest: list[list[Any]] = [[] for _ in asked]
        generators = [torch.Generator().manual_seed(seed) for _, seed, _ in asked]
        while open_ones := [
            i
            for i, (_, _, sampling) in enumerate(asked)
            if len(drawn[i]) < sampling.max_new_tokens and not (drawn[i] and drawn[i][-1][0] == end)
        ]:
            with torch.no_grad():
                logits = self.next_logits([[*asked[i][0], *(token for token, _ in drawn[i])] for i in open_ones])
            scales = torch.tensor([asked[i][2].temperature or 1.0 for i in open_ones])
            for i, plain in zip(open_ones, (logits / scales[:, None]).log_softmax(-1), strict=True):
                logprobs = truncated(plain, asked[i][2])
                if asked[i][2].temperature == 0.0:
                    token = int(logprobs.argmax())
                else:
                    token = int(torch.multinomial(logprobs.exp(), 1, generator=generators[i]))
                drawn[i].append((token, float(logprobs[token])))
                if asked[i][2].top_logprobs:
                    likeliest[i].append(logprobs.topk(asked[i][2].top_logprobs))
        tops = [
            (torch.stack([one.indices.int() for one in turn]), torch.stack([one.values for one in turn]))
            for turn in likeliest
            if turn
        ]
        return [
            Sampled(
                token_ids=tuple(token for token, _ in turn),
                logprobs=tuple(logprob for _, logprob in turn),
                versions=(self.version,) * len(turn),
                finish_reason="stop" if turn[-1][0] == end else "length",
                top=top,
            )
            for turn, top in zip(drawn, tops or [None] * len(drawn), strict=True)
        ]


def truncated(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """Return the log-probabilities over the tokens that top_k and then top_p keep, as vLLM does; -inf elsewhere."""
    ranked = logprobs.sort(descending=True)
    kept = torch.arange(len(logprobs)) < (sampling.top_k or len(logprobs))
    chances = ranked.values.masked_fill(~kept, -torch.inf).softmax(0)
    kept &= chances.cumsum(0) - chances < sampling.top_p
    return torch.full_like(logprobs, -torch.inf).scatter(0, ranked.indices[kept], ranked.values[kept]).log_softmax(0)


class Seeing(Engine):
    """The rollout role of a policy that sees. The model is the policy's own, and computes packed rows."""

    def __init__(self, policy: TrainedWorker) -> None:
        FakeEngines.__init__(self)
        self.policy = policy
        self.version = -1

    async def update_weights(self, manifest: FakeManifest) -> None:
        self.model = self.policy.engine.module
        self.version = int(manifest)

    async def prove(self, probe: PolicyProbe) -> float:
        return 0.0

    def next_logits(self, rows: Sequence[list[int]]) -> Tensor:
        return seen_logits(self.model, rows)


def seen_logits(model: Any, rows: Sequence[list[int]]) -> Tensor:
    """Return the logits of the token after each row. Equal rows are computed once."""
    distinct = list(dict.fromkeys(map(tuple, rows)))
    lengths = torch.tensor(list(map(len, distinct)))
    ids = torch.tensor([token for row in distinct for token in row])
    logits = hidden_states(model, ids, lengths)[lengths.cumsum(0) - 1] @ lm_head_weight(model).T
    return logits[[distinct.index(tuple(row)) for row in rows]]


class Conversing(Engine):
    """The rollout role of a run with an environment: turns requested at about the same time are a single batch."""

    def __init__(self, model: str, policy: TrainedWorker, spec: EnvironmentSpec) -> None:
        super().__init__(model, policy)
        self.conversations = Conversations(spec, load_tokenizer(model, trust_remote_code=False), self._draw)
        self.is_started = False
        self.waiting: list[tuple[tuple[tuple[int, ...], int, Sampling], asyncio.Future[Sampled]]] = []

    async def generate(
        self, requests: Sequence[GroupRequest], sampling: Sampling, *, version: int
    ) -> AsyncIterator[CompletedGroup]:
        if not self.is_started:
            await self.conversations.start()
            self.is_started = True
        played = [self.conversations.group(one, one.drawn_by(sampling)) for one in requests]
        for request, (rollouts, infos) in zip(requests, await asyncio.gather(*played), strict=True):
            yield CompletedGroup(request=request, rollouts=rollouts, infos=infos)

    async def _draw(
        self, group_id: int, tokens: tuple[int, ...], seed: int, sampling: Sampling, stop: int | None
    ) -> Sampled:
        future: asyncio.Future[Sampled] = asyncio.get_running_loop().create_future()
        self.waiting.append(((tokens, seed, sampling), future))
        await asyncio.sleep(0.02)
        if self.waiting:
            waiting, self.waiting = self.waiting, []
            turns = self.sample([asked for asked, _ in waiting])
            for (_, answer), turn in zip(waiting, turns, strict=True):
                answer.set_result(turn)
        return await future

    async def stop(self) -> None:
        await self.conversations.stop()


async def run(
    loaded: LoadedConfig, *, watch: Callable[[OnlineRoles], OnlineRoles] = lambda roles: roles, resume: bool = False
) -> Path:
    """Run without Ray and return the folder. The process must have joined a gang of one. watch: wraps the roles."""
    async with started(loaded, watch=watch, resume=resume) as (controller, _):
        await controller.run()
        await controller.export()
        controller.record.folder.commit_final()
        return controller.record.folder.path


@asynccontextmanager
async def looped(loaded: LoadedConfig, **options: Any) -> AsyncIterator[OwnLoop]:
    """Offer the roles to a user's loop without Ray, as rlhf.start does."""
    async with started(loaded, **options) as (controller, stage):
        assert isinstance(stage.inputs, OnlineInputs)

        async def fetch(ref: Any) -> Any:
            return ref

        loop = OwnLoop(
            controller,
            tokenizer=stage.tokenizer,
            fetch=fetch,
            read=partial(read_prompt, stage, stage.inputs),
            write_final=partial(write_final, controller),
            written=stage.written,
        )
        await loop.begin()
        yield loop
        loop.end()


@asynccontextmanager
async def started(
    loaded: LoadedConfig, *, watch: Callable[[OnlineRoles], OnlineRoles] = lambda roles: roles, resume: bool = False
) -> AsyncIterator[tuple[OnlineController, StageInputs]]:
    """Start the roles of a run in this process, and yield the controller."""
    (stage,) = await asyncio.to_thread(load_inputs, loaded)  # this function has its own event loops
    assert isinstance(stage, StageInputs)
    inputs = stage.inputs
    assert isinstance(inputs, OnlineInputs)
    with recording(stage.written, resume=resume) as (record, step):
        images = None if stage.images is None else stage.images.reader.store.folder
        roles, reward = _roles(stage.config, inputs, images)
        controller = OnlineController(
            stage.config,
            watch(roles),
            record,
            prompts=Stream(inputs.prompts, seed=stage.config.run.seed, shuffle=True, shares=inputs.shares),
            eval_sets=inputs.eval_sets,
            marking=inputs.marking,
            probe_ids=inputs.probe_ids,
            policy_fingerprint="",
            rewards_fingerprint=fingerprint(inputs.rewards, model=""),
            supervisor=Supervisor(stage.config.cluster.restarts, record, ("policy", "critic")),
        )
        try:
            if step is not None:
                await controller.restore(step)
            yield controller, stage
        finally:
            reward.stop()
            rollout: Any = roles.rollout
            if isinstance(rollout, Conversing):
                await rollout.stop()


def _roles(config: Config, inputs: OnlineInputs, images: Path | None) -> tuple[OnlineRoles, RewardWorker]:
    assert config.rollouts is not None
    rank = StreamedPolicyWorker if config.train.streamed else WORKERS[config.algorithm.kind]
    worker: Any = rank(config, replace(PLACE, images=images), optimizer_steps=derive.policy_optimizer_steps(config))
    tokens = config.train.max_tokens_per_microbatch
    sequences: Any = config.rollouts.model_dump(include={"temperature", "samples_per_prompt"})
    sequences["max_tokens_per_microbatch"] = tokens
    settings = RewardSettings(
        specs=inputs.rewards,
        tokenizer=config.policy.model,
        trust_remote_code=False,
        model=None,
        timeout_s=config.reward_policy.timeout_s,
        processes=1,
        memory_gib=config.reward_policy.memory_gib,
        max_tokens_per_microbatch=tokens,
    )
    reward = RewardWorker(settings, PLACE)
    engine = Engine(config.policy.model, worker) if images is None else Seeing(worker)
    if isinstance(inputs.environment, EnvironmentSpec):
        engine = Conversing(config.policy.model, worker, inputs.environment)
    roles: Any = {"policy": Policy(worker), "rollout": engine, "reward": Reward(reward)}
    if "critic" in derive.needs(config):
        model, steps = derive.critic_model(config), derive.critic_optimizer_steps(config)
        roles["critic"] = Critic(CriticWorker(config, model, PLACE, optimizer_steps=steps))
    if "reference" in derive.needs(config):
        roles["reference"] = Reference(ReferenceWorker(derive.reference_model(config), PLACE, **sequences))
    if config.teacher is not None:
        served = served_models(config)
        form: Any = ServedOnlineTeacherWorker if served else OnlineTeacherWorker
        returns: Any = {"top": top_of(config), "spans": spans_of(config)}
        roles["teacher"] = Teacher(form(served or derive.teachers(config), PLACE, **returns, **sequences))
        for name in derive.teachers(config) if derive.reads_teacher_heads(config) else ():
            worker.take_teacher(name, roles["teacher"].worker.head(teacher=name)[0])
    return OnlineRoles(**roles), reward
