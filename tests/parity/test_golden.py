"""Our equations return the values of published libraries, and the runner can also say no."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.parity.run import Verdict, judge, load, main

CASES = Path(__file__).parent / "cases.json"
OFFLINE_CASES = Path(__file__).parent / "offline_cases.json"
NO_BASELINE = "a group of one has no baseline"
NO_SCORE = "needs finite scores"


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in judge(load(CASES))}


@pytest.fixture
def stored() -> dict[str, dict[str, Any]]:
    return {case["name"]: case for case in json.loads(CASES.read_text())["cases"]}


def test_no_value_differs(verdicts: dict[str, Verdict]) -> None:
    assert [verdict.line() for verdict in verdicts.values() if verdict.kind == "differs"] == []


def test_every_further_case_of_an_offline_loss_is_ok() -> None:
    verdicts = list(judge(load(OFFLINE_CASES)))
    assert verdicts
    assert [verdict.line(why=True) for verdict in verdicts if verdict.kind != "ok"] == []


def test_no_case_is_unsupported(verdicts: dict[str, Verdict]) -> None:
    assert [verdict.line(why=True) for verdict in verdicts.values() if verdict.kind == "unsupported"] == []


def test_the_page_says_how_many_are_equal(verdicts: dict[str, Verdict]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    table = page.partition("| cases | equal | refused |\n|---|---|---|\n")[2].partition("\n\n")[0]
    told = {name: (int(ok), int(no)) for name, ok, no in re.findall(r"\| `?(\w+)`? \| (\d+) \| (\d+) \|", table)}
    found: dict[str, list[str]] = {"all": []}
    offline = {verdict.name: verdict for verdict in judge(load(OFFLINE_CASES))}
    for cases, outcomes in ((load(CASES), verdicts), (load(OFFLINE_CASES), offline)):
        for case in cases:
            if case.name in outcomes:
                for name in ("all", case.category):
                    found.setdefault(name, []).append(outcomes[case.name].kind)
    assert told == {name: (kinds.count("ok"), kinds.count("refused")) for name, kinds in found.items()}


def test_a_packing_with_a_sequence_elsewhere_differs(
    tmp_path: Path, stored: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    case = copy.deepcopy(stored["trl.pack.bfd.len6"])
    case["expected"]["seq_lengths"][1:3] = [[5], [4, 2, 1]]
    assert rerun(tmp_path, case, capsys)[1][0] == "differs trl.pack.bfd.len6 max_error=inf (seq_lengths)"


def test_only_groups_of_one_and_missing_scores_are_refused(verdicts: dict[str, Verdict]) -> None:
    refused = [verdict for verdict in verdicts.values() if verdict.kind == "refused"]
    assert refused
    assert all(NO_BASELINE in verdict.detail or NO_SCORE in verdict.detail for verdict in refused)


def test_a_case_without_expected_values_is_skipped(verdicts: dict[str, Verdict]) -> None:
    assert "trl.e2e.weights" not in verdicts


def rerun(tmp_path: Path, case: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({"cases": [case]}))
    code = main([str(path)])
    return code, capsys.readouterr().out.splitlines()


def test_a_changed_value_differs(
    tmp_path: Path, stored: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    case = copy.deepcopy(stored["verl.ppo_dual_clip3.token-mean"])
    case["expected"]["grad_log_prob"][1][2] += 1e-6
    code, lines = rerun(tmp_path, case, capsys)
    assert code == 1
    assert lines[0] == "differs verl.ppo_dual_clip3.token-mean max_error=1e-06 (grad_log_prob)"
    assert lines[1] == "0 ok, 1 differ, 0 refused, 0 unsupported"


@pytest.mark.parametrize(("change", "kind"), [(5e-8, "ok"), (1e-6, "differs")])
def test_one_unit_in_the_last_place_of_a_float32_logarithm_is_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: float, kind: str
) -> None:
    cases = {case["name"]: case for case in json.loads(OFFLINE_CASES.read_text())["cases"]}
    case = copy.deepcopy(cases["trl.dpo.exo_pair.2.0.0.25"])
    case["expected"]["loss"] += change
    assert rerun(tmp_path, case, capsys)[1][0].split(" ")[0] == kind


@pytest.mark.parametrize("change", ["params", "inputs", "expected"])
def test_whatever_the_answer_would_ignore_is_unsupported(
    tmp_path: Path, stored: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str], change: str
) -> None:
    case = copy.deepcopy(stored["verl.ppo_dual_clip3.token-mean"])
    case[change]["never_heard_of"] = 1.0
    code, lines = rerun(tmp_path, case, capsys)
    assert code == 0
    assert lines == ["unsupported verl.ppo_dual_clip3.token-mean", "0 ok, 0 differ, 0 refused, 1 unsupported"]


def test_an_unknown_word_is_unsupported(
    tmp_path: Path, stored: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    case = copy.deepcopy(stored["trl.grpo.dapo"])
    case["params"]["loss_type"] = "never_heard_of"
    assert rerun(tmp_path, case, capsys)[1][0] == "unsupported trl.grpo.dapo"


def test_a_parameter_is_used_not_remembered(
    tmp_path: Path, stored: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    case = copy.deepcopy(stored["trl.grpo.dapo"])
    case["params"]["epsilon_high"] = 0.28
    case["expected"] = stored["trl.grpo.dapo.clip_higher0.28"]["expected"]
    code, lines = rerun(tmp_path, case, capsys)
    assert (code, lines[0]) == (0, "ok trl.grpo.dapo")


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("trl.grpo.dapo", ["epsilon", "epsilon_high", "loss_type", "importance_sampling_level", "delta"]),
        ("trl.grpo.grpo.kl0.04", ["use_bias_correction_kl"]),
        ("trl.rloo.loss.eps0.2_0.2", ["epsilon_low", "epsilon_high"]),
        ("trl.grpo.vllm_is.sequence_mask.cmax1.3_cmin0.7", ["vllm_importance_sampling_mode"]),
        ("verl.ppo_dual_clip3.token-mean", ["loss_agg_mode", "clip_ratio", "clip_ratio_low", "clip_ratio_c"]),
        ("verl.adv.grpo_vectorized.std", ["norm_adv_by_std_in_grpo", "epsilon"]),
    ],
)
def test_a_parameter_left_out_takes_the_default_of_its_source(
    tmp_path: Path,
    stored: dict[str, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    name: str,
    left_out: list[str],
) -> None:
    case = copy.deepcopy(stored[name])
    for parameter in left_out:
        del case["params"][parameter]
    whole, without = (rerun(tmp_path, each, capsys)[1][0].split(":")[0] for each in (stored[name], case))
    assert without == whole


def test_a_row_that_starts_with_a_masked_token_shows_the_ratio_of_its_sampled_ones(
    tmp_path: Path, stored: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Another masked column in front changes no result of TRL's sequence-level loss."""
    case = copy.deepcopy(stored["trl.grpo.grpo.seq_level"])
    for name in ("logps", "old_logps", "entropies", "mask"):
        case["inputs"][name] = [[0, *row] for row in case["inputs"][name]]
    case["expected"]["grad_logps"] = [[0, *row] for row in case["expected"]["grad_logps"]]
    assert rerun(tmp_path, case, capsys)[1][0] == "ok trl.grpo.grpo.seq_level"


def test_a_refusal_shows_our_message(
    tmp_path: Path, stored: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = rerun(tmp_path, stored["verl.adv.grpo.std"], capsys)
    assert code == 0
    assert lines[0].startswith("refused verl.adv.grpo.std: group_normalized needs group_size >= 2, got 1")
    assert lines[1] == "0 ok, 0 differ, 1 refused, 0 unsupported"


@pytest.mark.parametrize("text", [None, "{", "{}", '[{"name": "no source"}]', "[3]"])
def test_a_file_that_is_no_cases_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    path = tmp_path / "cases.json"
    if text is not None:
        path.write_text(text)
    assert main([str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(str(path))
    assert captured.err.count("\n") == 1
