"""Run recipes of the tinker-cookbook against `rlhf tinker`, unmodified, and draw what they learn.

    python -m venv --system-site-packages cookbook
    cookbook/bin/pip install 'tinker-cookbook[math-rl]==0.6.1' inspect-ai
    python benchmarks/cookbook.py --python cookbook/bin/python --model models/SmolLM2-135M-Instruct

The recipes get another address, another model, smaller sizes and local data: `datasets` reads a folder with the name of
a dataset in the working directory in place of the hub. The data are additions, opinions and programming tasks. Later
recipes start from checkpoints of the supervised ones. A recipe with results in `--folder` is not run again, so that a
stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from matplotlib.figure import Figure

from rlhf.rewards.sandbox.run import Sandbox
from rlhf.tracking.display.plots import COLORS

ROOT = Path(__file__).resolve().parents[1]
START_WITHIN_S = 900.0
ENDS_WITHIN_S = 3600.0
CODE_TASKS = "agentica-org/DeepCoder-Preview-Dataset"


class Recipe(NamedTuple):
    """A recipe of the cookbook. `{NAME:STEP:KIND}` stands for a checkpoint's path: the state's or the sampler's.

    The table has the means of the metric over so many first and last steps: `mean`.
    """

    module: str
    arguments: str
    metric: str
    mean: int = 1


RECIPES: Mapping[str, Recipe] = {
    "supervised": Recipe(
        "recipes.chat_sl.train",
        "dataset=no_robots batch_size=32 learning_rate=2e-3 max_length=128 max_steps=30 eval_every=5 save_every=5",
        metric="test/nll",
    ),
    "preferences": Recipe(
        "recipes.preference.dpo.train",
        "dataset=hhh batch_size=8 learning_rate=5e-4 max_length=128 max_steps=20",
        metric="margin",
    ),
    "shorter": Recipe(
        "recipes.preference.shorter.train",
        "batch_size=4 group_size=4 learning_rate=5e-4 max_tokens=48 eval_every=0 max_steps=20",
        metric="env/all/ac_tokens_per_turn",
    ),
    "verifier": Recipe(
        "recipes.math_rl.train",
        "loss_fn=importance_sampling load_checkpoint_path={supervised:final:state} group_size=8 groups_per_batch=8 "
        "learning_rate=3e-4 max_tokens=6 max_steps=20 eval_every=0 save_every=0",
        metric="env/all/correct",
        mean=5,
    ),
    "distillation": Recipe(
        "recipes.distillation.on_policy_distillation",
        "dataset=tulu3 load_checkpoint_path={supervised:000005:state} teacher_checkpoint={supervised:final:sampler} "
        "teacher_model={model} lora_rank=32 group_size=4 groups_per_batch=12 learning_rate=3e-4 max_tokens=5 "
        "max_steps=15 eval_every=0 save_every=0",
        metric="teacher_kl",
    ),
    "calls": Recipe(
        "recipes.chat_sl.train",
        "dataset=calls.jsonl train_on_what=all_assistant_messages batch_size=4 learning_rate=1e-3 max_length=600 "
        "max_steps=16 eval_every=0 save_every=0",
        metric="train_mean_nll",
    ),
    "tools": Recipe(
        "recipes.code_rl.train",
        "load_checkpoint_path={calls:final:state} group_size=4 groups_per_batch=8 learning_rate=4e-4 max_tokens=64 "
        "max_steps=12 eval_every=100 save_every=0",
        metric="env/all/reward/total",
        mean=5,
    ),
}
EVALUATION = "evaluation"
EVALUATED = {
    "base": "",
    "student": "{supervised:000005:sampler}",
    "distilled": "{distillation:final:sampler}",
    "teacher": "{supervised:final:sampler}",
}
ADDITION = """
import json
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate

@task
def addition():
    rows = [Sample(**json.loads(line)) for line in (Path(__file__).parent / "additions.jsonl").read_text().splitlines()]
    return Task(dataset=MemoryDataset(rows, name="addition"), solver=generate(), scorer=match(numeric=True))
"""  # a task of inspect, which the evaluation reads
CALLS = """
import json
import sys
from pathlib import Path

from tinker_cookbook import renderers
from tinker_cookbook.recipes.code_rl import code_env
from tinker_cookbook.tokenizer_utils import get_tokenizer

renderer = renderers.get_renderer("qwen3_instruct", get_tokenizer(sys.argv[1]))
with Path("calls.jsonl").open("w") as file:
    for line in Path("tried.jsonl").read_text().splitlines():
        tried = json.loads(line)
        task = code_env.DeepcoderTask(problem=code_env._build_question(tried), tests=[])
        start = code_env._initial_messages(task, renderer, code_env.DeepcoderTool(task))
        call = json.dumps({"name": "check_solution", "arguments": {"code": tried["first"]}})
        status = {"status": "Success" if tried["passed"] else "Failed"}
        result = json.dumps({"passed": tried["passed"], "details": status})
        said = [f"<tool_call>\\n{call}\\n</tool_call>", result, f"```python\\n{tried['answer']}\\n```"]
        turns = [{"role": role, "content": text} for role, text in zip(("assistant", "tool", "assistant"), said)]
        file.write(json.dumps({"messages": start + turns}) + "\\n")
"""  # writes conversations with calls of the tool that code_rl has, with the prompts of code_rl


def write_data(folder: Path) -> None:
    """Write the data of all recipes: folders with the names of the datasets, and the task of the evaluation."""
    draw = random.Random(0)
    sums = draw.sample(list(itertools.product(range(101), repeat=2)), 1088)
    said = [(f"What is {first} + {second}?", str(first + second)) for first, second in sums]
    chats = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in said
    ]
    _write(folder / "HuggingFaceH4/no_robots/train.jsonl", chats[:960])
    _write(folder / "HuggingFaceH4/no_robots/test.jsonl", chats[960:1024])
    _write(folder / "allenai/tulu-3-sft-mixture/train.jsonl", chats[:960])
    _write(folder / "additions.jsonl", [{"input": question, "target": answer} for question, answer in said[1024:]])
    (folder / "addition_task.py").write_text(ADDITION, encoding="utf-8")
    things = (
        "a lemon",
        "snow",
        "grass",
        "the sea",
        "coal",
        "the sun",
        "a frog",
        "milk",
        "the night",
        "a rose",
        "honey",
    )
    asked = ("Tell me about {}.", "What do you think of {}?", "Describe {}.", "Why do people like {}?")
    chosen = ("I like {} a lot.", "I think {} is lovely.", "Ah, {}! How nice.", "Well, {} makes me glad.")
    rejected = ("I will not talk about {}.", "Oh, {} is of no use.", "Go away with {}.", "Sorry, {} bores me.")
    pairs = []
    for _ in range(512):
        thing = draw.choice(things)
        start = f"\n\nHuman: {draw.choice(asked).format(thing)}\n\nAssistant: "
        answers = {"chosen": draw.choice(chosen), "rejected": draw.choice(rejected)}
        pairs.append({side: start + answer.format(thing) for side, answer in answers.items()})
    _write(folder / "Anthropic/hh-rlhf/train.jsonl", pairs[:480])
    _write(folder / "Anthropic/hh-rlhf/test.jsonl", pairs[480:])
    tried = []
    for _ in range(160):
        task, passed = _task(draw), draw.random() < 0.3
        first = task.program if passed else task.wrong
        answer = task.program if draw.random() < 0.2 else first
        tried.append({"problem": task.problem, "first": first, "passed": passed, "answer": answer})
    _write(folder / "tried.jsonl", tried)
    names = ("primeintellect", "taco", "lcbv5", "codeforces")
    trained = {name: [_task(draw) for _ in range(100)] for name in names}
    known = {row["problem"] for row in tried} | {task.problem for tasks in trained.values() for task in tasks}
    fresh = (task for task in iter(lambda: _task(draw), None) if task.problem not in known)
    configs = []
    for name in names:
        files = []
        for split, tasks in (("train", trained[name]), ("test", itertools.islice(fresh, 48))):
            rows = [{"problem": task.problem, "tests": json.dumps(task.tests)} for task in tasks]
            _write(folder / CODE_TASKS / f"{name}_{split}.jsonl", rows)
            files.append({"split": split, "path": f"{name}_{split}.jsonl"})
        configs.append({"config_name": name, "data_files": files})
    readme = folder / CODE_TASKS / "README.md"
    readme.write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n", encoding="utf-8")


class _Task(NamedTuple):
    """A problem of operations on a number, the program that solves the problem, a wrong program, and tests."""

    problem: str
    program: str
    wrong: str
    tests: list[dict[str, str]]


def _task(draw: random.Random) -> _Task:
    """Return a task of one operation or of two. The wrong program has the numbers of the right one, and other signs."""
    signs = {"times": "*", "plus": "+", "minus": "-"}
    names = [draw.choice(list(signs)), *draw.choices(["plus", "minus"], k=draw.choice((0, 0, 1)))]
    numbers = draw.choices(range(2, 100), k=len(names))

    def formula(chosen: Iterable[str]) -> str:
        return " ".join(f"{sign} {number}" for sign, number in zip(chosen, numbers, strict=True))

    right = wrong = formula([signs[name] for name in names])
    while wrong == right:
        wrong = formula(draw.choices(list(signs.values()), k=len(names)))
    tests = [
        {"input": f"{given}\n", "output": f"{eval(f'{given} {right}')}\n"} for given in draw.choices(range(3, 51), k=2)
    ]
    problem = f"Read a number and print the number {formula(names)}.\n\n"
    return _Task(problem, f"print(int(input()) {right})", f"print(int(input()) {wrong})", tests)


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@contextlib.contextmanager
def serving(model: Path, folder: Path, *, dtype: str, port: int) -> Iterator[str]:
    """Run `rlhf tinker` with the model, and yield the URL."""
    config = {
        "run": {"name": "server", "dir": str(folder)},
        "policy": {"model": str(model), "dtype": dtype, "lora": {"rank": 32}},
        "service": {"max_length": 640, "max_adapters": 4},
    }
    file, log = folder / "tinker.yaml", folder / "server.log"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "rlhf.cli", "tinker", str(file), "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        ends = time.monotonic() + START_WITHIN_S
        while "serving http" not in log.read_text(encoding="utf-8"):
            if process.poll() is not None or time.monotonic() > ends:
                raise SystemExit(f"rlhf tinker did not start: see {log}")
            time.sleep(1.0)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120.0)


@contextlib.contextmanager
def judging() -> Iterator[str]:
    """Serve what code_rl asks of SandboxFusion: run a program on its tests, in the sandbox of our code rewards."""
    sandbox = Sandbox()

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            files = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["files"]
            program, tests = (base64.b64decode(files[name]).decode() for name in ("code.py", "test_cases.txt"))
            cases = json.loads(json.loads(tests)["input_output"])
            passed = all(
                sandbox.run(program, wall_s=6.0, stdin=given.encode()).stdout.split() == wanted.encode().split()
                for given, wanted in zip(cases["inputs"], cases["outputs"], strict=True)
            )
            body = json.dumps({"status": "Success" if passed else "Failed"}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Write nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/run_code"
        server.shutdown()


def _filled(arguments: str, folder: Path, model: Path) -> list[str]:
    """Return the arguments with the model and the paths of checkpoints."""

    def path(found: re.Match[str]) -> str:
        name, step, kind = found.groups()
        lines = (folder / name / "checkpoints.jsonl").read_text(encoding="utf-8").splitlines()
        paths = {row["name"]: row for row in map(json.loads, lines)}
        return str(paths[step][f"{kind}_path"])

    return re.sub(r"\{(\w+):(\w+):(\w+)\}", path, arguments.replace("{model}", str(model))).split()


def cook(name: str, folder: Path, model: Path, python: str, environment: Mapping[str, str]) -> None:
    """Run a recipe, and note its minutes."""
    begin = time.monotonic()

    def run(module: str, arguments: str, log: Path) -> str:
        command = [python, "-m", f"tinker_cookbook.{module}", f"model_name={model}", "renderer_name=qwen3_instruct"]
        command += _filled(arguments, folder, model)
        with log.open("w") as output:
            status = subprocess.run(
                command, cwd=folder, env=environment, stdout=output, stderr=output, timeout=ENDS_WITHIN_S
            ).returncode
        if status:
            raise SystemExit(f"{module} failed: see {log}")
        return log.read_text(encoding="utf-8")

    place = folder / name
    if name == EVALUATION:
        place.mkdir(exist_ok=True)
        scores = {}
        for of, path in EVALUATED.items():
            arguments = f"tasks=addition_task.py temperature=0.0 max_tokens=12 seed=1 log_dir={place}"
            arguments += path and f" model_path={path}"
            said = run("eval.run_inspect_evals", arguments, place / f"{of}.log")
            scores[of] = float(re.findall(r"addition/accuracy: ([0-9.]+)", said)[-1])
        (place / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    else:
        recipe = RECIPES[name]
        ends = f" log_path={place} behavior_if_log_dir_exists=delete"
        run(recipe.module, recipe.arguments + ends, folder / f"{name}.log")
    (place / "minutes.json").write_text(json.dumps((time.monotonic() - begin) / 60), encoding="utf-8")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return the steps and the values of a recipe's metric."""
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    metric = RECIPES[name].metric
    return [(row["step"], row[metric]) for row in rows if metric in row]


def table(folder: Path) -> str:
    """Return the results as a table in Markdown."""
    lines = ["| recipe | metric | before | after | minutes |", "|---|---|---|---|---|"]
    for name, recipe in RECIPES.items():
        values = [value for _, value in curve(folder, name)]
        first, last = (statistics.fmean(ends) for ends in (values[: recipe.mean], values[-recipe.mean :]))
        minutes = _read(folder / name / "minutes.json")
        lines.append(f"| `{recipe.module}` | `{recipe.metric}` | {first:.2f} | {last:.2f} | {minutes:.1f} |")
    base, *trained = _read(folder / EVALUATION / "scores.json").values()
    after = ", ".join(f"{score:.2f}" for score in trained)
    minutes = _read(folder / EVALUATION / "minutes.json")
    lines.append(f"| `eval.run_inspect_evals` | accuracy | {base:.2f} | {after} | {minutes:.1f} |")
    return "\n".join(lines)


def draw(folder: Path, output: Path) -> None:
    """Draw the curve of each recipe and the scores of the evaluation."""
    figure = Figure(figsize=(11.0, 5.0), layout="constrained")
    *panels, bars = figure.subplots(2, 4).flat
    for axes, (name, recipe) in zip(panels, RECIPES.items(), strict=True):
        steps, values = zip(*curve(folder, name), strict=True)
        axes.plot(steps, values, color=COLORS[0], linewidth=1.4, marker="o", markersize=2.5)
        axes.set_title(f"{recipe.module.removeprefix('recipes.').removesuffix('.train')}\n{recipe.metric}", fontsize=8)
        axes.set_xlabel("step", fontsize=8)
    scores = _read(folder / EVALUATION / "scores.json")
    bars.bar(list(scores), list(scores.values()), color=COLORS[: len(scores)])
    bars.set_title("eval.run_inspect_evals\naccuracy", fontsize=8)
    for axes in (*panels, bars):
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=144)


def main() -> None:
    """Start the server, run the recipes that have no results yet, print the table and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--python", default=sys.executable, help="the Python that has the tinker-cookbook")
    parser.add_argument("--model", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path, default=Path("runs/cookbook"))
    parser.add_argument("--port", type=int, default=8703)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "tinker_cookbook.png")
    args = parser.parse_args()
    folder, model = args.folder.resolve(), args.model.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in (*RECIPES, EVALUATION) if not (folder / name / "minutes.json").exists()]
    if missing:
        write_data(folder)
        with serving(model, folder, dtype=args.dtype, port=args.port) as url, judging() as judge:
            addresses = {"TINKER_BASE_URL": url, "TINKER_API_KEY": "tml-cookbook", "SANDBOX_URL": judge}
            subprocess.run([args.python, "-c", CALLS, str(model)], cwd=folder, check=True, timeout=START_WITHIN_S)
            for name in missing:
                cook(name, folder, model, args.python, os.environ | addresses)
    sys.stdout.write(table(folder) + "\n")
    draw(folder, args.output)


if __name__ == "__main__":
    main()
