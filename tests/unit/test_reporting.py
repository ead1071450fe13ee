"""What a report says of run folders that the run's own writers have made, and that nothing in it can act."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import rlhf
from rlhf.cli import main
from rlhf.errors import UserError
from rlhf.reporting.markup import text
from rlhf.reporting.runs import ResponsePair, read_runs, read_spans, shown_pairs
from rlhf.tracking.run_folder.atomic import append_line
from rlhf.tracking.run_folder.errors import ErrorRecord
from rlhf.tracking.run_folder.folder import RunFolder, evaluation_path
from rlhf.tracking.run_folder.samples import (
    SampleRecord,
    SampleSequence,
    SampleTokens,
    samples_path,
    write_samples,
)
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.tracking.sinks.tracker import Tracker

HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b[31m"


def sample(prompt: str, response: str, score: float, *, split: str = "heldout") -> SampleRecord:
    return SampleRecord(
        split=split,
        group_id=0,
        prompt_id=0,
        sample=0,
        prompt=prompt,
        response=response,
        score=score,
        scores={"correct": score},
        advantage=None,
        preferred=None,
        truncated=False,
        response_tokens=3,
        min_version=0,
        max_version=0,
        mean_rollout_logprob=-0.1,
        mean_old_logprob=None,
        mean_ref_logprob=None,
        mean_teacher_logprob=None,
    )


SESSION = replace(
    sample("Search", "who", 0.5),
    broken=("edited history",),
    columns={"secret": "red <b>", "tests": "x" * 9},
    result={"guess": "blue"},
    shortened={"columns.tests": 5000},
    tokens=SampleTokens(
        texts=("<tool_call>", '{"name": "find"}', "</tool_call>", "\u202e<img src=x>", "7", "<tool_call>", "8"),
        ids=(1, 2, 3, 4, 5, 1, 6),
        sampled=(True, True, True, False, True, True, True),
        rollout_logprobs=(-0.1,) * 7,
        old_logprobs=None,
        ref_logprobs=None,
        teacher_logprobs=None,
        advantages=None,
        sequences=(SampleSequence(start=0, own=0, after=None), SampleSequence(start=5, own=6, after=0)),
    ),
)


def make_run(parent: Path, name: str, *, steps: int = 6, lr: float = 1e-6, done: bool = True, kl: float = 0.02) -> Path:
    """A run of some steps with all that a run writes."""
    with RunFolder.open(parent, name, resume=False) as folder:
        folder.write_config(
            f"run:\n  name: {name}\n  seed: 0\nalgorithm:\n  name: grpo\npolicy:\n  model: some/model\n"
            f"data:\n  train: prompts.jsonl\nrewards:\n  correct: {{}}\ntrain:\n  steps: 6\n  lr: {lr}\n"
        )
        folder.environment.write_text(
            json.dumps({"packages": {"torch": "2.13.0"}, "hardware": {"cores": 2}, "git": {"commit": "abcdef0123456"}})
        )
        tracker, timeline = Tracker(folder.path), Timeline(folder.timeline)
        for step in range(steps + 1):
            row: dict[str, float] = (
                {}
                if step == 0
                else {
                    "rewards/score/mean": 0.1 * step,
                    "experience/kl_ref/mean": kl * step,
                    "time/rollouts_s": 3.0,
                    "time/update_s": 1.0,
                    "time/step_s": 4.0,
                    "time/recovery_s": 0.0,
                    "recovery/rollout/total": float(step == 2),
                    "memory/policy_rss_gib": 1.0 + 0.01 * step,
                }
            )
            if step in (0, 6):
                row["eval/heldout/score"] = 0.1 * step
                score = {"value": 0.1 * step, "low": 0.1 * step - 0.05, "high": 0.1 * step + 0.05}
                sets = {"heldout": {"num_rows": 50, "num_failed": 0, "metrics": {"score": score}}}
                evaluation_path(folder.path, step).write_text(json.dumps({"sets": sets}))
                answers = [sample("2+2=", HOSTILE if step else "5", step / 6), sample("1+1=", "2", 1.0), SESSION]
                write_samples(samples_path(folder.path, step), answers)
            timeline.record("rollouts", "rollout", start_s=100.0 + 4 * step, end_s=103.0 + 4 * step)
            timeline.record("update", "policy", start_s=103.0 + 4 * step, end_s=104.0 + 4 * step)
            tracker.log(step, row)
        for prompt in range(3):
            tracker.log_error(
                ErrorRecord(
                    step=2, stage="rewards", kind="raised", message="no <answer>", source="correct", prompt_id=prompt
                )
            )
        timeline.close()
        if done:
            folder.begin_final()
            folder.commit_final()
    return folder.path


class Page(HTMLParser):
    """What a browser would make of it: text, elements, attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source.replace("<wbr>", ""))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.words.append(data)

    def data(self) -> Any:
        return json.loads(re.findall(r'<script id="data"[^>]*>(.*?)</script>', self.source, re.DOTALL)[0])


def test_one_run_is_told_with_its_numbers(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "demo")
    written = rlhf.report(folder)
    assert written.html == folder / "report.html"
    assert [path.name for path in written.pictures] == ["report.png"]
    assert written.pictures[0].read_bytes().startswith(b"\x89PNG")
    page = Page(written.html)
    for told in (
        "demo finished grpo on some/model with prompts.jsonl by correct 6 of 6 in",
        "2 cores, torch 2.13.0, commit abcdef0123",
        "heldout (50) score 0 (-0.05 to 0.05) 0.6 (0.55 to 0.65) +0.6",  # with its intervals
        ", lost workers started again: 1 ",
        "step 0, score 0, 3 tokens 5 step 6, score 1, 3 tokens",
        "rollouts 75.0 % 18 s update 25.0 % 6 s",  # 6 steps of 3 + 1 seconds
        "memory/policy_rss_gib 1.01 1.06 1.06",
        "3 rewards: raised (correct) 2 no <answer>",
        "Nothing in the metrics looks wrong.",
    ):
        assert told in page.text, told
    (group,) = page.data()["groups"]
    curve = next(one for one in group["plots"] if one["key"] == "rewards/score/mean")
    assert curve["x"] == [1, 2, 3, 4, 5, 6]
    assert curve["y"] == [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]


def test_what_a_model_wrote_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    page = Page(rlhf.report(make_run(tmp_path, "demo")).html)
    assert [tag for tag, _ in page.elements].count("script") == 3  # the data, uPlot, the page's own
    assert not [tag for tag, attributes in page.elements if tag == "img" or any(k.startswith("on") for k in attributes)]
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>\\x202e\\x1b[31m" in page.text
    policy = next(attributes for _, attributes in page.elements if "http-equiv" in attributes)
    assert str(policy["content"]).startswith("default-src 'none'")
    assert "'unsafe-inline'" not in str(policy["content"]).split("script-src")[1]


def test_the_evaluations_of_a_received_run_are_shown_and_never_obeyed(tmp_path: Path) -> None:
    """Numbers that are none leave the file out; a number of rows is text to HTML, whatever it is."""
    run = make_run(tmp_path, "demo")
    refresh = '<meta http-equiv="refresh" content="0; url=http://127.0.0.1:1/">'
    good = {"score": {"value": 0.5, "low": 0.4, "high": 0.6}}
    (run / "evals").mkdir(exist_ok=True)
    for step, sets in enumerate(
        (
            {"heldout": {"num_rows": refresh, "metrics": good}},
            {"heldout": {"metrics": {"score": {"value": refresh}}}},
            {"heldout": refresh},
            {"heldout": {"metrics": [refresh]}},
        ),
        start=20,
    ):
        (run / "evals" / f"step_{step:06d}.json").write_text(json.dumps({"sets": sets}))
    (run / "evals" / "step_x.json").write_text("[" * 200_000)
    page = Page(rlhf.report(run).html)
    assert [a.get("http-equiv") for tag, a in page.elements if tag == "meta" and "http-equiv" in a] == [
        "Content-Security-Policy"
    ]
    assert f"heldout ({refresh})" in page.text


def test_a_metric_of_another_version_is_left_out_of_the_picture(tmp_path: Path) -> None:
    run = make_run(tmp_path, "demo")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**row, "eval/a/b/c/score": 1.0}) + "\n" for row in rows))
    assert rlhf.report(run).pictures


def test_half_surrogates_do_not_break_the_file() -> None:
    assert text("a\ud800<b>").encode() == b"a?&lt;b&gt;"


def test_every_mark_of_direction_shows() -> None:
    for code in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)):
        assert text(chr(code)) == f"\\x{code:02x}"


def test_nothing_of_the_page_lies_elsewhere(tmp_path: Path) -> None:
    page = Page(rlhf.report(make_run(tmp_path, "demo")).html)
    assert not [(tag, a) for tag, a in page.elements if "src" in a or "href" in a or tag in ("link", "iframe")]


def test_several_runs_are_overlaid_and_their_differences_told(tmp_path: Path) -> None:
    one, two = make_run(tmp_path, "one"), make_run(tmp_path, "two", lr=1e-3, kl=0.5)
    (two / "environment.json").write_text(json.dumps({"packages": {"torch": "2.14.0"}}))
    written = rlhf.report([one, two], out=tmp_path / "both.html")
    assert written.pictures == (tmp_path / "both.png",)
    page = Page(written.html)
    assert "train.lr 1e-06 0.001" in page.text
    assert "packages.torch 2.13.0 2.14.0" in page.text
    assert "algorithm.name grpo grpo" not in page.text  # equal keys are not told
    assert "run.name" not in page.text.partition("Configuration: what differs")[2].partition("Curves")[0]
    (group,) = page.data()["groups"]
    assert [run["name"] for run in group["runs"]] == ["one", "two"]
    kl = next(one for one in group["plots"] if one["key"] == "experience/kl_ref/mean")
    assert kl["y"][0][-1] == pytest.approx(0.12)
    assert kl["y"][1][-1] == pytest.approx(3.0)
    assert kl["bands"] == [[2, 6, "failure"]]  # the mean of steps 2 to 4 is the first above 1 nat
    assert [[one.kind for one in found] for found in written.findings.values()] == [[], ["kl_blow_up"]]
    assert "The KL to the reference is 2.5 nats a token" in page.text


def test_the_stages_of_a_pipeline_are_told_one_by_one_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    make_run(tmp_path, "pipe/sft")
    make_run(tmp_path, "pipe/early", done=False)
    (tmp_path / "pipe" / "config.resolved.yaml").write_text("stages:\n  sft: {}\n  early: {}\n")
    written = rlhf.report(tmp_path / "pipe")
    assert [path.name for path in written.pictures] == ["report.sft.png", "report.early.png"]
    page = Page(written.html)
    assert page.text.index("pipe/sft finished") < page.text.index("pipe/early stopped")
    assert len(page.data()["groups"]) == 2


def test_a_run_without_rows_one_that_goes_on_and_one_that_failed(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "young", resume=False) as young:
        young.write_environment(seed=0)
        page = Page(rlhf.report(young.path).html)
        assert "young running" in page.text
        assert "No step is written yet." in page.text
    assert read_runs([young.path])[0].state == "not started"
    failed = make_run(tmp_path, "failed", steps=3, done=False)
    append_line(failed / "errors.jsonl", {"step": 4, "stage": "run", "kind": "RunError", "message": "update: <lost>"})
    page = Page(rlhf.report(failed).html)
    assert "failed failed grpo" in page.text
    assert "failed: update: <lost>" in page.text
    assert "3 of 6 in" in page.text


def test_training_samples_of_prompts_that_came_twice(tmp_path: Path) -> None:
    run = make_run(tmp_path, "demo", steps=3)  # evaluated once, so there is no before and after of it
    for path in (run / "samples").glob("*"):
        path.unlink()
    write_samples(samples_path(run, 1), [sample("a", "x", 0.0, split="train"), sample("b", "y", 1.0, split="train")])
    write_samples(samples_path(run, 3), [sample("a", "z", 1.0, split="train"), sample("c", "w", 1.0, split="train")])
    page = Page(rlhf.report(run).html)
    assert "train a step 1, score 0, 3 tokens x step 3, score 1, 3 tokens z" in page.text
    assert "train c" not in page.text


def test_pairs_are_told_from_both_ends() -> None:
    def pair(name: str, gain: float) -> ResponsePair:
        return ResponsePair(
            split="s", prompt=name, first={"score": 0.5}, last={"score": 0.5 + gain}, first_step=0, last_step=1
        )

    pairs = [
        *(pair(f"up{i}", 0.1 * i) for i in range(1, 9)),
        *(pair(f"down{i}", -0.1 * i) for i in range(1, 5)),
        pair("=", 0),
    ]
    assert [one.prompt for one in shown_pairs(pairs, 6)] == ["up8", "up7", "up6", "down4", "down3", "="]
    assert len(shown_pairs(pairs[:3], 6)) == 3


def test_the_newest_spans_of_a_cut_timeline(tmp_path: Path) -> None:
    run = make_run(tmp_path, "demo")
    path = run / "timeline.json"
    path.write_text(path.read_text().rstrip("]\n") + ',\n{"name": "upd')
    spans = read_spans(run)
    assert [(one.name, one.role, one.start_s, one.end_s) for one in spans[:2]] == [
        ("rollouts", "rollout", 0.0, 3.0),
        ("update", "policy", 3.0, 4.0),
    ]
    assert len(spans) == 14


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.mkdir(), "holds no run"),
        (
            lambda path: (path.mkdir(), (path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n')),
            "metrics.jsonl:2",
        ),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, message: str) -> None:
    make(tmp_path / "x")
    assert main(["report", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_place_that_cannot_be_written_and_a_run_named_twice(tmp_path: Path) -> None:
    run = make_run(tmp_path, "demo")
    with pytest.raises(UserError, match="--out"):
        rlhf.report(run, out=tmp_path / "none" / "x.html")
    with pytest.raises(UserError, match="named twice"):
        rlhf.report([run, run])


def test_the_command_tells_the_findings_and_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "demo", kl=0.5)
    assert main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "failure: demo, steps 2 to 6: The KL to the reference is 2.5 nats a token.",
        f"written: {tmp_path / 'r.html'}",
        f"written: {tmp_path / 'r.png'}",
    ]


BROWSER = "chromium-headless-shell"


def test_a_browser_draws_the_plots_within_a_phones_width(tmp_path: Path) -> None:
    if shutil.which(BROWSER) is None:
        pytest.skip(f"NOT TESTED: no {BROWSER}; apt-get install chromium-headless-shell")
    html = rlhf.report(make_run(tmp_path, "demo")).html
    done = subprocess.run(
        [
            *(BROWSER, "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"),
            *("--window-size=380,900", "--virtual-time-budget=3000", "--dump-dom", f"file://{html}"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert 'data-drawn="3"' in done.stdout  # eval, reward, KL; the others wait until they are opened
    assert done.stdout.count("<canvas") == 3
    widths = [int(found) for found in re.findall(r"<canvas[^>]* width=\"(\d+)\"", done.stdout)]
    assert all(200 <= found <= 380 for found in widths)
    (tmp_path / "drawn.html").write_text(done.stdout, encoding="utf-8")
    drawn = Page(tmp_path / "drawn.html")
    assert "alert(1)" in drawn.text
    assert "img" not in [tag for tag, _ in drawn.elements]
    session = 'first sequence tool call: find <tool_call>{"name": "find"}</tool_call> environment (not trained) '
    session += "\\x202e<img src=x> policy 7 branch after place 0 policy 8"
    assert session in drawn.text
    assert "broken: edited history" in drawn.text
    assert "secret red <b> tests (the first 9 of 5000 characters) xxxxxxxxx" in " ".join(drawn.text.split())
    assert 'result {"guess": "blue"}' in drawn.text
    assert {"class": "sequence", "style": "margin-left: 1rem;"} in [attributes for _, attributes in drawn.elements]
