"""docs/configuration.md equals the page that the schema generates."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf.config.files.docs import TEXT, configuration_page, slug
from rlhf.config.files.load import load
from rlhf.config.mistakes.schema_keys import all_keys
from rlhf.config.schema.root import Config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == configuration_page(), "run: python -m rlhf.config.files.docs > docs/configuration.md"


def test_every_key_has_words() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", configuration_page(), re.MULTILINE)
    assert {name for name, _ in rows} >= {key[-1] for key in all_keys(Config) if len(key) > 1}
    assert all(meaning.strip().endswith((".", ")")) for _, meaning in rows)


def test_every_link_leads_to_one_heading() -> None:
    anchors = [slug(title) for title in re.findall(r"^##+ (.+)$", configuration_page(), re.MULTILINE)]
    assert len(set(anchors)) == len(anchors)
    links = set(re.findall(r"\]\(#([^)]+)\)", configuration_page()))
    assert links <= set(anchors)
    assert {"keys", "run", "algorithm-with-name-grpo", "cluster", "sweepmethod-with-name-asha"} <= links


def test_sections_of_one_name_are_told_apart() -> None:
    """PPO's penalty and GRPO's have different defaults."""
    page = configuration_page()
    ppo, grpo = (
        page.partition(f"### `algorithm.kl` of `{name}`")[2].partition("\n### ")[0] for name in ("ppo", "grpo")
    )
    assert "| `coef` | a number >= 0 | `0.01` |" in ppo
    assert "| `coef` | a number >= 0 | `0.0` |" in grpo
    rloo, dapo = (page.partition(f"with `name: {name}`\n")[2].partition("\n### ")[0] for name in ("rloo", "dapo"))
    assert "[`algorithm.kl` of `ppo`](#algorithmkl-of-ppo)" in rloo
    assert "[`algorithm.kl` of `grpo`](#algorithmkl-of-grpo)" in dapo


def test_the_example_of_a_pipeline_loads(tmp_path: Path) -> None:
    based, example = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "based.yaml").write_text(based)
    assert load(tmp_path / "based.yaml").runs == load("recipe:dapo_smollm2").runs
    path = tmp_path / "example.yaml"
    path.write_text(example)
    assert list(load(path).stages) == ["sft", "ppo", "soup", "judge"]
