"""Each preset maps the rows of a public data set, and the preset's reward tells right answers from wrong answers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.config.schema.data import PromptFormat
from rlhf.data.examples import load_examples
from rlhf.data.labelled import load_labelled
from rlhf.data.preferences import load_pairs
from rlhf.data.presets import PresetSource, presets, presets_table
from rlhf.data.prompts import load_prompts
from rlhf.data.row import Row
from rlhf.data.sources import read_rows
from rlhf.data.steps import load_step_labelled
from rlhf.errors import UserError
from rlhf.models.files.loading import load_tokenizer
from rlhf.models.files.tiny_vision import build_tiny_vision
from rlhf.preflight.sources import row_images
from rlhf.rewards.functions.table import BUILT_INS
from tests.fixtures.preset_rows import CASES, Case
from tests.fixtures.rows import reading

LOADERS: dict[str, Callable[..., Any]] = {
    "RL": load_prompts,
    "evaluation": load_prompts,
    "SFT": load_examples,
    "preferences": load_pairs,
    "unpaired": load_labelled,
    "process rewards": load_step_labelled,
}


def write(path: Path, case: Case) -> Path:
    if case.suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(case.rows), path)
    else:
        lines = [json.dumps(row) for row in case.rows]
        path.write_text(f"[{','.join(lines)}]" if case.suffix == "json" else "\n".join(lines), encoding="utf-8")
    return path


def rows_of(name: str, tmp_path: Path) -> list[Row]:
    case, split = CASES[name], "train" if presets()[name].train is not None else "eval"
    return read_rows(PresetSource(preset=name, split=split, path=str(write(tmp_path / f"rows.{case.suffix}", case))))


def test_every_preset_has_rows_here() -> None:
    assert CASES.keys() == presets().keys()


@pytest.mark.parametrize("name", CASES)
def test_a_preset_maps_its_columns_and_the_loaders_of_its_uses_take_the_rows(
    name: str, tmp_path: Path, tokenizer: Any
) -> None:
    rows, preset = rows_of(name, tmp_path), presets()[name]
    assert [dict(row.columns) for row in rows] == [{**mapped, "preset": name} for mapped in CASES[name].mapped]
    how = reading(apply_chat_template=True, max_tokens=1024)
    if "images" in CASES[name].mapped[0]:
        model = str(build_tiny_vision(tmp_path / "model", "qwen2_5_vl", seed=0))
        how = replace(how, images=row_images(model, tmp_path / "images", PromptFormat()))
        tokenizer = load_tokenizer(model)
    for use in preset.use.split(", "):
        loaded = LOADERS[use](rows, tokenizer, how)
        assert len(loaded.items) == len(rows), use


@pytest.mark.parametrize("name", [name for name, preset in presets().items() if preset.rewards])
def test_the_reward_of_a_preset_gives_1_to_a_right_and_0_to_a_wrong_response(name: str, tmp_path: Path) -> None:
    first, case = rows_of(name, tmp_path)[0], CASES[name]
    (reward,) = presets()[name].rewards.values()
    function = BUILT_INS[reward["function"]]
    score = function(**reward.get("args", {})) if inspect.isclass(function) else function
    taken = {key: first.columns[key] for key in ("answer", "tests", "test_code") if key in first.columns}
    assert [score(prompt="", response=text, **taken) for text in (case.right, case.wrong)] == [1.0, 0.0]


def test_a_folder_with_the_files_of_the_data_set_replaces_the_hub(tmp_path: Path) -> None:
    folder, others = tmp_path / "main", tmp_path / "socratic"
    for place in (folder, others):
        place.mkdir()
    write(folder / "train-00000-of-00001.parquet", CASES["gsm8k"])
    write(folder / "test-00000-of-00001.parquet", Case(rows=CASES["gsm8k"].rows * 3, mapped=[]))
    write(others / "train-00000-of-00001.parquet", CASES["gsm8k"])
    sizes = {
        split: len(read_rows(PresetSource(preset="gsm8k", split=split, path=str(tmp_path))))
        for split in ("train", "eval", "test")
    }
    assert sizes == {"train": 1, "eval": 3, "test": 3}
    two = read_rows(PresetSource(preset="gsm8k", split="eval", size=2, path=str(tmp_path)))
    assert [row.place for row in two] == [f"{tmp_path}[eval]:{line}" for line in (1, 2)]
    with pytest.raises(UserError, match=r"no split `validation`; it has train, test.*preset's `split`"):
        read_rows(PresetSource(preset="gsm8k", split="validation", path=str(tmp_path)))


def test_a_row_of_another_form_and_a_missing_split_are_errors(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "Q?", "answer": "#### 1"}\n{"problem": "P?"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"other.jsonl:2: is no row of openai/gsm8k.*KeyError: 'question'.*`problem`"):
        read_rows(PresetSource(preset="gsm8k", path=str(other)))
    with pytest.raises(UserError, match="preset dapo-math-17k has no held-out split"):
        read_rows(PresetSource(preset="dapo-math-17k", split="eval"))
    with pytest.raises(UserError, match="preset math-500 has no training split"):
        read_rows(PresetSource(preset="math-500"))


def test_the_page_has_the_table_of_the_presets() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert presets_table() in page, "write the output of `python -m rlhf.data.presets` into docs/data.md"
