"""Write docs/configuration.md from the schema: `python -m rlhf.config.files.docs > docs/configuration.md`.

The text comes from the docstrings of the sections and their fields; this module describes no keys.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

from pydantic.fields import FieldInfo

from rlhf.algorithms.section import Section
from rlhf.config.mistakes.explain import expected
from rlhf.config.mistakes.schema_keys import is_section, members
from rlhf.config.schema.evaluate import EvaluationStage
from rlhf.config.schema.merge import MergeFile
from rlhf.config.schema.root import Config
from rlhf.config.schema.sweep import SweepFile

HEAD = """\
# Configuration

Generated from the schema by `python -m rlhf.config.files.docs > docs/configuration.md`; edit the docstrings in
`rlhf/config/` and `rlhf/algorithms/`.

One YAML file describes one run, or a pipeline of runs. Every key is typed. An unknown key is an error, and the message
suggests a key. A key without effect is an error too: a critic with GRPO, `rollouts` with supervised fine-tuning, or the
clip range with one optimizer step per batch. `rlhf plan CONFIG` checks a file and shows the derived values: batch
arithmetic, optimizer steps, placement and weight transport. The run folder gets `config.resolved.yaml` with every value
in effect. `rlhf train` on this file repeats the run.

{contents}
## On the command line

`rlhf train FILE section.key=value ...` sets any key, whether the file has it or not:

```
rlhf train configs/ppo_smollm2.yaml train.lr=3e-6 rollouts.stop='["\\n"]' policy.lora.rank=8
```

Values are YAML: `null`, `true`, numbers, quoted or plain strings, `[lists]`, `{mappings: of values}`. A string with
`: ` or ` #` in it needs YAML's own quotes. Only `true` and `false` are boolean values, so `tracking.wandb=off` is a
string. A key given twice is an error.

## A file on top of another

`base: FILE` at the top of a file names a file to start from. The path is relative to the file, or is the name of a
recipe of the library. Most files in `configs/` differ from another one in a few lines:

```yaml
base: grpo_smollm2.yaml
run: {name: dapo-smollm2}
algorithm: {name: dapo, clip_low: 0.2, clip_high: 0.28, overlong: {buffer: 32, factor: 1.0}}
rollouts: {dynamic_sampling: {}}
train: {sequences_per_update: 16}
```

1. Mappings are merged key by key. All other values, lists among them, replace those of the base.
2. A section of another kind replaces the section of the base, since keys of the old kind do not belong to it. This
   holds for an `algorithm`, an `environment` or a sweep's `method` with another `name`, for a data source with another
   `task` or form, and for a reward with another `function`, `url`, `role` or `environment`.
3. `null` sets a key to null if null is one of its values. Otherwise it takes back what the base gives:
   `rewards: {correct: null}` removes an inherited reward, and `train: {eps: null}` restores the default.
4. An inherited key without effect is an error as always. The message names its line in the base.
5. A base may have a base. A circle is an error.
6. A stage of a pipeline may have a `base` too, the file of a single run. The stage takes everything but its `run`.
7. A sweep's inline `config` may have a `base`, and so may a mapping in Python, relative to the current folder.
   `rlhf submit` packs all bases. `config.resolved.yaml` has every value and no `base`.

## Pipelines

A file with `stages:`, a mapping of stage names to sections, is a pipeline. Its stages run in the order of the file,
each in a separate folder, `<run.dir>/<run.name>/<stage>/`. A stage trains a model, merges models or evaluates a model.

```yaml
run: {name: demo}
policy: {dtype: float32}
data: {eval: heldout.jsonl}
rollouts: {prompts_per_step: 64, samples_per_prompt: 4}
rewards: {correct: {function: math_answer}}
stages:
  sft:
    policy: {model: HuggingFaceTB/SmolLM2-135M-Instruct}
    algorithm: {name: sft}
    data: {train: demonstrations.jsonl}
    train: {steps: 200, lr: 1e-5, sequences_per_update: 32}
  ppo:
    policy: {model: stage:sft}
    algorithm: {name: ppo}
    data: {train: prompts.jsonl}
    train: {steps: 100, lr: 1e-6, sequences_per_update: 128}
  soup:
    merge: {method: linear, models: {sft: {model: stage:sft}, ppo: {model: stage:ppo}}}
  judge:
    evaluate: {model: stage:soup, against: stage:ppo, data: heldout.jsonl, rewards: {correct: {function: math_answer}}}
```

1. Sections at the top are shared. Each stage merges its sections over them, key by key.
2. A shared key is left out of a stage that cannot use it (here `rollouts` and `rewards` in `sft`). A shared key is an
   error if no stage uses it, because no stage can or because every stage overrides it. The keys of a stage follow the
   rules of a single run.
3. Only the top has `run`.
4. Each stage has exactly one of `algorithm` (it trains), `merge` ([merging](merging.md)) and `evaluate`
   ([evaluation](evaluation.md)). A merge has no other section, and an evaluation only `cluster` and `tracking`. Other
   shared sections are left out.
5. `stage:NAME` as a model or adapter is the final model or adapter of an earlier stage.
6. All stages run in one Ray with the same `cluster.address` and `cluster.object_store_gib`.
7. On the command line, `train.lr=1e-5` sets the shared key, and `stages.ppo.train.lr=1e-5` sets the key of one stage.

## Keys

Keys marked "required" have no default. All other keys are optional.
"""


MERGE = """
## Keys of a merge

A file for `rlhf merge` has only this section. A merge stage has it too, without `out`. [merging](merging.md) lists the
keys of each method.
"""

EVALUATION = """
## Keys of an evaluation

An evaluation stage has this section. [evaluation](evaluation.md) describes the metrics.
"""


SWEEP = """
## Keys of a sweep

A file for `rlhf sweep` has only this section. [sweeps](sweeps.md) describes each method.
"""


def render() -> str:
    """Return the whole page as Markdown."""
    page = _Page()
    parts = [HEAD, page.sections(Config), MERGE, page.sections(MergeFile), EVALUATION]
    parts += [page.keys("evaluate", EvaluationStage.model_fields["evaluate"]), SWEEP, page.sections(SweepFile)]
    return "".join(parts).replace("{contents}", _contents("".join(parts)))


class _Page:
    """Write the sections of the schema. Each class is described once, and other keys link to it."""

    def __init__(self) -> None:
        self.titles: dict[type[Section], str] = {}  # classes already described, or scheduled to be described

    def sections(self, root: type[Section]) -> str:
        """Return every section of a file."""
        return "".join(self.keys(name, field) for name, field in root.model_fields.items())

    def keys(self, path: str, field: FieldInfo, owner: str = "") -> str:
        """Describe the new classes at and below a key.

        owner: the algorithm or method whose section the key belongs to.
        """
        new = [(at, section) for at, section in _sections(path, field) if section not in self.titles]
        self.titles |= {section: _title(at, section, owner) for at, section in new}
        return "".join(self._section(at, section, field, _name(section, at) or owner) for at, section in new)

    def _section(self, path: str, section: type[Section], field: FieldInfo, owner: str) -> str:
        text = f"\n### {self.titles[section]}\n\n{_line(section.__doc__ or '')}"
        text += f" {_line(field.description or '')}\n\n" if field.default is None else "\n\n"
        text += "| key | values | default | meaning |\n|---|---|---|---|\n"
        below = ""
        for name, member in sorted(section.model_fields.items(), key=lambda item: item[0] != "name"):
            below += self.keys(f"{path}.{name}", member, owner)
            cells = (f"`{name}`", _cell(expected(member)), _default(member), self._meaning(member))
            text += f"| {' | '.join(cells)} |\n"
        return text + below

    def _meaning(self, field: FieldInfo) -> str:
        links = [f"[{self.titles[section]}](#{slug(self.titles[section])})" for _, section in _sections("", field)]
        return _cell(field.description or "") + (f" Keys: {', '.join(links)}." if links else "")


def slug(title: str) -> str:
    """Return GitHub's anchor of a heading."""
    return "".join(c for c in title.lower() if c.isalnum() or c in " -_").replace(" ", "-")


def _name(section: type[Section], path: str) -> str:
    """Return the `name` that selects a section among the forms of its key, or an empty string for a single form."""
    if path not in ("algorithm", "sweep.method"):
        return ""
    return str(get_args(section.model_fields["name"].annotation)[0])


def _title(path: str, section: type[Section], owner: str) -> str:
    if name := _name(section, path):
        return f"`{path}` with `name: {name}`"
    return f"`{path}` of `{owner}`" if owner else f"`{path}`"


def _contents(text: str) -> str:
    """Return links to the headings, one line per section, with its algorithms or methods."""
    lines: list[str] = []
    for level, title in re.findall(r"^(##+) (.+)$", text, re.MULTILINE):
        path, _, name = title.partition(" with ")
        if level == "##":
            lines.append(f"- [{title}](#{slug(title)})")
        elif name:
            link = f"[{name.removeprefix('`name: ').rstrip('`')}](#{slug(title)})"
            start = f"  - {path}: "
            lines[-1:] = [f"{lines[-1]}, {link}"] if lines[-1].startswith(start) else [lines[-1], f"{start}{link}"]
        elif "." not in path.removesuffix(".NAME`"):
            lines.append(f"  - [{title}](#{slug(title)})")
    return "\n".join(lines) + "\n"


def _sections(path: str, field: FieldInfo) -> Iterator[tuple[str, type[Section]]]:
    """Yield the possible classes of a key with their paths. `NAME` stands for a name chosen by the user."""
    for member in members(field.annotation):
        named = get_origin(member) is dict
        for inner in members(get_args(member)[1]) if named else [member]:
            if is_section(inner):
                yield f"{path}.NAME" if named else path, inner
                break


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Section):
        changed = {name: getattr(value, name) for name in type(value).model_fields if name in value.model_fields_set}
        return _cell(f"`{json.dumps(changed)}`") if changed else "its defaults"
    plain = isinstance(value, Path) or (isinstance(value, str) and value.isprintable())
    return f"`{value}`" if plain else f"`{json.dumps(value)}`"


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(render())
