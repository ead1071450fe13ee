"""Convert a file of TRL, verl or OpenRLHF to the YAML of this framework, and say what became of each setting."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from rlhf.config.mistakes.synonyms import Framework
from rlhf.config.schema.root import Config
from rlhf.config.yaml_tree import to_yaml
from rlhf.converting.draft import NEEDED, Draft, SettingOutcome, nested
from rlhf.converting.rules import apply_rules, folder_name
from rlhf.converting.sources import METHODS, read_source
from rlhf.errors import UserError
from rlhf.tracking.logs import redact

_TITLES = {
    "unknown": "Unknown here",
    "none": "No counterpart",
    "inert": "Without effect in this run",
    "same": "The same without a key",
}


@dataclass(frozen=True, slots=True)
class Conversion:
    """Hold the converted configuration, and what became of each setting of the file, by its name there."""

    yaml: str
    """The configuration, with the remarks as comments at the top."""
    outcomes: Mapping[str, SettingOutcome]
    remarks: tuple[str, ...]
    """What to look at: settings without a counterpart, conversions with a difference, and keys that are missing."""


def convert_file(path: Path, framework: Framework, *, method: str | None, gpus: int | None) -> Conversion:
    """Convert a file. UserError: the file cannot be read, or does not say which trainer it configures."""
    source = read_source(path, framework)
    chosen, known = method or source.method, METHODS[framework]
    if chosen not in known:
        what = f"is {chosen!r}" if chosen else "is not given, and the file does not name it"
        raise UserError(f"{path}: the trainer {what}; name the method with --method: {', '.join(known)}")
    draft = Draft(framework, chosen, gpus or source.gpus, source.settings)
    draft.outcomes |= {name: SettingOutcome("none", text) for name, text in source.unread.items()}
    draft.put("run.name", folder_name(path.stem) or "converted")
    apply_rules(draft)
    if source.zero_stage is not None:
        draft.put("cluster.roles.policy.zero_stage", source.zero_stage)
    missing = [f"{'.'.join(problem.key)}: {shorten(problem.text, 160)}" for problem in draft.fit()]
    if source.has_branches:
        missing.append("the script has `if` or `case`, and all branches are read; check the values that they set")
    tree = nested(draft.values)
    for key in NEEDED:
        section, _, name = key.partition(".")
        if name not in tree.get(section, {}):
            missing.append(f"{key}: the file does not name it; add it, or give `{key}=...` on the command line")
    if variables := sorted({*re.findall(r"\$\{\w+\}", str(source.settings))}):
        missing.append(f"{', '.join(variables)}: the file gives no value to the variable; write the value")
    remarks = (*draft.looks, *missing, *_listed(draft.outcomes, ("unknown", "none", "inert")))
    notes = [f"Converted from {framework} by `rlhf convert`: {path.name}. `rlhf plan FILE` checks the file."]
    notes += [f"Look at: {text}" for text in (*draft.looks, *missing)]
    notes += _listed(draft.outcomes, tuple(_TITLES))
    head = "".join(f"# {line}\n" for note in notes for line in redact(note).splitlines())
    algorithm = tree.get("algorithm", {})
    tree["algorithm"] = {key: algorithm[key] for key in sorted(algorithm, key=lambda key: key != "name")}
    text = head + to_yaml({section: tree[section] for section in Config.model_fields if section in tree})
    return Conversion(text, draft.outcomes, tuple(redact(remark) for remark in remarks))


def _listed(outcomes: Mapping[str, SettingOutcome], kinds: tuple[str, ...]) -> Iterator[str]:
    """Yield a line for each reason, with all settings that have the reason."""
    for kind in kinds:
        by_text: dict[str, list[str]] = {}
        for name, outcome in outcomes.items():
            if outcome.kind == kind:
                by_text.setdefault(outcome.text, []).append(name)
        yield from (f"{_TITLES[kind]}: {', '.join(names)}: {text}" for text, names in by_text.items())
