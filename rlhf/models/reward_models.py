"""Reward models: a language model's body with a scalar head, from a folder with both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.deferred import torch
from rlhf.models.files.loading import (
    _prepared,
    has_score_head,
    is_adapter,
    load_model_config,
    load_scalar_model,
    no_reward_head,
)


def load_reward_model(path: str, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Load a sequence-classification model with one label. Raise UserError if the checkpoint has no such head.

    The folder of a LoRA adapter stands for the base with the adapter added in float32, and rounded to dtype.
    """
    refuse_without_head(path, trust_remote_code=trust_remote_code)
    if is_adapter(Path(path)):
        from rlhf.models.adapters.folder import load_folded  # with peft, which takes seconds

        model = load_folded(Path(path), dtype=dtype, trust_remote_code=trust_remote_code)
    else:
        model = load_scalar_model(path, dtype=dtype, trust_remote_code=trust_remote_code)
    return _prepared(model, gradient_checkpointing=False)


def refuse_without_head(path: str, *, trust_remote_code: bool = False) -> None:
    """Raise UserError if a model has no reward head. Reads the config; for an adapter also headers and the base's."""
    if is_adapter(Path(path)):
        from rlhf.models.adapters.folder import refuse_no_reward_adapter  # with peft, which takes seconds

        refuse_no_reward_adapter(Path(path), trust_remote_code=trust_remote_code)
        return
    config = load_model_config(path, trust_remote_code=trust_remote_code)
    if not has_score_head(config):
        kind = ", ".join(config.architectures or ["model of unknown class"])
        raise no_reward_head(path, f"{kind} with {config.num_labels} labels")
