"""Which model a user means: a hub name, a model folder, a LoRA adapter's folder, or the folder of a finished run.

Reads small JSON files and headers of weights; loads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.errors import UserError
from rlhf.models.folder_check import read_json_object, refuse_broken_weights
from rlhf.models.loading import (
    ADAPTER_CONFIG,
    is_adapter,
    load_config,
    refuse_missing_weights,
    refuse_no_language_model,
)

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOnDisk:
    """A language model as it can be loaded."""

    name: str  # as the user wrote it
    base: str  # hub name or folder
    adapter: str | None  # folder of a LoRA adapter for it
    lora_rank: int | None  # the adapter's; None without one
    tokenizer: str  # hub name or folder
    dtype: Dtype
    max_length: int | None  # prompt and response, tokens; None: its config.json sets no limit
    trust_remote_code: bool


def find_model(name: str, *, trust_remote_code: bool, dtype: Dtype | None = None) -> ModelOnDisk:
    """The model of a hub name or a folder. dtype None: the one that its config.json names.

    UserError if there is none, if it is no language model, or if its weights are missing or cut.
    """
    folder = _of_run(Path(name).expanduser())
    base, adapter, rank = name if folder is None else str(folder), None, None
    tokenizer = tokenizer_of(base)
    if folder is not None and is_adapter(folder):
        base, rank, adapter = *base_of(folder), base
        refuse_broken_weights(folder)
    config = load_config(base, trust_remote_code=trust_remote_code)
    refuse_no_language_model(base, trust_remote_code=trust_remote_code)
    refuse_broken_weights(Path(base))
    refuse_missing_weights(base, trust_remote_code=trust_remote_code)
    if adapter is not None:
        from rlhf.models.adapter_folder import refuse_incomplete  # with peft, which takes seconds

        refuse_incomplete(Path(adapter), base, trust_remote_code=trust_remote_code)
    own = str(config.dtype).removeprefix("torch.")
    return ModelOnDisk(
        name=name,
        base=base,
        adapter=adapter,
        lora_rank=rank,
        tokenizer=tokenizer,
        dtype=dtype or (own if own in ("float16", "float32") else "bfloat16"),  # type: ignore[arg-type]
        max_length=getattr(config.get_text_config(), "max_position_embeddings", None),  # BLOOM has none
        trust_remote_code=trust_remote_code,
    )


def may_ask_the_hub(name: str) -> bool:
    """Whether the model, or the base of its adapter, may be a name on the hub."""
    folder = _of_run(Path(name).expanduser())
    if folder is None or not is_adapter(folder):
        return folder is None
    return not Path(base_of(folder)[0]).exists()


def tokenizer_of(model: str) -> str:
    """Where a model's tokenizer is: that of an adapter's folder without one is its base's."""
    folder = Path(model)
    own = not is_adapter(folder) or (folder / "tokenizer_config.json").is_file()
    return model if own else base_of(folder)[0]


def base_of(folder: Path) -> tuple[str, int]:
    """The base model of an adapter's folder, and the adapter's rank."""
    path = folder / ADAPTER_CONFIG
    config = read_adapter_settings(folder)
    if config["peft_type"] != "LORA":
        raise UserError(f"{path}: is an adapter of type {config['peft_type']}; LORA alone is known here.")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base_model_name_or_path is {base!r}, so the base model is unknown. Write it there.")
    return base, max(_ranks(config).values())


def refuse_unservable(model: ModelOnDisk) -> None:
    """UserError for an adapter that vLLM's engines do not know: DoRA, or one with whole layers of its own."""
    if model.adapter is None:
        return
    path = Path(model.adapter, ADAPTER_CONFIG)
    config = read_adapter_settings(Path(model.adapter))
    found = [key for key in ("use_dora", "modules_to_save") if config.get(key)]
    if found:
        raise UserError(f"{path}: has {', '.join(found)}, which engines cannot serve. Merge the adapter into its base.")


def read_adapter_settings(folder: Path) -> dict[str, Any]:
    """What an adapter folder's adapter_config.json says. UserError if it is damaged, or a LoRA without whole ranks."""
    path = folder / ADAPTER_CONFIG
    settings = read_json_object(path)
    if not isinstance(settings.get("peft_type"), str):
        raise UserError(f"{path} is no adapter's configuration: it names no peft_type. Get it again.")
    if settings["peft_type"] == "LORA":
        for key, rank in _ranks(settings).items():
            if type(rank) is not int or rank < 1:
                raise UserError(f"{path}: the rank {key} is {rank!r}, expected an integer >= 1. Get the file again.")
    return settings


def _of_run(path: Path) -> Path | None:
    """The model's folder: of a run's folder its final/. None: the name is no folder here."""
    if not path.is_dir():
        return None
    if not (path / "config.resolved.yaml").is_file():
        return path
    if (path / "final").is_dir():
        return path / "final"
    stages = [f"{path.name}/{inner.parent.name}" for inner in sorted(path.glob("*/final"))]
    if stages:
        raise UserError(f"{path} is a pipeline of several runs; name one of them: {', '.join(stages)}.")
    raise UserError(
        f"{path} is a run without final/: it has not ended. `rlhf export` writes one of its checkpoints as a model."
    )


def _ranks(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rank, and those of single layers."""
    pattern = settings.get("rank_pattern") or {}
    return {"r": settings.get("r"), **(pattern if isinstance(pattern, dict) else {"rank_pattern": pattern})}
