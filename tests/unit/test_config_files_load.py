"""Broken YAML, unknown keys and wrong types are refused with their place. Arguments override the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.algorithms import ALGORITHMS
from rlhf.config.files.load import LoadedConfig, checked, load, run_folder
from rlhf.config.schema.root import Config
from rlhf.config.schema.run import RunConfig
from rlhf.config.yaml_tree import from_yaml
from rlhf.errors import UserError
from tests.fixtures.configs import file_error

BASE = """\
run: {name: demo, dir: out}
policy:
  model: some/model
algorithm: {name: ppo}
data: {train: prompts.jsonl}
rollouts: {max_new_tokens: 50}
rewards: {correct: {function: math_answer}}
train: {steps: 10, lr: 1e-6, sequences_per_update: 128}
"""
*_FIRST, _LAST = (f"`{name}`" for name in ALGORITHMS)
NAMES = f"{', '.join(_FIRST)} or {_LAST}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def config(path: Path, *overrides: str) -> Config:
    (loaded,) = load(path, overrides).stages.values()
    return loaded


BOMB = "a0: &a0 [x, x, x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}, *a{i}]\n" for i in range(40))


def test_a_run_and_its_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(file)
    assert (loaded.name, loaded.is_pipeline, loaded.folder) == ("demo", False, Path("out/demo"))
    assert list(loaded.stages) == ["demo"]
    assert run_folder(loaded.stages["demo"]) == Path("out/demo")
    monkeypatch.setenv("HOME", "/home/me")
    assert config(file, "run.dir=~/runs").run.dir == Path("/home/me/runs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("- a\n", "must hold a mapping of sections, not ['a']"),
        (BASE + "run: {name: other}\n", ":9: run is given twice"),
        (BASE.replace("{name: ppo}", "{name: ppo, name: grpo}"), ":4: algorithm.name is given twice"),
        ("run: {name: demo\npolicy: {}\n", ":2: not valid YAML: the `{` of line 1 is not closed"),
        ("run:\n\tname: demo\n", ":2: not valid YAML: the line is indented with a tab. Indent with spaces."),
        ("run:\n  name: x\n dir: y\n", ":3: not valid YAML: the line is indented unlike its section of line 1."),
        ("run:\n  name: x\n   dir: y\n", ":3: not valid YAML: a key cannot stand here."),
        ("run: name: x\n", ":1: not valid YAML: there are two `: ` on the line."),
        ("run: {}\nx: 'a\ny: 1\n", ":2: not valid YAML: the quote that opens here is never closed."),
        ("x: ***\n", ":1: not valid YAML: `*` starts a reference to an anchor"),
        ("x: @a\n", ":1: not valid YAML: a value cannot start with '@'. Put the value in quotes."),
        ("run: {}\nx\ny: 1\n", ":2: not valid YAML: the key has no `: ` behind it."),
        ("x: 'it's'\n", ":1: not valid YAML: there is text after the end of the value."),
        ("x: 1\n---\ny: 2\n", ":2: not valid YAML: the file holds a second document."),
        ("x: - a\n", ":1: not valid YAML: a list starts on the next line"),
        ('x: "\\q"\n', ":1: not valid YAML: a backslash in double quotes starts an escape"),
        ("x: [1]]\n", ":1: not valid YAML: the `]` closes a bracket that was never opened."),
        ("run: {}\n<<: {b: 2}\n", ":2: <<: merge keys (`<<`) are not supported; write the keys out"),
        ("x: &a 1\ny: &a 1\n", ":2: not valid YAML: the anchor exists already."),
        (BOMB, "the text stands for more than 100,000 values"),
        ("x: " + "[" * 101 + "]" * 101 + "\n", ":1: sections within sections go too deep, beyond 100"),
        ('x: "\\ud800"\n', "holds half of a character"),
        ("#" * (2**20 + 1), "is larger than 1 MiB, the limit of a configuration"),
        ("1: 2\n", ":1: the key 1 is not a string"),
        ("run: !!python/name:os.system\n", ":1: not valid YAML: "),
        ("run: &x {name: *x}\n", "the alias contains itself"),
        ("run: {name: a\0b}\n", "holds the control character '\\x00', which is not YAML"),
        ("{a: " * 3000 + "1" + "}" * 3000, "sections within sections go too deep"),
        ("run: !!int abc\n", ":1: 'abc' is not a value of a config"),
        ("run: !!timestamp 2020-01-01\n", ":1: '2020-01-01' as tag:yaml.org,2002:timestamp is not a value"),
    ],
)
def test_broken_files_name_their_line(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    assert message in file_error(file)
    assert file_error(file).startswith(str(file))


def test_the_configuration_of_a_received_run_is_bounded_too() -> None:
    """`rlhf report` reads config.resolved.yaml of any folder by from_yaml."""
    with pytest.raises(UserError, match="the text stands for more than 100,000 values"):
        from_yaml(BOMB)


def test_a_file_that_cannot_be_read(file: Path, tmp_path: Path) -> None:
    assert file_error(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such config file"
    file.write_bytes(b"run: {name: caf\xe9}\n")
    assert file_error(file) == f"{file}: is not UTF-8 text: invalid continuation byte at byte 15"
    assert file_error(file.parent) == f"{file.parent}: cannot be read: Is a directory"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.stepz", "train.steps"),
        ("algorithm.clip_lo", "algorithm.clip_low"),
        ("trian.steps", "train"),
        ("prompts_per_step", "rollouts.prompts_per_step"),  # right word, wrong place
        ("train.temperature", "rollouts.temperature"),
        ("cluster.roles.rollouts.engines", "cluster.roles.rollout"),
    ],
)
def test_an_unknown_key_names_its_nearest_relative(file: Path, key: str, meant: str) -> None:
    parent = key if key.count(".") == 0 else key.removesuffix(".steps").removesuffix(".engines")
    assert file_error(file, f"{key}=1") == f"argument '{key}=1': {parent}: unknown key; did you mean {meant}?"


def test_a_key_unlike_any_other_lists_the_keys(file: Path) -> None:
    keys = ", ".join(sorted(RunConfig.model_fields))
    assert file_error(file, "run.zzz=1") == f"argument 'run.zzz=1': run.zzz: unknown key; run has {keys}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=abc", "train.lr: got 'abc', expected a number > 0"),
        ("train.lr=-1", "train.lr: got -1, expected a number > 0"),
        ("train.steps=true", "train.steps: got true, expected an integer >= 1"),
        ('train.steps="3"', "train.steps: got '3', expected an integer >= 1"),
        ("train.steps=3.5", "train.steps: got 3.5, expected an integer >= 1"),
        ("train.lr=.inf", "train.lr: got '.inf', expected a number > 0"),
        ("train.betas=[0.9]", "train.betas: got too few values, expected a list of 2 numbers >= 0 and < 1"),
        ("train.lr_schedule=step", "train.lr_schedule: got 'step', expected `constant`, `linear`, `cosine`"),
        ("policy.model=3", "policy.model: got 3, expected a string"),
        ("policy=3", "policy: got 3, expected a mapping"),
        ("policy.trust_remote_code=yes", "policy.trust_remote_code: got 'yes', expected true or false"),
        ("algorithm.name=pp", f"algorithm.name: got 'pp'; did you mean `ppo`? Expected {NAMES}"),
        ("algorithm={}", f"algorithm.name: is missing: expected {NAMES}"),
        ("cluster.roles.policy.threads=0", "cluster.roles.policy.threads: got 0, expected an integer >= 1 and <= 1024"),
        ("data.train={task: t}", "data.train.size: is missing: expected an integer >= 1"),
        ("data.train={a: {source: x, weight: 0}}", "data.train.a.weight: got 0, expected a number > 0"),
        ("data.train={a: x.jsonl}", "data.train.a: got 'x.jsonl', expected a mapping"),
        ("data.train={a: {weight: 2}}", "data.train.a.source: is missing: expected a string or a mapping"),
        ("data.train={a: {source: x, wieght: 2}}", "data.train.a.wieght: unknown key; did you mean"),
        ("data.too_long=drop", "data.too_long: got 'drop', expected `error`, `skip` or `cut`"),
        ("data.max_unusable_fraction=1", "data.max_unusable_fraction: got 1, expected a number >= 0 and < 1"),
        ("data.eval={a: {task: t, size: 0}}", "data.eval.a.size: got 0, expected an integer >= 1"),
        ("policy.lora={target_modules: []}", "policy.lora.target_modules: got [], expected `all-linear` or a list of"),
        ("policy.lora={target_modules: [3]}", "policy.lora.target_modules"),
        ("data.eval={task: t, size: 3, wat: 1}", "data.eval.wat: unknown key"),
        ("data.eval={dict: {task: t, size: 0}}", "data.eval.dict.size: got 0, expected an integer >= 1"),
        ("data.eval={a: 3}", "data.eval.a: got 3, expected a string or a mapping"),
        ("data.eval={a b: x}", "data.eval.a b: got 'a b', expected letters, digits"),
        ("run.name=../up", "run.name: got '../up', expected letters, digits"),
        ("run.seed=4294967296", "run.seed: got 4294967296, expected an integer >= 0 and <= 4294967295"),
        ("rollouts.prompts_per_step=1000001", "rollouts.prompts_per_step: got 1000001, expected an integer >= 1 and"),
        ("rollouts.temperature=0.001", "rollouts.temperature: got 0.001, expected a number >= 0.01 and <= 2"),
        ("rollouts.temperature=3", "rollouts.temperature: got 3, expected a number >= 0.01 and <= 2"),
        ("eval.temperature=0.001", "eval.temperature: got 0.001, expected 0 (greedy) or a number from 0.01 to 2"),
        ("eval.temperature=2.5", "eval.temperature: got 2.5, expected a number >= 0 and <= 2"),
        ("rollouts.stop=['']", "rollouts.stop: got '', expected a string that is not empty"),
        ("reward_policy.timeout_s=1e300", "reward_policy.timeout_s: got 1e+300, expected a number > 0 and <= 1000000"),
        ("cluster.roles.policy.workers=65537", "cluster.roles.policy.workers: got 65537, expected an integer >= 1 and"),
    ],
)
def test_a_wrong_value_says_what_is_expected(file: Path, override: str, message: str) -> None:
    assert file_error(file, override).startswith(f"argument {override!r}: {message}")


def test_every_mistake_has_a_short_line_with_its_place(file: Path) -> None:
    assert len(file_error(file, "a" * 1_000_000 + "=1")) < 1000
    assert len(file_error(file, "train.lr=" + "a" * 1_000_000)) < 1000
    assert len(file_error(file, *(f"x{i}=1" for i in range(300))).splitlines()) == 100
    assert len(file_error(file, "train.lr=x", "train.step=2", "policy.dtype=int8").splitlines()) == 3
    message = "rewards.correct: give exactly one of `function`, `role`, `url` and `environment: true`"
    assert file_error(file, "rewards.correct.role=reward") == f"{file}:7: {message}"
    file.write_text(BASE.replace("  model:", "  modle: x\n  model:").replace("data: {train: prompts.jsonl}\n", ""))
    assert file_error(file).splitlines() == [
        f"{file}: data: is missing: expected a mapping",
        f"{file}:3: policy.modle: unknown key; did you mean policy.model?",
    ]


def test_overrides_are_yaml_values(file: Path) -> None:
    more = ["tracking.wandb=off", "data.eval={a: x.jsonl}", "policy.lora.rank=8"]
    changed = config(file, "train.lr=3e-6", "rollouts.stop=['a', \"\\n\"]", *more)
    assert (changed.train.lr, changed.rollouts.stop, changed.tracking.wandb) == (3e-6, ("a", "\n"), "off")
    assert (changed.data.eval, changed.policy.lora.rank) == ({"a": "x.jsonl"}, 8)
    assert file_error(file, "policy={dtype: float32}").endswith("policy.model: is missing: expected a string")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lr"], "argument 'train.lr': expected section.key=value"),
        (["=3"], "argument '=3': expected section.key=value"),
        (["train..lr=3"], "argument 'train..lr=3': expected section.key=value"),
        (["train.lr=1", "train.lr=2"], "argument 'train.lr=2': train.lr is given twice"),
        ([r'run.name="\ud83d"'], "holds half of a character (a lone surrogate)"),
        (["train.lr=1", "train={lr: 2}"], "argument 'train={lr: 2}': would remove train.lr, which is given before it"),
        (["train.lr.x=1"], "argument 'train.lr.x=1': train.lr is 1e-06, not a section with keys"),
        (["train.lr=[1"], "argument 'train.lr=[1': not valid YAML: "),
        (["train.lr=1e400"], "argument 'train.lr=1e400': '1e400' is not a finite number"),
        (["train.steps=" + "9" * 5000], "is not a value of a config: Exceeds the limit"),
        ([".".join("a" * 200) + "=1"], "sections within sections go too deep, beyond 100"),
        (["run.dir=~nosuchuser/x"], "run.dir: got '~nosuchuser/x', and there is no such home folder"),
        (["run.dir=" + "a/" * 2000], "run.dir: has 3999 bytes; a path may have 3000, and the name of a folder 255"),
        (["run.dir=" + "b" * 256], "run.dir: has 256 bytes; a path may have 3000, and the name of a folder 255"),
        (['run.dir="\\0"'], "run.dir: holds a null character, which no path may"),
        (["run.name=a\x00"], "holds the control character '\\x00', which is not YAML"),
        (["stages.a.train.lr=1"], "has no stage 'a'; its stages: none, it is a single run"),
    ],
)
def test_overrides_that_cannot_be(file: Path, overrides: list[str], message: str) -> None:
    assert message in file_error(file, *overrides)


def test_a_config_made_in_python_is_checked_too(file: Path) -> None:
    good = config(file)
    assert checked(good).stages == {"demo": good}
    bad = good.model_copy(update={"train": good.train.model_copy(update={"sequences_per_update": 100})})
    with pytest.raises(UserError, match=r"^config: train\.sequences_per_update: is 100 and must divide"):
        checked(bad)


def test_a_stage_s_section_makes_no_run(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    for section, fix in (("merge: {method: fold}", "use `rlhf merge"), ("evaluate: {model: x}", "with `rlhf eval`")):
        path.write_text(f"run: {{name: demo}}\n{section}\n")
        assert file_error(path).startswith(f"{path}:2: {section.partition(':')[0]}: ")
        assert fix in file_error(path)


def test_a_later_error_gets_the_place_of_its_key(file: Path, tmp_path: Path) -> None:
    def located(loaded: LoadedConfig, message: str) -> str:
        with pytest.raises(UserError) as caught, loaded.located():
            raise UserError(message)
        return str(caught.value)

    single = load(file, ["data.eval=held.jsonl"])
    assert located(single, "rewards.correct.function: broken") == f"{file}:7: rewards.correct.function: broken"
    assert located(single, "data.eval.heldout: empty") == "argument 'data.eval=held.jsonl': data.eval.heldout: empty"
    assert located(single, "policy.model some/model is short") == f"{file}:3: policy.model some/model is short"
    assert located(single, "prompts.jsonl:3: empty") == "prompts.jsonl:3: empty"
    assert located(checked(config(file)), "policy.model: none") == "policy.model: none"
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(
        "run: {name: demo}\npolicy: {model: some/model}\ntrain: {steps: 1, lr: 1.0, sequences_per_update: 1}\nstages:\n"
        "  a:\n    algorithm: {name: sft}\n    data: {train: a.jsonl}\n"
        "  b: {algorithm: {name: sft}, data: {train: b.jsonl}, policy: {model: stage:a}}\n"
    )
    loaded = load(pipeline)
    assert located(loaded, "stages.a: data.train: empty").startswith(f"{pipeline}:7: stages.a: data.train")
    assert located(loaded, "stages.a: policy.model: none").startswith(f"{pipeline}:2: stages.a: policy")
    assert located(loaded, "stages.b: policy.model: none").startswith(f"{pipeline}:8: stages.b: policy")
    assert located(loaded, "stages.a: too small").startswith(f"{pipeline}:5: stages.a: too small")


def test_code_beside_the_file_keeps_its_place(file: Path) -> None:
    """config.resolved.yaml stands in the run folder, and must name the same file."""
    (file.parent / "mine.py").write_text("")
    rewards = {"mine": "mine.py:score", "far": "elsewhere.py:score", "builtin": "last_number"}
    overrides = [f"rewards.{name}.function={function}" for name, function in rewards.items()]
    run = config(file, *overrides, "rollouts.environment={name: 'mine.py:Game', max_tokens: 2000}")
    mine = file.parent.resolve() / "mine.py"
    functions = {name: reward.function for name, reward in run.rewards.items() if name in rewards}
    assert functions == {**rewards, "mine": f"{mine}:score"}
    assert run.rollouts.environment.name == f"{mine}:Game"
