"""Check the low-rank adapters of trained roles, for rlhf.config.validation.run."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.config.problem import Problem, problem
from rlhf.config.schema.model import LoraConfig, TrainedModelConfig
from rlhf.config.schema.root import Config
from rlhf.role_table import TRAINED_ROLES


def adapter_problems(config: Config) -> Iterator[Problem]:
    """Yield kinds of low-rank training that exclude each other."""
    for role in TRAINED_ROLES:
        section: TrainedModelConfig | None = getattr(config, role)
        if section is None:
            continue
        lora, key = section.lora, f"{role}.lora"
        if lora is None:
            if section.adapter is not None:
                text = (
                    f"is {section.adapter}, but {key} is null; write `lora: {{}}` to train the adapter, or merge the "
                    "adapter first"
                )
                yield problem(f"{role}.adapter", text)
            continue
        if lora.init == "pissa" and lora.dora:
            text = (
                "is pissa, but dora needs the magnitudes of whole weights, and PiSSA leaves a remainder; use only one "
                "of them"
            )
            yield problem(f"{key}.init", text)
        if lora.init == "pissa" and lora.quantize is not None:
            text = (
                f"is pissa, which decomposes the weights, but {key}.quantize keeps them in 4 bits; use only one of the "
                "keys"
            )
            yield problem(f"{key}.init", text)
        named = () if isinstance(lora.target_modules, str) else lora.target_modules
        if both := sorted(set(named) & set(lora.modules_to_save)):
            text = (
                f"has {', '.join(both)}, which {key}.target_modules adapts too; name a module in only one of these keys"
            )
            yield problem(f"{key}.modules_to_save", text)
        yield from _of_stacks(f"{key}.target_parameters", lora)


def _of_stacks(key: str, lora: LoraConfig) -> Iterator[Problem]:
    others = {"dropout": lora.dropout > 0.0, "layers": lora.layers is not None, "dora": lora.dora}
    given = [name for name, is_given in {**others, "init": lora.init != "default"}.items() if is_given]
    if lora.target_parameters and given:
        yield problem(key, f"adapts stacked experts, for which peft has no {' and no '.join(given)}; use one")
