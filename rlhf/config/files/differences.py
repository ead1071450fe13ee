"""Compare two configurations of a run, apart from the folder, to decide whether a run can continue a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.config.files.dump import dump_yaml
from rlhf.config.schema.stages import Stage
from rlhf.config.yaml_tree import from_yaml, kind
from rlhf.tracking.logs import redact_config


def differences(there: Any, here: Any, key: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield `key is ... there and ... here` for each value different in two trees."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for name in {**there, **here}:
            yield from differences(there.get(name), here.get(name), (*key, name))
    elif there != here:
        yield f"{'.'.join(key)} is {kind(there)} there and {kind(here)} here"


def home(stage: Stage) -> Path:
    return stage.run.dir / stage.run.name.partition("/")[0]


def portable(tree: Any, folder: Path) -> Any:
    """Return the tree with every path below `folder` made relative, since the folder may be moved."""
    if isinstance(tree, Mapping):
        return {name: portable(value, folder) for name, value in tree.items()}
    if isinstance(tree, list):
        return [portable(value, folder) for value in tree]
    if isinstance(tree, str):
        for start in (folder, folder.absolute()):
            if Path(tree).is_relative_to(start):
                return f"<run>/{Path(tree).relative_to(start)}"
    return tree


def changes(there: Stage, here: Stage) -> list[str]:
    """Return the differences that affect a stage's results."""
    return list(differences(_settings(there), _settings(here)))


def _settings(stage: Stage) -> Any:
    """Return the masked values in effect, without location, tracking, cluster and checkpoint settings."""
    tree = redact_config(from_yaml(dump_yaml(stage)))
    tree["run"] = {"seed": stage.run.seed}
    for part in (tree, *tree.get("stages", {}).values()):
        for section in ("tracking", "cluster"):
            part.pop(section, None)
        for key in ("checkpoint_every", "keep_checkpoints", "preemption_grace_s"):
            part.get("train", {}).pop(key, None)
    return portable(tree, home(stage))
