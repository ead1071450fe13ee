"""A run continues an adapter with the same shape. Unsuitable adapters are refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.derive import ships_adapter
from rlhf.config.files.load import load
from rlhf.errors import UserError
from rlhf.models.adapters.lora import add_lora
from rlhf.models.files.export import export_adapter
from rlhf.models.files.loading import load_causal_lm, load_tokenizer
from rlhf.models.files.weights import adapter_sources
from rlhf.preflight.inputs import load_inputs
from rlhf.preflight.models import with_adapters
from tests.fixtures.models import changed_copy
from tests.merging_models import make_reward_adapter

EXAMPLES = [{"prompt": f"{n} + {n} =", "completion": f" {n + n}"} for n in range(8)]


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "dora"
    model = load_causal_lm(str(tiny_model), dtype=torch.float32)
    model = add_lora(model, rank=3, alpha=6.0, dropout=0.0, dora=True)
    weights = ((source.name, source.make()) for source in adapter_sources(model))
    export_adapter(folder, weights, model, load_tokenizer(str(tiny_model)))
    return folder


TRAIN = {"steps": 1, "lr": 1e-3, "sequences_per_update": 4, "max_tokens_per_microbatch": 256}


def sft(folder: Path, model: Path, **policy: Any) -> dict[str, Any]:
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    trained = {"model": str(model), "dtype": "float32", **policy}
    return {"policy": trained, "algorithm": {"name": "sft"}, "data": {"train": str(data)}, "train": TRAIN}


def loaded(folder: Path, tree: dict[str, Any]) -> Any:
    path = folder / "run.yaml"
    path.write_text(json.dumps({"run": {"name": "demo", "dir": str(folder)}, **tree}))
    return load(path)


def two_stages(folder: Path, first: dict[str, Any], second: dict[str, Any]) -> Any:
    return loaded(folder, {"stages": {"a": first, "b": second}})


def test_the_shape_is_the_folders(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    run = loaded(tmp_path, sft(tmp_path, tiny_model, lora={"lora_plus_ratio": 4.0}, adapter=str(adapter)))
    (stage,) = load_inputs(run)
    lora = stage.config.policy.lora
    assert (lora.rank, lora.alpha, lora.dora, lora.lora_plus_ratio) == (3, 6.0, True, 4.0)
    assert not ships_adapter(stage.config)
    assert stage.written.policy.lora.rank == 16  # as the user has it
    plain = loaded(tmp_path, sft(tmp_path, tiny_model, lora={"rank": 5})).stages["demo"]
    assert with_adapters(plain, {}) == plain


def test_of_an_earlier_stage_it_is_that_of_its_config(tiny_model: Path, tmp_path: Path) -> None:
    first = sft(tmp_path, tiny_model, lora={"rank": 4, "init": "pissa", "modules_to_save": ["lm_head"]})
    _, stage = load_inputs(two_stages(tmp_path, first, sft(tmp_path, tiny_model, lora={}, adapter="stage:a")))
    lora = stage.config.policy.lora
    assert (lora.rank, lora.init, lora.modules_to_save) == (8, "default", ("lm_head",))
    assert stage.config.policy.adapter == str(tmp_path / "demo" / "a" / "final")


def online(model: Path, **sections: Any) -> dict[str, Any]:
    return {
        "policy": {"model": str(model), "dtype": "float32"},
        "algorithm": {"name": "grpo"},
        "data": {"train": {"task": "running_totals", "size": 8}, "max_prompt_tokens": 64},
        "rollouts": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4},
        "rewards": {"taste": {"role": "reward"}},
        "train": TRAIN,
        **sections,
    }


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_a_reward_models_adapter_scores(tiny_model: Path, tmp_path: Path, own_tokenizer: bool) -> None:
    adapter = make_reward_adapter(tmp_path / "adapter", tiny_model, seed=1)
    for file in adapter.glob("*token*") if not own_tokenizer else ():
        file.unlink()
    assert load_inputs(loaded(tmp_path, online(tiny_model, reward={"model": str(adapter)})))


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
@pytest.mark.parametrize("name", ["reward_model", "process_reward_model"])
def test_what_a_stage_trains_to_score_is_a_reward(
    tiny_model: Path, tmp_path: Path, name: str, lora: dict[str, Any] | None
) -> None:
    data = tmp_path / "scored.jsonl"
    rows = [{"prompt": "1 =", "chosen": "1", "rejected": "0", "completions": ["1"], "labels": [True]}] * 4
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = sft(tmp_path, tiny_model, lora=lora) | {"algorithm": {"name": name}, "data": {"train": str(data)}}
    assert len(load_inputs(two_stages(tmp_path, first, online(tiny_model, reward={"model": "stage:a"})))) == 2


def test_an_adapter_in_the_wrong_place_is_refused(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    def of_a_stage(first: dict[str, Any], second: dict[str, Any]) -> Any:
        return two_stages(tmp_path, sft(tmp_path, tiny_model, **first), second)

    def alone(tree: dict[str, Any]) -> Any:
        return loaded(tmp_path, tree)

    lora: dict[str, Any] = {"lora": {}}
    other = changed_copy(tiny_model, tmp_path / "other", num_hidden_layers=1)
    kl = {"algorithm": {"name": "grpo", "kl": {"coef": 0.1}}, "rewards": {"right": {"function": "exact_match"}}}
    for run, message in (
        (
            of_a_stage(lora, sft(tmp_path, Path("stage:a"))),
            r"policy.model: .*/a/final will be an adapter, since its stage",
        ),
        (
            of_a_stage({}, sft(tmp_path, tiny_model, lora={}, adapter="stage:a")),
            r"policy.adapter: .* will be a whole mod",
        ),
        (
            of_a_stage(lora, online(tiny_model, **kl, reference={"model": "stage:a"})),
            r"reference\.model: .* since its stage has lora; merge it into its base in a stage",
        ),
        (
            of_a_stage(lora, online(tiny_model, reward={"model": "stage:a"})),
            r"reward\.model: .* will be a language model, expected a reward model",
        ),
        (
            alone(online(tiny_model, reward={"model": str(adapter)})),
            rf"^reward\.model: The reward model {adapter} is a LoRA adapter with task_type",
        ),
        (
            alone(sft(tmp_path, tiny_model, lora={}, adapter=str(tiny_model))),
            r"policy\.adapter: .* is no adapter folder",
        ),
        (
            alone(sft(tmp_path, other, lora={}, adapter=str(adapter))),
            r"policy\.adapter: the adapter .* of another architecture than",
        ),
    ):
        with pytest.raises(UserError, match=message):
            load_inputs(run)
