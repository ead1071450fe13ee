"""A user's script without a main guard: all code of its run is in this file, and a module stands beside it."""

import json
import sys

import beside

import rlhf
from rlhf.tracking.sinks.backends import TrackerBackend

RAISES = sys.argv[2] if len(sys.argv) > 2 else ""  # the object that fails
STARTED: list[int] = [1]
CALLS: list[list[object]] = []


def closeness(scale: float):
    def close(prompt: str, response: str) -> float:
        if RAISES == "reward":
            raise ValueError("no score")
        return scale * beside.LIMIT - abs(len(response) - STARTED[0])

    return close


class Naming:
    """Ends a conversation at the second turn, with the number of turns as reward."""

    def __init__(self, last: int) -> None:
        self.last = last

    def reset(self, seed: int) -> str:
        self.turns = 0
        if RAISES == "environment":
            raise ValueError("no start")
        return "go "

    def step(self, response: str) -> tuple[str, float, bool]:
        self.turns += 1
        return "on ", float(self.turns), self.turns == self.last


class Lines(TrackerBackend):
    """Keeps the steps in memory, in the script."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, step) -> None:
        if RAISES == "tracker":
            raise ValueError("no line")
        self.steps.append(step.step)


class Recorder(rlhf.Callback):
    def on_start(self, run) -> None:
        CALLS.append(["start", run.name, run.done_steps])

    def on_evaluation(self, step, metrics) -> None:
        CALLS.append(["evaluation", step, metrics["eval/heldout/score"]])

    def on_step(self, step, metrics) -> None:
        CALLS.append(["step", step, metrics["rewards/close/mean"], metrics["rewards/turns/mean"]])
        if RAISES == "callback" and step == 1:
            raise ValueError("no step")
        if step == 3:
            raise rlhf.StopRun("three are enough")

    def on_checkpoint(self, step, folder) -> None:
        CALLS.append(["checkpoint", step, (folder / "controller.json").is_file()])

    def on_end(self, error) -> None:
        CALLS.append(["end", error and type(error).__name__])


lines = Lines()
try:
    rlhf.train(
        {
            "run": {"name": "demo", "dir": sys.argv[1]},
            "policy": {"model": "tiny:llama", "dtype": "float32"},
            "algorithm": {"name": "grpo"},
            "data": {"train": "prompts.jsonl", "eval": "prompts.jsonl", "max_prompt_tokens": 32},
            "rollouts": {
                "prompts_per_step": 2,
                "samples_per_prompt": 2,
                "max_new_tokens": 4,
                "environment": {"name": Naming, "args": {"last": 2}, "max_tokens": 64},
            },
            "rewards": {"close": {"function": closeness(0.5)}, "turns": {"environment": True}},
            "train": {
                **{"steps": 4, "lr": 1e-3, "sequences_per_update": 4, "max_tokens_per_microbatch": 256},
                "checkpoint_every": 2,
            },
            "eval": {"every": 2},
            "cluster": {"object_store_gib": 0.25},
        },
        callbacks=[Recorder()],
        trackers=[lines],
        resume="resume" in sys.argv,
    )
finally:
    sys.stdout.write(json.dumps({"calls": CALLS, "steps": lines.steps}) + "\n")
