"""A script without a main guard trains with a reward, an environment, a tracker and a callback of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.recipes import rows

SCRIPT = Path(__file__).parent / "passed_objects_script.py"


def start(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run a copy of the script, and return the notes of the script's callback and tracker."""
    (folder / "script.py").write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "beside.py").write_text("LIMIT = 30\n", encoding="utf-8")
    prompts = "".join(json.dumps({"prompt": f"{letter} {{observation}}"}) + "\n" for letter in "abc")
    (folder / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    command = [sys.executable, "script.py", "runs", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    return done, json.loads(done.stdout.splitlines()[-1])


def raised(text: str, script: Path, function: str) -> str:
    """Return the text and the place of an exception raised by the script."""
    lines = [line.strip() for line in SCRIPT.read_text(encoding="utf-8").splitlines()]
    number = 1 + lines.index(f'raise ValueError("{text}")')
    return f"ValueError: {text}, at {script}:{number} in {function}"


@pytest.mark.timeout(500)
def test_all_objects_of_a_script_in_one_run(tmp_path: Path) -> None:
    """Metrics seen by the objects are those of metrics.jsonl. The callback stops the run of four steps after three."""
    done, noted = start(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs/demo"
    by_step = {row["step"]: row for row in rows(folder)}
    assert list(by_step) == [0, 1, 2, 3]
    assert noted["steps"] == [0, 1, 2, 3]
    steps = [["step", n, row["rewards/close/mean"], row["rewards/turns/mean"]] for n, row in by_step.items() if n]
    scores = [["evaluation", n, by_step[n]["eval/heldout/score"]] for n in (0, 2)]
    expected = [["start", "demo", None], scores[0], steps[0], scores[1], steps[1], ["checkpoint", 2, True], steps[2]]
    assert noted["calls"] == [*expected, ["checkpoint", 3, True], ["end", None]]
    assert by_step[1]["rewards/turns/mean"] == 3.0  # 1 + 2 of two turns
    assert (folder / "final/config.json").exists()
    assert sorted(path.name for path in (folder / "checkpoints").glob("step_*")) == ["step_000002", "step_000003"]
    assert "step 3: the callback `Recorder.on_step` stops the run: three are enough" in done.stderr
    resolved = (folder / "config.resolved.yaml").read_text(encoding="utf-8")
    assert "function: python object close of __main__" in resolved
    assert "name: python object Naming of __main__" in resolved
    again = [sys.executable, "-m", "rlhf.cli", "train", str(folder / "config.resolved.yaml"), "run.name=again"]
    refused = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "`python object " in refused.stderr
    assert "stands for an object of the script that started the run" in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_failing_object_is_named_with_its_line(tmp_path: Path) -> None:
    """A callback fails after step 1, and the resumed run continues from the checkpoint with a failing tracker."""
    script = tmp_path / "script.py"
    done, noted = start(tmp_path, "callback")
    failure = f"the callback `Recorder.on_step` raised {raised('no step', script, 'on_step')}."
    assert f"CallbackFailed: {failure} A checkpoint of step 1 is written." in done.stderr
    assert noted["calls"][-1] == ["end", "CallbackFailed"]
    done, noted = start(tmp_path, "tracker", "resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert noted["calls"][0] == ["start", "demo", 1]
    assert "the code or the arguments of rewards.close and rollouts.environment have changed since" in done.stderr
    failure = f"the tracker Lines failed while logging: {raised('no line', script, 'log')}."
    assert f"{failure} The run continues without it" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "text", "function"), [("reward", "no score", "close"), ("environment", "no start", "reset")]
)
def test_an_error_in_a_process_of_the_run_names_the_line_of_the_script(
    tmp_path: Path, name: str, text: str, function: str
) -> None:
    done, _ = start(tmp_path, name)
    assert done.returncode == 1
    assert raised(text, tmp_path / "script.py", function) in done.stderr
