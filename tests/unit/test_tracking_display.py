"""The displays of a run, its curves as PNG, and log lines without secrets."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from rlhf.errors import UserError
from rlhf.tracking import formatting, logs, notebook
from rlhf.tracking.diagnosis.findings import Finding
from rlhf.tracking.display.plots import plot_curves
from rlhf.tracking.display.progress import LineProgress, Progress
from rlhf.tracking.display.progress_live import CellProgress, LiveProgress, open_progress
from rlhf.tracking.run_folder.samples import last_sample, samples_path, write_samples
from rlhf.tracking.sinks.tracker import Tracker
from tests.fakes.samples import sample_record


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_one_line_a_step_with_numbers_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(monkeypatch), io.StringIO()
    with open_progress(10, show=["rewards/score/mean", "eval/held/score"], run="demo", stream=out) as display:
        assert type(display) is LineProgress
        display.step(0, {"eval/held/score": 0.25, "update/lr": 1.0})
        for step in (1, 2, 3):
            clock.now += 5.0 if step > 1 else 50.0  # the first step compiles and warms up
            display.stage("rollouts", 3, 64)
            display.step(step, {"rewards/score/mean": step / 3})
    assert out.getvalue().splitlines() == [
        "demo: 10 steps",
        "before training  eval/held/score 0.25",
        "step 1/10  eval/held/score 0.25  rewards/score/mean 0.333",
        "step 2/10  eval/held/score 0.25  rewards/score/mean 0.667  left 40 s",  # 8 steps of 5 s
        "step 3/10  eval/held/score 0.25  rewards/score/mean 1  left 35 s",
    ]


def test_a_long_step_speaks_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(monkeypatch), io.StringIO()
    display = open_progress(10, done_steps=4, run="soup/ppo", stream=out)
    for name, steps in (("starting", (None,)), ("rollouts", (0, 5))):
        for step in steps:
            if step is not None:
                display.begin(step)
            for done in range(8):
                display.stage(name, done, 64)
                clock.now += 10.0
    for count in (1, 2):
        display.ahead(count)
        clock.now += 60.0
        display.stage("update")
    assert out.getvalue().splitlines() == [
        "soup/ppo: 10 steps, of which 4 are done",
        "soup/ppo: starting 6/64",
        "before training: rollouts 4/64",
        "step 5/10: rollouts 2/64",
        "step 5/10: update  1 batch ahead",
        "step 5/10: update  2 batches ahead",
    ]


def written_sample(folder: Path, step: int, response: str) -> None:
    path = samples_path(folder, step)
    path.parent.mkdir(exist_ok=True)
    row = {"split": "train", "prompt": "2+2=", "response": response, "score": 0.5, "truncated": False}
    path.write_text(json.dumps({**row, "response": "another"}) + "\n" + json.dumps(row) + "\n")


def test_live_display_shows_stages_a_step_table_and_the_last_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, out = Clock(monkeypatch), Terminal()
    written_sample(tmp_path, 3, "four\x1b[2J [red]")
    display = open_progress(
        10, done_steps=1, show=["update/kl_old/mean", "eval/held/score"], run="demo", folder=tmp_path, stream=out
    )
    assert type(display) is LiveProgress
    display.step(2, {"update/kl_old/mean": 0.5, "eval/held/score": 0.25})
    display.step(3, {"update/kl_old/mean": 0.0123, "update/lr": 1.0})
    display.stage("rollouts", 1, 64)
    clock.now += 3.0
    display.stage("update")
    clock.now += 2.0
    display.stage("rollouts", 37, 64)
    clock.now += 1.0
    shown = io.StringIO()
    Console(file=shown, width=90).print(display._render())
    display.close()
    lines = [" ".join(line.split()) for line in shown.getvalue().splitlines()]
    for line, start, end in zip(
        lines, ("steps ", "rollouts ", "update "), ("3/10 left 0 s demo", "37/64 4.0 s", "2.0 s"), strict=False
    ):
        assert line.startswith(start)
        assert line.endswith(end)
    assert lines[3:] == [
        "update/ eval/",
        "step kl_old/mean held/score",
        "2 0.5 0.25",
        "3 0.0123",
        "sample 2+2=",
        "-> four [2J [red] [0.5]",  # nothing that the terminal would obey
    ]
    display.step(4, {})
    assert display._stages == {}


def test_the_live_table_keeps_the_last_evaluation_and_has_no_empty_row() -> None:
    display = open_progress(20, show=["rewards/score/mean", "eval/held/score"], run="demo", stream=Terminal())
    assert type(display) is LiveProgress
    display.step(0, {"time/sync_s": 1.0})
    display.step(1, {"rewards/score/mean": 0.5, "eval/held/score": 0.25})
    for step in range(2, 10):
        display.step(step, {"rewards/score/mean": 0.5})
    display.close()
    shown = io.StringIO()
    Console(file=shown, width=90).print(display._table())
    lines = [line.split() for line in shown.getvalue().splitlines()[2:]]
    assert lines == [["1", "0.5", "0.25"], *([str(step), "0.5"] for step in range(4, 10))]


def test_json_lines_are_one_object_a_stage_step_and_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    written_sample(tmp_path, 1, "4")
    finding = Finding(
        kind="slower", severity="notice", first_step=1, last_step=1, metrics=(), what="w", why="y", advice="a"
    )
    with open_progress(2, mode="json", run="demo", folder=tmp_path) as display:
        display.begin(1)
        for done in range(3):
            display.stage("rollouts", done, 3)
        clock.now += 5.0
        display.step(1, {"update/lr": 0.5, "update/grad_norm": math.inf})
        display.finding(finding)
        display.note("kept")
    out, err = capsys.readouterr()
    assert err == ""
    stage, step, found, note = map(json.loads, out.splitlines())
    assert stage == {"event": "stage", "run": "demo", "step": 1, "stage": "rollouts"}
    assert step == {
        "event": "step",
        "run": "demo",
        "step": 1,
        "steps": 2,
        "left_s": None,
        "metrics": {"update/grad_norm": None, "update/lr": 0.5},
        "sample": {"split": "train", "prompt": "2+2=", "response": "4", "score": 0.5, "truncated": False},
    }
    assert (found["event"], found["kind"], found["advice"]) == ("finding", "slower", "a")
    assert note == {"event": "note", "run": "demo", "text": "kept"}


def test_quiet_shows_nothing_and_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [": 10 steps", "step 1/10", "x"]
    for mode, display_type, shown in (("quiet", Progress, []), ("auto", LineProgress, lines)):
        with open_progress(10, mode=mode) as display:
            assert type(display) is display_type
            display.stage("rollouts", 1, 2)
            display.step(1, {})
            display.note("x")
        out, err = capsys.readouterr()
        assert (out, err.splitlines()) == ("", shown)


def test_the_last_sample_is_read_from_the_files_end(tmp_path: Path) -> None:
    assert last_sample(tmp_path, 1) is None
    written_sample(tmp_path, 1, "x" * (2 << 20))  # longer than the part that is read
    assert last_sample(tmp_path, 1) is None
    written_sample(tmp_path, 1, "x")
    assert last_sample(tmp_path, 1)["response"] == "x"


def test_durations_and_numbers() -> None:
    durations = {0.4: "0 s", 59.6: "1 min 00 s", 200: "3 min 20 s", 7500: "2 h 05 min", -1: "0 s"}
    assert {value: formatting.duration(value) for value in durations} == durations
    numbers = {3.0: "3", 0.12345: "0.123", 1e-6: "1e-06", -2.5: "-2.5", 15312.7: "15313", 999.7: "1000", 1e12: "1e+12"}
    assert {value: formatting.number(value) for value in numbers} == numbers
    assert formatting.number(float("nan")) == "nan"


def test_each_metric_of_any_run_has_a_panel_with_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    metrics = {"a": {"rewards/score/mean": 0.5, "update/loss/mean": float("nan")}, "b": {"eval/held/score": 0.4}}
    for name, values in metrics.items():
        (tmp_path / name).mkdir()
        tracker = Tracker(tmp_path / name)
        for step in (1, 2, 3):
            tracker.log(step, {key: value * step for key, value in values.items()})
    keys = ["rewards/score/mean", "update/loss/mean", "eval/held/score"]
    plot_curves({name: tmp_path / name for name in "ab"}, keys, output=tmp_path / "both.png")
    panels = {axes.get_title(loc="left"): [list(line.get_ydata()) for line in axes.lines] for axes in drawn[0].axes}
    evaluated = pytest.approx([0.4, 0.8, 1.2])
    assert panels == {"rewards/score/mean": [[0.5, 1.0, 1.5], []], "eval/held/score": [[], evaluated]}
    # the legend also names a run without values in the first panel
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["a", "b"]


def test_nothing_to_plot_is_said(tmp_path: Path) -> None:
    runs, output = {"run": tmp_path}, tmp_path / "curves.png"
    with pytest.raises(UserError, match="nothing to plot"):
        plot_curves(runs, ["rewards/score/mean"], output=output)
    Tracker(tmp_path).log(1, {"update/lr": 1.0})
    with pytest.raises(KeyError, match="not declared"):
        plot_curves(runs, ["update/speed"], output=output)
    assert not output.exists()
    assert plot_curves(runs, ["update/lr"], output=output).read_bytes().startswith(b"\x89PNG")


def test_one_event_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", role="policy", rank=1)
    logs.configure("info", role="policy", rank=1)  # the second call replaces the first, so the line appears once
    logs.set_step(12)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("actors.roles.gang").exception("lost %d ranks", 2)
    logging.getLogger("rlhf.x").debug("hidden")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ERROR policy/1 step=12 actors\.roles\.gang: lost 2 ranks\\n", line
    )
    assert "ValueError: two" in line


def test_no_secret_is_logged_and_no_terminal_obeys_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SHORT_TOKEN", "true")  # too short for a secret: masking would garble ordinary text
    monkeypatch.setenv("MAX_TOKENS", "12345678")
    logs.configure()
    logging.getLogger("rlhf.x").info("got %s, true, 12345678, \x1b[2J and \x07", "0123456789abcdef")
    line = capsys.readouterr().err  # outside of a step
    assert line.endswith("Z INFO controller rlhf.x: got ***, true, 12345678, \\x1b[2J and \\x07\n")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("key hf_abcdefghijklmnopqrst.", "key ***."),
        ("Authorization: Bearer abc.def-123456", "Authorization: Bearer ***"),
        ("redis://:pass@host/0 http://me:pw@host", "redis://***@host/0 http://***@host"),
        ("sk-abcdefghijklmnop1234", "***"),
        ("git clone with github_pat_11ABCDEFG0abcdef_hijkl", "git clone with ***"),
        ("GET https://host/a?token=abc&n=1#top", "GET https://host/a?token=***&n=1#top"),
        ("'https://host/?n=1&X-Api-Key=abc'", "'https://host/?n=1&X-Api-Key=***'"),
        ("is monkey=1 a keyboard? tokens=3", "is monkey=1 a keyboard? tokens=3"),
        ("nothing here: max_tokens 12, http://host:80/a@b", "nothing here: max_tokens 12, http://host:80/a@b"),
    ],
)
def test_what_looks_like_a_token_is_masked(text: str, masked: str) -> None:
    assert logs.redact(text) == masked


def test_a_config_is_masked_by_key_and_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-long-secret")
    monkeypatch.setenv("github_pat", "another-secret")
    config = {
        "request": {"headers": [{"X-Api-Key": "x"}], "passphrase": "x", "auth": "x", "author": "x another-secret"},
        "judge": {"api_key": "short", "auth_token": "x", "token_env": "JUDGE", "headers": ["a-long-secret", 1]},
        "args": {"password": 12345678, "credentials": {"user": "bob", "ports": [80], "tls": True}, "cookie": 0},
        "env": {"github_token": "x", "SLACK_TOKEN": "x", "botToken": "x", "HF_TOKEN": "${HF_TOKEN}"},
        "rewards": {"secret": {"function": "found", "weight": 2.0, "args": {"auth": {"user": "bob"}}}},
    }
    assert logs.redact_config(config) == {
        "request": {"headers": [{"X-Api-Key": "***"}], "passphrase": "***", "auth": "***", "author": "x ***"},
        "judge": {"api_key": "***", "auth_token": "***", "token_env": "JUDGE", "headers": ["***", 1]},
        "args": {"password": "***", "credentials": {"user": "***", "ports": ["***"], "tls": True}, "cookie": 0},
        "env": {"github_token": "***", "SLACK_TOKEN": "***", "botToken": "***", "HF_TOKEN": "${HF_TOKEN}"},
        "rewards": {"secret": {"function": "found", "weight": 2.0, "args": {"auth": {"user": "***"}}}},
    }
    names = ["pad_token", "eos_token", "end_token", "stop-token", "cost_per_token", "max_tokens", "tokenizer"]
    plain = {"data": {"eval": {"password": {"task": "calculator"}}}, "password": "", **dict.fromkeys(names, "x")}
    assert logs.redact_config(plain) == plain


def test_libraries_say_nothing_when_they_are_imported() -> None:
    says = "import rlhf, logging; logging.getLogger('bitsandbytes').warning('pip install kernels')"
    done = subprocess.run([sys.executable, "-c", says], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Stand in for the kernel of a notebook, and collect the HTML shown in the place of a cell."""
    shown: list[str] = []
    for module in ("notebook", "display.progress_live"):
        monkeypatch.setattr(f"rlhf.tracking.{module}.in_notebook", lambda: True)
    monkeypatch.setattr(
        notebook.PLACE, "show", lambda shape: shown.append(shape._repr_mimebundle_([], [])["text/html"])
    )
    yield shown
    notebook.PLACE.leave()
    monkeypatch.undo()
    logs.configure()


def test_a_notebook_shows_a_run_in_one_place(cell: list[str], tmp_path: Path) -> None:
    write_samples(samples_path(tmp_path, 1), [sample_record("<script>alert(1)</script>\x1b[31m", score=0.5)])
    with open_progress(2, show=["rewards/score/mean"], run="demo", folder=tmp_path) as display:
        assert type(display) is CellProgress
        display.begin(1)
        display.stage("rollouts", 3, 64)
        deadline = time.monotonic() + 20.0
        while not cell and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "rollouts" in cell[0]
        assert "3/64" in cell[0]
        display.step(1, {"rewards/score/mean": 0.125})
    assert "1/2" in cell[-1]
    assert "0.125" in cell[-1]
    assert "&lt;script&gt;alert(1)" in cell[-1]
    assert "<script>" not in cell[-1]
    assert "\x1b" not in cell[-1]
    count = len(cell)
    time.sleep(0.7)  # longer than between two updates
    assert len(cell) == count


def test_in_a_notebook_log_lines_replace_each_other_and_warnings_stay(
    cell: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure()
    logger = logging.getLogger("rlhf.tests")
    logger.info("starting Ray <here>")
    with logs.written_to(tmp_path / "log.txt"), open_progress(2, run="demo"):
        logger.info("weights go by shm")  # the display of the run has the place
        logger.warning("a worker died")
    logger.info("afterwards")
    assert "starting Ray &lt;here&gt;" in cell[0]
    assert not any("weights go by shm" in text for text in cell)
    assert "afterwards" in cell[-1]
    err = capsys.readouterr().err
    assert "WARNING controller rlhf.tests: a worker died\n" in err
    assert err.count("\n") == 1
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split("rlhf.tests: ")[1] for line in lines] == ["weights go by shm", "a worker died"]


def test_a_log_file_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    with logs.written_to(Path("/dev/full")):
        logging.getLogger("rlhf.tests").info("a line")
    assert capsys.readouterr().err.count("\n") == 1


def test_a_new_cell_has_a_new_place(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Handle:
        def update(self, shape: object) -> None:
            calls.append(f"update {shape}")

    def display(shape: object, *, display_id: bool) -> Handle:
        calls.append(f"display {shape}")
        return Handle()

    import IPython

    shell = SimpleNamespace(execution_count=1, kernel=None)
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    monkeypatch.setattr("IPython.display.display", display)
    assert notebook.in_notebook()
    place = notebook.CellPlace()
    for cell in (1, 1, 2):
        shell.execution_count = cell
        place.show(f"in {cell}")
    place.leave()
    place.show("next run")
    assert calls == ["display in 1", "update in 1", "display in 2", "display next run"]
    monkeypatch.setattr(IPython, "get_ipython", lambda: None)
    assert not notebook.in_notebook()
