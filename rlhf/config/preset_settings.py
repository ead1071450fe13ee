"""Complete a run on presets with the presets' settings: the rewards, and how to treat rows that cannot be used.

The settings enter the tree before it is parsed. config.resolved.yaml and `rlhf plan` therefore show the settings, and
every key that the tree already has stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.data.presets import SETTINGS, Preset, presets


def with_preset_settings(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tree of a run with the settings of its training presets. A set that is no preset: the same tree."""
    data = values.get("data")
    named = _training_presets(data.get("train")) if isinstance(data, Mapping) else []
    if not named or not isinstance(data, Mapping):
        return values
    settings = {} if data.get("too_long") == "error" else {**SETTINGS, **data}
    completed = {**values, "data": settings or data}
    if values.get("rollouts") is not None and "rewards" not in values and (rewards := _rewards(named)):
        completed["rewards"] = rewards
    return completed


def _training_presets(train: Any) -> list[Preset]:
    """Return the presets of data.train, or nothing if a set is no preset."""
    sets: list[Any] = [train] if isinstance(train, Mapping) and "preset" in train else []
    if isinstance(train, Mapping) and not sets:
        sets = [section.get("source") if isinstance(section, Mapping) else None for section in train.values()]
    names = [str(source.get("preset")) if isinstance(source, Mapping) else "" for source in sets]
    return [presets()[name] for name in names] if all(name in presets() for name in names) else []


def _rewards(named: list[Preset]) -> dict[str, Any]:
    """Return the rewards of all presets. If presets differ, each reward has the presets' rows in `only`."""
    of_presets: list[tuple[Mapping[str, Any], list[str]]] = []
    for preset in named:
        group = next((names for rewards, names in of_presets if rewards == preset.rewards), None)
        if group is None:
            of_presets.append((preset.rewards, [preset.name]))
        elif preset.name not in group:
            group.append(preset.name)
    if len(of_presets) == 1:
        return {name: dict(reward) for name, reward in of_presets[0][0].items()}
    return {
        f"{name}-{names[0]}": {**reward, "only": {"preset": names}}
        for rewards, names in of_presets
        for name, reward in rewards.items()
    }
