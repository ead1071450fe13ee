"""Where a run runs: the one section that differs between a laptop and a cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf.algorithms.section import Section

Threads = Annotated[int, Field(ge=1, le=1024)] | Literal["auto"]


class TrainedRole(Section):
    """Workers of a trained model: one gang of ranks."""

    workers: int = Field(default=1, ge=1, le=65536)
    """Ranks."""
    cpus: float = Field(default=1.0, gt=0.0)
    """CPUs that Ray reserves for each; a colocated worker uses those of its host."""
    node_labels: dict[str, str] = Field(default_factory=dict)
    """Labels that the nodes of these workers must have, as `ray start --labels=pool=gpu` gives them; colocated ones
    stand with their host."""
    threads: Threads = "auto"
    """Compute threads of each; auto: the node's cores shared out among the ranks of this role on it."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 1 shards the optimizer, 2 the gradients too, 3 the parameters too."""
    offload: tuple[Literal["optimizer", "parameters"], ...] = ()
    """What DeepSpeed keeps in host memory. `parameters` needs zero_stage 3."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Ranks that share each micro-batch, a part of its tokens each (DeepSpeed Ulysses): for sequences that are too long
    for one. It divides workers and the model's attention heads."""

    @property
    def data_parallel_ranks(self) -> int:
        """Among how many the sequences of an optimizer step are dealt out: the ranks that share count as one."""
        return self.workers // self.sequence_parallel


class PolicyRole(TrainedRole):
    """Workers of the policy."""

    @property
    def colocate_with(self) -> None:
        """The policy is a host of others and has none itself."""
        return None


class CriticRole(TrainedRole):
    """Workers of the critic."""

    colocate_with: Literal["policy"] | None = "policy"
    """Use that role's bundles and take turns with it; null: bundles of its own."""


class ForwardRole(Section):
    """Workers of the reference, the teacher or the reward role: each holds the whole model; work is dealt out among
    them."""

    workers: int = Field(default=1, ge=1, le=65536)
    """Processes."""
    cpus: float = Field(default=1.0, gt=0.0)
    """CPUs that Ray reserves for each; a colocated worker uses those of its host."""
    node_labels: dict[str, str] = Field(default_factory=dict)
    """Labels that the nodes of these workers must have, as `ray start --labels=pool=gpu` gives them; colocated ones
    stand with their host."""
    threads: Threads = "auto"
    """Compute threads of each; auto: the node's cores shared out among the workers of this role on it."""


class ReferenceRole(ForwardRole):
    """Workers of the reference model."""

    colocate_with: Literal["policy", "rollout"] | None = "policy"
    """Use that role's bundles and take turns with it; null: bundles of its own."""


class TeacherRole(ForwardRole):
    """Workers of the teacher."""

    colocate_with: Literal["policy"] | None = "policy"
    """Use that role's bundles and take turns with it; null: bundles of its own, and the teacher is a step ahead."""


class RewardRole(ForwardRole):
    """Workers that score responses: reward functions and the reward model."""

    colocate_with: Literal["policy", "rollout"] | None = "rollout"
    """Use that role's bundles and take turns with it; null: bundles of its own."""


class RolloutRole(Section):
    """vLLM engines."""

    engines: int = Field(default=1, ge=1, le=65536)
    """Engines; prompts are dealt out among them."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs of one engine."""
    cpus: float = Field(default=1.0, gt=0.0)
    """CPUs that Ray reserves for each engine; a colocated one uses those of its host."""
    node_labels: dict[str, str] = Field(default_factory=dict)
    """Labels that the nodes of the engines must have, as `ray start --labels=pool=gpu` gives them; colocated ones
    stand with their host."""
    threads: Threads = "auto"
    """Compute threads of each engine on a CPU; auto: the node's cores shared out among the engines on it."""
    colocate_with: Literal["policy"] | None = None
    """Use the policy's bundles and take turns with it, on GPUs by sleep and wake; null: bundles of its own."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """KV cache of each engine on a CPU, whole GiB."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Share of a GPU's memory that an engine may use."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences decoded at once by one engine. vLLM's own default depends on the GPU (1024 on an H100), and with it the
    rounding of log-probabilities would. Raise it where an engine gets more responses at once than this."""
    enforce_eager: bool = False
    """GPU: no CUDA graphs. On a CPU engines are always eager."""


class Roles(Section):
    """Resources of each role. A role that the run does not need must not be named."""

    policy: PolicyRole = PolicyRole()
    """Ranks of the policy."""
    critic: CriticRole = CriticRole()
    """Ranks of the critic."""
    reference: ReferenceRole = ReferenceRole()
    """Workers of the reference model."""
    teacher: TeacherRole = TeacherRole()
    """Workers of the teacher."""
    reward: RewardRole = RewardRole()
    """Workers that score responses."""
    rollout: RolloutRole = RolloutRole()
    """Rollout engines."""


class ClusterConfig(Section):
    """The Ray cluster and the deadlines."""

    address: str | None = None
    """null: a local Ray started for this run; `auto`: the cluster this command runs in; else its address."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where models live. cuda gives every trained and forward worker one GPU and every engine tensor_parallel GPUs."""
    weight_sync: Literal["auto", "shm", "gloo", "nccl", "ipc"] = "auto"
    """How weights reach the engines. auto: shm on one CPU host, gloo across CPU hosts, ipc where policy and engine
    share GPUs, else nccl."""
    object_store_gib: float = Field(default=1.0, gt=0.05)
    """Shared memory of a local Ray."""
    start_timeout_s: float = Field(default=300.0, gt=0.0, le=1_000_000)
    """Limit on placing and starting all workers."""
    call_timeout_s: float = Field(default=1800.0, gt=0.0, le=1_000_000)
    """Limit on one call of a worker: the longest that a hang can last."""
    roles: Roles = Roles()
    """Resources of each role."""
