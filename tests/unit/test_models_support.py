"""The table of tested architectures equals measurements of the tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.models.support import refuse_without_engine, support_by_type, support_table, untested_model
from tests.support_measurements import measured
from tests.tiny_architectures import ALL

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
QUICK = {"bloom", "gpt_oss", "lfm2", "llama", "qwen3_5_text"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_a_line_of_the_table_is_true(name: str) -> None:
    assert measured(name) == support_by_type()[name]


def test_the_page_shows_the_table() -> None:
    shown = PAGE.read_text(encoding="utf-8")
    assert shown.endswith(support_table()), "run: python -m rlhf.models.support docs/models.md"


def test_every_tiny_architecture_is_in_the_table() -> None:
    assert support_by_type().keys() == ALL.keys()


def test_a_type_outside_the_table_is_named() -> None:
    assert untested_model({"model_type": "llama"}) is None
    assert untested_model({"model_type": "pictures", "text_config": {"model_type": "qwen3"}}) is None
    assert "models of type blip" in str(untested_model({"model_type": "blip"}))


def test_a_difference_was_measured_where_engines_may_start() -> None:
    wrong = [row for row in support_by_type().values() if (row.engines == "any") != row.engine[0].isdigit()]
    assert wrong == []


def test_types_that_no_engine_computes_are_refused() -> None:
    for kind in ("llama", "nemotron_h", "gpt_neo", "blip"):  # measured twice, perhaps by transformers, and unknown
        refuse_without_engine({"model_type": kind}, device="cpu")
    refuse_without_engine({"model_type": "mamba"}, device="cuda")
    with pytest.raises(UserError, match=r"of type mamba: vLLM has no selective scan for a CPU .* Use GPUs"):
        refuse_without_engine({"model_type": "mamba"}, device="cpu")
    with pytest.raises(UserError, match="of type longcat_flash: vLLM refuses"):
        refuse_without_engine({"model_type": "longcat_flash"}, device="cuda")
    refuse_without_engine({"model_type": "gemma3"}, device="cuda")
    refuse_without_engine({"model_type": "gemma3_text"}, device="cpu")
    with pytest.raises(UserError, match=r"of type gemma3: .* attend to each other, .* Use GPUs"):
        refuse_without_engine({"model_type": "gemma3"}, device="cpu")
