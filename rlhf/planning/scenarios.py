"""Run `rlhf plan --simulate`: simulate a run's layout at several sizes and schedules for some steps.

`gpus=` scales the layout: engines, training workers and prompts per step grow together, so the work per GPU is
unchanged. This module creates the scenarios; rlhf.planning.simulate simulates them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rlhf.config.files.load import LoadedConfig
from rlhf.config.nodes import parse_cluster
from rlhf.config.schema.root import Config
from rlhf.errors import UserError
from rlhf.planning.report import response_lengths, sizes_of
from rlhf.planning.schedules import schedules
from rlhf.planning.simulate import simulate
from rlhf.planning.summary import format_table, refuse_misfit
from rlhf.planning.system import Outcome, Schedule, System
from rlhf.planning.time import system_of

# The meaning of each number, and its smallest value.
_NUMBERS: Mapping[str, tuple[str, float]] = {
    "base_ms": ("an engine's decoding step without sequences, ms", 1e-6),
    "each_us": ("additional time of a decoding step for each sequence, us", 0.0),
    "train_tokens_per_s": ("tokens through experience and updates, all trainers together", 1e-3),
    "sync_s": ("seconds from the end of an update to new weights in the engines", 0.0),
    "load_s": ("seconds of it in which the engines pause, if responses are in flight", 0.0),
    "prefill_us": ("time of a token of a prompt, or of one whose keys and values are computed again, us", 0.0),
    "latency_s": ("mean seconds of a group in a reward service, after it is decoded", 0.0),
    "latency_sigma": ("sigma of its logarithm", 0.0),
    "mtbf_h": ("hours between two failures of a node", 1e-3),
    "restart_s": ("seconds until a failed node works again", 0.0),
    "steps": ("steps after the pipeline is full; by default 6, or 2 for large batches", 1.0),
    "seed": ("seed of lengths and failures", 0.0),
}
_FIELDS = {  # of System, and the unit
    "base_ms": ("base_s", 1e-3),
    "each_us": ("each_s", 1e-6),
    "train_tokens_per_s": ("train_tokens_per_s", 1.0),
    "sync_s": ("sync_s", 1.0),
    "load_s": ("load_s", 1.0),
    "prefill_us": ("prefill_s", 1e-6),
    "latency_s": ("latency_s", 1.0),
    "latency_sigma": ("latency_sigma", 1.0),
    "mtbf_h": ("mtbf_s", 3600.0),
    "restart_s": ("restart_s", 1.0),
}
_LISTS = {"gpus": 1, "staleness": 0}
MOST_RESPONSES = 1_000_000  # per step: takes seconds to simulate
MOST_STALENESS = 16
_HEADINGS = (
    *("GPUs", "schedule", "s / step", "tokens / s", "GPUs busy", "engines busy", "engines full", "trainers busy"),
    *("tail", "lag", "asked again", "failures"),
)


def render_scenarios(
    loaded: LoadedConfig,
    spec: str,
    *,
    cluster: str | None = None,
    shapes: Path | None = None,
    lengths: str | None = None,
) -> str:
    """Return the scenarios of every run with rollouts as a table.

    Raise UserError without such a run or for a wrong spec.
    """
    runs = [run for run in loaded.runs.values() if run.algorithm.is_online]
    if not runs:
        raise UserError(f"--simulate: {loaded.source} has no run with rollouts; there is nothing to overlap")
    numbers, lists = parse_spec(spec)
    nodes = None if cluster is None else parse_cluster(cluster)
    refuse_misfit(loaded, nodes, cluster)
    sizes = sizes_of(loaded, nodes, shapes)
    given = {field: numbers[key] * unit for key, (field, unit) in _FIELDS.items() if key in numbers}
    parts = []
    for run in runs:
        system = system_of(run, sizes, nodes, response_lengths(run, lengths), given)
        results = scenarios(run, system, lists, steps=numbers.get("steps"), seed=int(numbers.get("seed", 0)))
        parts.append(_text(run, system, results))
    return "\n\n".join(parts) + "\n"


def parse_spec(text: str) -> tuple[dict[str, float], dict[str, tuple[int, ...]]]:
    """Parse `gpus=64+4096,staleness=0+1,mtbf_h=5000` into numbers and lists. UserError names the mistake."""
    numbers: dict[str, float] = {}
    lists: dict[str, tuple[int, ...]] = {}
    for item in text.replace(" ", "").split(","):
        key, equals, value = item.partition("=")
        if not equals or key not in (*_NUMBERS, *_LISTS):
            raise UserError(
                f"--simulate {text!r}: got {item!r}, expected KEY=VALUE of {', '.join([*_LISTS, *_NUMBERS])}"
            )
        try:
            if key in _LISTS:
                lists[key] = tuple(int(part) for part in value.split("+"))
                wrong = min(lists[key]) < _LISTS[key]
                wrong |= key == "staleness" and max(lists[key]) > MOST_STALENESS
            else:
                numbers[key] = float(value)
                wrong = not _NUMBERS[key][1] <= numbers[key] < 1e12
        except ValueError:
            wrong = True
        if wrong:
            meaning = (
                "whole numbers joined by +" if key in _LISTS else f"{_NUMBERS[key][0]}, at least {_NUMBERS[key][1]:g}"
            )
            raise UserError(f"--simulate {text!r}: {item!r}, expected {meaning}")
    return numbers, lists


def scenarios(
    config: Config, system: System, lists: Mapping[str, tuple[int, ...]], *, steps: float | None, seed: int
) -> list[tuple[int, Schedule, Outcome]]:
    """Simulate every size with every schedule. Return the GPUs, the schedule and the outcome of each.

    Raise UserError if a size is not a multiple of the layout or cannot be simulated.
    """
    staleness = lists.get("staleness", (0,) if system.colocated else (0, 1, 2))
    if system.colocated and max(staleness) > 0:
        raise UserError(
            "--simulate: cluster.roles.rollout.colocate_with is policy, so rollouts and training take turns; only "
            "staleness=0 can be simulated"
        )
    compared, results = schedules(config, staleness), []
    for gpus in lists.get("gpus", (system.gpus,)):
        factor, rest = divmod(gpus, system.gpus)
        if rest:
            raise UserError(
                f"--simulate: gpus={gpus} is no multiple of the {system.gpus} that {config.run.name} uses for "
                "training and engines"
            )
        larger = replace(
            system,
            engines=system.engines * factor,
            training_gpus=system.training_gpus * factor,
            prompts_per_step=system.prompts_per_step * factor,
            train_tokens_per_s=system.train_tokens_per_s * factor,
        )
        responses = larger.prompts_per_step * larger.samples_per_prompt
        if responses > MOST_RESPONSES:
            raise UserError(f"--simulate: {responses:,} responses a step at gpus={gpus}, expected {MOST_RESPONSES:,}")
        count = None if steps is None else int(steps)
        results += [(gpus, s, simulate(larger, s, steps=count, seed=seed)) for s in compared]
    return results


def _text(config: Config, system: System, results: Sequence[tuple[int, Schedule, Outcome]]) -> str:
    engines = (
        f"{system.engines} of {system.gpus_per_engine}; a step {system.base_s * 1e3:.3g} ms + "
        f"{system.each_s * 1e6:.3g} us a sequence, at most {system.max_num_seqs}; "
        f"{system.prefill_s * 1e6:.3g} us a token of a prompt"
    )
    fails = "none"
    if system.mtbf_s is not None:
        fails = f"each node every {system.mtbf_s / 3600:,.4g} h, back in {system.restart_s:g} s"
    service = f"log-normal, sigma {system.latency_sigma:g}, mean {system.latency_s:g} s a group"
    facts = [
        ["responses", f"{system.prompts_per_step} prompts * {system.samples_per_prompt} at {system.gpus} GPUs"],
        ["lengths", str(system.lengths)],
        ["engines", engines],
        ["training", f"{system.training_gpus} GPUs, {system.train_tokens_per_s:,.0f} tokens / s"],
        ["weight sync", f"{system.sync_s:.3g} s, of which engines in flight pause {system.load_s:.3g} s"],
        *([["services", service]] if system.latency_s else []),
        ["failures", fails],
    ]
    rows = [list(_HEADINGS)]
    for gpus, schedule, o in results:
        shares = [f"{part:.0%}" for part in (o.gpus_busy, o.engines_busy, o.engines_full, o.trainer_busy, o.tail)]
        speed = [f"{o.step_s:,.4g}", f"{o.tokens_per_s:,.0f}"]
        rows.append([f"{gpus:,}", str(schedule), *speed, *shares, f"{o.lag:.2f}", str(o.reasked), str(o.failures)])
    notes = (
        "  full: sampled tokens divided by those of engines that are always full. tail: fraction of a batch's rollout\n"
        "  time after nine tenths of its responses are done."
    )
    return f"{config.run.name}: simulated\n\n{format_table(facts)}\n\n{format_table(rows)}\n{notes}"
