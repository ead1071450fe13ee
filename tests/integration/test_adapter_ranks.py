"""Adapters take turns on real ranks: the same bits as alone, a supervised run's steps, and folders for peft."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import rlhf
from rlhf.models.files.tiny import VOCAB_SIZE, build_tiny_llama, byte_tokenizer
from tests.fakes.client_states import client_state
from tests.integration import adapter_tenants as tenants
from tests.integration.rank_gang import Gang, small_config

STAGES = pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", seed=0))


@pytest.mark.parametrize(
    ("stage", "dtype", "count"),
    [
        (0, "float32", 30),
        pytest.param(0, "float32", 400, marks=pytest.mark.slow),
        pytest.param(3, "float32", 60, marks=pytest.mark.slow),
        pytest.param(0, "bfloat16", 60, marks=pytest.mark.slow),
        pytest.param(3, "bfloat16", 60, marks=pytest.mark.slow),
    ],
)
def test_an_adapter_has_the_same_bits_beside_others(
    gang: Gang, model: str, tmp_path: Path, stage: int, dtype: str, count: int
) -> None:
    options = {"model": model, "stage": stage, "dtype": dtype, "count": count, "folder": tmp_path}
    for summary in gang.run(tenants.interleaved, **options):
        assert set(summary) == set(tenants.SHAPES)
        assert sum(results for results, _, _ in summary.values()) == count + len(tenants.SHAPES)
        assert all((different, padding) == (0, 0) for _, different, padding in summary.values()), summary


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-6), pytest.param("bfloat16", 2e-2, marks=pytest.mark.slow)])
def test_a_packed_pass_equals_turns(gang: Gang, model: str, dtype: str, most: float) -> None:
    for summary in gang.run(tenants.packed_against_turns, model=model, dtype=dtype):
        for error, difference, norm in summary.values():
            assert error <= 5 * most
            assert difference <= most * norm
            assert norm > 1e-3


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_thousand_calls_cross_nothing(tmp_path: Path) -> None:
    """Four adapters share a model of a single small layer."""
    model = LlamaForCausalLM(small_config(vocab_size=VOCAB_SIZE, num_hidden_layers=1))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "stage": 0, "dtype": "float32", "folder": tmp_path}
    gang = Gang(1, deadline_s=2700.0)
    (summary,) = gang.run(tenants.interleaved, count=10_000, **options)
    gang.close()
    assert all((different, padding) == (0, 0) for _, different, padding in summary.values()), summary


@STAGES
def test_steps_have_the_bits_of_a_supervised_run(gang: Gang, model: str, stage: int) -> None:
    for difference, change in gang.run(tenants.against_supervised, model=model, stage=stage):
        assert difference == 0.0
        assert change > 1e-2


@pytest.mark.parametrize(("stage", "other"), [(0, 0), pytest.param(3, 0, marks=pytest.mark.slow)])
def test_a_saved_adapter_goes_on_exactly_and_peft_loads_it(
    gang: Gang, model: str, tmp_path: Path, stage: int, other: int
) -> None:
    options = {"model": model, "folder": tmp_path}
    probe, state, report = gang.run(tenants.trained_and_exported, stage=stage, **options)[0]
    assert set(load_file(tmp_path / "peft" / "adapter_model.safetensors")) == set(
        load_file(tmp_path / "state" / "adapter_model.safetensors")
    )
    made = client_state(tmp_path / "server", tmp_path / "state", tenants.SHAPES["three"], base=model)
    rlhf.export(made, tmp_path / "out")
    rlhf.export(made, tmp_path / "merged", merged=True)
    for folder in ("peft", "state", "out"):
        alone = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path / folder))
        assert alone.peft_config["default"].r == 3
        ids = torch.arange(1, 30)
        with torch.no_grad():
            logprobs = alone(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids[None]).logits
        torch.testing.assert_close(torch.tensor(probe), logprobs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone(input_ids=ids[None]).logits, whole, rtol=1e-4, atol=1e-4)
    again, same_report, errors = gang.run(tenants.loaded, stage=stage, **options)[0]
    assert tenants.same(state, again)
    assert state.steps == 4
    assert tenants.same(report, same_report)
    assert "rank 3 there, 8 here" in errors[0]
    assert "attention False there, True here" in errors[0]
    assert "cannot be loaded" in errors[1]
    assert "cannot be loaded" in errors[2]
    other_state, other_report, _ = gang.run(tenants.loaded, stage=other, **options)[0]
    assert tenants.same(state, other_state)
    assert other_report.loss == pytest.approx(report.loss, rel=1e-5)
    shutil.copy(tmp_path / "peft" / "adapter_config.json", tmp_path / "state" / "added.json")
    for error in gang.run(tenants.load_error, model=model, shape=tenants.SHAPES["three"], folder=tmp_path / "state"):
        assert "added later" in str(error)


@STAGES
def test_a_failing_client_changes_nothing_of_another(gang: Gang, model: str, stage: int) -> None:
    *messages, unchanged, norm = gang.run(tenants.faults, model=model, stage=stage)[0]
    expected = [
        "There is no gradient: call forward_backward",
        "The loss importance_sampling is not finite",
        "no error",
        "The gradient was dropped, because a part of the batch failed: The loss importance_sampling is not finite",
        "There is no gradient",
        "no error",
        "There is an adapter good already",
        "There is no adapter nobody",
        "no error",
    ]
    for found, begin in zip(messages, expected, strict=True):
        assert found.startswith(begin), found
    assert unchanged
    assert 0.0 < norm < float("inf")
