"""A worker measuring the likelihood of examples: the forward pass of supervised training, without an update."""

from __future__ import annotations

import torch

from rlhf.engine.memory import explains_out_of_memory
from rlhf.evaluation.results import ExampleResult
from rlhf.models.loading import load_causal_lm
from rlhf.models.on_disk import ModelOnDisk
from rlhf.models.packed import supervised_loss
from rlhf.models.row_check import check_rows
from rlhf.models.row_layout import row_layout
from rlhf.types import Examples
from rlhf.workers.microbatches import split_microbatches
from rlhf.workers.rank_context import RankContext


class LikelihoodWorker:
    """Holds the whole model. Examples are distributed over the workers."""

    def __init__(self, model: ModelOnDisk, place: RankContext, *, max_tokens_per_microbatch: int) -> None:
        self.source = model
        self.place = place
        self.max_tokens = max_tokens_per_microbatch
        self.device = place.torch_device()
        torch.set_num_threads(place.threads)

    def start(self) -> None:
        """Load the model, with its adapter if it has one."""
        source = self.source
        with explains_out_of_memory(role="policy", stage="start", rank=self.place.rank):
            model = load_causal_lm(
                source.base, dtype=getattr(torch, source.dtype), trust_remote_code=source.trust_remote_code
            )
            if source.adapter is not None:
                from rlhf.models.lora import with_adapter  # with peft, which takes seconds

                model = with_adapter(model, source.adapter)
            self.model = model.to(self.device).eval().requires_grad_(False)
            check_rows(self.model, self.device)

    def measure(self, examples: Examples) -> tuple[ExampleResult, ...]:
        """Return one result for each example, in order."""
        lengths = examples.lengths.tolist()
        results: list[ExampleResult | None] = [None] * len(lengths)
        layout = row_layout(self.model)
        for microbatch in split_microbatches(lengths, range(len(lengths)), max_tokens=self.max_tokens, layout=layout):
            mask = examples.loss_mask[microbatch.tokens]
            with (
                torch.no_grad(),
                explains_out_of_memory(
                    role="policy", stage="eval", rank=self.place.rank, tokens=len(microbatch.tokens)
                ),
            ):
                _, logprobs, is_top1 = supervised_loss(
                    self.model,
                    examples.token_ids[microbatch.tokens].to(self.device),
                    microbatch.lengths.to(self.device),
                    mask=mask.to(self.device),
                    token_weight=1.0,
                )
            sizes = microbatch.lengths.tolist()
            columns = (mask.split(sizes), logprobs.double().split(sizes), is_top1.split(sizes))
            for row, learnt, logprob, top1 in zip(microbatch.rows, *columns, strict=True):
                results[row] = ExampleResult(
                    num_tokens=int(learnt.sum()), logprob=float(logprob.sum()), num_top1=int(top1.sum())
                )
        return tuple(result for result in results if result is not None)
