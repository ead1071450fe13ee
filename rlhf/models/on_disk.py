"""Resolve a user's model without loading weights: a hub name, or the folder of a model, a LoRA adapter, a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.errors import UserError
from rlhf.models.adapters.settings import base_of, read_adapter_settings
from rlhf.models.files.folder_check import refuse_broken_weights
from rlhf.models.files.loading import (
    ADAPTER_CONFIG,
    is_adapter,
    load_model_config,
    refuse_missing_weights,
    refuse_no_language_model,
)
from rlhf.objectives.costs import fast_dtype

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOnDisk:
    """A language model, with everything needed for loading."""

    name: str  # as the user wrote it
    base: str  # hub name or folder
    adapter: str | None  # folder of a LoRA adapter for the base
    lora_rank: int | None  # the adapter's; None: no adapter
    tokenizer: str  # hub name or folder
    dtype: Dtype
    max_length: int | None  # prompt and response, tokens; None: its config.json sets no limit
    trust_remote_code: bool


def find_model(name: str, *, trust_remote_code: bool, device: str) -> ModelOnDisk:
    """Resolve a hub name or a folder. The dtype is that of config.json, if `device` (`cpu` or `cuda`)
    multiplies it fast.

    Raise UserError for a missing model, a model of a different kind, or missing or truncated weights.
    """
    folder = _of_run(Path(name).expanduser())
    base, adapter, rank = name if folder is None else str(folder), None, None
    tokenizer = tokenizer_of(base)
    if folder is not None and is_adapter(folder):
        base, rank, adapter = *base_of(folder), base
        refuse_broken_weights(folder)
    config = load_model_config(base, trust_remote_code=trust_remote_code)
    refuse_no_language_model(base, trust_remote_code=trust_remote_code)
    refuse_broken_weights(Path(base))
    refuse_missing_weights(base, trust_remote_code=trust_remote_code)
    if adapter is not None:
        from rlhf.models.adapters.folder import refuse_incomplete  # with peft, which takes seconds

        refuse_incomplete(Path(adapter), base, trust_remote_code=trust_remote_code)
    stored_dtype: Any = str(config.dtype).removeprefix("torch.")
    return ModelOnDisk(
        name=name,
        base=base,
        adapter=adapter,
        lora_rank=rank,
        tokenizer=tokenizer,
        dtype=stored_dtype if stored_dtype in ("float16", "float32") else fast_dtype(device),
        max_length=getattr(config.get_text_config(), "max_position_embeddings", None),  # BLOOM has none
        trust_remote_code=trust_remote_code,
    )


def may_ask_the_hub(name: str) -> bool:
    """Return whether the model, or an adapter's base, may be a name on the hub."""
    folder = _of_run(Path(name).expanduser())
    if folder is None or not is_adapter(folder):
        return folder is None
    return not Path(base_of(folder)[0]).exists()


def tokenizer_of(model: str) -> str:
    """Return the name or folder of a model's tokenizer: the base's for an adapter folder without one."""
    folder = Path(model)
    has_tokenizer = not is_adapter(folder) or (folder / "tokenizer_config.json").is_file()
    return model if has_tokenizer else base_of(folder)[0]


def refuse_unservable(model: ModelOnDisk) -> None:
    """Raise UserError for an adapter that engines cannot load: DoRA, stacked experts, or modules trained whole."""
    if model.adapter is None:
        return
    path, config = Path(model.adapter, ADAPTER_CONFIG), read_adapter_settings(Path(model.adapter))
    if keys := ", ".join(key for key in ("use_dora", "modules_to_save", "target_parameters") if config.get(key)):
        raise UserError(f"{path}: has {keys}, which engines cannot serve. Merge the adapter into its base.")


def _of_run(path: Path) -> Path | None:
    """Return the model's folder, for a run's folder the run's final/. None: the name is no folder here."""
    if not path.is_dir():
        return None
    if not (path / "config.resolved.yaml").is_file():
        return path
    if (path / "final").is_dir():
        return path / "final"
    if stages := ", ".join(f"{path.name}/{inner.parent.name}" for inner in sorted(path.glob("*/final"))):
        raise UserError(f"{path} is a pipeline of several runs; name one of them: {stages}.")
    raise UserError(
        f"{path} is a run without final/, because the run has not ended. `rlhf export` writes one of its checkpoints "
        "as a model."
    )
