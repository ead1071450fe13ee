"""A client trains all weights on real ranks: a supervised run's steps, exact saves, and the base model again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rlhf
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.models.files.tiny_vision import build_tiny_vision
from rlhf.vision.kinds import is_vision_weight
from tests.fakes.client_states import client_state
from tests.integration import whole_tenants as tenants
from tests.integration.rank_gang import Gang, Gangs

STAGES = pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", seed=0))


@STAGES
def test_steps_have_the_bits_of_a_supervised_run(gang: Gang, model: str, stage: int) -> None:
    for difference, change in gang.run(tenants.against_supervised, model=model, stage=stage):
        assert difference == 0.0
        assert change > 1e-2


@pytest.mark.parametrize(
    ("stage", "dtype", "other"),
    [
        (0, "float32", 0),
        pytest.param(3, "float32", 0, marks=pytest.mark.slow),
        pytest.param(0, "bfloat16", None, marks=pytest.mark.slow),
        pytest.param(3, "bfloat16", None, marks=pytest.mark.slow),
    ],
)
def test_a_model_is_saved_and_continued_and_gives_way_to_another(
    gang: Gang, model: str, tmp_path: Path, stage: int, dtype: str, other: int | None
) -> None:
    found = gang.run(tenants.lives, model=model, stage=stage, dtype=dtype, folder=tmp_path)[0]
    assert found["errors"][0].startswith("These ranks train all weights, of one model at a time, and hold one.")
    assert all(error.startswith("These ranks no longer have the weights of the base") for error in found["errors"][1:3])
    assert found["errors"][3].startswith("rank: is 4, but all weights are trained here")
    assert found["base again"] == found["base"] != found["probe"]
    assert found["no gradient"].startswith("There is no gradient")
    assert found["dropped"].startswith("There is no gradient")
    assert "engine.json" in found["other"]
    assert found["same steps"]
    assert tenants.same_reports(found["continued"], found["after"])
    assert found["weights alone"] == found["probe"]
    first, second = (len(reports) // 3 for reports in (found["after"], found["without moments"]))
    assert tenants.same_reports(found["without moments"][:first], found["after"][:second])
    assert not tenants.same_reports(found["without moments"], found["after"])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert str(whole.dtype) == f"torch.{dtype}"
    for name, weight in found["saved"].items():
        assert torch.equal(whole.get_parameter(name).float(), weight), name
    rlhf.export(
        client_state(tmp_path / "server", tmp_path / "state", tenants.ALL, base=model, dtype=dtype), tmp_path / "out"
    )
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == whole.dtype
    if dtype == "float32":
        ids = torch.arange(1, 30)
        with torch.no_grad():
            logprobs = whole(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found["probe"]), logprobs, rtol=1e-5, atol=1e-5)
    if other is not None:
        again = gang.run(tenants.resumed, model=model, stage=other, folder=tmp_path)[0]
        if other == stage:
            assert tenants.same_reports(again, found["after"])
        assert [one.loss for one in again] == pytest.approx([one.loss for one in found["after"]], rel=1e-4)


@pytest.mark.slow
def test_all_weights_of_a_vision_model_are_those_of_its_language_model(gangs: Gangs, tmp_path: Path) -> None:
    """Of two ranks at stage 3, one may have all images of a pass."""
    model = build_tiny_vision(tmp_path / "model", "qwen2_5_vl", seed=0)
    found = []
    for ranks, stage in ((1, 0), (2, 3)):
        folder = tmp_path / str(ranks)
        reports, logprobs = gangs[ranks].run(tenants.sees, model=str(model), stage=stage, folder=folder)[0]
        losses = [report.loss for report in reports]
        assert losses == sorted(losses, reverse=True)
        found.append([*losses, *logprobs])
        before, after = (load_file(path / "model.safetensors") for path in (model, folder / "whole"))
        assert before.keys() == after.keys()
        for name, weight in after.items():
            assert torch.equal(weight, before[name]) == is_vision_weight(name), name
    assert found[0] == pytest.approx(found[1], abs=1e-4)
