"""Adapters that a run goes on from: their shape is taken over, and what cannot be is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.inputs import load_inputs
from actors.models import with_adapters
from rlhf.config.derive import ships_adapter
from rlhf.config.load import load
from rlhf.errors import UserError
from rlhf.models.export import export_adapter
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.lora import add_lora
from rlhf.models.weights import adapter_sources

EXAMPLES = [{"prompt": f"{n} + {n} =", "completion": f" {n + n}"} for n in range(8)]


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "dora"
    model = load_causal_lm(str(tiny_model), dtype=torch.float32)
    model = add_lora(model, rank=3, alpha=6.0, dropout=0.0, dora=True)
    weights = ((source.name, source.make()) for source in adapter_sources(model))
    export_adapter(folder, weights, model, load_tokenizer(str(tiny_model)))
    return folder


def sft(folder: Path, model: Path, **policy: Any) -> dict[str, Any]:
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    return {
        "policy": {"model": str(model), "dtype": "float32", **policy},
        "algorithm": {"name": "sft"},
        "data": {"train": str(data)},
        "train": {"steps": 1, "lr": 1e-3, "sequences_per_update": 4, "max_tokens_per_microbatch": 256},
    }


def loaded(folder: Path, tree: dict[str, Any]) -> Any:
    path = folder / "run.yaml"
    path.write_text(json.dumps({"run": {"name": "demo", "dir": str(folder)}, **tree}))
    return load(path)


def test_the_shape_is_the_folders(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    run = loaded(tmp_path, sft(tmp_path, tiny_model, lora={"lora_plus_ratio": 4.0}, adapter=str(adapter)))
    (stage,) = load_inputs(run)
    lora = stage.config.policy.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dora, lora.lora_plus_ratio) == (3, 6.0, True, 4.0)
    assert not ships_adapter(stage.config)
    assert stage.written.policy.lora is not None
    assert stage.written.policy.lora.rank == 16  # as the user has it


def test_of_an_earlier_stage_it_is_that_of_its_config(tiny_model: Path, tmp_path: Path) -> None:
    first = sft(tmp_path, tiny_model, lora={"rank": 4, "init": "pissa", "modules_to_save": ["lm_head"]})
    second = sft(tmp_path, tiny_model, lora={}, adapter="stage:a")
    _, stage = load_inputs(loaded(tmp_path, {"stages": {"a": first, "b": second}}))
    lora = stage.config.policy.lora
    assert lora is not None
    assert (lora.rank, lora.init, lora.modules_to_save) == (8, "default", ("lm_head",))
    assert stage.config.policy.adapter == str(tmp_path / "demo" / "a" / "final")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"lora": {}}, {"model": "stage:a"}, "policy.model: .*/a/final will be an adapter, not a model"),
        ({}, {"lora": {}, "adapter": "stage:a"}, "policy.adapter: .*/a/final will be a whole model"),
    ],
)
def test_an_adapter_is_no_model(
    tiny_model: Path, tmp_path: Path, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    a, b = sft(tmp_path, tiny_model, **first), sft(tmp_path, tiny_model)
    b["policy"] |= second
    with pytest.raises(UserError, match=message):
        load_inputs(loaded(tmp_path, {"stages": {"a": a, "b": b}}))


def test_what_does_not_fit_is_refused(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"policy\.adapter: .* is no adapter folder"):
        load_inputs(loaded(tmp_path, sft(tmp_path, tiny_model, lora={}, adapter=str(tiny_model))))
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text()) | {"num_hidden_layers": 1}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"policy\.adapter: the adapter .* of another architecture than"):
        load_inputs(loaded(tmp_path, sft(tmp_path, other, lora={}, adapter=str(adapter))))


def test_without_an_adapter_nothing_changes(tiny_model: Path, tmp_path: Path) -> None:
    config = loaded(tmp_path, sft(tmp_path, tiny_model, lora={"rank": 5})).stages["demo"]
    assert with_adapters(config, {}) == config
