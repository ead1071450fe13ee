"""Create the workers of each role of a run. The table at the end names the builder of each role."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ray.actor import ActorHandle

from actors.cluster.memory_folders import MemoryFolders
from actors.cluster.placement import Placement
from actors.roles.gang import CriticGang, Gang, OfflineGang, PolicyGang
from actors.roles.group import SpawnOne, Stoppable, WorkerGroup, spawn
from actors.roles.ranks import RANKS, StreamedPolicyRank
from actors.roles.teacher import OnlineTeacherWorkers, TeacherWorkers
from actors.roles.worker_pools import ReferenceWorkers, RewardWorkers
from rlhf.config import derive
from rlhf.config.schema.root import Config
from rlhf.controller.supervisor import Supervisor
from rlhf.preflight.sources import served_models
from rlhf.rewards.scoring import RewardSpec
from rlhf.role_table import Role
from rlhf.workers.frozen.reference import ReferenceWorker
from rlhf.workers.frozen.reward import RewardSettings
from rlhf.workers.frozen.served_teacher import ServedOnlineTeacherWorker, ServedTeacherWorker
from rlhf.workers.frozen.teacher import OnlineTeacherWorker, TeacherWorker
from rlhf.workers.frozen.top_settings import spans_of, top_of
from rlhf.workers.online.critic import CriticWorker
from rlhf.workers.trained import TrainedWorker

G = TypeVar("G", bound=Gang)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """Hold all that the builders of a run's roles need."""

    config: Config
    placement: Placement
    longest_sequence: int  # tokens of prompt and response; engines have the same
    supervisor: Supervisor | None = None  # None: a lost worker ends the work
    rewards: tuple[RewardSpec, ...] = ()
    judgements: Path | None = None  # folder for the answers of judges
    tokenizer_class: type[Any] | None = None  # of the policy; None: the model's own code defines the class
    images: Path | None = None  # folder of the run's images
    folders: MemoryFolders | None = None  # for snapshots of trained ranks; None: no snapshots

    def spawn(self, role: Role, worker: type, *args: Any, **options: Any) -> tuple[list[ActorHandle[Any]], SpawnOne]:
        options |= {"longest_sequence": self.longest_sequence, "images": self.images}
        return spawn(self.config.cluster, self.placement, role, worker, *args, **options)

    def gang(self, gang: type[G], rank: type[TrainedWorker], *args: Any, **options: Any) -> G:
        made = gang(
            *self.spawn(gang.role, rank, *args, **options),
            deadline_s=self.config.cluster.call_timeout_s,
            one_host=self.placement.on_one_host(),
            sequence_parallel=getattr(self.config.cluster.roles, gang.role).sequence_parallel,
        )
        made.folders = self.folders
        return made

    def frozen(self, group: type[WorkerGroup], worker: type, model: Any, **options: Any) -> WorkerGroup:
        """Create the workers of a frozen role. Online, the workers score responses exactly as sampled."""
        config = self.config
        options["max_tokens_per_microbatch"] = config.train.max_tokens_per_microbatch
        if config.rollouts is not None:
            options |= config.rollouts.model_dump(include={"temperature", "samples_per_prompt"})
        spawned = self.spawn(group.role, worker, model, **options)
        return group(*spawned, deadline_s=config.cluster.call_timeout_s)


def _policy(run: RunContext) -> PolicyGang | OfflineGang:
    config, algorithm = run.config, run.config.algorithm
    gang: type[PolicyGang | OfflineGang] = PolicyGang if algorithm.is_online else OfflineGang
    rank = StreamedPolicyRank if config.train.streamed else RANKS[algorithm.kind]
    return run.gang(gang, rank, config, optimizer_steps=derive.policy_optimizer_steps(config))


def _critic(run: RunContext) -> CriticGang:
    config, steps = run.config, derive.critic_optimizer_steps(run.config)
    return run.gang(CriticGang, CriticWorker, config, derive.critic_model(config), optimizer_steps=steps)


def _reference(run: RunContext) -> WorkerGroup:
    return run.frozen(ReferenceWorkers, ReferenceWorker, derive.reference_model(run.config))


def _teacher(run: RunContext) -> WorkerGroup:
    config, options = run.config, {"top": top_of(run.config), "spans": spans_of(run.config)}
    if served := served_models(config):
        is_online = config.algorithm.is_online
        worker = ServedOnlineTeacherWorker if is_online else ServedTeacherWorker
        group = run.frozen(OnlineTeacherWorkers if is_online else TeacherWorkers, worker, served, **options)
        group.deadline_s += max(model.service.deadline_s for model in served.values())  # a request may take this long
        return group
    if config.algorithm.is_online:
        return run.frozen(OnlineTeacherWorkers, OnlineTeacherWorker, derive.teachers(config), **options)
    return run.frozen(TeacherWorkers, TeacherWorker, derive.teachers(config), **options)


def _reward(run: RunContext) -> RewardWorkers:
    config, policy = run.config, run.config.reward_policy
    settings = RewardSettings(
        specs=run.rewards,
        tokenizer=config.policy.tokenizer_source,
        trust_remote_code=config.policy.trust_remote_code,
        tokenizer_class=run.tokenizer_class,
        template=derive.chat_template(config),
        model=config.reward if derive.uses_reward_model(config) else None,
        timeout_s=policy.timeout_s,
        processes=policy.processes,
        memory_gib=policy.memory_gib,
        max_tokens_per_microbatch=config.train.max_tokens_per_microbatch,
        judgements=run.judgements,
    )
    return RewardWorkers.create(
        config.cluster, run.placement, settings, longest_sequence=run.longest_sequence, images=run.images
    )


# In the order in which the groups start and stop. The engines are leased with the run's placement: see EnginePool.
ROLE_BUILDERS: Mapping[Role, Callable[[RunContext], WorkerGroup]] = {
    PolicyGang.role: _policy,
    CriticGang.role: _critic,
    ReferenceWorkers.role: _reference,
    TeacherWorkers.role: _teacher,
    RewardWorkers.role: _reward,
}


def build_roles(run: RunContext, groups: list[Stoppable]) -> dict[Role, Any]:
    """Create the workers of all roles of the run, apart from the engines. Each group is appended to `groups` at once,
    so that a failure of the next group still ends the group."""
    last: list[Stoppable] = []  # end after the ranks that write into them
    if derive.restarts_gangs(run.config):
        folders = MemoryFolders(start_timeout_s=run.config.cluster.start_timeout_s)
        last.append(folders)
        run = replace(run, folders=folders)
    roles: dict[Role, Any] = {}
    try:
        for role, build in ROLE_BUILDERS.items():
            if role in derive.needs(run.config):
                roles[role] = build(run)
                roles[role].supervisor, roles[role].placement = run.supervisor, run.placement
                groups.append(roles[role])
    finally:
        groups += last
    return roles
