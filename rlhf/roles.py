"""Protocols of the roles, as the controller sees them.

A `Ref` is a value that stays where it was made (an object reference under Ray, the object itself in one process):
the controller hands it on and never opens it. Everything else that crosses here is scalars and ids.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from rlhf.evaluation.voting import AnswerForm
from rlhf.tracking.metrics.reductions import Reduction
from rlhf.tracking.run_folder.samples import SampleRecord
from rlhf.types import (
    BatchPlan,
    Examples,
    GroupRequest,
    GroupScores,
    LearntStates,
    MinibatchPlan,
    Pairs,
    RolloutInfo,
    Rollouts,
    Sampling,
    TokenSignals,
    TokenValues,
)

WeightManifest = Any  # names one published set of weights; what is in it is between the transport's two ends
Metrics = Mapping[str, Reduction]  # declared names; merges over ranks, micro-batches and minibatches

T_co = TypeVar("T_co", covariant=True)


class Ref(Protocol[T_co]):
    """A value in another process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletedGroup:
    """All responses to one request. `rollouts` holds their tokens."""

    request: GroupRequest
    rollouts: Ref[Rollouts]
    infos: tuple[RolloutInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A completed group with its scores: what training takes."""

    group: CompletedGroup
    scores: GroupScores
    greedy_score: float | None = None  # of the greedy response to the same prompt; None: none was asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSelection:
    """Responses of one group for the samples file. Their records lack only the text, which the controller has not."""

    rollouts: Ref[Rollouts]
    records: tuple[SampleRecord, ...]  # `sample` names the response within the group
    sequence_ids: tuple[int, ...]  # of the records, in their order


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Peak memory of a role's largest process, GiB."""

    rss_gib: float
    gpu_gib: float | None  # None: it has no GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceReport:
    """Sums and means over the sampled tokens of one sequence, before it is trained on."""

    sequence_id: int
    kl_ref: float | None  # sum of the configured estimator of KL(policy || reference); None: no reference
    mean_old_logprob: float
    mean_ref_logprob: float | None  # None: no reference


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReport:
    """What the current weights say of a batch, over all ranks. No sequences: the first update will measure them."""

    sequences: tuple[SequenceReport, ...]
    metrics: Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantagesReport:
    """Advantages of a batch, over all ranks; `returns` are the critic's targets, one column a rank."""

    mean_advantages: Mapping[int, float]  # by sequence id
    metrics: Metrics
    returns: tuple[Ref[TokenValues], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """What a trained role's hardware could do, for the share of it that is used (`throughput/mfu`)."""

    flops_per_token: float  # of a forward and backward pass, attention apart
    flops_per_token_and_length: float  # more of it for each token of the mean sequence length
    peak_flops: float  # of all ranks, a second, in large matrix products

    def utilisation(self, *, tokens_per_s: float, mean_length: float) -> float:
        """The share of the peak that this many trained tokens a second are."""
        return (self.flops_per_token + self.flops_per_token_and_length * mean_length) * tokens_per_s / self.peak_flops


EnginePart = Literal["weights", "cache"]


class RolloutRole(Protocol):
    """The engines. They refuse to generate until they have been given weights."""

    def generate(self, requests: Sequence[GroupRequest], sampling: Sampling) -> AsyncIterator[CompletedGroup]:
        """Answer all requests; groups come as they are completed."""
        ...

    async def cancel(self, requests: Sequence[GroupRequest]) -> None:
        """Drop requests of the `generate` at work: it yields none of them any more, and ends without them."""
        ...

    async def update_weights(self, manifest: WeightManifest) -> None:
        """Load a published set of weights; RunError if version or checksum is not the manifest's afterwards."""
        ...

    async def probe(self, token_ids: Sequence[int]) -> list[list[float]]:
        """Each engine's log-probabilities of token_ids[1:]."""
        ...

    async def sleep(self, *, keep_weights: bool) -> None:
        """Give the GPU to the trainers (nothing to do on a CPU). Weights that are not kept come with the next sync."""
        ...

    async def wake(self, part: EnginePart) -> None:
        """Take a part of the GPU's memory back: the weights', then the cache's, without which it does not generate."""
        ...

    async def memory(self) -> MemoryReport: ...


class RewardRole(Protocol):
    """Scores responses and, having their text, writes the samples files."""

    async def score(self, group: CompletedGroup) -> GroupScores: ...

    async def answers(self, group: CompletedGroup, form: AnswerForm) -> tuple[str | None, ...]:
        """What each response answers, by which responses vote; None: nothing."""
        ...

    async def write_samples(
        self, path: Path, selections: Sequence[SampleSelection], signals: Sequence[Ref[TokenSignals]] = ()
    ) -> None:
        """Add the text and the tokens, with what training made of those that there are `signals` of; write the file."""
        ...

    async def memory(self) -> MemoryReport: ...


class NodesRole(Protocol):
    """The nodes that the run is on."""

    async def use(self) -> Metrics:
        """`system/*` of each since the last call; of one that does not answer, nothing."""
        ...


StatesByRank = Sequence[Sequence[Ref[LearntStates]]]  # for each data-parallel rank, the columns that hold its rows


class GpuGuest(Protocol):
    """A role that can leave the GPU which it shares with an engine. Nothing to do on a CPU."""

    async def offload(self) -> None:
        """Give the GPU to the engines."""
        ...

    async def reload(self) -> None:
        """Take the GPU back."""
        ...


class ReferenceRole(GpuGuest, Protocol):
    """The frozen model."""

    async def become(self, folder: Path) -> None:
        """Hold the model of a folder from now on."""
        ...

    async def logprobs(
        self,
        rollouts: Sequence[Ref[Rollouts]],
        *,
        only: frozenset[int] | None = None,
        temperatures: Mapping[int, float] | None = None,
    ) -> list[Ref[TokenValues]]:
        """One column for each given batch, in order; of these sequences only, at least one of each batch.

        temperatures: by sequence id, where it is not that of all; None: nowhere.
        """
        ...

    async def memory(self) -> MemoryReport: ...


class TeacherRole(Protocol):
    """The frozen model that a student learns from."""

    async def states(self, dataset: int, plan: MinibatchPlan) -> StatesByRank:
        """Its states in which the tokens to be learnt of the named rows of a data set are predicted."""
        ...

    async def memory(self) -> MemoryReport: ...


class OnlineTeacherRole(GpuGuest, Protocol):
    """The frozen model that a student learns from on its own responses."""

    async def logprobs(
        self, rollouts: Sequence[Ref[Rollouts]], *, temperatures: Mapping[int, float]
    ) -> list[Ref[TokenValues]]:
        """Log-probabilities of the sampled tokens, one column for each given batch, in order."""
        ...

    async def states(self, plan: MinibatchPlan, groups: Sequence[CompletedGroup]) -> StatesByRank:
        """Its states in which the sampled tokens of a minibatch's sequences are predicted."""
        ...

    async def mean_logprobs(
        self, rollouts: Sequence[Ref[Rollouts]], *, temperature: float, samples_per_prompt: int
    ) -> Mapping[int, float]:
        """By sequence id, over its sampled tokens."""
        ...

    async def memory(self) -> MemoryReport: ...


class TrainedRole(GpuGuest, Protocol):
    """What the policy and the critic share."""

    @property
    def num_ranks(self) -> int: ...

    async def save(self, folder: Path) -> None:
        """Everything that an exact continuation needs."""
        ...

    async def load(self, folder: Path) -> None: ...

    async def export(self, folder: Path) -> None:
        """A Hugging Face folder, or an adapter folder."""
        ...

    async def arithmetic(self) -> Arithmetic:
        """Measured now: nothing else should run."""
        ...

    async def memory(self) -> MemoryReport: ...


class PolicyRole(TrainedRole, Protocol):
    """The trained language model."""

    async def prepare(
        self, plan: BatchPlan, rollouts: Sequence[Ref[Rollouts]], ref_logprobs: Sequence[Ref[TokenValues]]
    ) -> PrepareReport:
        """Take a batch in, and measure what the current weights say of it."""
        ...

    async def set_advantages(
        self, by_sequence: Mapping[int, float] | None, values: Sequence[Ref[TokenValues]]
    ) -> AdvantagesReport:
        """Give every sampled token its advantage: its sequence's, or (None) estimated from the critic's values."""
        ...

    async def update(self, minibatch: int, states: StatesByRank = ()) -> Metrics:
        """One optimizer step on the prepared batch's minibatch. `states`: what a teacher says of it, if it is asked."""
        ...

    async def token_signals(self, sequences: Sequence[int]) -> list[Ref[TokenSignals]]:
        """What training made of the tokens of these sequences of the prepared batch, one column a rank."""
        ...

    async def empty_cache(self) -> None:
        """Return memory that torch keeps but no tensor uses, so that a process on the same GPU can have it."""
        ...

    async def publish(self, version: int) -> WeightManifest:
        """Stage the current weights for the engines."""
        ...

    async def send(self, manifest: WeightManifest) -> None:
        """Send them where the transport needs it, while the engines receive."""
        ...

    async def settle(self) -> None:
        """The engines have loaded what was published: memory that only served its way may go."""
        ...

    async def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of token_ids[1:] at temperature 1."""
        ...


class CriticRole(TrainedRole, Protocol):
    """The value model."""

    async def values(self, plan: BatchPlan, rollouts: Sequence[Ref[Rollouts]]) -> list[Ref[TokenValues]]:
        """Values of the batch's tokens, one column a rank."""
        ...

    async def prepare(self, plan: BatchPlan, returns: Sequence[Ref[TokenValues]]) -> None: ...

    async def update(self, minibatch: int) -> Metrics:
        """One optimizer step on the prepared batch's minibatch."""
        ...


class OfflineRole(TrainedRole, Protocol):
    """A model trained on fixed data. A plan's sequence ids are rows of a data set."""

    async def load_data(self, sets: Sequence[Ref[Examples | Pairs]]) -> None:
        """Train set first, then the evaluation sets."""
        ...

    async def update_on(self, plan: MinibatchPlan, states: StatesByRank = ()) -> Metrics:
        """One optimizer step on rows of the training set. `states`: what a teacher says of them, if there is one."""
        ...

    async def evaluate(self, dataset: int, name: str, plan: MinibatchPlan, states: StatesByRank = ()) -> Metrics:
        """Loss and accuracy on the named rows of a data set, without an update."""
        ...

    async def reference_key(self, dataset: int) -> str:
        """Names what the weights, as they are now, say of a data set."""
        ...

    async def reference_logprobs(self, dataset: int, plan: MinibatchPlan) -> list[Ref[TokenValues]]:
        """Log-probabilities of the named rows by the weights as they are now, one column a rank."""
        ...

    async def keep_reference(self, dataset: int, path: Path, columns: Sequence[Ref[TokenValues]]) -> None:
        """Take up the columns of a whole data set as the reference's, and write them down."""
        ...

    async def read_reference(self, dataset: int, path: Path) -> bool:
        """Take up what was written down; False if it is damaged or not what these weights say."""
        ...
