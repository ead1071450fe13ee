"""`rlhf recipes` lists each recipe with the numbers of `rlhf plan`, and `rlhf models fetch` names what it can fetch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import rlhf
from rlhf.cli import main
from rlhf.commands.recipes import Recipe
from rlhf.config.files.load import load
from rlhf.config.files.recipes import RECIPES
from rlhf.planning.report import render_plan
from rlhf.planning.whole_run import totals


@pytest.fixture(scope="module")
def listed() -> dict[str, Recipe]:
    return {recipe.name: recipe for recipe in rlhf.recipes()}


def planned_minutes(text: str) -> float:
    return (
        sum(float(seconds.replace(",", "")) for seconds in re.findall(r"whole run +([\d,.e+]+) +[\d,.e+-]+ ", text))
        / 60
    )


@pytest.mark.parametrize("name", ["grpo_smollm2", "grpo_in_flight_smollm2", "quickstart", "dpo_smollm2"])
def test_memory_and_minutes_on_cpus_are_those_of_the_plan(name: str, listed: dict[str, Recipe]) -> None:
    text = render_plan(load(f"recipe:{name}"))
    assert listed[name].minutes == pytest.approx(planned_minutes(text), rel=1e-3)
    wanted = [float(gib.replace(",", "")) for gib in re.findall(r"^  this machine +([\d,.]+)", text, re.MULTILINE)]
    assert listed[name].memory_gib == pytest.approx(max(wanted), abs=0.006)


def test_memory_and_minutes_on_gpus_are_those_of_the_plan(listed: dict[str, Recipe]) -> None:
    large = listed["grpo_qwen3_235b_a22b_multinode"]
    assert large.devices == "64 h200"  # 80 GiB are too little
    text = render_plan(load("recipe:grpo_qwen3_235b_a22b_multinode"), cluster="8*cpu=128,gpu=8,type=h200,mem=2000")
    assert large.minutes == pytest.approx(planned_minutes(text), rel=1e-3)
    wanted = [float(gib) for gib in re.findall(r"^  GPU of .+?  +([\d.]+)", text, re.MULTILINE)]
    assert large.memory_gib == pytest.approx(max(wanted), abs=0.006)
    assert listed["ppo_7b_8gpu"].devices == "8 h100"


def test_every_recipe_is_described_from_its_file(listed: dict[str, Recipe]) -> None:
    assert sorted(listed) == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    quickstart = listed["quickstart"]
    assert (quickstart.method, quickstart.model, quickstart.data) == ("sft > ppo", "tiny:llama", "running_totals")
    merge = listed["merge_ties"]
    assert (merge.method, merge.devices, merge.memory_gib, merge.minutes) == ("merge (ties)", None, None, None)
    assert (listed["sweep_tiny"].method, listed["sweep_tiny"].minutes) == ("sweep of sft", None)


def test_the_table_has_a_line_for_each_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(list(RECIPES.glob("*.yaml")))]] == sorted(
        path.stem for path in RECIPES.glob("*.yaml")
    )


def test_a_shown_recipe_runs_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "dapo_smollm2"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(text)
    assert yaml.safe_load(text)["base"] == "recipe:grpo_smollm2"
    assert dict(load(tmp_path / "mine.yaml").stages) == dict(load("recipe:dapo_smollm2").stages)
    assert rlhf.show_recipe("recipe:dapo_smollm2") == text
    assert main(["recipes", "show", "dapo"]) == 2
    assert "there is no recipe of this name" in capsys.readouterr().err
    assert main(["recipes", "show"]) == 2
    assert "needs the NAME" in capsys.readouterr().err


def test_every_recipe_names_its_base_as_a_recipe() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in RECIPES.glob("*.yaml")}
    assert any("base: recipe:" in text for text in texts.values())
    assert not [name for name, text in texts.items() if re.search(r"\bbase: *\S+\.ya?ml", text)]


def test_a_model_not_fetched_yet_is_planned_by_its_known_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = totals(load("recipe:sft_smollm2"))
    known = totals(load("recipe:sft_smollm2", ["policy.model=HuggingFaceTB/SmolLM2-135M-Instruct"]))
    assert here == known


def test_a_model_is_fetched_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(
        "rlhf.models.files.fetch.fetch", lambda model, folder: asked.append((model.repo, folder)) or "ok"
    )
    assert main(["models", "fetch", "smollm2"]) == 0
    assert rlhf.fetch_model("smollm2", tmp_path / "m") == tmp_path / "m"
    repo = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert asked == [(repo, Path("models/SmolLM2-135M-Instruct")), (repo, tmp_path / "m")]
    assert main(["models", "fetch", "smollm3"]) == 2
    assert "got 'smollm3', expected smollm2" in capsys.readouterr().err


def test_the_tested_versions_are_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--versions"]) == 0
    assert capsys.readouterr().out == rlhf.tested_versions()
    assert main(["doctor", "--versions", "--cluster"]) == 2
    assert "--versions only prints the tested" in capsys.readouterr().err
