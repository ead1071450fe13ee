"""docs/environments.md, step by step: the files of the page are written, and the run trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.integration.recipes import ONLINE, rows, train

PAGE = Path(__file__).parents[2] / "docs" / "environments.md"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_steps_of_the_page_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text(encoding="utf-8")
    steps = text[text.index("## Add an environment") : text.index("## The protocol")]
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", steps, flags=re.DOTALL))
    assert list(blocks) == ["python", "json", "yaml"]
    name = re.match(r"# (\S+)\n", blocks["python"])
    assert name is not None
    (tmp_path / name[1]).write_text(blocks["python"])
    (tmp_path / "prompts.jsonl").write_text(blocks["json"])
    written = yaml.safe_load(blocks["yaml"])
    here = {"cluster": ONLINE["cluster"], "run": {**written["run"], "dir": str(tmp_path)}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**written, **here}))
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "config.yaml")
    found = rows(tmp_path / "countdown")
    assert [row["step"] for row in found] == [1, 2]
    assert all(row["rollouts/turns/max"] > 1 for row in found)
