"""A run as an object: tables, curves, report and diagnosis of a folder, and a path wherever a call takes one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import rlhf
from rlhf.commands.shared import config_or_name, starts_work
from rlhf.config.files.load import from_mapping
from rlhf.errors import Interrupted
from rlhf.tracking.run_folder.atomic import append_line
from rlhf.tracking.run_folder.folder import RunFolder
from tests.fakes.run_folders import make_run


def test_metrics_are_a_table_with_a_row_a_step(tmp_path: Path) -> None:
    metrics = rlhf.Run(make_run(tmp_path, "demo")).metrics
    assert metrics.index.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert metrics["rewards/score/mean"].iloc[1:].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert metrics["eval/heldout/score"].dropna().to_dict() == pytest.approx({0: 0.0, 6: 0.6})


def test_samples_and_their_tokens_are_tables(tmp_path: Path) -> None:
    run = rlhf.Run(make_run(tmp_path, "demo"))
    samples = run.samples
    assert samples.index.tolist() == [(0, 0), (0, 1), (0, 2), (6, 0), (6, 1), (6, 2)]
    assert samples.loc[6].score.tolist() == [1.0, 1.0, 0.5]
    assert samples.loc[(6, 2), "columns/secret"] == "red <b>"
    assert samples.loc[(6, 2), "result"] == {"guess": "blue"}
    assert not {"tokens", "steps", "mean_teacher_logprob"} & set(samples.columns)  # elsewhere, or without any value
    tokens = run.tokens(6, 2)
    assert tokens["texts"].tolist()[:2] == ["<tool_call>", '{"name": "find"}']
    assert tokens["sampled"].sum() == 6  # all of the seven but the text of the tool
    with pytest.raises(rlhf.UserError, match=r"has no samples of step 3. Steps with samples: 0, 6\."):
        run.tokens(3)
    with pytest.raises(rlhf.UserError, match=r"has 3 samples of step 6, but row is 3\."):
        run.tokens(6, 3)


def test_evaluations_have_their_intervals(tmp_path: Path) -> None:
    last = rlhf.Run(make_run(tmp_path, "demo")).evaluations.iloc[-1].to_dict()
    assert last == {
        **{"step": 6, "set": "heldout", "metric": "score", "rows": 50},
        **{"value": pytest.approx(0.6), "low": pytest.approx(0.55), "high": pytest.approx(0.65)},
    }


def test_curves_are_a_figure_that_a_notebook_shows(tmp_path: Path) -> None:
    run, other = rlhf.Run(make_run(tmp_path, "one")), rlhf.Run(make_run(tmp_path, "two", lr=1e-3, kl=0.5))
    figure = run.plot("rewards/score/mean", "experience/kl_ref/mean", against=other)
    assert isinstance(figure, Figure)
    assert figure.axes[0].get_title(loc="left") == "rewards/score/mean"
    curves = figure.axes[1].lines
    assert [line.get_label() for line in curves] == ["one", "two"]
    assert curves[1].get_ydata()[-1] == pytest.approx(3.0)  # six steps of 0.5
    assert figure._repr_png_().startswith(b"\x89PNG")
    titles = [axes.get_title(loc="left") for axes in run.plot().axes]
    assert titles[:2] == ["eval/heldout/score", "rewards/score/mean"]
    with pytest.raises(rlhf.UserError, match="no value of the metric 'rewards/scor/mean'; did you mean rewards/score/"):
        run.plot("rewards/scor/mean")


def test_a_run_says_its_state_its_numbers_and_its_problems(tmp_path: Path) -> None:
    run = rlhf.Run(make_run(tmp_path, "demo"))
    lines = repr(run).splitlines()
    assert lines[0].startswith("demo: finished, 6 of 6 in ")
    assert lines[1] == "  grpo on some/model with prompts.jsonl by correct"
    assert lines[2].split() == ["eval/heldout/score", "0", "->", "0.6"]
    assert lines[-1] == "  no problem found"
    assert repr(run.diagnosis) == "no problem found"
    for step in range(7, 20):
        append_line(run.folder / "metrics.jsonl", {"step": step, "time_s": 1.0, "update/loss/mean": None})
    assert repr(run).endswith("problems: not_finite (see `diagnosis`)")
    assert repr(run.diagnosis).startswith("failure, steps 7 to 19: ")
    assert " Try: " in repr(run.diagnosis)


def test_the_report_of_a_run_is_a_frame_in_a_notebook(tmp_path: Path) -> None:
    run = rlhf.Run(make_run(tmp_path, "demo"))
    written = run.report(tmp_path / "page.html")
    frame = written._repr_html_()
    assert frame.startswith("<iframe srcdoc='<!doctype html>")
    assert frame.count("'") == 8  # of the four attributes: no quote of the page ends an attribute
    page = frame.partition("srcdoc='")[2].partition("' width=")[0].replace("&#39;", "'").replace("&amp;", "&")
    assert page == (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_run_is_a_path(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "demo")
    run = rlhf.Run(folder)
    assert str(run) == os.fspath(run) == str(folder)
    assert run.folder == folder
    assert run.model == folder / "final"
    assert rlhf.report([run, make_run(tmp_path, "two")]).html.name == "comparison.html"
    assert config_or_name(run) == str(folder)
    with pytest.raises(rlhf.UserError, match=r"demo: cannot be read: Is a directory"):
        rlhf.plan(run)
    values = {
        **{"run": {"name": "next"}, "policy": {"model": run.model}, "algorithm": {"name": "sft"}},
        **{"data": {"train": "rows.jsonl"}, "train": {"steps": 1, "lr": 1e-5, "sequences_per_update": 4}},
    }
    assert from_mapping(values).runs["next"].policy.model == f"{folder}/final"


def test_a_pipeline_has_its_stages(tmp_path: Path) -> None:
    make_run(tmp_path, "pipe/sft")
    make_run(tmp_path, "pipe/ppo", steps=3, done=False)
    pipeline = rlhf.Run(tmp_path / "pipe")
    assert pipeline.stages == {name: rlhf.Run(tmp_path / "pipe" / name) for name in ("sft", "ppo")}
    assert [stage.state for stage in pipeline.stages.values()] == ["finished", "stopped"]
    assert repr(pipeline).count(": finished, ") == 1
    for name in ("metrics", "samples", "diagnosis", "evaluations", "model", "state"):
        with pytest.raises(rlhf.UserError, match=r"a pipeline of the stages sft, ppo\. Take .* `run.stages\['ppo'\]`"):
            getattr(pipeline, name)
    with pytest.raises(rlhf.UserError, match=r"ppo has no model in final/: the run is stopped\."):
        _ = pipeline.stages["ppo"].model
    assert set(pipeline.report().findings) == {"sft", "ppo"}


def test_a_run_without_a_step_has_empty_tables_and_a_damaged_one_says_so(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "new", resume=False) as folder:
        run = rlhf.Run(folder.path)
        assert run.metrics.empty
        assert run.samples.empty
        assert run.evaluations.empty
        assert "no step yet" in repr(run)
        with pytest.raises(rlhf.UserError, match=r"metrics.jsonl has no step with a main metric: nothing to plot"):
            run.plot()
    (run.folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(rlhf.UserError, match=r"metrics.jsonl:1: the row has no `step`"):
        _ = run.metrics
    (run.folder / "samples").mkdir(exist_ok=True)
    (run.folder / "samples/step_000001.jsonl").write_text("{\n")
    with pytest.raises(rlhf.UserError, match=r"step_000001\.jsonl:1: not JSON: .* Correct or remove this line"):
        _ = run.samples
    with pytest.raises(rlhf.UserError, match=r"is not a folder\. Name the folder of a run"):
        rlhf.Run(tmp_path / "none")


@pytest.mark.parametrize("kind", [rlhf.UserError, rlhf.RunError, rlhf.Preempted, Interrupted])
def test_ipython_shows_the_text_of_an_error(kind: type[rlhf.UserError]) -> None:
    assert kind("train.lr: is wrong")._render_traceback_() == [f"{kind.__name__}: train.lr: is wrong"]


@pytest.mark.parametrize("notebook", [False, True])
def test_the_error_of_a_task_group_becomes_that_of_the_user(monkeypatch: pytest.MonkeyPatch, notebook: bool) -> None:
    """IPython would show the tracebacks of a group among the causes."""
    monkeypatch.setattr("rlhf.tracking.notebook.in_notebook", lambda: notebook)

    @starts_work
    def work() -> None:
        try:
            raise ExceptionGroup("rank 0", [ValueError("inner")])
        except ExceptionGroup as error:
            raise ExceptionGroup("tasks", [rlhf.RunError("policy/0 died")]) from error

    with pytest.raises(rlhf.RunError, match=r"^policy/0 died$") as caught:
        work()
    assert caught.value.__cause__ is None

    @starts_work
    def mistake() -> None:
        try:
            raise ExceptionGroup("rank 0", [ValueError("inner")])
        except ExceptionGroup as error:
            raise rlhf.UserError("wrong") from error

    with pytest.raises(rlhf.UserError, match=r"^wrong$") as refused:
        mistake()
    assert (refused.value.__cause__ is None) == notebook
