"""A report has the numbers of its runs, and a model's text cannot run there. A model card has the run's metrics."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import rlhf
from rlhf.cli import main
from rlhf.config.files.load import load
from rlhf.config.schema.root import Config
from rlhf.tracking.run_folder.atomic import append_line, read_lines, write_lines
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.samples import samples_path, write_samples
from rlhf.viewing.model_card import model_card, write_model_card
from rlhf.viewing.report import MOST_POINTS, MOST_TOKENS
from rlhf.viewing.runs import RunPlaces
from rlhf.viewing.timeline import read_spans
from tests.fakes.run_folders import HOSTILE, SESSION, make_run, sample
from tests.fakes.samples import sample_tokens


class Page(HTMLParser):
    """A report with elements and contained answers."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.answers: Any = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][1].get("id") == "answers" and self.answers is None:
            self.answers = json.loads(data)

    def texts(self, name: str) -> list[str]:
        """Return all texts of a run's summary, a row of a table as one text."""
        summary = self.answers["summaries"][name]
        rows = [" | ".join(row) for table in summary["tables"] for row in table["rows"]]
        return [*(text for text in summary.values() if isinstance(text, str)), *rows]


def test_a_report_has_the_numbers_of_the_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "demo")
    written = rlhf.report(folder)
    assert written.html == folder / "report.html"
    assert [path.name for path in written.pictures] == ["report.png"]
    assert written.pictures[0].read_bytes().startswith(b"\x89PNG")
    page = Page(written.html)
    texts = page.texts("demo")
    for text in (
        "grpo on some/model with prompts.jsonl by correct",
        "2 cores, torch 2.13.0, commit abcdef0123",
        "heldout (50) | score | 0 (-0.05 to 0.05) | 0.6 (0.55 to 0.65) | +0.6",
        "memory/policy_rss_gib | 1.01 | 1.06 | 1.06",
        "3 | rewards: raised (correct) | 2 | no <answer>",
    ):
        assert text in texts
    summary = page.answers["summaries"]["demo"]
    assert summary["progress"].startswith("6 of 6 in ")
    assert summary["progress"].endswith(", lost workers started again: 1")
    assert summary["time"] == [["rollouts", 0.75, "18 s"], ["update", 0.25, "6 s"]]  # 6 steps of 3 + 1 seconds
    assert summary["findings"] == []
    data = page.answers["data"]["demo"]
    assert data["steps"] == [0, 1, 2, 3, 4, 5, 6]
    assert data["columns"]["rewards/score/mean"] == [None, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    (run,) = page.answers["runs"]
    assert (run["state"], run["steps"]) == ("finished", [0, 6])
    assert [one["response"] for one in page.answers["samples"]["demo 6"]["whole"]] == [HOSTILE, "2"]


def test_model_text_is_no_markup_and_damaged_numbers_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, "<script>x")
    wrong = "<b>0.5"
    good = {"score": {"value": 0.5, "low": 0.4, "high": 0.6}}
    contents = [{"metrics": {"score": {"value": wrong}}}, wrong, {"metrics": [wrong]}, {"num_rows": wrong}]
    for step, content in enumerate([{"num_rows": 7, "metrics": good}, *contents], start=20):
        (run / "evals" / f"step_{step:06d}.json").write_text(json.dumps({"sets": {"heldout": content}}))
    (run / "evals" / "step_x.json").write_text("[" * 200_000)
    rows = read_lines(run / "metrics.jsonl")
    write_lines(run / "metrics.jsonl", [{**row, "eval/a/b/c/score": 1.0} for row in rows])  # of another version
    written = rlhf.report(run)
    assert written.pictures
    page = Page(written.html)
    assert "heldout (7) | score | 0 (-0.05 to 0.05) | 0.5 (0.4 to 0.6) | +0.5" in page.texts("<script>x")
    assert [tag for tag, _ in page.elements].count("script") == 3  # the answers, uPlot, and the page's own
    assert page.answers["runs"][0]["name"] == "<script>x"
    for tag, attributes in page.elements:
        assert tag not in ("img", "link", "iframe")
        assert not [name for name in attributes if name in ("src", "href") or name.startswith("on")]
    policy = next(str(attributes["content"]) for _, attributes in page.elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; img-src data:; script-src 'sha256-")
    assert "unsafe" not in policy


def test_long_runs_are_thinned_and_long_texts_cut(tmp_path: Path) -> None:
    run = make_run(tmp_path, "demo")
    write_lines(run / "metrics.jsonl", [{"step": step, "update/loss/mean": 1.0 / step} for step in range(1, 5001)])
    tokens = sample_tokens(*"x" * 7000)
    write_samples(samples_path(run, 6), [replace(SESSION, response="x" * 9000, tokens=tokens)])
    answers = Page(rlhf.report(run).html).answers
    data = answers["data"]["demo"]
    assert MOST_POINTS / 2 < len(data["steps"]) <= MOST_POINTS + 1
    assert data["steps"][-1] == 5000
    (whole,) = answers["samples"]["demo 6"]["whole"]
    assert whole["response"] == f"{'x' * MOST_TOKENS} ... (9,000 characters)"
    assert (len(whole["tokens"]["ids"]), whole["cut"]) == (MOST_TOKENS, 3000)


def test_several_runs_stand_in_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make_run(tmp_path, "one"), make_run(tmp_path, "two", lr=1e-3, kl=0.5)
    written = rlhf.report([one, two], out=tmp_path / "both.html")
    assert written.pictures == (tmp_path / "both.png",)
    assert main(["report", str(two), "--out", str(tmp_path / "r.html")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "failure: two, steps 2 to 6: The KL to the reference is 2.5 nats a token.",
        *(f"written: {tmp_path}/r.{kind}" for kind in ("html", "png")),
    ]
    answers = Page(written.html).answers
    assert [run["name"] for run in answers["runs"]] == ["one", "two"]
    assert [answers["summaries"][name]["config"]["train.lr"] for name in ("one", "two")] == ["1e-06", "0.001"]
    (finding,) = answers["summaries"]["two"]["findings"]
    assert finding["what"] == "The KL to the reference is 2.5 nats a token."
    assert (finding["first_step"], finding["last_step"]) == (2, 6)  # the mean of steps 2 to 4 is the first above 1 nat
    assert [[one.kind for one in found] for found in written.findings.values()] == [[], ["kl_blow_up"]]


@pytest.mark.parametrize(
    ("added", "named"),
    [
        ({"teacher": {"model": "t", "dtype": None}}, "taught by t"),
        ({"teacher": {"math": {"model": "t"}, "code": {"model": "u"}}}, "taught by math, code"),
        ({"algorithm": {"name": "opsd", "privileged": {"template": "{prompt}"}}}, "taught by itself"),
        ({"algorithm": {"name": "grpo", "correction": {"preset": "m2po", "mode": "decoupled"}}}, "corrected by m2po"),
        ({"algorithm": {"name": "oapl", "correction": {"preset": None, "mode": "bypass"}}}, "corrected by bypass"),
    ],
)
def test_a_report_names_teachers_and_correction(tmp_path: Path, added: dict[str, Any], named: str) -> None:
    run = make_run(tmp_path, "demo")
    path = run / "config.resolved.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | added, sort_keys=False))
    assert Page(rlhf.report(run).html).answers["summaries"]["demo"]["what"].endswith(f" by correct {named}")


def test_the_stages_of_a_pipeline_are_runs_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    make_run(tmp_path, "pipe/sft")
    make_run(tmp_path, "pipe/early", done=False)
    (tmp_path / "pipe" / "config.resolved.yaml").write_text("stages:\n  sft: {}\n  early: {}\n")
    written = rlhf.report(tmp_path / "pipe")
    assert [path.name for path in written.pictures] == ["report.sft.png", "report.early.png"]
    answers = Page(written.html).answers
    assert [(run["name"], run["state"]) for run in answers["runs"]] == [("sft", "finished"), ("early", "stopped")]
    assert [answers["summaries"][name]["stage"] for name in ("sft", "early")] == ["sft", "early"]


def test_a_running_run_and_a_failed_one(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "young", resume=False) as young:
        young.environment.write_text("{}")
        answers = Page(rlhf.report(young.path).html).answers
        assert (answers["runs"][0]["state"], answers["summaries"]["young"]["progress"]) == ("running", "no step yet")
    assert [run.word() for run in RunPlaces([young.path]).by_name().values()] == ["not started"]
    failed = make_run(tmp_path, "failed", steps=3, done=False)
    append_line(failed / "errors.jsonl", {"step": 4, "stage": "run", "kind": "RunError", "message": "update: <lost>"})
    (failed / "traceback.txt").touch()
    answers = Page(rlhf.report(failed).html).answers
    assert (answers["runs"][0]["state"], answers["summaries"]["failed"]["ended_by"]) == ("failed", "update: <lost>")


def test_training_samples_are_of_prompts_that_came_twice(tmp_path: Path) -> None:
    run = make_run(tmp_path, "demo", steps=3)
    for path in (run / "samples").glob("*"):
        path.unlink()
    for step, rows in {1: (("a", "x", 0.0), ("b", "y", 1.0)), 3: (("a", "z", 1.0), ("c", "w", 1.0))}.items():
        samples = [replace(sample(*row, split="train"), group_id=place) for place, row in enumerate(rows)]
        write_samples(samples_path(run, step), samples)
    listings = Page(rlhf.report(run).html).answers["samples"]
    assert {name: [one["response"] for one in of["whole"]] for name, of in listings.items()} == {
        "demo 1": ["x"],
        "demo 3": ["z"],
    }


def test_the_samples_of_a_run_that_got_better_are_shown_with_some_that_got_worse(tmp_path: Path) -> None:
    run = make_run(tmp_path, "demo")
    for step in (0, 6):
        gains = [*range(1, 13), 0, 0, *range(-6, 0)]
        rows = [sample(f"gain {of}", "x", of / 10 if step else 0.0) for of in gains]
        write_samples(samples_path(run, step), [replace(row, group_id=i) for i, row in enumerate(rows)])
    shown = [one["prompt"] for one in Page(rlhf.report(run).html).answers["samples"]["demo 6"]["whole"]]
    assert sorted(shown) == sorted(f"gain {of}" for of in (12, 11, 10, 9, 8, 0, -6, -5))


@pytest.mark.parametrize("rest", ["", ',\n{"name": "upd', ',\n{"ph": "X", "args": {}'])
def test_the_newest_spans_of_a_cut_timeline(rest: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, "demo")
    path = run / "timeline.json"
    path.write_text(path.read_text().rstrip("]\n") + rest)
    spans = read_spans(run)
    assert [tuple(span.values()) for span in spans[:2]] == [
        ("rollouts", "rollout", "main", 0.0, 3.0),
        ("update", "policy", "main", 3.0, 4.0),
    ]
    assert len(spans) == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "is not a folder"),
        (["empty"], "holds no run"),
        (["damaged"], "metrics.jsonl:2"),
        (["run", "damaged/../run"], "a run is named twice"),
        (["run", "--out", "none/x.html"], "--out"),
    ],
)
def test_what_cannot_be_reported_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, rows in (("empty", None), ("run", '{"step": 1}\n'), ("damaged", '{"step": 1}\nnot json\n')):
        Path(name).mkdir()
        if rows is not None:
            Path(name, "metrics.jsonl").write_text(rows)
    assert main(["report", *arguments]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error


def config_of(folder: Path, **sections: Any) -> Config:
    tree = {
        "run": {"name": "demo"},
        "policy": {"model": "org/base", "revision": "v2"},
        "algorithm": {"name": "dpo"},
        "data": {"train": "org/pairs"},
        "train": {"steps": 3, "lr": 1e-3, "sequences_per_update": 4},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(tree | sections))
    (config,) = load(path).runs.values()
    return config


def front_matter(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def test_the_card_names_base_method_data_settings_and_the_metrics_of_its_step(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "time_s": 1.0, "update/loss/mean": 0.7, "eval/held_out/accuracy": 0.5},
        {"step": 2, "time_s": 2.0, "update/loss/mean": 0.25, "preference/accuracy/mean": None},
        {"step": 3, "time_s": 3.0, "update/loss/mean": 0.125},
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    warm_ups = {"warmup_steps": (3, "3 steps"), "warmup_ratio": (0.1, "0.1 of all steps")}
    for key, (value, shown) in warm_ups.items():
        train = {"steps": 40, "lr": 1e-3, "sequences_per_update": 4, key: value}
        write_model_card(tmp_path, config_of(tmp_path, train=train), run=tmp_path, step=2)
        card = (tmp_path / "README.md").read_text()
        assert front_matter(card) == {
            "library_name": "transformers",
            "base_model": "org/base",
            "pipeline_tag": "text-generation",
            "tags": ["ray-rlhf", "dpo"],
            "datasets": ["org/pairs"],
        }
        expected = {
            **{"base model": "org/base@v2", "method": "dpo", "training data": "org/pairs", "steps": "2"},
            "learning rate": f"0.001 (constant, warm-up: {shown})",
            **{"sequences per update": "4", "eval/held_out/accuracy": "0.5", "update/loss/mean": "0.25"},
        }
        assert {f"| {name} | {text} |" for name, text in expected.items()} <= set(card.splitlines())


def test_paths_of_the_machine_are_not_told(tmp_path: Path) -> None:
    model = {"model": "/home/me/secret/model"}
    card = model_card(config_of(tmp_path, policy=model, data={"train": "/home/me/pairs.jsonl"}), [])
    assert "/home" not in card
    assert "| base model | model |" in card
    assert "| training data | pairs.jsonl |" in card
    assert front_matter(card).keys() == {"library_name", "pipeline_tag", "tags"}


def test_an_adapter_and_a_reward_model_say_so(tmp_path: Path) -> None:
    lora = config_of(tmp_path, policy={"model": "org/base", "lora": {"rank": 8}})
    assert front_matter(model_card(lora, []))["library_name"] == "peft"
    assert "| LoRA | rank 8, alpha 32 |" in model_card(lora, [])
    assert "needs its base model" in model_card(lora, [])
    assert front_matter(model_card(lora, [], merged=True))["library_name"] == "transformers"
    reward = config_of(tmp_path, algorithm={"name": "reward_model"})
    assert front_matter(model_card(reward, []))["pipeline_tag"] == "text-classification"
