"""Unfinished responses of a step, on disk for a later step to continue.

One file a group, named by the id of the cancelled request and written whole or not at all. The file holds the responses
so far: the tokens with log-probabilities and versions. A file speaks for a request only if prompt, seeds and sampling
are the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from rlhf.deferred import safetensors_torch, torch
from rlhf.rollouts.records.ledgers import request_identity
from rlhf.rollouts.records.spans import Sampled
from rlhf.tracking.run_folder.atomic import write_aside
from rlhf.types import FinishReason, GroupRequest, Sampling

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """The first tokens of a response, possibly no token or all."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()  # log-probabilities of the sampler
    versions: tuple[int, ...] = ()  # weight version that sampled each token
    finish_reason: FinishReason | None = None  # None: not finished
    experts: Int[Tensor, "n L K"] | None = field(default=None, compare=False)  # as in Sampled; not written to files
    top: tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]] | None = field(default=None, compare=False)  # the same

    def finished(self) -> Sampled:
        """Return the whole response."""
        assert self.finish_reason is not None, "an unfinished response is not trained on"
        return Sampled(**{column.name: getattr(self, column.name) for column in fields(self)})


def begun_groups(folder: Path) -> dict[Path, int]:
    """Return the files of all begun groups, with the ids of their cancelled requests."""
    return {path: int(path.stem.split("_")[1]) for path in folder.glob("begun_*.safetensors")}


def write_begun(folder: Path, request: GroupRequest, sampling: Sampling, responses: Sequence[Begun]) -> None:
    """Write the responses to a cancelled request aside, then rename the file into place."""
    path = _path(folder, request.group_id)
    columns = {"lengths": torch.tensor([len(begun.token_ids) for begun in responses])}
    for name, dtype in (("token_ids", torch.int64), ("logprobs", torch.float64), ("versions", torch.int64)):
        columns[name] = torch.tensor([value for begun in responses for value in getattr(begun, name)], dtype=dtype)
    reasons = json.dumps([begun.finish_reason for begun in responses])
    metadata = {**_identity(request, sampling), "finish_reasons": reasons}
    write_aside(path, lambda aside: safetensors_torch.save_file(columns, aside, metadata=metadata))


def read_begun(folder: Path, request: GroupRequest, sampling: Sampling) -> tuple[Begun, ...] | None:
    """Return the responses that the request continues, or None without a whole file of responses to the prompt."""
    assert request.continues is not None
    path = _path(folder, request.continues)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if any(metadata.get(key) != value for key, value in _identity(request, sampling).items()):
                logger.warning("%s belongs to another request, so its prompt is sampled from the start", path)
                return None
            sizes = file.get_tensor("lengths").tolist()
            columns = [file.get_tensor(name).split(sizes) for name in ("token_ids", "logprobs", "versions")]
            reasons = json.loads(metadata["finish_reasons"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        logger.warning("%s cannot be read (%s), so its prompt is sampled from the start", path, error)
        return None
    rows = ([tuple(column.tolist()) for column in row] for row in zip(*columns, strict=True))
    return tuple(
        Begun(token_ids=token_ids, logprobs=logprobs, versions=versions, finish_reason=reason)
        for (token_ids, logprobs, versions), reason in zip(rows, reasons, strict=True)
    )


def _path(folder: Path, group_id: int) -> Path:
    return folder / f"begun_{group_id:08d}.safetensors"


def _identity(request: GroupRequest, sampling: Sampling) -> dict[str, str]:
    """Return the inputs that a request and the continuing request have in common."""
    identity = request_identity(request, sampling)
    return {key: identity[key] for key in ("sampling", "prompt_token_ids", "turn_end", "seeds")}
