"""Objects of a script reach the processes of a run by value, and a configuration names them."""

from __future__ import annotations

import array
import asyncio
import functools
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import rlhf
from rlhf.config.files.dump import dump_yaml
from rlhf.config.files.load import from_mapping, load
from rlhf.errors import UserError
from rlhf.extensions import CodeSource, PassedObject, find_code, passed_objects
from rlhf.passed_objects import forgotten_afterwards
from rlhf.preflight.run_folder import warn_of_changed_code
from rlhf.preflight.training_data import OnlineInputs
from rlhf.rewards.loading import load_reward
from rlhf.rewards.processes.pool import GroupOutcome, RewardPool
from rlhf.rollouts.environments.host import EnvironmentFailure, EnvironmentHost
from tests.fixtures.configs import ONLINE

LOCK = threading.Lock()
KEY = "rewards.mine.function"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    with forgotten_afterwards():
        yield


def scaled(scale: Any) -> Any:
    def close(prompt: str, response: str) -> float:
        if response == "bad":
            raise ValueError("no score")
        return scale * len(response)

    return close


def constant(value: float) -> Any:
    class Constant:
        def __init__(self, value: float = value) -> None:
            self.value = value

        def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
            return [self.value] * len(prompts)

    return Constant


def counting() -> Any:
    class Counting:
        """Ends a conversation at its turn number `last`."""

        def __init__(self, last: int = 1) -> None:
            self.last, self.turns = last, 0

        def reset(self, seed: int) -> str:
            return "begin"

        def step(self, response: str) -> tuple[str, float, bool]:
            self.turns += 1
            if response == "bad":
                raise ValueError("no step")
            return "more", float(self.turns), self.turns == self.last

    return Counting


def line(text: str) -> int:
    """Return the number of the only line of this file with the text."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return 1 + lines.index(text)


def named(reward: Any, **more: Any) -> str:
    """Return the name of a reward in the configuration of a mapping."""
    loaded = from_mapping({**yaml.safe_load(ONLINE), "rewards": {"mine": {"function": reward, **more}}})
    return str(loaded.runs["demo"].rewards["mine"].function)


def outcome(name: str, response: str = "abc", **args: Any) -> GroupOutcome:
    pool = RewardPool([load_reward(name, args=args, folders=(), key=KEY).source], timeout_s=30.0)
    try:
        return pool.score(0, "p", [response], {})
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("reward", "args", "name", "expected"),
    [
        (scaled(0.5), {}, "close of test_passed_objects", 1.5),
        (lambda prompt, response, by: by, {"by": 4.0}, "<lambda> of test_passed_objects", 4.0),
        (constant(2.0), {"value": 5.0}, "Constant of test_passed_objects", 5.0),
        (constant(2.0)(3.0), {}, "Constant() of test_passed_objects", 3.0),
        (constant(6.0)().__call__, {}, "Constant.__call__ of test_passed_objects", 6.0),
        (functools.partial(scaled(2.0)), {}, "partial() of functools", 6.0),
    ],
)
def test_a_reward_may_be_any_callable_object(reward: Any, args: dict[str, Any], name: str, expected: float) -> None:
    assert named(reward, args=args) == f"python object {name}"
    assert outcome(f"python object {name}", **args).scores == (expected,)


def test_an_error_in_a_passed_reward_names_its_line() -> None:
    (failure,) = outcome(named(scaled(1.0)), "bad").failures
    raised = line('            raise ValueError("no score")')
    assert failure.message == f"ValueError: no score, at {__file__}:{raised} in close"


def test_what_a_passed_reward_must_take_is_checked_at_the_start() -> None:
    def score(prompt: str, answr: str) -> float:
        return 0.0

    with pytest.raises(
        UserError, match=rf"^{KEY}: `score\(prompt: 'str', answr: 'str'\)` must take `prompt, response`"
    ):
        outcome(named(score))
    with pytest.raises(UserError, match=rf"^{KEY}: `array\(\)` in .* is of type array, not a function or a class"):
        outcome(named(array.array("i")))


@pytest.mark.parametrize("is_instance", [False, True])
def test_an_environment_may_be_a_class_or_an_instance(is_instance: bool) -> None:
    """Each conversation begins with a fresh copy of the instance."""
    environment = counting()(2) if is_instance else counting()
    name = named("math_answer") and _environment_name(environment)
    source = find_code("environment", name, args={} if is_instance else {"last": 2})

    async def play() -> list[tuple[float, bool]]:
        host = EnvironmentHost(source, step_timeout_s=10.0, memory_gib=4.0)
        await host.start()
        steps = []
        try:
            for _ in range(2):
                conversation = await host.open()
                await conversation.reset(1, {})
                for _ in range(2):
                    step = await conversation.step("x")
                    steps.append((step.reward, step.done))
                with pytest.raises(EnvironmentFailure) as failure:
                    await conversation.step("bad")
                await conversation.end()
            raised = line('                raise ValueError("no step")')
            assert str(failure.value) == f"step: ValueError: no step, at {__file__}:{raised} in step"
        finally:
            await host.stop()
        return steps

    assert asyncio.run(play()) == [(1.0, False), (2.0, True)] * 2


def _environment_name(environment: Any) -> str:
    tree = yaml.safe_load(ONLINE)
    tree["rollouts"]["environment"] = {"name": environment, "max_tokens": 200}
    rollouts = from_mapping(tree).runs["demo"].rollouts
    assert rollouts is not None
    assert rollouts.environment is not None
    return rollouts.environment.name


def test_two_objects_of_one_name_get_two_names_and_one_object_one_name() -> None:
    tree, twice = yaml.safe_load(ONLINE), scaled(1.0)
    tree["rewards"] = {"a": {"function": twice}, "b": {"function": scaled(2.0)}, "c": {"function": twice}}
    names = [reward.function for reward in from_mapping(tree).runs["demo"].rewards.values()]
    first, second = ("python object close", "python object close (2)")
    assert names == [f"{name} of test_passed_objects" for name in (first, second, first)]
    assert [outcome(name or "").scores for name in names] == [(3.0,), (6.0,), (3.0,)]


def test_a_stage_of_a_pipeline_may_have_an_object() -> None:
    run = yaml.safe_load(ONLINE)
    del run["run"]
    run["rewards"]["correct"]["function"] = scaled(1.0)
    loaded = from_mapping({"run": {"name": "p"}, "stages": {"one": run, "two": run}})
    functions = {stage.rewards["correct"].function for stage in loaded.runs.values()}
    assert functions == {"python object close of test_passed_objects"}


def test_the_resolved_file_names_the_object_and_is_refused_with_what_to_pass(tmp_path: Path) -> None:
    loaded = from_mapping({**yaml.safe_load(ONLINE), "rewards": {"mine": {"function": scaled(1.0)}}})
    (tmp_path / "run.yaml").write_text(dump_yaml(loaded), encoding="utf-8")
    passed_objects.clear()  # as at the end of each call
    name = load(tmp_path / "run.yaml").runs["demo"].rewards["mine"].function  # other commands may read the file
    assert name == "python object close of test_passed_objects"
    with pytest.raises(UserError) as error:
        load_reward(name, args={}, folders=(), key=KEY)
    assert str(error.value) == (
        f"{KEY}: `{name}` stands for an object of the script that started the run, which no file can hold. Start the "
        f'run from Python, and pass the reward there: rlhf.train({{"base": FILE, ...}}), where {KEY} is the object.'
    )
    again = from_mapping({"base": str(tmp_path / "run.yaml"), "rewards": {"mine": {"function": scaled(2.0)}}})
    assert outcome(str(again.runs["demo"].rewards["mine"].function)).scores == (6.0,)


@pytest.mark.parametrize(
    ("reward", "name", "part"),
    [
        (lambda prompt, response: LOCK, "<lambda>", "the global variable `LOCK`"),
        (scaled(LOCK), "close", "the variable `scale` around the function"),
        (constant(1.0)(LOCK), r"Constant\(\)", "the attribute `value`"),
    ],
)
def test_an_object_that_cannot_be_pickled_is_refused_with_the_culprit(reward: Any, name: str, part: str) -> None:
    with pytest.raises(UserError, match=rf"^{KEY}: `{name}` cannot be sent .*, because {part} of type lock"):
        named(reward)


def test_an_object_is_refused_where_a_file_holds_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = yaml.safe_load(ONLINE)
    with pytest.raises(
        UserError, match=r"^train\.lr: is of type function, expected a value that a YAML file " r"can contain"
    ):
        from_mapping({**tree, "train": {**tree["train"], "lr": scaled(1.0)}})
    with pytest.raises(
        UserError, match=r"^tracking\.trackers\.mine: is .* Pass the object of a tracker as rlhf\.train"
    ):
        from_mapping({**tree, "tracking": {"trackers": {"mine": constant(1.0)}}})
    with pytest.raises(UserError, match=rf"^config: {KEY}: got 3, expected"):
        named(3)
    monkeypatch.setattr("rlhf.passed_objects.MAX_MIB", 0)
    with pytest.raises(UserError, match=rf"^{KEY}: .* takes 0 MiB when pickled, more than 0\. Each process"):
        named(scaled(1.0))


def test_a_call_that_ends_leaves_the_objects_of_a_call_in_progress() -> None:
    """As in a notebook: the report of a run is asked for while another run begins and continues."""
    with forgotten_afterwards():
        report = forgotten_afterwards()
        report.__enter__()
        name, function = named(scaled(1.0)), "python object close (2) of test_passed_objects"
        assert named(scaled(2.0)) == function  # of another call, with an object of the same name
        assert outcome(name).scores == (3.0,)
        report.__exit__(None, None, None)
        assert name in passed_objects


def test_a_plan_takes_objects_and_forgets_them(tmp_path: Path) -> None:
    tree = yaml.safe_load(ONLINE)
    tree["rewards"]["correct"]["function"] = scaled(1.0)
    tree["policy"]["model"] = "tiny:llama"
    passed_objects.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.passed_objects._calls", [])
        assert "demo: ppo" in rlhf.plan(tree)
    assert not passed_objects


def test_a_job_and_a_sweep_get_no_objects() -> None:
    with pytest.raises(TypeError, match=r"A job gets files only: no object of this process reaches the job\.$"):
        rlhf.submit({"rewards": {"mine": {"function": scaled(1.0)}}})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="A trial gets files only"):
        rlhf.sweep({})  # type: ignore[arg-type]


SCRIPT = """\
import helper
from rlhf.passed_objects import name_of_code
from rlhf.extensions import passed_objects, find_code, load_code

WORDS = {"one", "two", "three", "four"}

class Base:
    words = WORDS
    def count(self, response):
        return sum(word in {"five", "six", "seven"} for word in response.split())

class Mine(Base):
    def __init__(self, seen):
        self.seen = seen
    def __call__(self, prompt, response):
        return super().count(response) + len(WORDS & self.seen)

def by_helper(prompt, response):
    return helper.LIMIT

for value in (Mine, Mine({"a", "b", "c"}), by_helper):
    name = name_of_code(value, "k", {})
    print(name, find_code("reward", name).digest().hex())
print(name_of_code(helper.f, "k", {}))
"""


def script(folder: Path, text: str = SCRIPT) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "helper.py").write_text("LIMIT = 3\ndef f(prompt, response): return 1.0\n", encoding="utf-8")
    (folder / "script.py").write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_digest_is_of_code_and_values_alone(tmp_path: Path) -> None:
    """Processes with other hash seeds, another folder and other lines have the same digest."""
    *first, function = script(tmp_path / "a")
    names = ["Mine", "Mine()", "by_helper"]
    assert [text.rpartition(" ")[0] for text in first] == [f"python object {name} of __main__" for name in names]
    assert function == f"{tmp_path / 'a' / 'helper.py'}:f"  # another process can import it
    assert script(tmp_path / "b", "# A comment.\n" + SCRIPT)[:-1] == first
    changed = script(tmp_path / "c", SCRIPT.replace('"seven"', '"eight"'))[:-1]
    assert [a == b for a, b in zip(first, changed, strict=True)] == [False, False, True]
    changed = script(tmp_path / "d", SCRIPT.replace('Mine({"a"', 'Mine({"z"'))[:-1]
    assert [a == b for a, b in zip(first, changed, strict=True)] == [True, False, True]


def test_a_module_missing_in_the_processes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text("LIMIT = 3\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here  # type: ignore[import-not-found]

    name = named(lambda prompt, response: only_here.LIMIT)
    monkeypatch.undo()
    expected = "`<lambda>` uses the module only_here, which the processes of the run cannot import. Install the module"
    with pytest.raises(UserError, match=rf"^{KEY}: {expected} on every node"):
        load_reward(name, args={}, folders=(), key=KEY)


def test_the_code_of_a_cell_is_shown_as_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """IPython gives the name of a cell to a generated file."""

    class Compiler:
        def format_code_name(self, name: str) -> tuple[str, str] | None:
            return ("Cell", "In[5]") if name == "/tmp/ipykernel_1/2.py" else None

    shell = type("Shell", (), {"compile": Compiler()})()
    monkeypatch.setitem(sys.modules, "IPython", type("IPython", (), {"get_ipython": staticmethod(lambda: shell)}))
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("def score(prompt, response):\n    raise ValueError('no')\n", "/tmp/ipykernel_1/2.py", "exec"), space)
    (failure,) = outcome(named(space["score"])).failures
    assert failure.message == "ValueError: no, at Cell In[5]:2 in score"


def test_an_object_is_no_file_and_no_built_in() -> None:
    passed_objects["python object x of y"] = PassedObject(name="x", file="/x.py", pickled=b"", digest=b"d")
    source = find_code("agent", "python object x of y", args={"a": 1}, key="k")
    assert source == CodeSource(path="/x.py", name="x", args={"a": 1}, passed=passed_objects["python object x of y"])
    assert source.digest() != CodeSource(path=None, name="x", args={"a": 1}).digest()


ALGORITHM = """\
from __future__ import annotations
import pickle, subprocess, sys
from pydantic import Field
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.online_config import ClippedConfig
from rlhf.config.files.load import from_mapping
from rlhf.extensions import passed_objects

class PowerConfig(ClippedConfig):
    exponent: float = Field(default=1.0, gt=0.0)

class Power(OnlineAlgorithm):
    config: PowerConfig

    def sequence_advantages(self, outcomes):
        return outcomes ** self.config.exponent

if len(sys.argv) > 1:
    tree = TREE
    config = from_mapping({**tree, "algorithm": {"name": Power, "exponent": 3.0}}).runs["demo"]
    pickled = pickle.dumps(config)
    print(config.algorithm.name, config.algorithm.short_name, config.algorithm.code_digest)
    code = (
        "import pickle, sys\\nfrom rlhf.algorithms import algorithm_of\\nfrom rlhf.algorithms.online import *\\n"
        "config = pickle.load(sys.stdin.buffer).algorithm\\n"
        "print(algorithm_of(config, OnlineAlgorithm).sequence_advantages(2.0), config.code_digest)"
    )
    sys.stdout.flush()
    subprocess.run([sys.executable, "-c", code], input=pickled, check=True)
"""


def test_an_algorithm_may_be_a_class_of_the_script(tmp_path: Path) -> None:
    """Another process without a module of the script unpickles the configuration and calls the algorithm."""
    path = tmp_path / "script.py"
    path.write_text(ALGORITHM.replace("TREE", repr(yaml.safe_load(ONLINE))), encoding="utf-8")
    done = [subprocess.run([sys.executable, path, "x"], capture_output=True, text=True, check=False) for _ in range(2)]
    assert done[0].returncode == 0, done[0].stderr
    first, second = done[0].stdout.splitlines()
    name, _, digest = first.rpartition(" ")
    assert name == "python object Power of __main__ Power"
    assert second == f"8.0 {digest}"
    assert done[1].stdout == done[0].stdout  # the digest is the same in each start


def test_a_resumed_run_says_which_code_has_changed(caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint has the digests of its code. Code unknown to the checkpoint counts as unchanged."""
    sources = {
        name: find_code("reward", named(reward))
        for name, reward in {"same": scaled(1.0), "rubric/other": scaled(2.0), "rubric/new": scaled(3.0)}.items()
    }
    functions = {name: SimpleNamespace(source=of) for name, of in sources.items()}
    specs = [SimpleNamespace(functions={"same": functions.pop("same")}), SimpleNamespace(functions=functions)]
    environment = SimpleNamespace(key="rollouts.environment", source=CodeSource(path=None, name="guess_number"))
    inputs = object.__new__(OnlineInputs)
    object.__setattr__(inputs, "rewards", specs)
    object.__setattr__(inputs, "environment", environment)
    code = inputs.code()
    assert list(code) == ["rewards.same", "rewards.rubric/other", "rewards.rubric/new", "rollouts.environment"]
    before = {"code": {"rewards.same": code["rewards.same"], "rewards.rubric/other": "x", "rollouts.environment": "y"}}
    with caplog.at_level(logging.WARNING):
        warn_of_changed_code(inputs, before, step=7)
    assert [record.getMessage() for record in caplog.records] == [
        "the code or the arguments of rewards.rubric/other and rollouts.environment have changed since the checkpoint "
        "of step 7; the run uses the new ones"
    ]
