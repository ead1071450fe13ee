"""Merges of whole models: equal to mergekit's own command bit for bit, and to formulas of a few lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.io.tasks import LoaderCache
from mergekit.scripts.run_yaml import main as mergekit_yaml
from torch import Tensor

from rlhf.config.schema.merge import MODEL_METHODS, MergeConfig
from rlhf.merging.merge import merge_models
from tests.merging_models import make_adapter, make_models, weights

Values = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("merging"))


def ours(out: Path, **values: Any) -> dict[str, Tensor]:
    merge_models(MergeConfig.model_validate(values), out, quiet=True)
    return weights(out)


def theirs(folder: Path, config: Values, *options: str) -> dict[str, Tensor]:
    """Return the weights written by `mergekit-yaml FILE FOLDER OPTIONS`."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(mergekit_yaml, [str(file), str(folder), "--quiet", *options], catch_exceptions=False)
    assert done.exit_code == 0
    LoaderCache().loaders.clear()
    return weights(folder)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# method: (our keys, those of each model; mergekit's parameters, those of each model)
PARAMETERS: dict[str, tuple[Values, Values, Values, Values]] = {
    "linear": ({}, {"weight": 0.3}, {}, {"weight": 0.3}),
    "task_arithmetic": ({"scale": 0.7}, {"weight": 0.3}, {"lambda": 0.7}, {"weight": 0.3}),
    "ties": ({"normalize": False}, {"density": 0.3}, {"normalize": False}, {"density": 0.3, "weight": 1.0}),
    "dare_linear": ({"seed": 7}, {"density": 0.3}, {}, {"density": 0.3, "weight": 1.0}),
    "dare_ties": ({"seed": 7}, {"density": 0.3}, {}, {"density": 0.3, "weight": 1.0}),
    "della": ({"seed": 7}, {"density": 0.3, "epsilon": 0.1}, {}, {"density": 0.3, "epsilon": 0.1, "weight": 1.0}),
    "della_linear": ({"seed": 7}, {"density": 0.3}, {}, {"density": 0.3, "weight": 1.0}),
}


@pytest.mark.parametrize(
    ("method", "dtype"), [*((method, "float32") for method in PARAMETERS), ("linear", "bfloat16"), ("ties", "bfloat16")]
)
def test_equals_the_command(tmp_path: Path, models: Path, method: str, dtype: str) -> None:
    keys, per_model, parameters, per_input = PARAMETERS[method]
    with_base = "base" in MODEL_METHODS[method].keys
    a, b = str(models / "a"), str(models / "b")
    named = {"x": {"model": a, **per_model}, "y": {"model": b, **per_model, "weight": 0.9}}
    base = {"base": str(models / "base")} if with_base else {}
    merged = ours(tmp_path / "ours", method=method, dtype=dtype, models=named, **base, **keys)
    inputs = [{"model": a, "parameters": per_input}, {"model": b, "parameters": {**per_input, "weight": 0.9}}]
    config: Values = {"merge_method": method, "dtype": "float32", "out_dtype": dtype, "models": inputs}
    config |= {"base_model": str(models / "base")} if with_base else {}
    expected = theirs(tmp_path / "theirs", {**config, "parameters": parameters}, "--random-seed", "7")
    assert equal(merged, expected)
    assert not equal(merged, weights(models / "base"))


def test_slerp_and_shards_equal_the_command(tmp_path: Path, models: Path) -> None:
    """Files of 200 kB: 2**-12 * 0.8 GiB is 209715 bytes."""
    named = {"x": {"model": str(models / "tied_a")}}
    base = str(models / "tied_base")
    shard_gib = 0.8 * 2**-12
    values = {"method": "slerp", "t": 0.3, "base": base, "models": named, "dtype": "float32", "shard_gib": shard_gib}
    merged = ours(tmp_path / "ours", **values)
    config = {"merge_method": "slerp", "dtype": "float32", "out_dtype": "float32", "base_model": base}
    config |= {"models": [{"model": base}, {"model": str(models / "tied_a")}], "parameters": {"t": 0.3}}
    expected = theirs(tmp_path / "theirs", config, "--out-shard-size", str(int(shard_gib * 2**30)))
    assert equal(merged, expected)
    files = [sorted(file.name for file in (tmp_path / side).glob("model*")) for side in ("ours", "theirs")]
    assert files[0] == files[1]
    assert len(files[0]) > 3
    assert "lm_head.weight" not in merged


def test_passthrough_equals_the_command(tmp_path: Path, models: Path) -> None:
    a, b = str(models / "a"), str(models / "b")
    slices = [{"model": "x", "layers": [0, 3]}, {"model": "x", "layers": [1, 3]}, {"model": "y", "layers": [2, 3]}]
    named = {"x": {"model": a}, "y": {"model": b}}
    merged = ours(tmp_path / "ours", method="passthrough", models=named, slices=slices, dtype="float32")
    sources = [{"sources": [{"model": named[s["model"]]["model"], "layer_range": s["layers"]}]} for s in slices]
    config = {"merge_method": "passthrough", "slices": sources, "dtype": "float32", "out_dtype": "float32"}
    assert equal(merged, theirs(tmp_path / "theirs", config, "--clone-tensors"))
    up = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(merged[up.format(3)], weights(models / "a")[up.format(1)])
    assert torch.equal(merged[up.format(5)], weights(models / "b")[up.format(2)])
    assert torch.equal(merged["lm_head.weight"], weights(models / "b")["lm_head.weight"])


def test_adapters_are_added_to_their_base_as_the_command_does(tmp_path: Path, models: Path) -> None:
    base = models / "base"
    adapter = make_adapter(tmp_path / "adapter", base, seed=1)
    named = {"x": {"model": str(adapter), "density": 0.5}, "y": {"model": str(models / "b"), "density": 0.5}}
    merged = ours(tmp_path / "ours", method="ties", base=str(base), models=named, dtype="float32")
    inputs = [
        {"model": f"{base}+{adapter}", "parameters": {"weight": 1.0, "density": 0.5}},
        {"model": str(models / "b"), "parameters": {"weight": 1.0, "density": 0.5}},
    ]
    config = {"merge_method": "ties", "base_model": str(base), "models": inputs, "dtype": "float32"}
    options = ("--lora-merge-cache", str(tmp_path / "cache"), "--lora-merge-dtype", "float32")
    assert equal(merged, theirs(tmp_path / "theirs", config, *options))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def slerp(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A quarter of the way from base to a on the great circle."""
    x, y = base.double().flatten(), a.double().flatten()
    angle = torch.acos((x @ y / (x.norm() * y.norm())).clamp(max=1.0))
    if angle < 0.01:  # norm scales are equal in all models
        return base
    return ((torch.sin(0.75 * angle) * base.double() + torch.sin(0.25 * angle) * a.double()) / torch.sin(angle)).float()


def ties(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """arXiv:2306.01708, section 4: trim to the largest half, elect a sign by mass, average the entries of this sign."""
    deltas = torch.stack([a - base, b - base])
    for delta in deltas:
        keep = torch.zeros(delta.numel())
        keep[delta.abs().flatten().argsort(descending=True)[: delta.numel() // 2]] = 1
        delta.mul_(keep.view_as(delta))
    shares = torch.tensor([1.0, 3.0]).view(2, *[1] * base.ndim)
    sign = torch.where((shares * deltas).sum(0) >= 0, 1.0, -1.0)
    agree = deltas.sign() == sign
    total = (shares * agree).sum(0)
    return base + torch.where(total > 0, (shares * deltas * agree).sum(0) / total.clamp(min=1.0), 0.0)


@pytest.mark.parametrize("formula", [slerp, ties], ids=["slerp", "ties"])
def test_equals_the_formula(tmp_path: Path, models: Path, formula: Callable[..., Tensor]) -> None:
    a, b, base = (str(models / name) for name in ("a", "b", "base"))
    named: Values = {"x": {"model": a, "density": 0.5}, "y": {"model": b, "weight": 3.0, "density": 0.5}}
    keys: Values = {"method": "ties", "models": named}
    if formula is slerp:
        keys = {"method": "slerp", "t": 0.25, "models": {"x": {"model": a}}}
    merged = ours(tmp_path / "ours", base=base, dtype="float32", **keys)
    sources = [weights(Path(source)) for source in (base, a, b)]
    assert merged.keys() == sources[0].keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, formula(*(of[name] for of in sources)), rtol=1e-5, atol=1e-7)
