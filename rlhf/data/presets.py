"""Map the rows of public data sets to our columns. presets.yaml names hub address, columns, rewards and licence.

This module opens no data set: `rlhf.data.sources` reads the rows, and rlhf.config takes a preset's settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Columns = Mapping[str, Any]

SETTINGS = {"too_long": "skip", "max_unusable_fraction": 0.1}  # of `data`, unless the run sets them: rows are not ours
_REQUIRED_BY_REWARDS = ("answer", "tests", "test_code")
_FIELD = re.compile(r"\{([A-Za-z_][\w.]*)\}")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class LeftOut(Exception):
    """Raised for a row that a preset leaves out; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetSource:
    """A preset as named in a configuration (PresetConfig)."""

    preset: str
    split: str = "train"
    size: int | None = None
    path: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        return f"{self.path or self.preset}[{self.split}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A public data set, as described at the top of presets.yaml."""

    name: str
    hub: str
    license: str
    use: str
    columns: Mapping[str, Any]
    subset: str | None = None
    train: str | None = "train"
    eval: str | None = None
    keep: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    drop: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    distinct: bool = False
    rewards: Mapping[str, Any] = field(default_factory=dict)

    def split(self, name: str) -> str:
        """Return the data set's name of a split. `train` and `eval` are ours. ValueError: there is no such split."""
        split = {"train": self.train, "eval": self.eval}.get(name, name)
        if split is None:
            what = "training" if name == "train" else "held-out"
            raise ValueError(f"preset {self.name} has no {what} split; {self.hub} is for {self.use}")
        return split

    def convert(self, row: Columns) -> dict[str, Any]:
        """Return a row with our columns, and the preset's name in `preset`.

        Raise LeftOut for a row that is not used, and KeyError, IndexError, TypeError or ValueError for a row of another
        form than the data set's.
        """
        for column, values in self.keep.items():
            if row[column] not in values:
                raise LeftOut(f"{column} is not {' or '.join(map(str, values))}")
        for column, values in self.drop.items():
            if row[column] in values:
                raise LeftOut(f"{column} is {row[column]}")
        converted = {name: _value(form, row) for name, form in self.columns.items()}
        for name in _REQUIRED_BY_REWARDS:
            if name in converted and converted[name] in (None, "", []):
                raise LeftOut(f"there is no {name}")
        return converted | {"preset": self.name}


@cache
def presets() -> Mapping[str, Preset]:
    """Return all presets by name, in the order of the file."""
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    values = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the C parser needs libyaml
    return {name: Preset(name=name, **keys) for name, keys in values.items()}


def presets_table() -> str:
    """Return the table of docs/data.md, in Markdown."""
    lines = ["| preset | data set | splits `train`, `eval` | use | rewards | licence |", "|---|---|---|---|---|---|"]
    for preset in presets().values():
        hub = preset.hub if preset.subset in (None, "default") else f"{preset.hub}, {preset.subset}"
        rewards = ", ".join(f"`{reward['function']}`" for reward in preset.rewards.values()) or "-"
        splits = f"{preset.train or '-'}, {preset.eval or '-'}"
        lines.append(f"| `{preset.name}` | {hub} | {splits} | {preset.use} | {rewards} | {preset.license} |")
    return "\n".join(lines)


def _value(form: Any, row: Columns) -> Any:
    """Return the value of a form of presets.yaml for a row."""
    if isinstance(form, list):
        turns = [(role, _value(content, row)) for turn in form for role, content in turn.items()]
        return [{"role": role, "content": content} for role, content in turns if content or role == "assistant"]
    if isinstance(form, Mapping):
        ((name, columns),) = form.items()
        return _FORMS[name](*(_at(row, column) for column in ([columns] if isinstance(columns, str) else columns)))
    if _FIELD.search(form):
        return _FIELD.sub(lambda match: str(_at(row, match[1])), form)
    return _at(row, form)


def _at(row: Columns, path: str) -> Any:
    value: Any = row
    for part in path.split("."):
        value = value[int(part)] if part.isdigit() else value[part]
    return value


def _after_hashes(answer: str) -> str:
    """Return the text after the last `####`, the final answer in GSM8K."""
    return answer.rpartition("####")[2].strip()


def _last_boxed(solution: str) -> str:
    """Return the content of the last \\boxed{...}, or an empty string."""
    starts = [match.end() for match in _BOXED.finditer(solution)]
    if not starts:
        return ""
    text, depth = solution[starts[-1] :], 0
    if not text.startswith("{"):  # \boxed 5
        return re.split(r"[\s$]", text, maxsplit=1)[0]
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:place].strip()
    return ""


def _sharegpt(turns: Sequence[Mapping[str, str]], system: str = "") -> list[Columns]:
    """Return messages for turns with the fields `from` and `value`."""
    if any(turn["from"] not in _ROLES for turn in turns):
        raise LeftOut("a turn is of another role than human, gpt and system")
    messages: list[Columns] = [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _transcript(text: str) -> list[Columns]:
    """Return messages for a text of turns that begin with `Human:` and `Assistant:`. An open last turn is left out."""
    before, *parts = _TURN.split(text)
    turns: list[Columns] = [
        {"role": {"Human": "user", "Assistant": "assistant"}[name], "content": content.strip()}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if turns and not turns[-1]["content"] and turns[-1]["role"] == "assistant":
        turns.pop()
    if before.strip() or not turns or not all(turn["content"] for turn in turns):
        raise LeftOut("the transcript has an empty turn, or text before the first turn")
    return turns


def _dialogue(text: str) -> list[Columns]:
    turns = _transcript(text)
    if turns[-1]["role"] != "assistant":
        raise LeftOut("the transcript ends without an answer")
    return turns


def _ranked(answers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if len(answers) < 2:
        raise LeftOut("there are fewer than two answers")
    return sorted(answers, key=lambda answer: float(answer["rank"]))


def _by_sign(number: float, if_negative: Any, if_positive: Any) -> Any:
    return if_negative if number < 0 else if_positive


_FORMS: dict[str, Callable[..., Any]] = {
    "after_hashes": _after_hashes,
    "best": lambda answers: _ranked(answers)[0]["answer"],
    "by_sign": _by_sign,
    "dialogue": _dialogue,
    "last_boxed": _last_boxed,
    "sharegpt": _sharegpt,
    "transcript": _transcript,
    "worst": lambda answers: _ranked(answers)[-1]["answer"],
}

if __name__ == "__main__":
    print(presets_table())  # noqa: T201
