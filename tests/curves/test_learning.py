"""Every algorithm on rollouts raises the score of a tiny task, with the settings of its recipe. A game is learnt too.

The task is running totals of four digits. The model has imitated a demonstrator who is careless half of the time. For
distillation, the teacher has imitated careful examples alone, and the student gets no score. The game is
configs/guessing_game.yaml: a number from 1 to 7 in three guesses. A player who halves the range each time always wins.
The demonstrator ignores every second answer, and does not always win. Workers, objectives and loop are those of a run.
Learning needs neither Ray nor vLLM; other tests cover both.
"""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from rlhf.algorithms import ALGORITHMS
from rlhf.config.files.base_file import read_tree
from rlhf.config.files.load import load
from rlhf.data.tasks import TaskSource, make_rows
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.tracking.metrics.declarations import expected_metrics
from rlhf.tracking.sinks.tracker import read_metrics
from tests.curves.imitation import after_imitation, imitate
from tests.curves.in_process import run
from tests.integration.recipes import merge

CONFIGS = Path(__file__).parents[2] / "configs"
PLAYED = {"gigpo"}  # learns only from conversations
SCORED = {name for name, one in ALGORITHMS.items() if one.config_class().kind in ("advantages", "sampled_pairs")}
RECIPES = {name: CONFIGS / f"{name}_smollm2.yaml" for name in sorted(SCORED)}
NAMED = ["opsd", "sdft", "sdpo", "gkd", "m2po", "score_centering", "bias_corrected_kl", "support_replay"]
OTHERS = {  # besides a test for each algorithm that learns from scores
    "reinforce_plus_plus_baseline": CONFIGS / "reinforce_plus_plus_baseline_smollm2.yaml",
    "on_policy_distillation": CONFIGS / "on_policy_distill_smollm2.yaml",
    "flash_reinforce": CONFIGS / "flash_reinforce_smollm2.yaml",
    "vapo": CONFIGS / "vapo_smollm2.yaml",
    "short_answers": CONFIGS / "short_answers_smollm2.yaml",
    **{name: CONFIGS / f"{name}_smollm2.yaml" for name in NAMED},
}
SHOWN = {"privileged": {"template": "{answer};\n\n{prompt}"}}
GAME = read_tree(CONFIGS / "guessing_game.yaml").values["stages"]["grpo"]
USER, ASSISTANT, END = 259, 260, 257
GAIN = 0.08  # of the held-out score
SHOWN_STEPS, GAME_WARM_STEPS = 1200, 200

TASK: dict[str, Any] = {
    "data": {
        "train": {"task": "running_totals", "split": "train", "size": 3000},
        "eval": {"task": "running_totals", "split": "eval", "size": 256},
        "apply_chat_template": False,
        "max_prompt_tokens": 16,
    },
    "rollouts": {"prompts_per_step": 32, "samples_per_prompt": 8, "max_new_tokens": 13},
    "rewards": {"correct": {"function": "last_number"}},
    "train": {
        "steps": 14,
        "lr": 3e-4,
        "lr_schedule": "linear",
        "warmup_steps": 8,
        "sequences_per_update": 128,
        "max_tokens_per_microbatch": 4096,
        "checkpoint_every": 100,
    },
    "eval": {"every": 100, "temperature": 1.0, "samples_per_prompt": 2},
}
# The settings that the task needs for a recipe's algorithm, in addition to the settings above.
CHANGES: dict[str, dict[str, Any]] = {
    "ppo": {"algorithm": {"critic_lr": 1e-3}},
    "a_star_po": {
        "algorithm": {"beta": 0.1},
        "rollouts": {"prompts_per_step": 256, "samples_per_prompt": 1},
        "train": {"lr": 1e-4},
    },
    "vapo": {"algorithm": {"critic_lr": 1e-3, "critic_warmup_steps": 2}},
    "dapo": {"algorithm": {"overlong": {"buffer": 2}}},
    "gdpo": {"rewards": {"format": {"function": "format_regex", "args": {"pattern": "[0-9]+,[0-9]+,[0-9]+"}}}},
    "online_dpo": {"rollouts": {"prompts_per_step": 64}, "train": {"lr": 1e-4, "sequences_per_update": 64}},
    "sapo": {"train": {"lr": 1e-4}},
    "dro": {"train": {"steps": 60}},
    "gpg": {"train": {"lr": 1e-4, "steps": 30}},
    "oapl": {"train": {"lr": 1e-4}},  # at 3e-4 the score of the samples rises to 0.70 by step 5 and falls to 0.21
    "opsd": {"algorithm": {**SHOWN, "divergence": "reverse_kl"}},
    "sdft": {"algorithm": SHOWN},
    "sdpo": {"algorithm": {"privileged": {"template": "{better_response};\n\n{prompt}"}}},
    "rlsd": {"algorithm": SHOWN},
    "support_replay": {"rollouts": {"top_k": 20, "top_p": 0.95}},
    "raft": {"train": {"sequences_per_update": 32}},  # of at most 64 kept groups
}


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model after imitation, between the careful and the careless demonstrator."""
    rows = make_rows(TaskSource(task="running_totals", split="sft", size=2500))
    pairs = [(row["prompt"], row["completion"]) for row in rows]
    return after_imitation(tmp_path_factory.mktemp("warm") / "model", pairs)


@pytest.fixture(scope="module")
def shown_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model after the same imitation, and after repeating answers that prompts begin with."""
    rows = make_rows(TaskSource(task="running_totals", split="sft", size=2500))
    rows += make_rows(TaskSource(task="running_totals", split="sft", size=2500, args={"shows_answer": True}))
    pairs = [(row["prompt"].replace(";", ";\n\n"), row["completion"]) for row in rows]
    return after_imitation(tmp_path_factory.mktemp("shown") / "model", pairs, steps=SHOWN_STEPS)


@pytest.fixture(scope="module")
def careful_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model after imitation of a demonstrator who always carries."""
    prompts = [row["prompt"] for row in make_rows(TaskSource(task="running_totals", split="sft", size=2500))]
    totals = [list(accumulate(map(int, prompt.removesuffix("=").split("+"))))[1:] for prompt in prompts]
    said = [",".join(map(str, one)) for one in totals]
    return after_imitation(tmp_path_factory.mktemp("teacher") / "model", list(zip(prompts, said, strict=True)))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "grpo" else pytest.mark.slow)
        for name in RECIPES | OTHERS
        if name not in PLAYED
    ],
)
async def test_the_score_rises(name: str, alone: None, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    recipe = read_tree((RECIPES | OTHERS)[name]).values
    changes = CHANGES.get(name, {})
    start = request.getfixturevalue("shown_start" if "privileged" in changes.get("algorithm", {}) else "warm_start")
    taught: dict[str, Any] = {}
    if name in ("chord", "gkd"):
        changes = merge(changes, {"data": {"train": right_answers(tmp_path)}})
    if "teacher" in recipe:  # the score is measured, and not learnt from
        taught = {"teacher": {"model": str(request.getfixturevalue("careful_teacher")), "dtype": "float32"}}
    tree = merge(
        {
            "run": {"name": name, "dir": str(tmp_path), "seed": 0},
            "policy": {"model": str(start), "dtype": "float32", "support_replay": name == "support_replay"},
            "algorithm": recipe["algorithm"],
            **taught,
            **TASK,
        },
        changes,
    )
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    folder = await run(load(config, []))
    rows = list(read_metrics(folder))
    if ALGORITHMS[recipe["algorithm"]["name"]].config_class().kind == "sampled_pairs":
        parts = ["rewards", "preference", "groups", "reference", "eval"]
        assert {name for name in expected_metrics(parts) if "<" not in name} - {"memory/reference_rss_gib"} <= set(
            rows[-1]
        )
        pairs = [row["preference/pairs/total"] for row in rows[1:]]
        assert pairs == [64 * (1 - row["advantages/zero_groups/fraction"]) for row in rows[1:]]
    before, after = rows[0]["eval/heldout/correct"], rows[-1]["eval/heldout/correct"]
    assert 0.1 < before < 0.6, before
    assert after > before + GAIN, json.dumps({"before": before, "after": after})
    if name == "support_replay":
        assert max(row["experience/rollout_logprob_diff/max"] for row in rows[1:]) < 1e-3
    if name == "bias_corrected_kl":
        assert rows[-1]["update/kl_loss/mean"] > 0.0


def right_answers(folder: Path) -> str:
    """Return a file with the task's training prompts and right responses."""
    rows = make_rows(TaskSource(task="running_totals", split="train", size=3000))
    path = folder / "right.jsonl"
    path.write_text("".join(json.dumps({**row, "completion": row["answer"]}) + "\n" for row in rows), encoding="utf-8")
    return str(path)


async def test_given_responses_pass_through_the_whole_loop(alone: None, tmp_path: Path) -> None:
    model = build_tiny_llama(tmp_path / "model", seed=0)
    small = {
        "run": {"name": "chord", "dir": str(tmp_path), "seed": 0},
        "policy": {"model": str(model), "dtype": "float32"},
        "algorithm": {"name": "chord", "mu": 0.4, "mu_decay": {"steps": 1, "final": 0.0}},
        "data": {"train": right_answers(tmp_path), "eval": {"size": 2}},
        "rollouts": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 8},
        "train": {"steps": 2, "sequences_per_update": 4, "warmup_steps": 0, "checkpoint_every": 2},
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(merge(TASK, small), sort_keys=False), encoding="utf-8")
    first, last = list(read_metrics(await run(load(config, []))))[-2:]
    assert first["update/given_share"] == 0.4
    assert 4.0 < first["update/given_nll/mean"] < 7.0  # of an untrained model: the logarithm of 320 tokens is 5.8
    assert first["update/given_loss/mean"] < 0.1  # p (1 - p) is small
    assert "update/given_share" not in last  # mu has reached 0: no response is passed


def test_every_algorithm_has_a_recipe() -> None:
    assert set(RECIPES) == SCORED


def demonstration(row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """Return a game's tokens, and the mask of the player's tokens."""
    ids: list[int] = []
    learnt: list[bool] = []
    for message in row["messages"]:
        said = [*message["content"].encode(), END]
        ids += [ASSISTANT if message["role"] == "assistant" else USER, *said]
        learnt += [False, *[message["role"] == "assistant"] * len(said)]
    return ids, learnt


@pytest.fixture(scope="module")
def warm_player(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after imitation."""
    folder = build_tiny_llama(tmp_path_factory.mktemp("warm") / "player", seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = make_rows(TaskSource(task="guessing_game", split="sft", size=2000))
    assert tokenizer.apply_chat_template(rows[0]["messages"], return_dict=False) == demonstration(rows[0])[0]
    return imitate(folder, [demonstration(row) for row in rows], steps=GAME_WARM_STEPS)


async def trained(
    model: Path, folder: Path, changes: dict[str, Any], *overrides: str
) -> tuple[list[dict[str, Any]], Path]:
    """Return the rows of a run of the recipe, and the run's folder."""
    own = {"run": {"name": "game", "dir": str(folder), "seed": 0}, "policy": {"model": str(model), "dtype": "float32"}}
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(merge(merge(GAME, own), changes), sort_keys=False), encoding="utf-8")
    path = await run(load(config, overrides))
    return list(read_metrics(path)), path


async def test_conversations_pass_through_the_whole_loop(alone: None, tmp_path: Path) -> None:
    model = build_tiny_llama(tmp_path / "model", seed=0)
    small = {
        "data": {"train": {"size": 8}, "eval": {"size": 7}},
        "rollouts": {"prompts_per_step": 4, "samples_per_prompt": 4},
        "train": {"steps": 1, "sequences_per_update": 8, "warmup_steps": 0, "checkpoint_every": 1},
        "algorithm": {"name": "gigpo"},
    }
    found, folder = await trained(model, tmp_path, small)
    row = found[-1]
    # Sampler and trainer agree about every sampled token, so both have the same tokens at the same places.
    assert row["experience/rollout_logprob_diff/max"] < 1e-4
    assert row["rollouts/turns/max"] == 3.0
    assert row["rollouts/environment_tokens/mean"] > 20.0  # an untrained model is told what a number is, twice
    assert row["rollouts/environment_errors/total"] == 0.0
    lines = (folder / "samples" / "step_000001.jsonl").read_text(encoding="utf-8").splitlines()
    for sample in map(json.loads, lines):
        roles = [turn["role"] for turn in sample["turns"]]
        assert roles == ["prompt", "policy", *["environment", "policy"] * (len(roles) // 2 - 1)]
        assert sum(turn["tokens"] for turn in sample["turns"] if turn["sampled"]) == sample["response_tokens"]


async def test_demonstrations_are_learned_beside_conversations(alone: None, tmp_path: Path) -> None:
    games = {5: [("assistant", "4"), ("user", "higher"), ("assistant", "5")], 1: [("assistant", "1")]}
    rows = [
        {"prompt": "?", "secret": secret, "completion": [{"role": role, "content": text} for role, text in turns]}
        for secret, turns in games.items()
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small = {
        "data": {"eval": {"size": 2}},
        "rollouts": {"prompts_per_step": 2, "samples_per_prompt": 2},
        "train": {"steps": 1, "sequences_per_update": 4, "warmup_steps": 0, "checkpoint_every": 1},
    }
    own = ["algorithm={name: chord, mu: 0.4}", f"data.train={tmp_path}/rows.jsonl"]
    found, _ = await trained(build_tiny_llama(tmp_path / "model", seed=0), tmp_path, small, *own)
    assert found[-1]["update/given_share"] == 0.4
    assert 4.0 < found[-1]["update/given_nll/mean"] < 7.0  # of an untrained model, on the assistant's turns


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("algorithm", ["grpo", "gigpo"])
async def test_a_game_is_learnt(algorithm: str, warm_player: Path, alone: None, tmp_path: Path) -> None:
    changes = {
        "data": {"eval": {"size": 140}},
        "train": {"steps": 12, "checkpoint_every": 12},
        "algorithm": {"name": algorithm},
    }
    found, _ = await trained(warm_player, tmp_path, changes)
    before, after = found[0]["eval/heldout/won"], found[-1]["eval/heldout/won"]
    assert after > before + 0.05, json.dumps({"before": before, "after": after})
