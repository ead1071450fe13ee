"""`rlhf generate` and `rlhf eval` refuse wrong input before an engine starts, with exit code 2 and one line."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rlhf
from actors.rollout.engine_actor import RolloutSpec, RolloutWorker
from actors.run.evaluate import _identity, refuse_unusable_results_folder
from rlhf.cli import main
from rlhf.commands.decoding import decoding_of
from rlhf.config.files.load import from_mapping, load
from rlhf.config.yaml_tree import from_yaml
from rlhf.evaluation.decoding import Decoding
from rlhf.evaluation.passing import PassRule
from rlhf.evaluation.results import Marking, Marks, marking_of
from rlhf.extensions import CodeSource
from rlhf.models.on_disk import find_model
from rlhf.preflight.eval_inputs import inputs_of_model, inputs_of_run
from rlhf.preflight.inputs import load_inputs
from rlhf.rewards.loading import LoadedReward
from rlhf.rewards.processes.program import Signature
from rlhf.rewards.scoring import RewardSpec
from tests.fixtures.models import changed_copy

PLAIN: dict[str, Any] = {"model": None, "against": None, "marks": Marks()}
HERMES = Path(__file__).parents[2] / "examples/agents/programs/hermes.jinja"
TOOLS = '{"prompt": "1+1=", "answer": "2", "tools": [{"function": {"name": "weather"}}]}\n'
RIGHT = PassRule(judges={"correct": None}, pass_score=None)
CONFIG = """\
run: {name: demo, seed: 7}
policy: {model: MODEL, dtype: float32}
algorithm: {name: grpo}
data:
  train: none.jsonl
  eval: {small: {task: running_totals, split: eval, size: 4}}
  apply_chat_template: false
rollouts: {max_new_tokens: 13}
rewards: {correct: {function: last_number}}
train: {steps: 10, lr: 1.0e-6, sequences_per_update: 16}
eval: {temperature: 0.8, samples_per_prompt: 8}
"""
OFFLINE = """\
run: {name: demo, dir: DIR}
policy: {model: MODEL, dtype: float32}
algorithm: {name: sft}
data: {train: DIR/rows.jsonl, eval: DIR/rows.jsonl, apply_chat_template: false}
train: {steps: 1, lr: 1e-3, sequences_per_update: 2, max_tokens_per_microbatch: 64}
"""


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("MODEL", str(tiny_model)))
    return str(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate MODEL", "one of the arguments --prompt --file --chat is required"),
        ("generate MODEL --prompt a --chat", "not allowed with argument"),
        ("generate MODEL --prompt a --temperature 0.001", "temperature: is 0.001, expected 0 (greedy), or 0.01 to 2"),
        ("generate MODEL --prompt a --temperature 2.5", "temperature: is 2.5, expected 0 (greedy), or 0.01 to 2"),
        ("generate MODEL --prompt a --temperature nan", "temperature: is nan"),
        ("generate MODEL --prompt a --top-p 0", "top_p: is 0.0, expected above 0, up to 1"),
        ("generate MODEL --prompt a --samples 2 --temperature 0", "greedy responses to one prompt are all equal"),
        ("generate MODEL --prompt a --max-new-tokens 0", "max_new_tokens: is 0, expected 1 or more"),
        ("generate MODEL --prompt a --max-new-tokens 9000", "prompt:1: the prompt has 4 tokens. With 9000 new"),
        ("generate MODEL --prompt a --system-prompt b --no-apply-chat-template", "system_prompt: has no effect"),
        ("generate MODEL --prompt a --chat-template-kwargs x", "is 'x', expected a JSON object, such as"),
        ('generate MODEL --prompt a --chat-template-kwargs {"x":1}', "--chat-template-kwargs.x: has no effect: "),
        ("generate MODEL --prompt a --stop-token-id 320", "--stop-token-id: 320 is not a token of "),
        ("generate MODEL --prompt a --min-p 2", "min_p: is 2.0, expected 0 to 1"),
        ("generate MODEL --chat --samples 2", "have no effect with --chat"),
        ("generate MODEL --file PROMPTS", "prompts.jsonl:2: column `prompt` is the number 5, expected a string"),
        ("generate MODEL --file TOOLS --max-new-tokens 9000", "Name a template that writes tools as --chat-template, "),
        ("generate BARE --prompt a", "has no chat template"),
        ("generate BARE --chat", "has no chat template"),
        ("generate MODEL --prompt a --chat-template none.jinja", "chat_template: none.jinja cannot be read"),
        ("serve MODEL --chat-template none.jinja", "--chat-template: none.jinja cannot be read"),
        ("generate MODEL --file LIMITS --max-new-tokens 9000", "column `max_new_tokens` is 9001, expected the whole"),
        ("generate MODEL --file none.jsonl", "none.jsonl does not exist"),
        ("generate MODEL --prompt a --out PROMPTS", "prompts.jsonl exists already"),
        ("generate ./none --prompt a", "The model folder ./none does not exist"),
        ("generate MODEL --prompt a x=1", "generate has no argument x=1"),
        ("eval MODEL", "--data is missing"),
        ("eval MODEL --data running_totals:0 --reward last_number", "a number of rows follows the task's name"),
        ("eval MODEL --data preset:gsm9k --reward last_number", "--data preset:gsm9k: 'gsm9k' is no preset; did you"),
        ("eval MODEL --data preset:limo --reward math_answer", "preset limo has no held-out split"),
        ("eval MODEL --data running_totals --reward nothing", "--reward nothing: there is no reward `nothing`"),
        ("eval MODEL --data PROMPTS --reward last_number", "needs the column `answer`"),
        ("eval MODEL --data TOOLS --reward exact_match --max-new-tokens 9000", "does not tell the model of tool"),
        ("eval MODEL --data PROMPTS", "(without rewards its completions are measured)"),
        ("eval MODEL --data running_totals --k 1", "no reward scores responses; give a reward"),
        ("eval MODEL --data running_totals:4 --no-apply-chat-template --reward last_number --k 2", "is 2, expected 1"),
        ("eval MODEL --data running_totals --k x", "argument --k: takes whole numbers, such as 1,8, got 'x'"),
        ("eval MODEL --data running_totals --data running_totals", "a set called running_totals already"),
        ("eval MODEL --data running_totals --model other", "--model has no effect"),
        ("eval MODEL --data running_totals train.steps=3", "train.steps=3: sets a key of a configuration"),
        ("eval MODEL --data running_totals --reward last_number --reward-model MODEL", "--reward-model: "),
        ("eval CONFIG --samples 4", "--samples has no effect: "),
        ("eval recipe:grpo_smollm2 --samples 4", "--samples has no effect: recipe:grpo_smollm2 sets the decoding"),
        ("eval CONFIG --data x.jsonl", "--data has no effect"),
        ("eval CONFIG --model ./none", "--model: The model folder ./none does not exist"),
        ("eval CONFIG --k 9", "--k: is 9, expected 1 to the number of samples, 8"),
        ("eval CONFIG --out TAKEN", "holds an evaluation already"),
    ],
)
def test_wrong_input_exits_with_2(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, config: str, tmp_path: Path, words: str, message: str
) -> None:
    files = {
        "TOOLS": TOOLS,
        "PROMPTS": '{"prompt": "1+1=", "answer": "2", "response": "taken"}\n{"prompt": 5}\n',
        "LIMITS": '{"prompt": "1+1=", "max_new_tokens": 9001}\n',
    }
    names = {"MODEL": str(tiny_model), "CONFIG": config}
    names |= {name: str(tmp_path / f"{name.lower()}.jsonl") for name in files}
    names |= {name: str(tmp_path / name.lower()) for name in ("TAKEN", "BARE")}
    for name, text in files.items():
        Path(names[name]).write_text(text)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "eval.json").write_text("{}")
    if "BARE" in words:
        shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.jinja"))
    assert main([names.get(word, word) for word in words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err[:13]) == ("", "rlhf: error: ")
    assert message in err


def test_a_chat_template_that_writes_tools_takes_a_row_with_tools(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "tools.jsonl").write_text(TOOLS)
    words = ["--file", str(tmp_path / "tools.jsonl"), "--max-new-tokens", "9000", "--chat-template", str(HERMES)]
    assert main(["generate", str(tiny_model), *words]) == 2
    assert "With 9000 new tokens" in capsys.readouterr().err  # the file is read, and refused for its length alone


def test_a_run_says_how_it_is_evaluated(config: str, tiny_model: Path) -> None:
    inputs = inputs_of_run(load(config), model=None, against=str(tiny_model), marks=Marks())
    assert inputs.decoding == Decoding(samples=8, temperature=0.8, max_new_tokens=13, seed=7, apply_chat_template=False)
    assert inputs.marking == Marking(ks=(1, 2, 4, 8), passing=RIGHT, answers="last_number")
    assert [one.model.dtype for one in inputs.candidates] == ["float32", "float32"]
    assert [len(one.prompts["small"]) for one in inputs.candidates] == [4, 4]
    assert inputs.candidates[0].longest_prompt == 8


def offline(tmp_path: Path, model: Path, *rows: dict[str, Any]) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "run.yaml"
    path.write_text(OFFLINE.replace("DIR", str(tmp_path)).replace("MODEL", str(model)))
    return path


@pytest.mark.parametrize(("too_long", "num_examples"), [("skip", 1), ("cut", 2)])
def test_a_run_and_its_evaluation_read_the_same_examples(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture, too_long: str, num_examples: int
) -> None:
    """The first row fits, the second row is empty, and the third row has 2 + 9 + 1 tokens."""
    rows = [{"prompt": "1+", "completion": text} for text in ("2", " ", "123456789")]
    path = offline(tmp_path, tiny_model, *rows)
    settings = ["data.max_sequence_tokens=8", f"data.too_long={too_long}", "data.max_unusable_fraction=0.7"]
    loaded = load(path, settings)
    (stage,) = load_inputs(loaded)
    caplog.clear()
    (candidate,) = inputs_of_run(loaded, **PLAIN).candidates
    assert len(candidate.examples["heldout"]) == num_examples
    assert candidate.examples == stage.inputs.eval_sets  # type: ignore[union-attr]
    assert f"data.eval.heldout: {3 - num_examples} of 3 rows cannot be used and are left out" in caplog.text


def test_a_model_without_room_for_an_example_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    short = changed_copy(tiny_model, tmp_path / "short", max_position_embeddings=8)
    path = offline(tmp_path, short, {"prompt": "1+", "completion": " "}, {"prompt": "1+", "completion": "123456"})
    loaded = load(path, ["data.too_long=cut", "data.max_unusable_fraction=0.5"])
    with pytest.raises(rlhf.UserError, match=r"rows.jsonl:2: the example has 9 tokens, more than the 8 that"):
        inputs_of_run(loaded, **PLAIN)


SHORT = "rollouts.max_new_tokens=8 data.max_prompt_tokens=8"


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        ("algorithm.name=kto", "rlhf eval DIR/demo/final --data SET"),
        ("algorithm.name=dpo --model other", "rlhf eval other --data SET"),
        ("algorithm.name=distillation teacher.model=MODEL", "rlhf eval DIR/demo/final --data SET"),
        (f"algorithm.name=on_policy_distillation teacher.model=MODEL {SHORT}", "rlhf eval DIR/demo/final --data SET"),
        ("algorithm.name=reward_model", "rlhf eval MODEL --data PROMPTS --reward-model DIR/demo/final"),
        ("algorithm.name=process_reward_model", "metrics.jsonl); read them there"),
    ],
)
def test_held_out_sets_that_only_their_run_measures_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path, words: str, instead: str
) -> None:
    path = offline(tmp_path, tiny_model)
    given = [word.replace("=MODEL", f"={tiny_model}") for word in words.split()]
    assert main(["eval", str(path), *given]) == 2
    err, name = capsys.readouterr().err, given[0].partition("=")[2]
    message = f"algorithm.name: is {name}, whose held-out sets only the run itself measures"
    assert err.startswith(f"rlhf: error: argument '{given[0]}': {message}")
    assert instead.replace("DIR", str(tmp_path)) in err


def test_without_rewards_completions_are_measured(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "examples.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    nothing: dict[str, Any] = {"rewards": [], "reward_model": None, "against": None, "marks": Marks()}
    nothing |= {"decoding": Decoding(temperature=0.0, apply_chat_template=False)}
    inputs = inputs_of_model(
        str(tiny_model), data=[str(data)], device="cpu", trust_remote_code=False, images=tmp_path, **nothing
    )
    (candidate,) = inputs.candidates
    assert candidate.prompts == {}
    assert len(candidate.examples["examples"]) == 1


def test_only_functions_with_a_weight_have_a_mark() -> None:
    signature = Signature(batched=False, required=("answer",), optional=(), takes_all=False)
    source = CodeSource(path=None, name="last_number", args={})
    function = LoadedReward(function="last_number", source=source, signature=signature)
    model = RewardSpec(name="taste", weight=1.0, function=None)
    assert marking_of(Marks(), [model], samples=4) == Marking(ks=(1, 2, 4), passing=None, answers=None)
    watched = RewardSpec(name="correct", weight=0.0, function=function)
    assert marking_of(Marks(), [model, watched], samples=4).passing is None
    counted = replace(watched, weight=1.0)
    expected = Marking(ks=(1, 2, 4), passing=RIGHT, answers="last_number")
    assert marking_of(Marks(), [model, counted], samples=4) == expected
    expected = Marking(ks=(1, 3), passing=PassRule(judges={}, pass_score=0.5), answers="whole")
    assert marking_of(Marks(ks=(3, 1), pass_score=0.5, answers="whole"), [model], samples=4) == expected


def test_a_frozen_engine_takes_no_weights(tiny_model: Path) -> None:
    settings: dict[str, Any] = {"name": "engine", "model": str(tiny_model), "dtype": "float32"}
    settings |= {"max_model_len": 64, "max_num_seqs": 4}
    with pytest.raises(ValueError, match="an engine with an adapter must be frozen"):
        RolloutSpec(transport="shm", adapter="x", lora_rank=4, **settings)
    assert not RolloutSpec(transport="shm", **settings).is_frozen
    worker = RolloutWorker(RolloutSpec(transport=None, **settings))
    manifest: Any = None
    for refused in (worker.update_weights(manifest, 1), worker.open_weights(None, 0)):
        with pytest.raises(rlhf.RunError, match="is frozen: it answers with the weights of"):
            asyncio.run(refused)


STAGES = """\
run: {name: demo, seed: 7}
stages:
  judge:
    evaluate: {
      model: MODEL, against: MODEL, dtype: bfloat16, temperature: 0.8, samples_per_prompt: 8, max_new_tokens: 13,
      data: {small: {task: running_totals, split: eval, size: 4}}, apply_chat_template: false,
      rewards: {correct: {function: last_number}},
      stop: ["x"], k: [1, 8], answer: whole
    }
  soup: {merge: {method: linear, models: {a: {model: a}, b: {model: b}}}}
"""


def test_a_pipeline_is_evaluated_as_its_last_stage_that_is_no_merge(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(STAGES.replace("MODEL", str(tiny_model)))
    inputs = inputs_of_run(load(path), **PLAIN)
    decoding = {"samples": 8, "temperature": 0.8, "max_new_tokens": 13, "stop": ("x",), "seed": 7}
    assert inputs.decoding == Decoding(**decoding, apply_chat_template=False)
    assert inputs.marking == Marking(ks=(1, 8), passing=RIGHT, answers="whole")
    assert [one.model.dtype for one in inputs.candidates] == ["bfloat16", "bfloat16"]
    assert [len(one.prompts["small"]) for one in inputs.candidates] == [4, 4]
    assert inputs_of_run(load(path), **{**PLAIN, "marks": Marks(ks=(2,))}).marking.ks == (2,)
    with pytest.raises(rlhf.UserError, match=r"evaluate\.model: The model folder \./none does not exist"):
        inputs_of_run(load(path), model="./none", against=None, marks=Marks())
    path.write_text(path.read_text().replace("      rewards: {correct: {function: last_number}},\n", ""))
    with pytest.raises(rlhf.UserError, match=r"evaluate\.k: has no effect here: evaluate\.rewards is empty"):
        load(path)


def test_an_earlier_result_is_noted(tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = tmp_path / "p" / "first" / "final"
    shutil.copytree(tiny_model, result)
    first = from_yaml(OFFLINE.replace("MODEL", str(tiny_model)))
    second = from_yaml(CONFIG.replace("MODEL", '"stage:first"'))
    del first["run"], second["run"]
    loaded = from_mapping({"run": {"name": "p", "dir": tmp_path}, "stages": {"first": first, "second": second}})
    inputs_of_run(loaded, **{**PLAIN, "model": str(tiny_model)})
    assert "earlier stage" not in caplog.text
    inputs = inputs_of_run(loaded, **PLAIN)
    assert inputs.candidates[0].model.name == str(result)
    assert f"--model {tmp_path / 'p' / 'second'} measures the model that stage p/second trains" in caplog.text


RESOLVED = """\
run: {name: demo}
data: {train: x, system_prompt: Be brief., columns: {prompt: question}, apply_chat_template: true}
rollouts: {stop: ["<|user|>"], stop_token_ids: [7], max_new_tokens: 13}
"""


@pytest.fixture
def run_folder(tmp_path: Path, tiny_model: Path) -> Path:
    """Return the folder of an ended run."""
    folder = tmp_path / "demo"
    shutil.copytree(tiny_model, folder / "final")
    (folder / "config.resolved.yaml").write_text(RESOLVED)
    return folder


def test_a_runs_model_is_asked_as_its_run_asked_it(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = Decoding(system_prompt="Be brief.", columns={"prompt": "question"}, stop=("<|user|>",), stop_token_ids=(7,))
    assert asked.temperature == 0.0
    for model in (run_folder, run_folder / "final"):
        assert decoding_of(str(model), {}) == asked
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        resolved = run_folder / "config.resolved.yaml"
        assert f'{model} is sampled with the settings of its run ({resolved}): system_prompt "Be' in said
    assert decoding_of(str(run_folder / "final" / "config.json"), {}) == Decoding()  # not the run's folder
    assert capsys.readouterr().err == ""


def test_options_win_over_the_settings_of_the_run_which_may_be_the_usual_ones(run_folder: Path) -> None:
    given = {"system_prompt": "", "stop": ("x",), "columns": {"answer": "reply"}, "temperature": 0.5}
    columns = {"prompt": "question", "answer": "reply"}
    expected = Decoding(columns=columns, stop=("x",), stop_token_ids=(7,), temperature=0.5)
    assert decoding_of(str(run_folder), given) == expected
    raw = decoding_of(str(run_folder), {"apply_chat_template": False})
    assert (raw.system_prompt, raw.apply_chat_template) == (None, False)
    for text in ("data: {columns: null, system_prompt: null}\nrollouts: null\n", "stages: {one: {}}\n"):
        (run_folder / "config.resolved.yaml").write_text(text)
        assert decoding_of(str(run_folder), {}) == Decoding()


def test_an_option_names_another_column(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "1+1=", "answer": "2"}\n')
    words = ["--reward", "last_number", "--out", str(tmp_path / "out")]
    for name, option, more in (("eval", "--data", words), ("generate", "--file", [])):
        command = [name, str(tiny_model), option, str(data), *more]
        assert main(command) == 2
        assert "`prompt` (or `messages`) is missing" in (said := capsys.readouterr().err)
        assert said.endswith("set --column prompt=ITS_NAME.\n")
        assert main([*command, "--column", "prompt=q"]) == 2
        assert "--column prompt names `q`, which is missing; found `question`" in capsys.readouterr().err
        assert main([*command, "--column", "prompt"]) == 2
        assert "expected OURS=THEIRS, such as prompt=question" in capsys.readouterr().err
        assert main([*command, "--column", "prompt=question", "--max-new-tokens", "9000"]) == 2
        assert "questions.jsonl:1: the prompt has" in capsys.readouterr().err  # the file was read


def test_results_are_replaced_only_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text("{}")
    with pytest.raises(rlhf.UserError, match="replace it with --overwrite"):
        refuse_unusable_results_folder(tmp_path, overwrite=False)
    refuse_unusable_results_folder(tmp_path, overwrite=True)


def test_stored_answers_belong_to_a_model_with_its_dtype_and_files(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    model = find_model(str(folder), trust_remote_code=False, device="cpu")
    first = _identity(model)
    assert _identity(model) == first
    assert _identity(replace(model, dtype="bfloat16")) != first
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert _identity(model) != first
