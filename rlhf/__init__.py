"""Post-training on Ray. What the command line does, as typed calls; importing this imports nothing heavy.

loaded = rlhf.load_config("configs/ppo_smollm2.yaml", ["train.steps=3"])
sys.stdout.write(rlhf.plan(loaded))
folder = rlhf.train(loaded)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.errors import RunError, UserError

if TYPE_CHECKING:
    from rlhf.config.load import LoadedConfig
    from rlhf.config.merge import MergeRun
    from rlhf.config.root import Config

__all__ = ["RunError", "UserError", "export", "load_config", "load_merge", "merge", "plan", "train"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """The checked configuration of a YAML file with `section.key=value` overrides. UserError names every mistake."""
    from rlhf.config.load import load

    return load(path, overrides)


def plan(
    config: str | Path | Config | LoadedConfig, overrides: Sequence[str] = (), *, cluster: str | None = None
) -> str:
    """What follows from a configuration, as `rlhf plan` prints it. `cluster`: nodes such as `2*cpu=96,gpu=8` to fit it
    into."""
    from rlhf.config.plan import render

    return render(_loaded(config, overrides), cluster=cluster)


def train(
    config: str | Path | Config | LoadedConfig,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    quiet: bool = False,
) -> Path:
    """Run it, all stages of a pipeline in turn. Returns the folder of the run or the pipeline.

    UserError: the input is wrong. RunError: something failed at run time.
    """
    from rlhf.cli import launch

    loaded = _loaded(config, overrides)
    launch(loaded, resume=resume, quiet=quiet)
    return loaded.folder


def export(run: str | Path, folder: str | Path, *, step: int | None = None) -> None:
    """Write the checkpoint of a step (the latest if None) of the run in folder `run` as a Hugging Face folder."""
    from rlhf.cli import export as write

    write(Path(run), Path(folder), step=step)


def load_merge(path: str | Path, overrides: Sequence[str] = ()) -> MergeRun:
    """The checked merge of a YAML file with `merge.key=value` overrides. UserError names every mistake."""
    from rlhf.config.merge import load_merge as load

    return load(path, overrides)


def merge(config: str | Path | MergeRun, overrides: Sequence[str] = (), *, quiet: bool = False) -> Path:
    """Merge models or adapters. Returns the folder that was made.

    UserError: the input is wrong. RunError: something failed at run time.
    """
    from rlhf.cli import merge as run

    if isinstance(config, str | Path):
        config = load_merge(config, overrides)
    elif overrides:
        raise UserError("overrides change a file; build the MergeRun with the values you want instead")
    run(config, quiet=quiet)
    return config.out


def _loaded(config: str | Path | Config | LoadedConfig, overrides: Sequence[str]) -> LoadedConfig:
    from rlhf.config.load import checked
    from rlhf.config.root import Config

    if isinstance(config, str | Path):
        return load_config(config, overrides)
    if overrides:
        raise UserError("overrides change a file; build the Config with the values you want instead")
    return checked(config) if isinstance(config, Config) else config
