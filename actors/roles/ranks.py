"""Choose the class of the policy's ranks. An online rank is a worker from rlhf.workers with a weight sender."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from actors.weights import SENDERS, Meeting, Transport, WeightManifest, WeightSender
from actors.weights.adapter import AdapterSender
from rlhf.algorithms.algorithm import Kind
from rlhf.config.derive import leaves_tower, ships_adapter
from rlhf.config.files.differences import home, portable
from rlhf.models.files.export import adapter_config
from rlhf.workers.model_worker import torch_dtype
from rlhf.workers.offline.distillation import DistillationWorker
from rlhf.workers.offline.pairs import PreferenceWorker, RewardModelWorker
from rlhf.workers.offline.step_rewards import StepRewardWorker
from rlhf.workers.offline.supervised import SupervisedWorker
from rlhf.workers.offline.unpaired import UnpairedWorker
from rlhf.workers.online.pairs import OnlinePreferenceWorker
from rlhf.workers.online.policy import PolicyWorker
from rlhf.workers.online.self_taught import SelfTaughtWorker
from rlhf.workers.online.streamed import StreamedPolicyWorker
from rlhf.workers.online.student import StudentWorker
from rlhf.workers.trained import TrainedWorker


class Publishes(TrainedWorker):
    """Adds the weight transfer to the engines to an online policy."""

    sender: WeightSender

    def open_weights(
        self, transport: Transport, meeting: Meeting | None, adapter: Path | None, num_engines: int
    ) -> None:
        """Open this rank's end of the weight transport. If vLLM loads only the adapter, this rank writes to `adapter`.
        Each colocated engine shares the GPU of one rank, beginning with rank 0."""
        rank = self.place.rank
        if adapter is None:
            self.sender = SENDERS[transport](rank=rank, meeting=meeting, beside_engine=rank < num_engines)
        else:
            base = portable(self.model_config.model, home(self.config))
            self.sender = AdapterSender(adapter, adapter_config(self.engine.module), base=base, rank=rank)

    def publish(self, version: int) -> WeightManifest | None:
        """Describe the weights of a version to the engines; None on all ranks but 0. Collective."""
        return self.sender.publish(self._published(), version)

    def send(self, manifest: WeightManifest) -> None:
        """Send the weights, if needed by the transport. Collective."""
        self.sender.send(manifest, self._published())

    def settle(self) -> None:
        """Free the memory of the transfer, once the engines have loaded the weights. Collective."""
        self.sender.settle()

    def _published(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that the engines have not loaded at their start. Iterating is collective."""
        dtype = torch_dtype(self.model_config.dtype)
        if ships_adapter(self.config):
            return self.engine.named_adapter_weights(dtype)
        return self.engine.named_weights(dtype, with_tower=not leaves_tower(self.config))

    def stop(self) -> None:
        self.sender.close()
        super().stop()


class PolicyRank(Publishes, PolicyWorker):
    """One rank of a policy trained by advantages."""


class StreamedPolicyRank(Publishes, StreamedPolicyWorker):
    """One rank of a policy trained by advantages. A batch arrives in portions."""


class OnlinePreferenceRank(Publishes, OnlinePreferenceWorker):
    """One rank of a policy trained on pairs of the policy's responses."""


class StudentRank(Publishes, StudentWorker):
    """One rank of a policy trained by a teacher on the policy's responses."""


class SelfTaughtRank(Publishes, SelfTaughtWorker):
    """One rank of a policy that teaches itself with privileged prompts."""


RANKS: Mapping[Kind, type[TrainedWorker]] = {
    "advantages": PolicyRank,
    "sampled_pairs": OnlinePreferenceRank,
    "sampled_distillation": StudentRank,
    "self_distillation": SelfTaughtRank,
    "supervised": SupervisedWorker,
    "distillation": DistillationWorker,
    "preference": PreferenceWorker,
    "reward_model": RewardModelWorker,
    "step_rewards": StepRewardWorker,
    "unpaired": UnpairedWorker,
}
