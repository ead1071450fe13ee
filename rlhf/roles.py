"""Define the roles of a run as Protocols, for the controller.

A `Ref` is a value in the producing process: an object reference under Ray, or the object itself within one process. The
controller passes a `Ref` on and never opens it. Everything else in these interfaces is scalars and ids.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from rlhf.adapters import AdamStep, AdapterShape, LossReport, LossRows, NamedLoss, SampleAnswer, SampleRequest
from rlhf.errors import WorkerLost
from rlhf.evaluation.voting import AnswerForm
from rlhf.role_table import Role
from rlhf.tracking.metrics.reductions import Reduction
from rlhf.tracking.run_folder.samples import SampleRecord
from rlhf.types import (
    BatchPlan,
    Examples,
    GivenBatch,
    GroupRequest,
    GroupScores,
    MemoryReport,
    MinibatchPlan,
    OwnLoss,
    Pairs,
    PrivilegedContext,
    PrivilegedPrompts,
    Prompt,
    RolloutInfo,
    Rollouts,
    Sampling,
    TeacherColumn,
    TeacherPrompt,
    TokenSignals,
    TokenValues,
)

WeightManifest = Any  # names a published set of weights; only the transport reads more than the checksum
Metrics = Mapping[str, Reduction]  # declared names; merges over ranks, micro-batches and minibatches

T_co = TypeVar("T_co", covariant=True)


class Ref(Protocol[T_co]):
    """A value held by another process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteColumns(Generic[T_co]):
    """Token columns in another process. A rank fetches only columns with a sequence of the rank."""

    ref: Ref[T_co]
    sequence_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletedGroup:
    """All responses to one request. `rollouts` holds their tokens."""

    request: GroupRequest
    rollouts: Ref[Rollouts]
    infos: tuple[RolloutInfo, ...]

    @property
    def columns(self) -> RemoteColumns[Rollouts]:
        """Return the columns of the responses."""
        return RemoteColumns(ref=self.rollouts, sequence_ids=tuple(info.sequence_id for info in self.infos))


def teacher_prompts(groups: Sequence[CompletedGroup]) -> dict[int, TeacherPrompt]:
    """Return the prompts of teachers with another tokenizer, by the ids of the responses."""
    prompts = [(group, group.request.prompt.teacher_prompt) for group in groups]
    return {info.sequence_id: prompt for group, prompt in prompts if prompt is not None for info in group.infos}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A completed group with scores, the input of training."""

    group: CompletedGroup
    scores: GroupScores
    greedy_score: float | None = None  # of a greedy response to the same prompt; None: not requested
    greedy_tokens: int = 0  # number of sampled tokens in the greedy response

    @property
    def prompt(self) -> Prompt:
        return self.group.request.prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSelection:
    """Responses of one group for the samples file. The controller has no text, so the records lack the text."""

    rollouts: Ref[Rollouts]
    records: tuple[SampleRecord, ...]  # `sample` is the index within the group
    sequence_ids: tuple[int, ...]  # in the order of the records


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceReport:
    """Sums and means over the sampled tokens of one sequence, before training."""

    sequence_id: int
    kl_ref: float | None  # sum of the configured estimator of KL(policy || reference); None: no reference
    mean_old_logprob: float
    mean_ref_logprob: float | None  # None: no reference


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReport:
    """The current weights' metrics of a batch, over all ranks. Empty `sequences`: measured by the first update."""

    sequences: tuple[SequenceReport, ...]
    metrics: Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantagesReport:
    """Advantages of a batch, over all ranks. `returns` holds the critic's targets, one column per rank."""

    mean_advantages: Mapping[int, float]  # by sequence id
    metrics: Metrics
    returns: tuple[RemoteColumns[TokenValues], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Peak throughput of a trained role's hardware, the denominator of `throughput/mfu`."""

    flops_per_token: float  # of a forward and backward pass, without attention
    flops_per_token_and_length: float  # additional FLOPs for each token of the mean sequence length
    peak_flops: float  # per second over all ranks, in large matrix products

    def utilisation(self, *, tokens_per_s: float, mean_length: float) -> float:
        """Return the fraction of the peak used by training `tokens_per_s`."""
        return (self.flops_per_token + self.flops_per_token_and_length * mean_length) * tokens_per_s / self.peak_flops


EnginePart = Literal["weights", "cache"]


class MeasuredRole(Protocol):
    """A role with a report of memory."""

    async def memory(self) -> MemoryReport: ...


class ProfiledRole(Protocol):
    """A role whose processes can profile a step. `folder` gets a file for each process."""

    async def start_profile(self) -> None: ...

    async def stop_profile(self, folder: Path) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyProbe:
    """The policy's log-probabilities of a fixed text under one version of the weights. The engines must agree."""

    version: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of token_ids[1:] without images' positions
    dtype: str  # of the weights


class RolloutRole(MeasuredRole, Protocol):
    """The inference engines. Engines refuse to generate before receiving weights. In a sync: withdraw_weights,
    update_weights while the policy sends, prove."""

    def generate(
        self, requests: Sequence[GroupRequest], sampling: Sampling, *, version: int
    ) -> AsyncIterator[CompletedGroup]:
        """Answer all requests with the weights of `version`, and yield each completed group at once. Engines with later
        weights answer from stored groups. Raise RunError for a group that is not stored."""

    async def answer(
        self, request: GroupRequest, sampling: Sampling, *, oldest: int, urgent: bool = False
    ) -> CompletedGroup | None:
        """Answer one request with the engines' current weights. None: the request was cancelled. `oldest`: a stored
        group is used only if no token is older than this version. `urgent`: before waiting requests."""

    async def restored(self, group: CompletedGroup, sampling: Sampling) -> CompletedGroup:
        """Return a group with tokens from the run's store, in place of tokens lost with a node's memory."""

    @property
    def gives_published(self) -> bool:
        """Return whether an engine can load the last publication at any time before the next publication."""

    async def weights_are_missing(self) -> None:
        """Wait until the successor of a lost engine needs the last publication, but the publishing process is gone."""

    def offer_weights(self, manifest: WeightManifest) -> None:
        """Give successors of lost engines a repeated last publication. All remaining engines have these weights."""

    @property
    def num_working(self) -> int:
        """Return the number of answering engines."""

    async def fronts(self, key: str, name: str) -> Sequence[str]:
        """Return the base URLs of the engines' HTTP fronts, which admit calls with the key under a model's name. Only
        the engines of a run with suites have fronts."""

    async def cancel(self, requests: Sequence[GroupRequest]) -> None:
        """Cancel requests. The running `generate` ends without cancelled requests, and `answer` returns None."""

    async def withdraw_weights(self) -> None:
        """Prepare for a publication. From now on, no engine may load the last publication, which is overwritten."""

    async def update_weights(self, manifest: WeightManifest) -> None:
        """Load a published set of weights. RunError: the version or checksum differs from the manifest afterwards."""

    async def prove(self, probe: PolicyProbe) -> float | None:
        """Return the largest difference between the log-probabilities of engines and policy. None: no engine works now.
        Raise RunError if an engine has different weights. Engines that start later must pass the same probe."""

    async def image_effect(self, token_ids: Sequence[int], other_ids: Sequence[int]) -> float | None:
        """Return the smallest effect, of all engines, of the images of `other_ids` on log-probabilities. None: no
        engine works. See rlhf.vision.sight.image_effect."""

    async def sleep(self, *, keep_weights: bool) -> None:
        """Free the GPU for the trainers (no effect on a CPU). Discarded weights are restored by the next sync."""

    async def wake(self, part: EnginePart) -> None:
        """Allocate a part of the GPU memory again: first the weights, then the cache. Generating needs both."""


class RewardRole(MeasuredRole, Protocol):
    """Scores responses and, with the text at hand, writes the samples files."""

    async def score(self, group: CompletedGroup) -> GroupScores: ...

    async def answers(self, group: CompletedGroup, form: AnswerForm) -> tuple[str | None, ...]:
        """Return the answer of each response for voting. None: a response without an answer."""

    async def privileged_prompts(
        self, group: CompletedGroup, contexts: Mapping[int, PrivilegedContext]
    ) -> RemoteColumns[PrivilegedPrompts]:
        """Return the teacher's prompts of the responses in `contexts`, by sequence id."""

    async def write_samples(
        self,
        path: Path,
        selections: Sequence[SampleSelection],
        signals: Sequence[Ref[TokenSignals] | Ref[PrivilegedPrompts]] = (),
    ) -> None:
        """Write the samples file with text and tokens. Tokens covered by `signals` also get their training signals, and
        responses with a privileged prompt the text of that prompt."""


class NodesRole(Protocol):
    """The nodes of the run."""

    async def use(self) -> Metrics:
        """Return `system/*` of each node since the last call. Unresponsive nodes are left out."""


StatesByRank = Sequence[Sequence[Ref[TeacherColumn]]]  # for each data-parallel rank, the columns with its rows
GivenByRank = Sequence[Sequence[GivenBatch]]  # for each data-parallel rank, its given responses as the only entry


class GpuGuest(MeasuredRole, Protocol):
    """A role able to leave a GPU shared with an engine. Both methods have no effect on a CPU."""

    async def offload(self) -> None:
        """Free the GPU for the engines."""

    async def reload(self) -> None:
        """Move the state back to the GPU."""


class ReferenceRole(GpuGuest, Protocol):
    """The reference: a frozen language model."""

    role: Role

    async def become(self, folder: Path) -> None:
        """Replace the model by the model in a folder."""

    async def logprobs(
        self,
        groups: Sequence[CompletedGroup],
        *,
        only: frozenset[int] | None = None,
        temperatures: Mapping[int, float] | None = None,
    ) -> list[RemoteColumns[TokenValues]]:
        """Return a column for each group, in order. `temperatures`: by sequence id, if the prompt sets a temperature.
        `only`: the sequences to compute, at least one in each group; None computes all."""


class TeacherRole(MeasuredRole, Protocol):
    """The frozen teachers of a student trained on fixed data."""

    role: Role

    async def states(self, dataset: int, plan: MinibatchPlan) -> StatesByRank:
        """Return what each row's teacher predicts for the loss-mask tokens of the planned rows of a data set."""


class OnlineTeacherRole(GpuGuest, Protocol):
    """The frozen teachers of a student trained on the student's responses."""

    role: Role

    @property
    def present(self) -> str | None:
        """Return the teacher on the devices: the teacher of the last request. None: no request yet."""

    async def logprobs(
        self, groups: Sequence[CompletedGroup], *, temperatures: Mapping[int, float], teacher: str
    ) -> list[RemoteColumns[TokenValues]]:
        """Return a teacher's log-probabilities of the sampled tokens, a column for each group, in order."""

    async def states(self, plan: MinibatchPlan, groups: Sequence[CompletedGroup]) -> StatesByRank:
        """Return what each sample's teacher predicts for a minibatch's sampled tokens."""

    async def mean_logprobs(
        self, groups: Sequence[CompletedGroup], *, temperature: float, samples_per_prompt: int, teacher: str
    ) -> Mapping[int, float]:
        """Return the mean of a teacher's log-probabilities of the sampled tokens, by sequence id.

        A response that could not be compared with a teacher of another tokenizer is left out.
        """


class TrainedRole(GpuGuest, Protocol):
    """Methods shared by the policy and the critic."""

    @property
    def num_ranks(self) -> int: ...

    async def optim_step(self) -> Metrics:
        """Update the weights by the gradient of `forward_backward`. Return the norm of the gradient and the learning
        rate. Without a trained token there is no step."""

    async def save(self, folder: Path) -> None:
        """Save the full training state, for an exact continuation."""

    async def load(self, folder: Path) -> None: ...

    async def take_snapshot(self, step: int) -> None:
        """Begin to copy the state after a step into the memory of every rank's node. The copy survives the rank."""

    async def newest_snapshot(self) -> int | None:
        """Return the newest step of which every rank has a snapshot, once snapshots in progress are whole."""

    async def save_snapshots(self, step: int, folder: Path) -> None:
        """Make a checkpoint of the snapshots of a step. The ranks need not work any more."""

    async def restart(self) -> None:
        """End all ranks, and start new ranks in their places, with the state of a new run."""

    async def restore_snapshot(self, step: int) -> None:
        """Restore the snapshots of a step."""

    async def export(self, folder: Path) -> None:
        """Write a Hugging Face folder, or an adapter folder."""

    async def arithmetic(self) -> Arithmetic:
        """Measure the hardware's throughput now. Nothing else should run during the measurement."""


class PolicyRole(TrainedRole, Protocol):
    """The policy: the trained language model."""

    async def prepare(
        self, plan: BatchPlan, groups: Sequence[CompletedGroup], columns: Sequence[RemoteColumns[Any]]
    ) -> PrepareReport:
        """Load a batch or a portion into the ranks of its sequences, and compute metrics under the current weights."""

    async def set_advantages(
        self, plan: BatchPlan, by_sequence: Mapping[int, float] | None, values: Sequence[RemoteColumns[TokenValues]]
    ) -> AdvantagesReport:
        """Give the last prepared tokens the advantage of their sequence. None: estimate it from the critic's values."""

    async def forward_backward(
        self,
        minibatch: int,
        inputs: StatesByRank | GivenByRank = (),
        *,
        ends: bool = True,
        loss: OwnLoss | None = None,
    ) -> Metrics:
        """Add the gradient of a minibatch of the prepared batch. With train.streamed, the batch is what was prepared so
        far, and the metrics come at the end.

        Args:
            inputs: the teacher's states, or the given responses, if any.
            ends: whether `optim_step` follows.
            loss: replaces the policy loss of an algorithm with advantages.
        """

    async def token_signals(self, sequences: Sequence[int]) -> list[Ref[TokenSignals]]:
        """Return the training signals of the tokens of these sequences in the prepared batch, by rank."""

    async def empty_cache(self) -> None:
        """Return memory cached by torch but used by no tensor, for allocation by another process on the GPU."""

    async def publish(self, version: int) -> WeightManifest:
        """Stage the current weights for the engines."""

    async def send(self, manifest: WeightManifest) -> None:
        """Send the weights while the engines receive, if needed by the transport."""

    async def settle(self) -> None:
        """Free the memory of the transfer, once the engines have loaded the weights."""

    async def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Return log-probabilities of token_ids[1:] at temperature 1, except at images' positions."""


class CriticRole(TrainedRole, Protocol):
    """The critic: the trained value model."""

    async def values(self, plan: BatchPlan, groups: Sequence[CompletedGroup]) -> list[RemoteColumns[TokenValues]]:
        """Return the values of the batch's tokens, a column per rank."""

    async def prepare(self, plan: BatchPlan, returns: Sequence[RemoteColumns[TokenValues]]) -> None:
        """Load the targets of the batch given to `values`, with the same plan."""

    async def forward_backward(self, minibatch: int) -> Metrics:
        """Compute the gradient of a minibatch of the prepared batch."""


class OfflineRole(TrainedRole, Protocol):
    """A model trained on fixed data. A plan's sequence ids are rows of a data set."""

    async def load_data(self, sets: Sequence[Ref[Examples | Pairs]]) -> None:
        """Load the data sets: the training set first, then the evaluation sets."""

    async def load_train_set(self, rows: Ref[Examples | Pairs]) -> None:
        """Replace the training set, without the reference's logprobs of the earlier set."""

    async def update_on(
        self, plan: MinibatchPlan, states: StatesByRank = (), *, snapshot: int | None = None
    ) -> Metrics:
        """Make one optimizer step on rows of the training set. `states`: the teacher's, if any. `snapshot`: take the
        snapshot of this step right afterwards. A call of `take_snapshot` must follow."""

    async def evaluate(self, dataset: int, name: str, plan: MinibatchPlan, states: StatesByRank = ()) -> Metrics:
        """Return loss and accuracy on the planned rows of a data set, without an update."""

    async def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Return log-probabilities of token_ids[1:] at temperature 1, except at images' positions."""

    async def reference_key(self, dataset: int) -> str:
        """Return a key for the current weights' logprobs of a data set."""

    async def reference_logprobs(self, dataset: int, plan: MinibatchPlan) -> list[Ref[TokenValues]]:
        """Return log-probabilities of the planned rows under the current weights, a column per rank."""

    async def store_reference(self, dataset: int, path: Path, columns: Sequence[Ref[TokenValues]]) -> None:
        """Store the columns of a whole data set as the reference's, in memory and on disk."""

    async def read_reference(self, dataset: int, path: Path, *, compare: bool = True) -> bool:
        """Load stored columns. Return False if the file is damaged or, with `compare`, belongs to different weights
        than the current."""


class AdaptersRole(MeasuredRole, Protocol):
    """The policy of clients with their own loops: the ranks hold a base model and train many adapters of the model.

    An adapter has its own weights, optimizer state and gradient. Ranks without a place for adapters train all weights,
    of one model at a time. Then "adapter" means this model. Calls for different adapters may come in any order; their
    numbers are independent. UserError: the client must change the call, and the adapter stays as before. AdaptersLost:
    the ranks were lost during the call or before, and work again without the adapter.
    """

    def holds(self, adapter: str) -> bool:
        """Return whether the ranks have an adapter."""

    def forgive(self, losses: Sequence[WorkerLost]) -> None:
        """Do not count losses of ranks whose cause was a client's request."""

    async def create(self, adapter: str, shape: AdapterShape) -> None:
        """Make a new adapter. UserError: the name is taken, or the shape does not fit."""

    async def remove(self, adapter: str) -> None:
        """Forget an adapter."""

    async def forward_backward(
        self, adapter: str, rows: LossRows, loss: NamedLoss, *, forward_only: bool = False
    ) -> LossReport:
        """Add the gradient of the loss to the adapter's gradient. `forward_only`: compute the loss alone.

        After a UserError or RunError the adapter's gradient is dropped, and so is the next optimizer step. A failed
        call with `forward_only` changes nothing.
        """

    async def optim_step(self, adapter: str, step: AdamStep) -> float:
        """Update the adapter by its gradient, and drop the gradient. Return the gradient's norm before clipping.

        UserError: no gradient, or the gradient was dropped or is not finite.
        """

    async def drop_gradient(self, adapter: str, reason: str) -> None:
        """Drop the adapter's gradient. The next optimizer step fails with the reason."""

    async def save(self, adapter: str, folder: Path) -> None:
        """Save the adapter with the optimizer's state, for an exact continuation. The gradient is not saved."""

    async def load(self, adapter: str, folder: Path, *, optimizer: bool) -> None:
        """Restore a saved adapter of the same shape, and drop the gradient. `optimizer`: its state too."""

    async def export(self, adapter: str, folder: Path) -> str:
        """Write the adapter alone as peft's folder, in its own rank. Return the checksum of the weights' file.

        A model with all weights trained becomes a Hugging Face folder.
        """

    async def probe(self, adapter: str | None, token_ids: Sequence[int]) -> list[float]:
        """Return log-probabilities of token_ids[1:] at temperature 1. None: of the base model."""


class AdapterEnginesRole(MeasuredRole, Protocol):
    """The engines of clients with their own loops. They sample from the base model and from many adapters at once."""

    async def load(self, adapter: str, folder: Path, *, checksum: str, probe: PolicyProbe) -> float:
        """Load an exported adapter under a name, in all engines. Return the largest difference from the probe.

        RunError: an engine read a different file, or computes different log-probabilities than the policy.
        """

    async def unload(self, adapter: str) -> None:
        """Forget an adapter after its running samples."""

    async def sample(self, adapter: str | None, request: SampleRequest) -> SampleAnswer:
        """Draw the samples of a request. None: from the base model. UserError: the request cannot be answered."""
