"""Hold the settings of a server, and the parts that serve all models and samplers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.errors import UserError
from rlhf.hosting.checkpoints import Checkpoints
from rlhf.hosting.counters import Counters
from rlhf.hosting.images import ClientImages
from rlhf.hosting.residents import Residents
from rlhf.hosting.sessions import Sessions
from rlhf.process.suspects import Suspects
from rlhf.roles import AdaptersRole


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """The settings of a server."""

    model: str  # the name in requests
    base: str  # the name on the hub, or the folder on this machine
    tokenizer: str  # name or folder from which the client loads the tokenizer
    max_length: int  # largest number of tokens in a row, and in a prompt with its sample
    max_adapters: int  # largest number of adapters on the ranks at the same time
    trains_all: bool  # all weights, of one model at a time
    max_models: int  # limit of one API key, over clients that are still there
    checkpoint_bytes: int  # limit of one API key
    idle_s: float  # without a request of a model, until the model goes to disk
    dtype: str
    seed: int
    probe_ids: Sequence[int]

    def refuse_other_model(self, name: str | None) -> None:
        """Raise UserError if a request names another base model."""
        if name not in (None, self.model):
            raise UserError(f"base_model {name!r:.200} is not served here; the model is {self.model}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """The parts of a server for all models."""

    settings: ServiceSettings
    policy: AdaptersRole
    checkpoints: Checkpoints
    sessions: Sessions
    images: ClientImages
    residents: Residents
    suspects: Suspects  # the requests of models
    counters: Counters
    decode: Callable[[Sequence[int]], str]  # makes text of tokens, for the samples in the folder
