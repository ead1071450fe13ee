"""docs/configuration.md is what the schema says."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf.config.docs import HEAD, render
from rlhf.config.load import load
from rlhf.config.root import Config
from rlhf.config.schema import all_keys

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "run: python -m rlhf.config.docs > docs/configuration.md"


def test_every_key_has_words() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", render(), re.MULTILINE)
    assert {name for name, _ in rows} >= {key[-1] for key in all_keys(Config) if len(key) > 1}
    assert all(meaning.strip().endswith((".", ")")) for _, meaning in rows)


def test_the_example_of_a_pipeline_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", HEAD, re.DOTALL)
    path = tmp_path / "example.yaml"
    path.write_text(example)
    assert list(load(path).stages) == ["sft", "ppo", "soup", "judge"]
