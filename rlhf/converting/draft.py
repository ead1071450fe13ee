"""Hold the settings with their defaults, the keys converted so far, and what became of each setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, Literal

from rlhf.config.mistakes.explain import parse
from rlhf.config.mistakes.synonyms import SETTINGS, VALUES, Framework, Setting
from rlhf.config.problem import Problem
from rlhf.config.validation.run import problems
from rlhf.config.yaml_tree import Key, from_yaml

NEEDED = ("policy.model", "data.train")  # keys that a file may leave to the command line
NULL = object()  # null as the value of a key; None leaves the key out
_OF_CRITIC = {f"algorithm.{key}" for key in ("lam", "value_clip", "critic_lr", "critic_warmup_steps")}
Kind = Literal["converted", "same", "inert", "none", "unknown"]


@dataclass(frozen=True, slots=True)
class SettingOutcome:
    """Say what became of a setting, with a sentence for all kinds but `converted`.

    `same`: this framework does so without a key. `inert`: a key exists, but has no effect in this run. `none`: there is
    no counterpart. `unknown`: no table names the setting.
    """

    kind: Kind
    text: str = ""


@dataclass
class Draft:
    """The settings of a run of another framework, and the keys of its counterpart here."""

    framework: Framework
    method: str
    gpus: int | None
    file: Mapping[str, Any]  # the settings by the names in the file
    settings: dict[str, Any] = field(default_factory=dict)  # by the first name of the row
    written: dict[str, list[str]] = field(default_factory=dict)  # the names in the file, by the first name
    outcomes: dict[str, SettingOutcome] = field(default_factory=dict)  # by the name in the file
    values: dict[str, Any] = field(default_factory=dict)  # by dotted key of ours
    looks: list[str] = field(default_factory=list)  # sentences about conversions with a difference
    sources: dict[str, set[str]] = field(default_factory=dict)  # the settings behind a key of ours
    rows: dict[str, Setting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Sort the settings by their rows, and copy those that need no rule."""
        self.rows = {name: row for row in SETTINGS[self.framework] for name in row.names}
        for name, value in self.file.items():
            ends = [len(name), *(at for at in range(len(name) - 1, 0, -1) if name[at] == ".")]
            start = next((name[:end] for end in ends if name[:end] in self.rows), None)
            if start is None:
                self.outcomes[name] = SettingOutcome("unknown", "is in no table of settings")
                continue
            row = self.rows[start]
            at = row.names[0] if row.how in ("copy", "code") else start
            self.settings[at] = (
                {**(self.settings.get(at) or {}), name[len(start) + 1 :]: value} if name != start else value
            )
            self.written.setdefault(at, []).append(name)
        for row in SETTINGS[self.framework]:
            if row.how == "copy":
                self.put(row.keys, self(row.names[0]), row.names[0])

    def __call__(self, name: str) -> Any:
        """Return the value of a setting, or the default of the framework for this trainer, or None."""
        row = self.rows[name]
        at = row.names[0] if row.how in ("copy", "code") else name
        if (value := self.settings.get(at)) is not None:
            return value
        default = from_yaml(row.default) if row.default else None
        return default.get(self.method) if isinstance(default, dict) else default

    def put(self, key: str, value: Any, *names: str) -> None:
        """Set a key of ours to a value that follows from the named settings. None leaves the key as it is."""
        if value is None:
            return
        words = VALUES.get(".".join(key.split(".")[-2:]), VALUES.get(key.rpartition(".")[2], {}))
        self.values[key] = None if value is NULL else words.get(value, value) if isinstance(value, str) else value
        self.sources[key] = {self.rows[name].names[0] for name in names}

    def lack(self, name: str, text: str) -> None:
        """Say why a setting has no counterpart, if the file has it."""
        for written in self.written.get(self.rows[name].names[0], ()):
            self.outcomes[written] = SettingOutcome("none", text)

    def fit(self) -> list[Problem]:
        """Remove keys refused by the schema in this run, then written defaults. Return all other problems."""
        while True:
            config = parse(with_placeholders(self.values))
            found = list(config if isinstance(config, tuple) else problems(config))
            refused = {key: problem.text for problem in found for key in self._at(problem.key)}
            if not refused:
                break
            for key, text in refused.items():
                self._remove(key, text)
        for key in [key for key in self.values if not self.sources[key] & self.written.keys()]:
            rest = {other: value for other, value in self.values.items() if other != key}
            if not found and parse(with_placeholders(rest)) == config:
                self.values = rest
        for name, names in self.written.items():
            is_used = any(name in self.sources[key] for key in self.values)
            for written in names:
                outcome = self.outcomes.get(written)
                if outcome is None or (is_used and outcome.kind == "inert"):
                    self.outcomes[written] = SettingOutcome("converted") if is_used else self._outcome(name)
        return found

    def _at(self, key: Key) -> list[str]:
        """Return the keys at or below a key, or the mapping that holds it."""
        dotted = ".".join(key)
        below = [name for name in self.values if f"{name}.".startswith(f"{dotted}.")]
        return below or [name for name in self.values if dotted.startswith(f"{name}.")]

    def _remove(self, key: str, text: str) -> None:
        value, reason = self.values.pop(key), f"{key}: {shorten(text.partition(';')[0], 160)}"
        is_inert = text.startswith("has no effect here") or not value or key in _OF_CRITIC
        kind: Kind = "inert" if is_inert or (key, value) == ("algorithm.gamma", 1) else "none"
        for name in self.sources[key]:
            for written in self.written.get(name, ()):
                self.outcomes[written] = SettingOutcome(kind, reason)

    def _outcome(self, name: str) -> SettingOutcome:
        """Judge a setting from which no key follows, by its row."""
        row = self.rows[name]
        rule, _, argument = row.how.partition(":")
        value = self.settings[name]
        if rule == "like":
            is_same = value is None or value == self(argument)
        else:
            is_same = rule != "none" and (not argument or str(value).lower() in argument.lower().split("|"))
        return SettingOutcome(
            "same" if is_same else "none", row.note or "changes nothing here beside the other settings of the file"
        )


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as a tree of sections."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = {**value, **node.get(last, {})} if isinstance(value, dict) else value
    return tree


def with_placeholders(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree, with placeholders for a model and data that the file does not name."""
    tree = nested(values)
    for section, key in (key.split(".") for key in NEEDED):
        tree.setdefault(section, {}).setdefault(key, "TO_BE_NAMED")
    return tree
