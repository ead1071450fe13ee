"""Train all weights on the ranks of a gang by real DeepSpeed engines, for tests/integration/test_whole_ranks.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.adapters import AdamStep, AdapterShape, LossReport, LossRows, NamedLoss
from rlhf.errors import UserError
from rlhf.workers.adapters.whole_worker import WholeWorker
from rlhf.workers.trained import TrainedWorker
from tests.integration.adapter_tenants import config_of, joined, rows_of, supervised_of, train_both
from tests.integration.rank_gang import place_of
from tests.integration.vision_training import prompt_of

ALL = AdapterShape(rank=0)
CROSS_ENTROPY = NamedLoss(name="cross_entropy")
PROBE = range(1, 30)


def worker_of(model: str, rank: int, ranks: int, *, stage: int, dtype: str = "float32") -> WholeWorker:
    config = config_of(model, ranks=ranks, stage=stage, dtype=dtype, whole=True)
    worker = WholeWorker(config, replace(place_of(rank, ranks), longest_sequence=40), optimizer_steps=1)
    worker.build()
    return worker


def weights_of(worker: TrainedWorker) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in worker.engine.named_weights(torch.float32)}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    return "no error"


def against_supervised(rank: int, ranks: int, *, model: str, stage: int) -> tuple[float, float]:
    """Make two optimizer steps as a client and as a supervised run, on the same batches from the same weights.

    Return the largest difference of the weights, and the largest change of a weight by the steps.
    """
    supervised = supervised_of(model, rank, ranks, stage=stage, whole=True)
    client = worker_of(model, rank, ranks, stage=stage)
    client.create("mine", ALL)
    start = weights_of(client)
    assert difference(start, weights_of(supervised)) == 0.0
    train_both(supervised, client, ranks)
    ours = weights_of(client)
    return difference(ours, weights_of(supervised)), difference(ours, start)


def lives(rank: int, ranks: int, *, model: str, stage: int, dtype: str, folder: Path) -> dict[str, Any]:
    """Train, save, export and train on; then begin anew, and continue from the save, with and without moments."""
    worker = worker_of(model, rank, ranks, stage=stage, dtype=dtype)
    found: dict[str, Any] = {"base": worker.probe_adapter(None, PROBE)}
    worker.create("one", ALL)
    first = continued(worker, "one", 4)
    worker.save_adapter("one", folder / "state")
    worker.export_adapter("one", folder / "whole")
    found |= {"probe": worker.probe_adapter("one", PROBE), "saved": weights_of(worker)}
    found["after"] = continued(worker, "one", 3)
    worker.forward_backward("one", rows_of(1), CROSS_ENTROPY)  # a gradient that leaves with the model
    found["errors"] = [
        message(lambda: worker.create("two", ALL)),
        message(lambda: worker.probe_adapter(None, PROBE)),
        message(lambda: worker.export_adapter(None, folder / "base")),
    ]
    worker.remove("one")
    found["errors"].append(message(lambda: worker.create("two", AdapterShape(rank=4))))
    worker.create("two", ALL)
    found["base again"] = worker.probe_adapter("two", PROBE)
    found["no gradient"] = message(lambda: worker.step_adapter("two", AdamStep(lr=0.02)))
    found["same steps"] = same_reports(first, continued(worker, "two", 4))
    worker.forward_backward("two", rows_of(2), CROSS_ENTROPY)
    worker.load_adapter("two", folder / "state", optimizer=True)
    found["dropped"] = message(lambda: worker.step_adapter("two", AdamStep(lr=0.02)))
    found["continued"] = continued(worker, "two", 3)
    worker.load_adapter("two", folder / "state", optimizer=False)
    found["weights alone"] = worker.probe_adapter("two", PROBE)
    found["without moments"] = continued(worker, "two", 3)
    found["other"] = message(lambda: worker.load_adapter("two", folder / "whole", optimizer=True))
    return found


def resumed(rank: int, ranks: int, *, model: str, stage: int, folder: Path) -> list[LossReport]:
    """Continue from the save in new ranks."""
    worker = worker_of(model, rank, ranks, stage=stage)
    worker.create("one", ALL)
    worker.load_adapter("one", folder / "state", optimizer=True)
    return continued(worker, "one", 3)


def sees(rank: int, ranks: int, *, model: str, stage: int, folder: Path) -> tuple[list[LossReport], list[float]]:
    """Train a vision model on rows of which every second has images, and export the model.

    Return the reports of three steps, and log-probabilities of a text behind an image by the exported weights. A second
    client's model then begins with the weights of the first.
    """
    config = config_of(model, ranks=ranks, stage=stage, dtype="float32", whole=True)
    place = replace(place_of(rank, ranks), longest_sequence=40, images=folder / "images")
    worker = WholeWorker(config, place, optimizer_steps=1)
    worker.build()
    parts = [torch.cat([prompt_of(row, model, folder), torch.arange(100, 108 + row)]) for row in range(4)]
    token_ids = torch.cat(parts)
    targets = torch.cat([part.roll(-1) for part in parts]).clamp(min=0)[:, None]
    learnt = torch.cat([torch.arange(len(part)) >= len(part) - 7 for part in parts])[:, None]
    lengths = torch.tensor([len(part) for part in parts])
    rows = LossRows(token_ids=token_ids, lengths=lengths, targets=targets, columns={"weights": learnt.float()})
    found: list[tuple[list[LossReport], list[float]]] = []
    for name in ("one", "two"):
        worker.create(name, ALL)
        reports = []
        for _ in range(3):
            reports.append(joined(worker, [worker.forward_backward(name, rows, CROSS_ENTROPY)]))
            worker.step_adapter(name, AdamStep(lr=0.01, eps=1e-4))
        worker.export_adapter(name, folder / "whole")
        found.append((reports, worker.probe_adapter(name, parts[0].tolist())))
        worker.remove(name)
    assert same_reports(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    return found[0]


def continued(worker: WholeWorker, name: str, steps: int) -> list[LossReport]:
    """Make steps of two calls each, and return the reports."""
    reports = []
    for number in range(10 * steps, 11 * steps):
        for rows in (rows_of(number), rows_of(number + 1, "importance_sampling")):
            loss = CROSS_ENTROPY if "advantages" not in rows.columns else NamedLoss(name="importance_sampling")
            reports.append(joined(worker, [worker.forward_backward(name, rows, loss)]))
        worker.step_adapter(name, AdamStep(lr=0.01, grad_clip=1.0, weight_decay=0.1))
    return reports


def same_reports(ours: list[LossReport], theirs: list[LossReport]) -> bool:
    """Compare bit for bit."""
    pairs = zip(ours, theirs, strict=True)
    return all(one.loss == two.loss and torch.equal(one.logprobs, two.logprobs) for one, two in pairs)
