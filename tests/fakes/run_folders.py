"""Folders of runs with all files of a run, written without training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rlhf.tracking.run_folder.errors import ErrorRecord
from rlhf.tracking.run_folder.folder import RunFolder, evaluation_path
from rlhf.tracking.run_folder.samples import SampleRecord, SampleSequence, samples_path, write_samples
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.tracking.sinks.tracker import Tracker
from tests.fakes.samples import sample_record, sample_tokens

HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b[31m"


def sample(prompt: str, response: str, score: float, *, split: str = "heldout") -> SampleRecord:
    return sample_record(response, score=score, prompt=prompt, split=split, group_id=0, prompt_id=0)


SESSION = replace(
    sample("Search", "who", 0.5),
    broken=("edited history",),
    columns={"secret": "red <b>", "tests": "x" * 9},
    result={"guess": "blue"},
    shortened={"columns.tests": 5000},
    tokens=sample_tokens(
        *("<tool_call>", '{"name": "find"}', "</tool_call>", "\u202e<img src=x>", "7", "<tool_call>", "8"),
        sampled=(True, True, True, False, True, True, True),
        sequences=(SampleSequence(start=0, own=0, after=None), SampleSequence(start=5, own=6, after=0)),
    ),
)


def make_run(parent: Path, name: str, *, steps: int = 6, lr: float = 1e-6, done: bool = True, kl: float = 0.02) -> Path:
    """Return a run of some steps with all files of a run."""
    with RunFolder.open(parent, name, resume=False) as folder:
        folder.config.write_text(
            f"run: {{name: {name!r}, seed: 0}}\nalgorithm: {{name: grpo}}\npolicy: {{model: some/model}}\n"
            f"data: {{train: prompts.jsonl}}\nrewards: {{correct: {{}}}}\ntrain: {{steps: 6, lr: {lr}}}\n"
        )
        folder.environment.write_text(
            json.dumps({"packages": {"torch": "2.13.0"}, "hardware": {"cores": 2}, "git": {"commit": "abcdef0123456"}})
        )
        tracker, timeline = Tracker(folder.path), Timeline(folder.timeline)
        for step in range(steps + 1):
            row = {
                **{"rewards/score/mean": 0.1 * step, "experience/kl_ref/mean": kl * step},
                **{"time/rollouts_s": 3.0, "time/update_s": 1.0, "time/step_s": 4.0, "time/recovery_s": 0.0},
                **{"recovery/rollout/total": float(step == 2), "memory/policy_rss_gib": 1.0 + 0.01 * step},
            }
            row = row if step else {}
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
        for _ in range(3):
            tracker.log_error(
                ErrorRecord(step=2, stage="rewards", kind="raised", message="no <answer>", source="correct")
            )
        timeline.close()
        if done:
            folder.begin_final()
            folder.commit_final()
    return folder.path
