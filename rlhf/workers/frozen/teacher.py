"""A worker of the frozen teacher. It computes hidden states at the tokens in the loss mask, and ships its head once.

The student's ranks compute the teacher's logits from both, some rows at a time. Logits never leave the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.config.schema.model import TeacherConfig
from rlhf.engine.memory import explains_out_of_memory, peak_memory
from rlhf.models.loading import load_causal_lm
from rlhf.models.packed import learnt_states, lm_head_settings, lm_head_weight
from rlhf.models.row_check import check_rows
from rlhf.models.row_layout import row_layout
from rlhf.types import Examples, LearntStates, MemoryReport, VocabularyHead
from rlhf.workers.microbatches import Microbatch, split_microbatches
from rlhf.workers.rank_context import RankContext, torch_dtype


class TeacherWorker:
    """Holds the whole model. Rows are distributed over the workers."""

    def __init__(self, model: TeacherConfig, place: RankContext, *, max_tokens_per_microbatch: int) -> None:
        self.model_config = model
        self.place = place
        self.max_tokens = max_tokens_per_microbatch
        self.device = place.torch_device()
        torch.set_num_threads(place.threads)

    def start(self) -> None:
        """Load the model named in the configuration."""
        config = self.model_config
        with explains_out_of_memory(role="teacher", stage="start", rank=self.place.rank):
            model = load_causal_lm(
                config.model, dtype=torch_dtype(config.dtype), trust_remote_code=config.trust_remote_code
            )
            self.model = model.to(self.device).eval().requires_grad_(False)
            check_rows(self.model, self.device)

    def load_data(self, *sets: Examples) -> None:
        """Keep the student's data sets, in the student's order."""
        self.sets = sets

    def head(self) -> tuple[VocabularyHead, int]:
        """Return the vocabulary head and the size of its vocabulary."""
        return vocabulary_head(self.model)

    def states(self, dataset: int, shares: Sequence[Sequence[int]]) -> tuple[LearntStates | int, ...]:
        """Return one column of hidden states for each share of the rows and, last, the total number of states.

        All shares are packed together.
        """
        examples = self.sets[dataset].take([row for share in shares for row in share])
        lengths = examples.lengths.tolist()
        microbatches = split_microbatches(
            lengths, range(len(lengths)), max_tokens=self.max_tokens, layout=row_layout(self.model)
        )
        hidden = states_of(self.model, examples, microbatches, place=self.place)
        return (*in_shares(examples, hidden, [len(share) for share in shares]), len(hidden))

    def memory(self) -> MemoryReport:
        """Return the peak memory of this process."""
        peak = peak_memory()
        return MemoryReport(rss_gib=peak.rss_gib, gpu_gib=peak.gpu_gib)


def vocabulary_head(model: Any) -> tuple[VocabularyHead, int]:
    """Return a model's vocabulary head on the host, and the size of its vocabulary."""
    settings = lm_head_settings(model)
    weight, bias = lm_head_weight(model).detach(), settings["bias"]
    settings["bias"] = bias if bias is None else bias.detach().cpu()
    return VocabularyHead(weight=weight.cpu(), **settings), len(weight)


def states_of(
    model: Any, examples: Examples, microbatches: Sequence[Microbatch], *, place: RankContext
) -> Float[Tensor, "n H"]:
    """Return the hidden states predicting the tokens in the loss mask, in token order.

    `microbatches` cover all examples.
    """
    device = place.torch_device()
    places = examples.loss_mask.cumsum(0) - 1
    weight = lm_head_weight(model)
    hidden = weight.new_empty(int(examples.loss_mask.sum()), weight.shape[1], device="cpu")
    for microbatch in microbatches:
        mask = examples.loss_mask[microbatch.tokens]
        with (
            torch.no_grad(),
            explains_out_of_memory(role="teacher", stage="states", rank=place.rank, tokens=len(microbatch.tokens)),
        ):
            states = learnt_states(
                model,
                examples.token_ids[microbatch.tokens].to(device),
                microbatch.lengths.to(device),
                mask=mask.to(device),
                branches=microbatch.branches,
            )
        hidden[places[microbatch.tokens[mask]]] = states.cpu()
    return hidden


def in_shares(examples: Examples, hidden: Float[Tensor, "n H"], sizes: Sequence[int]) -> list[LearntStates]:
    """Split hidden states into one column for each share. `sizes` gives the number of sequences in each share."""
    counts = torch.stack([mask.sum() for mask in examples.loss_mask.split(examples.lengths.tolist())]).split(sizes)
    parts = (examples.sequence_ids.split(sizes), counts, hidden.split([int(of_rows.sum()) for of_rows in counts]))
    return [
        LearntStates(sequence_ids=ids, lengths=of_rows, hidden=part.clone())
        for ids, of_rows, part in zip(*parts, strict=True)
    ]
