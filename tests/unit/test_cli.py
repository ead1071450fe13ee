"""Commands return exit codes and messages, and call the function of the same name."""

from __future__ import annotations

import asyncio
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import rlhf
from rlhf.cli import main
from rlhf.commands import COMMANDS
from rlhf.commands.quickstart import RECIPE_OF
from rlhf.config.files.load import LoadedConfig, from_mapping, load
from rlhf.config.files.recipes import RECIPES, config_file
from rlhf.config.files.sweep import load_sweep
from rlhf.config.yaml_tree import from_yaml
from rlhf.errors import UserError
from rlhf.preflight.start import Start

BASE = """\
run: {name: demo}
policy: {model: some/model}
algorithm: {name: sft}
data: {train: examples.jsonl}
train: {steps: 10, lr: 1e-6, sequences_per_update: 16}
"""
ONLINE = {
    **from_yaml(BASE),
    "algorithm": {"name": "grpo"},
    "data": {"train": "prompts.jsonl"},
    "rollouts": {"prompts_per_step": 4, "samples_per_prompt": 4},
}
Launch = Callable[..., None]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return str(path)


@pytest.fixture
def launch_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Launch], None]:
    """Replace actors.run.train.launch, so that no Ray starts, and the folder of the run has only a configuration."""
    monkeypatch.chdir(tmp_path)

    def put(launch: Launch) -> None:
        def launched(loaded: LoadedConfig, start: Start) -> None:
            launch(loaded, start)
            loaded.folder.mkdir(parents=True, exist_ok=True)
            (loaded.folder / "config.resolved.yaml").touch()

        module = ModuleType("actors.run.train")
        module.__dict__["launch"] = launched
        monkeypatch.setattr("rlhf.tracking.logs.configure", lambda: None)
        monkeypatch.setitem(sys.modules, "actors.run.train", module)

    return put


def raising(error: BaseException) -> Launch:
    def launch(loaded: LoadedConfig, start: Start) -> None:
        raise error

    return launch


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["frobnicate"], f"invalid choice: 'frobnicate' (choose from {', '.join(map(repr, COMMANDS))})"),
        (["train"], "the following arguments are required: CONFIG. `rlhf train --help`"),
        (["train", "x.yaml", "--resume", "maybe"], "is 'maybe', expected auto, never, or a checkpoint such as"),
        (["train", "x.yaml", "--quiet", "--json"], "argument --json: not allowed with argument --quiet"),
        (["trian", "x.yaml"], "rlhf has no command trian; did you mean train?"),
        (["train", "recipe:gpro_smollm2"], "did you mean recipe:grpo_smollm2?"),
        (["train", "x.yaml", "--fast"], "train has no argument --fast. `rlhf train --help` shows all"),
        (["train", "x.yaml", "--overwritte"], "no argument --overwritte; did you mean --overwrite?"),
        (["doctor", "runs/none"], "runs/none holds no run"),
        (["train", "x.yaml", "--until", "x"], "argument --until: invalid int value: 'x'"),
        (["quickstart", "--algorithm", "dqn"], "invalid choice: 'dqn' (choose from 'ppo', 'grpo')"),
        (["plan", "none.yaml"], "none.yaml: no such config file"),
    ],
)
def test_wrong_arguments_exit_with_2(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rlhf: error: ")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("streams", [">&- 2>&-", ""], ids=["closed streams", "an ASCII locale"])
def test_closed_streams_and_an_ascii_locale_fail_nothing(file: str, streams: str) -> None:
    Path(file).write_text(BASE.replace("some/model", "modèle"), encoding="utf-8")
    ascii_locale = {} if streams else {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = f"exec {sys.executable} -m rlhf.cli plan {file} --cluster cpu=4 train.steps=7 {streams}"
    done = subprocess.run(["sh", "-c", command], env={**os.environ, **ascii_locale}, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (b"7 steps" in done.stdout) == (not streams)


def test_options_of_train(capsys: pytest.CaptureFixture[str], file: str, launch_with: Callable[[Launch], None]) -> None:
    calls = []

    def launch(loaded: LoadedConfig, start: Start) -> None:
        called = loaded.stages["demo"]
        calls.append((called.train.steps, called.run.seed, start.resume, start.from_step, start.mode, start.until))

    launch_with(launch)
    assert main(["train", file, "train.steps=3", "--resume", "auto", "run.seed=5", "--quiet", "--until", "2"]) == 0
    assert main(["train", file]) == 0
    capsys.readouterr()
    assert main(["train", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"event": "done", "run": "demo", "folder": "runs/demo"}
    assert main(["train", file, "--resume", "step_000030"]) == 0
    assert calls == [
        (3, 5, True, None, "quiet", 2),
        (10, 0, False, None, "auto", None),
        (10, 0, False, None, "json", None),
        (10, 0, True, 30, "auto", None),
    ]


UNEXPECTED = " (unexpected; --debug shows the traceback)\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (rlhf.UserError("no such column"), "rlhf: error: no such column\n"),
        (rlhf.RunError("rank 1 died"), "rlhf: error: rank 1 died\n"),
        (ExceptionGroup("a", [ExceptionGroup("b", [ValueError("x"), rlhf.RunError("deep")])]), "rlhf: error: deep\n"),
        (rlhf.RunError("https://me:secret@host is gone"), "rlhf: error: https://***@host is gone\n"),
        (rlhf.RunError("a service said \x1b]0;x\x07é"), "rlhf: error: a service said \\x1b]0;x\\x07é\n"),
        # a pipe to another process than our reader
        (BrokenPipeError(32, "Broken pipe"), f"rlhf: error: BrokenPipeError: [Errno 32] Broken pipe{UNEXPECTED}"),
        (ZeroDivisionError("by 0"), f"rlhf: error: ZeroDivisionError: by 0{UNEXPECTED}"),
    ],
)
def test_failures(
    capsys: pytest.CaptureFixture[str], file: str, launch_with: Callable[[Launch], None], error: Exception, message: str
) -> None:
    code = 2 if isinstance(error, rlhf.UserError) else 1
    launch_with(raising(error))
    assert main(["train", file]) == code
    assert capsys.readouterr() == ("", message)
    assert main(["train", file, "--debug"]) == code
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last):" in shown
    assert "secret" not in shown
    assert shown.endswith(message.replace("; --debug shows the traceback", ""))


@pytest.mark.parametrize(
    "options", ["", "--resume auto", "--resume=auto", "--resume never", "--resume step_000002", "--overwrite"]
)
def test_a_run_that_is_cut_off_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], file: str, launch_with: Callable[[Launch], None], options: str
) -> None:
    for ended, code, word in ((KeyboardInterrupt("why"), 130, "interrupted"), (rlhf.Preempted("why"), 75, "preempted")):
        launch_with(raising(ended))
        assert main(["train", file, "run.seed=5", *options.split()]) == code
        text = f"rlhf: {word}: why; there is no checkpoint, so the run starts from the beginning. Continue with: "
        resume = options if options == "--resume=auto" else "--resume auto"
        assert capsys.readouterr().err == f"{text}rlhf train {file} run.seed=5 {resume}\n"


def test_export_passes_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    module = ModuleType("rlhf.exporting")
    module.__dict__["export_checkpoint"] = lambda run, **options: calls.append(
        (run, options["step"], options["merged"], options["push_to_hub"])
    )
    monkeypatch.setitem(sys.modules, "rlhf.exporting", module)
    assert main(["export", "runs/a", "out", "--step", "20", "--merged", "--push-to-hub", "me/x"]) == 0
    rlhf.export("runs/a", "out")
    assert calls == [(Path("runs/a"), 20, True, "me/x"), (Path("runs/a"), None, False, None)]


def test_recipes_have_names_and_a_bare_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(config_file(name).is_file() for name in RECIPE_OF.values())
    assert load_sweep("recipe:sweep_tiny").config.name == "tiny"
    assert load("recipe:quickstart_grpo").source == str(RECIPES / "quickstart_grpo.yaml")
    with pytest.raises(UserError, match=r"^recipe:quickstart_gpro: .*did you mean recipe:quickstart_grpo\? `rlhf rec"):
        load("recipe:quickstart_gpro")
    with pytest.raises(UserError, match=r"^quickstart_grpo\.yaml: no such config file; `recipe:quickstart_grpo` is a"):
        load("quickstart_grpo.yaml")
    (tmp_path / "quickstart_grpo.yaml").write_text("run: {name: other}")
    with pytest.raises(UserError, match="policy: is missing"):
        load("quickstart_grpo.yaml")


def test_a_configuration_is_a_file_a_mapping_or_loaded_before(file: str, launch_with: Callable[[Launch], None]) -> None:
    calls = []
    launch_with(lambda loaded, start: calls.append((loaded.stages["demo"].train.steps, start.resume)))
    loaded, values = rlhf.load_config(file, ["train.steps=3"]), from_yaml(BASE)
    assert rlhf.train(loaded, resume=True) == rlhf.Run("runs/demo")
    rlhf.train(file, ["train.steps=4"])
    rlhf.train(loaded.stages["demo"])
    rlhf.train(values, ["train.steps=7"])
    rlhf.train({**values, "data": {"train": Path("examples.jsonl")}})
    assert calls == [(3, True), (4, False), (3, False), (7, False), (10, False)]
    assert "3 steps" in rlhf.plan(loaded)
    with pytest.raises(rlhf.UserError, match="overrides can change only a file"):
        rlhf.plan(loaded, ["train.steps=4"])
    with pytest.raises(rlhf.UserError, match=r"^config: train.stepps: unknown key; did you mean train.steps"):
        rlhf.train({**values, "train": {**values["train"], "stepps": 3}})
    with pytest.raises(rlhf.UserError, match=r"train.lr: is of type object, expected a value that a"):
        rlhf.plan({**values, "train": {**values["train"], "lr": object()}})
    with pytest.raises(TypeError, match="the configuration is of type int; give the path of a YAML file, a mapping"):
        rlhf.train(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [rlhf.load_config, rlhf.load_merge, rlhf.merge, rlhf.sweep, rlhf.submit])
def test_calls_that_take_only_a_file_refuse_a_mapping(call: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="the configuration is of type dict; give the path of a YAML file"):
        call(from_yaml(BASE))


def reward(prompt: str, response: str) -> float:
    return 1.0


def test_a_reward_of_a_mapping_can_be_a_function_of_a_file() -> None:
    loaded = from_mapping({**ONLINE, "rewards": {"mine": {"function": reward}}})
    assert loaded.runs["demo"].rewards["mine"].function == f"{__file__}:reward"


def test_a_call_works_inside_of_a_running_event_loop(file: str, launch_with: Callable[[Launch], None]) -> None:
    results = []
    launch_with(lambda loaded, start: results.append(asyncio.run(asyncio.sleep(0, "trained"))))

    async def cell_of_a_notebook() -> None:
        rlhf.train(file)

    asyncio.run(cell_of_a_notebook())
    assert results == ["trained"]


@pytest.mark.parametrize("held", ["final", "checkpoints/step_000004"])
def test_a_folder_that_holds_a_run_is_refused_before_anything_is_loaded_or_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, launch_with: Callable[[Launch], None], held: str
) -> None:
    calls = []
    launch_with(lambda loaded, start: calls.append(start.overwrite))
    (tmp_path / "demo" / held).mkdir(parents=True)
    words = ["train", file, f"run.dir={tmp_path}"]
    assert main(words) == 2
    assert "replace the run with --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--resume", "auto"]) == 2
    assert calls == []
    assert main([*words, "--overwrite"]) == 0
    out, err = capsys.readouterr()
    assert out == f"done: {tmp_path}/demo\n"
    assert f"rlhf view {tmp_path}/demo " in err
    assert calls == [True]


def test_every_command_is_a_call_too() -> None:
    names = {"eval": "evaluate", "serve-reward": "serve_reward", "models": "fetch_model"}
    missing = [name for name in COMMANDS if names.get(name, name) not in rlhf.__all__]
    assert not missing
    modules = {module.name for module in pkgutil.iter_modules(rlhf.__path__)}  # importing one would hide a call
    assert not modules & set(rlhf.__all__)


def test_a_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch_with: Callable[[Launch], None]) -> None:
    monkeypatch.chdir(tmp_path)
    shown: list[Path] = []
    launched = []
    launch_with(lambda loaded, start: launched.append((loaded.name, start.resume, start.mode)))
    monkeypatch.setattr("rlhf.commands.quickstart.show_improvement", lambda folder, is_recipe: shown.append(folder))
    assert rlhf.quickstart("grpo", ["run.name=mine"], quiet=True) == rlhf.Run("runs/mine")
    assert launched == [("mine", True, "quiet")]
    assert shown == [Path("runs/mine/grpo")]
    with pytest.raises(rlhf.UserError, match="got 'dqn', expected ppo or grpo"):
        rlhf.quickstart("dqn")  # type: ignore[arg-type]
