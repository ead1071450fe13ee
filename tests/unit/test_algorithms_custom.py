"""A user's algorithm has typed keys and loads in every process. A wrong class is refused."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.algorithms import algorithm_of
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.config.files.base_file import read_tree
from rlhf.config.files.dump import dump_yaml
from rlhf.config.files.load import from_mapping, load
from rlhf.config.files.sweep import load_sweep
from rlhf.config.schema.root import Config
from rlhf.errors import RunError, UserError
from rlhf.extensions import import_file
from rlhf.preflight import models
from rlhf.preflight.models import refuse_other_model
from tests.packages import install

CODE = """\
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.online_config import ClippedConfig
from pydantic import Field


class MineConfig(ClippedConfig):
    \"\"\"Keys of mine.\"\"\"

    sharpness: float = Field(default=1.0, gt=0.0)
    \"\"\"A key.\"\"\"
    modes: tuple[str, ...] = ()
    \"\"\"Another.\"\"\"


class Mine(OnlineAlgorithm):
    config: MineConfig
"""
RUN = """\
run: {name: demo, dir: DIR}
policy: {model: "tiny:llama"}
algorithm: {name: "mine.py:Mine", sharpness: 2.0, modes: [a]}
data: {train: prompts.jsonl, max_prompt_tokens: 8}
rollouts: {prompts_per_step: 8, samples_per_prompt: 4, max_new_tokens: 8}
rewards: {correct: {function: math_answer}}
train: {steps: 2, lr: 1.0e-3, sequences_per_update: 16, max_tokens_per_microbatch: 256}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    path = tmp_path / "run.yaml"
    path.write_text(RUN.replace("DIR", str(tmp_path)))
    return path


def config_of(file: Path, *overrides: str) -> Config:
    (config,) = load(file, overrides).runs.values()
    return config


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(file, overrides)
    return str(error.value)


def test_its_keys_are_typed(file: Path) -> None:
    algorithm: Any = config_of(file).algorithm
    assert (algorithm.name, algorithm.short_name) == (f"{file.parent / 'mine.py'}:Mine", "mine.py:Mine")
    assert (algorithm.sharpness, algorithm.modes, algorithm.clip_low) == (2.0, ("a",), 0.2)
    assert type(algorithm_of(algorithm, OnlineAlgorithm)).__name__ == "Mine"
    assert config_of(file, "algorithm={name: grpo}").algorithm.code_digest == ""


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("algorithm.sharpnes=1", "algorithm.sharpnes: unknown key; did you mean algorithm.sharpness?"),
        ("algorithm.sharpness=0", "algorithm.sharpness: got 0, expected a number > 0"),
        ("algorithm.modes=b", "algorithm.modes: got 'b', expected a list of strings"),
        ("algorithm.gamma=0.9", "algorithm.gamma: unknown key; "),
        ("algorithm.name=absent.py:Mine", "algorithm.name: the file `absent.py` of the algorithm does not exist"),
        ("algorithm.name=mine.py", "algorithm.name: `mine.py` names a file, but no algorithm in it. Write `m"),
        ("algorithm.name=mine.py:Min", "mine.py defines no `Min`; it defines: MineConfig, Mine"),
        ("algorithm.name=none", "algorithm.name: got 'none', expected `ppo`, "),
        ("algorithm.name=none", ", or your own as `path/file.py:CLASS`"),
        ("train.sequences_per_update=32", "algorithm.clip_low: "),  # every ratio is 1
    ],
)
def test_mistakes_are_those_of_a_built_in(file: Path, override: str, expected: str) -> None:
    extra = ["algorithm.clip_low=0.1"] if override.startswith("train") else []
    assert expected in refusal(file, override, *extra)


def test_a_mistake_names_file_and_line(file: Path) -> None:
    file.write_text(file.read_text().replace("sharpness", "sharpnes"))
    assert refusal(file).startswith(f"{file}:3: algorithm.sharpnes: unknown key")
    file.write_text(file.read_text().replace("mine.py", "absent.py"))
    assert refusal(file).startswith(f"{file}:3: algorithm.name: the file `absent.py` of the algorithm does not exist")


def test_a_file_that_fails_names_its_line(file: Path) -> None:
    (file.parent / "mine.py").write_text("import sys\nsys.exit(3)\n")
    message = f"{file}:3: algorithm.name: importing {file.parent / 'mine.py'} raised SystemExit: 3, at "
    assert refusal(file).startswith(f"{message}{file.parent / 'mine.py'}:2 in <module>")


def test_the_resolved_configuration_is_the_same_elsewhere(file: Path, tmp_path: Path) -> None:
    config = config_of(file)
    other = tmp_path / "elsewhere" / "resolved.yaml"
    other.parent.mkdir()
    other.write_text(dump_yaml(config))
    assert config_of(other) == config


def test_a_stage_of_a_pipeline(file: Path) -> None:
    text = file.read_text().replace("algorithm:", "stages:\n  only:\n    algorithm:")
    file.write_text(text.replace("\ndata:", "\n    data:").replace("\nrollouts", "\n    rollouts"))
    (config,) = load(file).runs.values()
    assert config.algorithm.short_name == "mine.py:Mine"
    assert "stages.only.algorithm.sharpnes: unknown key" in refusal(file, "stages.only.algorithm.sharpnes=1")
    file.write_text(file.read_text().replace("mine.py", "absent.py"))
    assert refusal(file).startswith(f"{file}:5: stages.only.algorithm.name: the file `absent.py`")


def test_a_sweep_over_its_keys(file: Path) -> None:
    text = "sweep: {name: s, config: run.yaml, method: {name: grid}, metric: rewards/score/mean, parameters: P}\n"
    path = file.parent / "sweep.yaml"
    path.write_text(text.replace(" P}", " {algorithm.sharpness: {values: [1.0, 3.0]}}}"))
    sweep = load_sweep(path)
    (trial,) = sweep.trial({"algorithm.sharpness": 3.0}, "t").runs.values()
    assert trial.algorithm.sharpness == 3.0  # type: ignore[attr-defined]
    path.write_text(text.replace(" P}", " {algorithm.sharpness: {values: [0.0]}}}"))
    with pytest.raises(UserError, match=r"algorithm\.sharpness: got 0\.0, expected a number > 0"):
        load_sweep(path)


def test_python_gives_the_class_itself(file: Path) -> None:
    values = read_tree(file).values
    mine = vars(import_file(str(file.parent / "mine.py")))["Mine"]
    loaded = from_mapping({**values, "algorithm": {"name": mine, "sharpness": 4.0}})
    assert loaded.runs["demo"].algorithm.name == f"{file.parent / 'mine.py'}:Mine"


def test_another_process_loads_the_file(file: Path) -> None:
    config = config_of(file)
    pickled = pickle.dumps(config)
    assert pickle.loads(pickled) == config
    code = (
        "import pickle, sys\nfrom rlhf.algorithms import algorithm_of\n"
        "from rlhf.algorithms.online import OnlineAlgorithm\n"
        "config = pickle.load(sys.stdin.buffer)\n"
        "print(type(algorithm_of(config.algorithm, OnlineAlgorithm)).__name__, config.algorithm.sharpness)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=pickled, capture_output=True, cwd="/", env={"PYTHONPATH": ":".join(sys.path)})
    assert done.stdout.decode() == "Mine 2.0\n", done.stderr.decode()


def test_a_process_refuses_another_text_of_the_file(file: Path) -> None:
    pickled = pickle.dumps(config_of(file))
    (file.parent / "mine.py").write_text(CODE + "\n")
    with pytest.raises(RunError, match=r"algorithm /.*mine\.py:Mine on .* differs from the one that the driver loaded"):
        pickle.loads(pickled)
    pickle.loads(pickle.dumps(config_of(file)))


def test_a_checkpoint_knows_its_code(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(models, "load_model_config", lambda *args, **options: None)
    monkeypatch.setattr(models, "architecture_fingerprint", lambda config: "p")
    monkeypatch.setattr(models, "trained_models", lambda config: {})
    config = config_of(file)
    state = {"policy": "p", "algorithm": "mine.py:Mine", "algorithm_code": config.algorithm.code_digest, "trained": {}}
    with caplog.at_level(logging.WARNING):
        refuse_other_model(config, state, checkpoint=file.parent)
        assert not caplog.records
        (file.parent / "mine.py").write_text(CODE + "\n")
        refuse_other_model(config_of(file), state, checkpoint=file.parent)
    assert "the code of algorithm mine.py:Mine has changed since" in caplog.text
    with pytest.raises(UserError, match=r"is a checkpoint of algorithm mine\.py:Mine, not of grpo"):
        refuse_other_model(config_of(file, "algorithm={name: grpo}"), state, checkpoint=file.parent)


def test_a_package_offers_an_algorithm(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(file.parent, monkeypatch, "shop", algorithms={"mine": "shop_code:Mine"}, code=CODE)
    config = config_of(file, "algorithm.name=mine")
    assert (config.algorithm.name, config.algorithm.short_name) == ("mine", "mine")
    assert pickle.loads(pickle.dumps(config)) == config
    assert "did you mean algorithm.sharpness?" in refusal(file, "algorithm.name=mine", "algorithm.sharpnes=1")


@pytest.mark.parametrize(
    ("packages", "name", "code", "expected"),
    [
        (["shop"], "grpo", "", "the package shop 1.0 offers the algorithm `grpo`, which is a built-in algorithm"),
        (["shop", "market"], "mine", "", "the packages market 1.0 and shop 1.0 all offer the algorithm `mine`"),
        (["shop"], "mine", "import nowhere\n", "the package shop 1.0 offers `mine` as shop_code:Mine, but importing "),
    ],
)
def test_packages_that_cannot_be_used(
    file: Path, monkeypatch: pytest.MonkeyPatch, packages: list[str], name: str, code: str, expected: str
) -> None:
    for package in packages:
        install(file.parent, monkeypatch, package, algorithms={name: f"{package}_code:Mine"}, code=code)
    assert f"algorithm.name: {expected}" in refusal(file, f"algorithm={{name: {name}}}")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def Mine(config): ...", "is not a subclass of an algorithm's base class: OnlineAlgorithm, PairAlgorithm, "),
        ("class Mine: ...", "is not a subclass of an algorithm's base class"),
        ("from rlhf.algorithms.algorithm import Algorithm\nclass Mine(Algorithm): ...", "class `Mine` needs an"),
        (
            "from rlhf.algorithms.pairs import PairAlgorithm\nclass Mine(PairAlgorithm):\n    config: 'Absent'",
            "the annotation `config` of class `Mine` cannot be read: NameError: name 'Absent' is not defined",
        ),
        (
            "from rlhf.algorithms.pairs import PairAlgorithm\nfrom rlhf.algorithms.online_config import OnlineConfig\n"
            "class Mine(PairAlgorithm):\n    config: OnlineConfig",
            "class `Mine` must be a subclass of OnlineAlgorithm, as its config is OnlineConfig",
        ),
        (
            "from rlhf.algorithms.kto import KTO\nfrom rlhf.algorithms.algorithm import AlgorithmConfig\n"
            "class C(AlgorithmConfig):\n    kind = 'unpaired'\nclass Mine(KTO):\n    config: C",
            "the config of class `Mine` is C, which is not a subclass of KTOConfig",
        ),
    ],
)
def test_classes_that_are_no_algorithm(file: Path, code: str, expected: str) -> None:
    (file.parent / "mine.py").write_text(code + "\n")
    assert expected in refusal(file, "algorithm={name: 'mine.py:Mine'}")
