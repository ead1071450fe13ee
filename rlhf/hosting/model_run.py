"""Write a client's model as a run for `rlhf view`: a row of curves and a few samples for each optimizer step."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.adapters import SampleAnswer, SampleRequest
from rlhf.tracking.run_folder.atomic import write_atomic
from rlhf.tracking.run_folder.folder import images_folder
from rlhf.tracking.run_folder.lock import lock_folder
from rlhf.tracking.run_folder.samples import SampleRecord, samples_path, write_samples
from rlhf.tracking.sinks.tracker import Tracker, read_metrics
from rlhf.vision.keys import image_keys, image_name
from rlhf.vision.store import ImageStore

SAMPLES_KEPT = 16  # for each optimizer step


def begin_folder(folder: Path, *, base: str, dtype: str) -> None:
    """Make the folder of a new model. The configuration is for `rlhf view` and `rlhf export`."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = f"algorithm: {{name: a client's loop}}\npolicy: {{model: {json.dumps(base)}, dtype: {dtype}}}\n"
    write_atomic(folder / "config.resolved.yaml", shown, waits=False)


@dataclass(slots=True)
class StepSums:
    """Sums over the forward_backward calls since the last optimizer step, for the metrics."""

    loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


class ModelRun:
    """The run in the folder of a created model. An optimizer step repeated after a kill is not written again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sums = StepSums()
        self._samples: list[SampleRecord] = []
        if not (environment := folder / "environment.json").exists():
            write_atomic(environment, "{}\n", waits=False)  # its time is the model's begin
        self._lock = lock_folder(folder, key="run.name")  # the run counts as running
        self._tracker = Tracker(folder)
        self._logged = max((row["step"] for row in read_metrics(folder)), default=0)

    def close(self) -> None:
        os.close(self._lock)

    async def log(self, step: int, *, norm: float, lr: float, seconds: float) -> None:
        """Write an optimizer step with the sums since the step before."""
        sums, self.sums = self.sums, StepSums()
        row = {
            "update/loss/mean": sums.loss,
            "update/tokens/total": sums.tokens,
            "update/grad_norm": norm,
            "update/lr": lr,
            "time/update_s": sums.seconds + seconds,
        }
        if step > self._logged:
            await asyncio.to_thread(self._write, step, row)

    def _write(self, step: int, row: dict[str, float]) -> None:
        self._tracker.log(step, row)
        self._logged = step
        samples, self._samples = self._samples, []
        if samples:
            write_samples(samples_path(self.folder, step), samples)

    def keep_samples(
        self,
        request: SampleRequest,
        answer: SampleAnswer,
        *,
        step: int,
        decode: Callable[[Sequence[int]], str],
        images: ImageStore,
    ) -> None:
        """Keep a few samples with their images. The next optimizer step writes the samples.

        decode: makes text of tokens. images: of the requests.
        """
        group = len(self._samples)
        if group >= SAMPLES_KEPT:
            return
        prompt, own = decode(request.token_ids), ImageStore(images_folder(self.folder))
        keys = [own.add_file(images.path(key)) for key in image_keys(request.token_ids)]
        for sample, sequence in enumerate(answer.sequences[: SAMPLES_KEPT - group]):
            self._samples.append(
                SampleRecord(
                    split="train",
                    group_id=group,
                    prompt_id=group,
                    sample=sample,
                    prompt=prompt,
                    images=tuple(map(image_name, keys)),
                    response=decode(sequence.token_ids),
                    scores={},
                    truncated=sequence.finish_reason == "length",
                    response_tokens=len(sequence.token_ids),
                    min_version=step,
                    max_version=step,
                    mean_rollout_logprob=sum(sequence.logprobs) / max(len(sequence.logprobs), 1),
                )
            )
