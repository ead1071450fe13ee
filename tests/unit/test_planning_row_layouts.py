"""`rlhf plan` names models whose sequences are not packed, without torch or the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.commands.plan import plan
from rlhf.errors import UserError
from rlhf.models.packed.row_layout import refuse_unpackable
from tests.tiny_architectures import tiny_config


def plan_of(folder: Path, kind: str, **changes: str) -> str:
    tiny_config(kind).save_pretrained(folder / "model")
    stored = folder / "model" / "config.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | changes))
    (folder / "run.yaml").write_text(
        f"run: {{name: x}}\npolicy: {{model: {folder}/model}}\nalgorithm: {{name: dpo}}\ndata: {{train: pairs.jsonl}}\n"
        "train: {steps: 1, lr: 1e-4, sequences_per_update: 2}\n"
    )
    return plan(folder / "run.yaml")


@pytest.mark.parametrize(
    ("kind", "changes", "line"),
    [
        ("bloom", {}, "sequences are computed one by one, which is slower: bloom adds a bias by position"),
        ("gptj", {}, "responses to a prompt do not share its tokens: gptj"),
        ("llama", {"model_type": "llama_of_tomorrow"}, "no test has run with models of type llama_of_tomorrow"),
    ],
)
def test_the_plan_names_a_model_whose_rows_are_special(
    tmp_path: Path, kind: str, changes: dict[str, str], line: str
) -> None:
    assert f"policy: {line}" in plan_of(tmp_path, kind, **changes)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_5_text"])
def test_the_plan_says_nothing_of_a_model_that_is_packed(tmp_path: Path, model_type: str) -> None:
    text = plan_of(tmp_path, model_type)
    assert "layout of sequences" not in text
    assert "no test has run" not in text


def test_ranks_cannot_share_the_rows_of_a_model_that_is_not_packed() -> None:
    refuse_unpackable(tiny_config("qwen3_5_text").to_dict(), 1)
    refuse_unpackable(tiny_config("gptj").to_dict(), 2)
    with pytest.raises(UserError, match=r"sequence_parallel is 2, .* qwen3_5_text has layers other than attention"):
        refuse_unpackable(tiny_config("qwen3_5_text").to_dict(), 2)
