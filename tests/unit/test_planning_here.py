"""`rlhf plan` names the inputs that this machine lacks, and refuses the inputs that `rlhf train` refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.config.files.load import load
from rlhf.errors import UserError
from rlhf.planning.here import missing_here, num_gpus

RUN = """\
run: {name: demo, dir: runs}
policy: {model: "tiny:llama", dtype: float32}
algorithm: {name: grpo}
data: {train: prompts.jsonl, max_prompt_tokens: 32}
rollouts: {prompts_per_step: 2, samples_per_prompt: 2, max_new_tokens: 8}
rewards: {mine: {function: "rewards.py:right"}}
train: {steps: 1, lr: 1e-3, sequences_per_update: 4, max_tokens_per_microbatch: 64}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "rewards.py").write_text("def right(prompt, response, answer):\n    return float(response == answer)\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n")
    return tmp_path


def missing(*overrides: str) -> list[str]:
    return [need.sentence for need in missing_here(load("run.yaml", overrides))]


def test_nothing_is_missing(folder: Path) -> None:
    assert missing() == []
    for name in ("models--some--model", "datasets--some--data"):
        (folder / "hub" / "hub" / name).mkdir(parents=True)
    assert missing("policy.model=some/model", "data.train='some/data:test'") == []


def test_what_is_missing_has_a_sentence_each(folder: Path) -> None:
    lacks = "and the cache of the model hub does not hold it"
    assert missing(
        "policy.model=models/none",
        "data.train={a: {source: none.jsonl}, b: {source: 'some/data:test'}}",
        "data.eval={held: ./none}",
        "rewards.mine.function='none.py:right'",
        "rollouts.environment={name: 'game.py:Game', max_tokens: 64}",
    ) == [
        f"policy.model: there is no folder models/none, {lacks}",
        "data.train.a.source: there is no file none.jsonl",
        f"data.train.b.source: there is no folder some/data, {lacks}",
        f"data.eval.held: there is no folder ./none, {lacks}",
        "rewards.mine.function: there is no file none.py",
        "rollouts.environment.name: there is no file game.py",
    ]
    long = "a" * 5000  # no path can have these names
    names = [f"policy.model={long}", f"data.train={long}.jsonl", "rewards.mine.function='~nobody/x.py:f'"]
    assert [sentence.partition(":")[0] for sentence in missing(*names)] == [name.partition("=")[0] for name in names]
    with pytest.raises(UserError, match=r"rewards\.mine\.function: there is no reward `contain`; did you mean"):
        missing("rewards.mine.function=contain")


def test_a_machine_that_is_too_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.planning.here.num_cpus", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (sentence,) = missing("cluster.device=cuda")
    assert sentence.endswith("GPUs (cluster.device is cuda), and this machine has 3 CPUs and 0 GPUs")
    (sentence,) = missing("cluster.roles.policy.cpus=5000")
    assert sentence == "cluster: wants 5001 CPUs and 0 GPUs, and this machine has 3 CPUs and 0 GPUs"
    assert missing("cluster.roles.policy.cpus=5000", "cluster.address='10.0.0.1:6379'") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter([Path("/dev/nvidia0"), Path("/dev/nvidia1")] * 4))
    assert num_gpus() == 2


def test_the_result_of_an_earlier_stage_is_not_missing(folder: Path) -> None:
    (folder / "pipeline.yaml").write_text(
        "run: {name: p, dir: runs}\n"
        "stages:\n"
        "  sft:\n"
        "    policy: {model: 'tiny:llama'}\n"
        "    algorithm: {name: sft}\n"
        "    data: {train: none.jsonl}\n"
        "    train: {steps: 1, lr: 1e-3, sequences_per_update: 4}\n"
        "  look:\n"
        "    evaluate: {model: 'stage:sft', data: none.csv, rewards: {r: {function: 'none.py:r'}}}\n"
    )
    assert [need.sentence for need in missing_here(load("pipeline.yaml"))] == [
        "stages.sft.data.train: there is no file none.jsonl",
        "stages.look.evaluate.data: there is no file none.csv",
        "stages.look.evaluate.rewards.r.function: there is no file none.py",
    ]


def test_plan_checks_the_inputs_writes_nothing_and_refuses_what_train_would(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "run.yaml"]) == 0
    assert capsys.readouterr().out.endswith("environments, agents\n  checked: `rlhf train` accepts them\n")
    assert not (folder / "runs").exists()
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "a", "reply": "b"}) + "\n")
    assert main(["plan", "run.yaml"]) == 2
    out, error = capsys.readouterr()
    assert "1 step" in out
    assert error.startswith("rlhf: error: run.yaml:6: rewards.mine.function: ")
    assert "rewards.py:right` needs the column `answer`, and data.train has reply." in error


def test_plan_checks_the_rest_if_the_hub_has_a_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "run.yaml", "policy.model=some/model"]
    monkeypatch.setattr("rlhf.models.files.hub.why_silent", lambda: "")
    assert main(command) == 0
    assert capsys.readouterr().out.endswith(
        "  checked: data files and rewards of training stages\n"
        "  not checked: some/model is not downloaded yet, and `rlhf train` downloads it if the hub has it\n"
    )
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "a", "reply": "b"}) + "\n")
    assert main(command) == 2
    assert "rewards.py:right` needs the column `answer`, and data.train has reply." in capsys.readouterr().err
    monkeypatch.setattr("rlhf.models.files.hub.why_silent", lambda: "no route")
    assert main(command) == 0
    assert "does not start on this machine:\n  policy.model: there is no folder some/model" in capsys.readouterr().out


def test_plan_says_why_inputs_are_not_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "prompts.jsonl").unlink()
    assert main(["plan", "run.yaml"]) == 0
    assert capsys.readouterr().out.endswith(
        "  not checked, since `rlhf train` does not start on this machine:\n"
        "  data.train: there is no file prompts.jsonl\n"
    )
    assert main(["plan", "run.yaml", "--cluster", "cpu=8"]) == 0
    assert "not checked, since --cluster describes other machines" in capsys.readouterr().out
