"""Each recipe of configs/ really trains, reduced to the tiny model, one step and this machine.

Models, data, sizes, steps and devices are reduced; methods, roles and placement stay. A pipeline runs whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import rlhf
from rlhf.config.files.base_file import read_tree
from rlhf.config.files.load import load
from rlhf.config.schema.stages import MergeStage, result_of
from rlhf.models.files.tiny import VOCAB_SIZE, byte_tokenizer
from tests.fakes.services import JudgeService, TeacherService, served
from tests.integration.recipes import merge

CONFIGS = Path(__file__).parents[2] / "configs"
OTHERS = {"merge", "sweep"}  # of other commands
RECIPES = [path for path in sorted(CONFIGS.glob("*.yaml")) if OTHERS.isdisjoint(read_tree(path).values)]

ONLINE = {"prompts_per_step": 4, "max_new_tokens": 4}
TRAIN = {"steps": 1, "sequences_per_update": 4, "checkpoint_every": 1}
DROPPED = {"warmup_steps", "keep_checkpoints", "best_metric"}  # keys of `train` that need more steps
ROLE_KEYS = {"zero_stage", "colocate_with"}  # kept keys of a role: others need GPUs or more nodes
SAMPLED = {"samples_per_prompt", "temperature"}  # kept keys of `eval`
HERE = {"object_store_gib": 0.25, "start_timeout_s": 200.0, "call_timeout_s": 120.0}


def source(written: Any) -> Any:
    """Return a data source as small as the run: a small task, also in place of missing files."""
    if isinstance(written, dict) and "task" in written:
        return {**written, "size": 8}
    if isinstance(written, dict) and all(isinstance(one, dict) and "source" in one for one in written.values()):
        return {name: {**one, "source": source(one["source"])} for name, one in written.items()}  # a mixture
    return {"task": "running_totals", "split": "train", "size": 8}


def cut(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's tree for a small run."""
    small = dict(tree)
    for role in ("policy", "reference", "teacher", "critic"):
        if role in small and not small[role].get("model", "stage:").startswith("stage:"):
            small[role] = {**small[role], "model": "tiny:llama"}
            small[role].pop("tinker", None)  # the run itself then trains the adapter
    if "data" in small:
        data = dict(small["data"])
        if "train" in data:
            data["train"] = source(data["train"])
        if "eval" in data:
            evals = data["eval"]
            data["eval"] = source(evals) if "task" in evals else {name: source(one) for name, one in evals.items()}
        if "max_prompt_tokens" in data:
            data["max_prompt_tokens"] = 1024  # the tiny model's tokens are bytes
        small["data"] = data
    if "train" in small:
        kept = {key: value for key, value in small["train"].items() if key not in DROPPED}
        small["train"] = {**kept, **TRAIN}
    if "algorithm" in small:
        small["algorithm"] = {k: v for k, v in small["algorithm"].items() if k != "critic_warmup_steps"}
        if "overlong" in small["algorithm"]:
            small["algorithm"]["overlong"] = {**small["algorithm"]["overlong"], "buffer": 2}
    if "rollouts" in small:
        sets = small.get("algorithm", {}).get("k", 1)  # responses in a set: a group must have several sets
        small["rollouts"] = {**small["rollouts"], **ONLINE, "samples_per_prompt": sets + 1}
        for player in {"environment", "agent"} & small["rollouts"].keys():
            small["rollouts"][player] = {**small["rollouts"][player], "max_tokens": 1100}
        small["rollouts"].pop("dynamic_sampling", None)  # the tiny model solves nothing: all groups have equal scores
    if "evaluate" in small:
        wanted = {"samples_per_prompt": 2, "max_new_tokens": 4}
        small["evaluate"] = {**small["evaluate"], "data": source(small["evaluate"]["data"]), **wanted}
    if "eval" in small:
        small["eval"] = {**{k: v for k, v in small["eval"].items() if k in SAMPLED}, "every": 1}
    if "cluster" in small:
        roles = small["cluster"].get("roles", {})
        kept_of = {name: {k: v for k, v in role.items() if k in ROLE_KEYS} for name, role in roles.items()}
        small["cluster"] = {"roles": {name: role for name, role in kept_of.items() if role}}
    if "stages" in small:
        small["stages"] = {name: cut(stage) for name, stage in small["stages"].items()}
    return small


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(path: Path, tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mine = {"run": {"dir": str(tmp_path)}, "tracking": {"wandb": "offline"}, "cluster": HERE}
    config = tmp_path / "recipe.yaml"
    tree = functools.reduce(merge, (cut(read_tree(path).values), mine))
    uniform = torch.full((VOCAB_SIZE,), -math.log(VOCAB_SIZE))
    taught = TeacherService(
        byte_tokenizer(), lambda ids: uniform.expand(len(ids), -1), size=VOCAB_SIZE, name="tiny:llama"
    )
    with served(JudgeService()) as url, served(taught) as teacher:  # in place of the services that a recipe names
        if "url" in tree.get("teacher", {}):
            tree["teacher"]["url"] = teacher
        for reward in tree.get("rewards", {}).values():
            if "url" in reward:
                reward["url"] = url
        config.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        rlhf.train(config, quiet=True)
    for stage in load(config).stages.values():
        assert result_of(stage).exists()
        if not isinstance(stage, MergeStage):
            assert (result_of(stage).parent / "metrics.jsonl").read_text(encoding="utf-8").count("\n") >= 1
