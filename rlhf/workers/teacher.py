"""A worker of the frozen teacher: its hidden states where the student learns, and once its vocabulary head.

From both the student's ranks make the teacher's logits, some rows at a time; no logits leave a process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.config.model import TeacherConfig
from rlhf.engine.memory import explains_out_of_memory, peak_memory
from rlhf.models.loading import load_causal_lm
from rlhf.models.packed import learnt_states, lm_head_settings, lm_head_weight
from rlhf.roles import MemoryReport
from rlhf.types import Examples, LearntStates, VocabularyHead
from rlhf.workers.place import RankPlace, torch_dtype
from rlhf.workers.ragged import slices


class TeacherWorker:
    """Holds the whole model; rows are dealt out among the workers."""

    def __init__(self, model: TeacherConfig, place: RankPlace, *, max_tokens_per_microbatch: int) -> None:
        self.model_config = model
        self.place = place
        self.max_tokens = max_tokens_per_microbatch
        self.device = place.torch_device()
        torch.set_num_threads(place.threads)

    def start(self) -> None:
        """Load the model."""
        config = self.model_config
        with explains_out_of_memory(role="teacher", stage="start", rank=self.place.rank):
            model = load_causal_lm(
                config.model, dtype=torch_dtype(config.dtype), trust_remote_code=config.trust_remote_code
            )
            self.model = model.to(self.device).eval().requires_grad_(False)

    def load_data(self, *sets: Examples) -> None:
        """The data sets, as the student has them."""
        self.sets = sets

    def head(self) -> tuple[VocabularyHead, int]:
        """What makes logits of the states, and the tokens of its vocabulary."""
        settings = lm_head_settings(self.model)
        weight, bias = lm_head_weight(self.model).detach(), settings["bias"]
        settings["bias"] = bias if bias is None else bias.detach().cpu()
        return VocabularyHead(weight=weight.cpu(), **settings), len(weight)

    def states(self, dataset: int, shares: Sequence[Sequence[int]]) -> tuple[LearntStates | int, ...]:
        """Of each share of rows one column, computed packed together over the shares; last, the states in all."""
        examples = self.sets[dataset].take([row for share in shares for row in share])
        lengths = examples.lengths.tolist()
        places = examples.loss_mask.cumsum(0) - 1
        weight = lm_head_weight(self.model)
        hidden = weight.new_empty(int(examples.loss_mask.sum()), weight.shape[1], device="cpu")
        for piece in slices(lengths, range(len(lengths)), max_tokens=self.max_tokens):
            mask = examples.loss_mask[piece.tokens]
            with (
                torch.no_grad(),
                explains_out_of_memory(role="teacher", stage="states", rank=self.place.rank, tokens=len(piece.tokens)),
            ):
                found = learnt_states(
                    self.model,
                    examples.token_ids[piece.tokens].to(self.device),
                    piece.lengths.to(self.device),
                    mask=mask.to(self.device),
                )
            hidden[places[piece.tokens[mask]]] = found.cpu()
        sizes = [len(share) for share in shares]
        counts = torch.stack([mask.sum() for mask in examples.loss_mask.split(lengths)]).split(sizes)
        parts = (
            examples.sequence_ids.split(sizes),
            counts,
            hidden.split([int(of_rows.sum()) for of_rows in counts]),
        )
        columns = [
            LearntStates(sequence_ids=ids, lengths=of_rows, hidden=part.clone())
            for ids, of_rows, part in zip(*parts, strict=True)
        ]
        return (*columns, len(hidden))

    def memory(self) -> MemoryReport:
        """Peaks of this process."""
        peak = peak_memory()
        return MemoryReport(rss_gib=peak.rss_gib, gpu_gib=peak.gpu_gib)
