"""A worker of the frozen reference model. It computes log-probabilities of the policy's samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.config.schema.model import ReferenceConfig, TeacherConfig
from rlhf.engine.memory import explains_out_of_memory, peak_memory
from rlhf.models.loading import load_causal_lm
from rlhf.models.packed import policy_logprobs_only
from rlhf.models.row_check import check_rows
from rlhf.models.row_layout import row_layout
from rlhf.role_table import Role
from rlhf.types import MemoryReport, Rollouts, TokenValues
from rlhf.workers.microbatches import Temperatures, shared_prompts, split_microbatches
from rlhf.workers.rank_context import RankContext, torch_dtype


class ReferenceWorker:
    """Holds the whole model. Batches are distributed over the workers."""

    role: Role = "reference"

    def __init__(
        self,
        model: ReferenceConfig | TeacherConfig,
        place: RankContext,
        *,
        temperature: float,
        samples_per_prompt: int,
        max_tokens_per_microbatch: int,
    ) -> None:
        self.model_config = model
        self.place = place
        self.temperature = temperature
        self.samples_per_prompt = samples_per_prompt
        self.max_tokens = max_tokens_per_microbatch
        self.device = place.torch_device()
        torch.set_num_threads(place.threads)

    def start(self) -> None:
        """Load the model named in the configuration."""
        self.become(self.model_config.model)

    def become(self, model: str) -> None:
        """Load `model` in place of the current one."""
        config = self.model_config
        self.model: Any = None  # frees the old model before loading the new one
        self.host_weights: list[Tensor] = []
        with explains_out_of_memory(role=self.role, stage="start", rank=self.place.rank):
            loaded = load_causal_lm(model, dtype=torch_dtype(config.dtype), trust_remote_code=config.trust_remote_code)
            self.model = loaded.to(self.device).eval().requires_grad_(False)
            check_rows(self.model, self.device)

    def offload(self) -> None:
        """Leave the GPU to a colocated engine."""
        if self.device.type == "cuda":
            self.put_aside()
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Move the model back to the GPU after `offload`."""
        for tensor in self._tensors():
            tensor.data = tensor.data.to(self.device)

    def put_aside(self) -> None:
        """Move the model to host memory. The weights never change, so one host copy lasts for the whole run."""
        if not self.host_weights:
            self.host_weights = [tensor.data.cpu() for tensor in self._tensors()]
        for tensor, copy in zip(self._tensors(), self.host_weights, strict=True):
            tensor.data = copy

    def _tensors(self) -> list[Tensor]:
        """Return the parameters and buffers of the model, each shared tensor once."""
        return [*self.model.parameters(), *self.model.buffers()]

    def logprobs(
        self, only: frozenset[int] | None, temperatures: Mapping[int, float], *given: Rollouts
    ) -> tuple[TokenValues | int, ...]:
        """Return one column of log-probabilities for each batch and, last, the total number of tokens.

        All batches are packed together. `only`: ids of the wanted sequences; None: all. `temperatures`: by
        sequence id, for sequences sampled at another temperature than the common one.
        """
        parts = given if only is None else [part.take(_places(part, only)) for part in given]
        values = self.values_of(
            parts,
            temperature=self.temperature,
            temperatures=temperatures,
            samples_per_prompt=self.samples_per_prompt,
        )
        columns = [
            TokenValues(sequence_ids=part.sequence_ids, lengths=part.lengths, values=column.clone())
            for part, column in zip(parts, values.split([len(part.token_ids) for part in parts]), strict=True)
        ]
        return (*columns, len(values))

    def values_of(
        self,
        parts: Sequence[Rollouts],
        *,
        temperature: float,
        temperatures: Mapping[int, float],
        samples_per_prompt: int,
    ) -> Float[Tensor, " N"]:
        """Return the log-probabilities of the sampled tokens of all batches, concatenated.

        `temperatures`: by sequence id, for sequences sampled at another temperature than the common one.
        """
        rollouts = Rollouts.gather(parts, [i for part in parts for i in part.sequence_ids.tolist()])
        lengths = rollouts.lengths.tolist()
        values = torch.zeros(len(rollouts.token_ids))
        at = Temperatures.of(rollouts, temperatures, common=temperature)
        prompts = shared_prompts(rollouts, samples_per_prompt=samples_per_prompt)
        for microbatch in split_microbatches(
            lengths, range(len(lengths)), max_tokens=self.max_tokens, prompts=prompts, layout=row_layout(self.model)
        ):
            with (
                torch.no_grad(),
                explains_out_of_memory(
                    role=self.role, stage="logprobs", rank=self.place.rank, tokens=len(microbatch.tokens)
                ),
            ):
                logprobs = policy_logprobs_only(
                    self.model,
                    rollouts.token_ids[microbatch.tokens].to(self.device),
                    microbatch.lengths.to(self.device),
                    mask=rollouts.response_mask[microbatch.tokens].to(self.device),
                    branches=microbatch.branches,
                    temperature=at.at(microbatch, self.device),
                )
            values[microbatch.tokens] = logprobs.float().cpu()
        return values

    def memory(self) -> MemoryReport:
        """Return the peak memory of this process."""
        peak = peak_memory()
        return MemoryReport(rss_gib=peak.rss_gib, gpu_gib=peak.gpu_gib)


def _places(part: Rollouts, wanted: frozenset[int]) -> list[int]:
    return [place for place, sequence_id in enumerate(part.sequence_ids.tolist()) if sequence_id in wanted]
