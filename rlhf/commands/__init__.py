"""The commands, one module each, in the order of the help.

A module has the function of the Python API (`rlhf.train` and so on) and the presenter of the result on the command
line. To keep help fast, a function itself imports actors and everything heavy.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf.commands import (
    convert,
    dashboard,
    doctor,
    evaluate,
    export,
    generate,
    merge,
    models,
    plan,
    play,
    quickstart,
    recipes,
    report,
    reward,
    serve,
    serve_reward,
    submit,
    sweep,
    tinker,
    train,
    view,
)
from rlhf.commands.command import Command

COMMANDS: Mapping[str, Command] = {
    "train": train.COMMAND,
    "plan": plan.COMMAND,
    "sweep": sweep.COMMAND,
    "convert": convert.COMMAND,
    "quickstart": quickstart.COMMAND,
    "recipes": recipes.COMMAND,
    "models": models.COMMAND,
    "export": export.COMMAND,
    "merge": merge.COMMAND,
    "generate": generate.COMMAND,
    "eval": evaluate.COMMAND,
    "serve": serve.COMMAND,
    "tinker": tinker.COMMAND,
    "reward": reward.COMMAND,
    "play": play.COMMAND,
    "serve-reward": serve_reward.COMMAND,
    "view": view.COMMAND,
    "report": report.COMMAND,
    "dashboard": dashboard.COMMAND,
    "submit": submit.COMMAND,
    "doctor": doctor.COMMAND,
}
