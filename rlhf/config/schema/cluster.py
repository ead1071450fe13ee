"""Define the resources of a run. Only this section differs between a laptop and a cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from rlhf.config.transports import Transport
from rlhf.sections import OnlyIn, OnlyWith, Section

OF_THE_HOST = OnlyWith("colocate_with", None, because="it uses what {value} reserves", gives_value=True)
OF_A_LOCAL_RAY = OnlyWith(
    "address", None, because="its size is that of `ray start --object-store-memory`", gives_value=True
)
Threads = Annotated[int, Field(ge=1, le=1024)] | Literal["auto"]


class RoleResources(Section):
    """Resources of a node for each process of a role."""

    cpus: Annotated[float, OF_THE_HOST] = Field(default=1.0, gt=0.0)
    """CPUs reserved by Ray for each process. A colocated process uses the CPUs of its host."""
    node_labels: Annotated[dict[str, str], OF_THE_HOST] = Field(default_factory=dict)
    """Labels required on the nodes of this role, as set by `ray start --labels=pool=gpu`. Colocated processes run on
    the node of their host."""
    threads: Annotated[Threads, OnlyIn("cpu")] = "auto"
    """Compute threads of each process on a CPU. auto: the node's cores divided by the number of this role's processes
    on it. `rlhf tinker` divides the cores by the processes of all roles, which compute at the same time."""


class TrainedResources(RoleResources):
    """Workers of a trained model, forming one group of ranks."""

    workers: int = Field(default=1, ge=1, le=65536)
    """Number of ranks."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], OnlyIn("training")] = 2
    """DeepSpeed ZeRO: 1 shards the optimizer, 2 the gradients too, 3 the parameters too."""
    offload: Annotated[
        tuple[Literal["optimizer", "parameters"], ...],
        OnlyIn("training", "cuda"),
        OnlyWith("zero_stage", 1, 2, 3, because="DeepSpeed offloads nothing at stage {value}"),
    ] = ()
    """States that DeepSpeed keeps in host memory. `parameters` needs zero_stage 3."""
    sequence_parallel: Annotated[int, OnlyIn("training")] = Field(default=1, ge=1)
    """Ranks that share each micro-batch, each with a part of its tokens (DeepSpeed Ulysses). Meant for sequences too
    long for one rank. The number must divide workers and the model's attention heads."""

    @property
    def data_parallel_ranks(self) -> int:
        """Return the number of groups of `sequence_parallel` ranks, which share the sequences of an optimizer step."""
        return self.workers // self.sequence_parallel


class PolicyResources(TrainedResources):
    """Workers of the policy."""

    @property
    def colocate_with(self) -> None:
        """Return None: other roles use the policy's bundles, never the reverse."""
        return None


class CriticResources(TrainedResources):
    """Workers of the critic."""

    colocate_with: Literal["policy"] | None = "policy"
    """Share the bundles and take turns with this role. null: use separate bundles."""


class ForwardResources(RoleResources):
    """Workers of the reference, teacher or reward role. Each worker holds the whole model, and the workers divide the
    rows."""

    workers: int = Field(default=1, ge=1, le=65536)
    """Number of processes."""
    colocate_with: Literal["policy", "rollout"] | None = "policy"
    """Share the bundles and take turns with this role. null: use separate bundles."""


class ReferenceResources(ForwardResources):
    """Workers of the reference model."""


class TeacherResources(ForwardResources):
    """Workers of the teacher."""

    colocate_with: Literal["policy"] | None = "policy"
    """Share the bundles and take turns with this role. null: use separate bundles; the teacher then works one step
    ahead."""


class RewardResources(ForwardResources):
    """Workers for reward functions and the reward model."""

    colocate_with: Literal["policy", "rollout"] | None = "rollout"


class EngineRange(Section):
    """A number of engines that follows the nodes of the cluster."""

    min: int = Field(ge=1, le=65536)
    """Smallest number of engines. At the start and after a loss, the run waits for these engines, at most
    cluster.start_timeout_s."""
    max: int = Field(ge=1, le=65536)
    """Largest number of engines. With fewer engines, the run asks Ray for room for a further engine."""


class RolloutResources(RoleResources):
    """The vLLM engines."""

    engines: Annotated[int, Field(ge=1, le=65536)] | EngineRange = 1
    """Number of engines. Prompts are divided among the engines. With min and max, engines join during the run when
    there is room, and leave with their nodes. Such a range needs rollouts.weight_updates `in_flight`."""
    tensor_parallel: Annotated[int, OnlyIn("cuda")] = Field(default=1, ge=1)
    """Number of GPUs of one engine."""
    colocate_with: Literal["policy"] | None = None
    """Share the policy's bundles and take turns with the policy; on GPUs the engine sleeps while the policy trains.
    null: use separate bundles."""
    kv_cache_gib: Annotated[int, OnlyIn("cpu")] = Field(default=1, ge=1)
    """KV cache of each engine on a CPU, in whole GiB."""
    gpu_memory_utilization: Annotated[float, OnlyIn("cuda")] = Field(default=0.85, gt=0.0, lt=1.0)
    """Fraction of a GPU's memory that an engine may use."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Largest number of sequences decoded at once by one engine. vLLM's default depends on the GPU (1024 on an H100),
    and so would the rounding of log-probabilities. Increase the number if an engine gets more responses at once."""
    enforce_eager: Annotated[bool, OnlyIn("cuda")] = False
    """Disable CUDA graphs on GPUs. CPU engines never use CUDA graphs."""
    engine_args: dict[str, JsonValue] = Field(default_factory=dict)
    """More arguments of vLLM's engine, by the names in its EngineArgs, such as `{enable_expert_parallel: true}`. The
    installed vLLM must know each argument. An argument with a key here is refused. docs/rollouts.md has recipes."""

    @property
    def workers(self) -> int:
        """Return the number of engines at the start of the run. Each engine is one actor, also with several GPUs."""
        return self.engines.min if isinstance(self.engines, EngineRange) else self.engines

    @property
    def is_elastic(self) -> bool:
        return isinstance(self.engines, EngineRange)


class Roles(Section):
    """Resources of each role. Roles not needed by the run must not be given."""

    policy: Annotated[PolicyResources, OnlyIn("policy role")] = PolicyResources()
    """Ranks of the policy."""
    critic: Annotated[CriticResources, OnlyIn("critic role")] = CriticResources()
    """Ranks of the critic."""
    reference: Annotated[ReferenceResources, OnlyIn("reference role")] = ReferenceResources()
    """Workers of the reference model."""
    teacher: Annotated[TeacherResources, OnlyIn("teacher role")] = TeacherResources()
    """Workers of the teacher."""
    reward: Annotated[RewardResources, OnlyIn("reward role")] = RewardResources()
    """Workers for scoring responses."""
    rollout: Annotated[RolloutResources, OnlyIn("rollout role")] = RolloutResources()
    """Rollout engines."""


class Restarts(Section):
    """Number of lost processes that a run replaces within `window_s`. The next loss ends the run."""

    engine: Annotated[int, OnlyIn("rollouts")] = Field(default=10, ge=0)
    """Rollout engines."""
    gang: Annotated[int, OnlyIn("training")] = Field(default=5, ge=0)
    """All ranks of the policy and the critic together. Above 0, each rank holds two snapshots of the rank's state in
    /dev/shm. The number also limits restarts of the driver with `rlhf train --supervise`."""
    worker: int = Field(default=10, ge=0)
    """Workers of the reference, teacher or reward role. Each role is counted separately."""
    window_s: float = Field(default=3600.0, gt=0.0)
    """Period for counting the losses, in seconds."""


class ClusterConfig(Section):
    """The Ray cluster and the deadlines."""

    address: str | None = None
    """Ray cluster to connect to. null: start a local Ray for this run. `auto`: the cluster this command runs in.
    Otherwise: the cluster's address."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of the models. cuda gives every trained and forward worker one GPU and every engine
    tensor_parallel GPUs."""
    weight_sync: Annotated[Literal["auto", Transport], OnlyIn("rollouts")] = "auto"
    """Transport of the weights to the engines. auto: shm on one CPU host, gloo across CPU hosts, ipc if policy and
    engine share GPUs, else nccl."""
    object_store_gib: Annotated[float, OF_A_LOCAL_RAY] = Field(default=1.0, gt=0.05)
    """Shared memory of a local Ray, in GiB."""
    start_timeout_s: float = Field(default=300.0, gt=0.0, le=1_000_000)
    """Time limit for placing and starting all workers, in seconds."""
    call_timeout_s: float = Field(default=1800.0, gt=0.0, le=1_000_000)
    """Time limit for one call of a worker, in seconds. The limit bounds the duration of a hang."""
    heartbeat_timeout_s: float = Field(default=60.0, ge=1.0, le=1_000_000)
    """Longest time in which a process may leave the driver's heartbeats unanswered, in seconds. Then the process is
    killed and counts as lost. A computing process answers; a stopped or disconnected process does not."""
    room_timeout_s: float = Field(default=1800.0, ge=0.0, le=1_000_000)
    """Longest time in which a run waits for room on a full disk or in shared memory, in seconds.
    No other time limit runs during this wait. 0: the run ends at once."""
    restarts: Restarts = Restarts()
    """How often lost processes are started again before the run ends."""
    roles: Roles = Roles()
    """Resources of each role."""
