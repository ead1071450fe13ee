"""Responses with their training signals: samples/step_NNNNNN.jsonl, one file a step, whole or absent.

A process with the text (a reward worker) writes a file. The driver removes the later files before a resumed run. Text
is written as sampled: this is the user's data and is never redacted or truncated. The columns of the data row and an
agent's result are a view of the data: secrets in them are masked, and long values are shortened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.tracking.logs import redact
from rlhf.tracking.run_folder.atomic import read_lines, write_lines
from rlhf.types import StepReward

MOST_CHARACTERS = 4096  # of a column of the data row, or of an agent's result
EVAL_SAMPLES = "samples.jsonl"  # of `rlhf eval`, in the folder of the results
_PROMPT_COLUMNS = ("prompt", "messages", "images")  # shown as the prompt itself
_TAIL_BYTES = 1 << 20  # searched for the last line, at the end of a samples file


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleTurn:
    """A stretch of a conversation, either sampled by the policy or given to the policy."""

    role: Literal["prompt", "policy", "environment"]
    text: str  # special tokens written out
    tokens: int
    sampled: bool  # the tokens are in the response mask: training uses these tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSequence:
    """A sequence of an agent's session, possibly with the same first tokens as an earlier sequence.

    Positions are indices in the columns of `SampleTokens`, in the order of the sequences.
    """

    start: int  # position of its first token
    own: int  # position of its first token after those that it shares with an earlier sequence
    after: int | None  # position of the last shared token there, negative in the prompt. None: no token is shared


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleTokens:
    """Everything after the prompt, token by token, in columns of equal length.

    The joined texts are the whole response, with special tokens written out. A token that ends within a character is
    the empty string, and the token that completes the character holds the whole character. The first position of an
    image holds the image's mark, and the other positions the empty string. A column is None if the run, or an
    evaluation response, has no such numbers. None in a column: this token has no number, such as an environment's
    token.
    """

    texts: tuple[str, ...]
    ids: tuple[int | None, ...]  # None: a position of an image
    sampled: tuple[bool, ...]  # the response mask: only sampled tokens are trained on
    rollout_logprobs: tuple[float | None, ...]  # by the engine while sampling
    old_logprobs: tuple[float | None, ...] | None  # by the trainer, with the weights at the start of the step
    ref_logprobs: tuple[float | None, ...] | None
    teacher_logprobs: tuple[float | None, ...] | None
    advantages: tuple[float | None, ...] | None
    sequences: tuple[SampleSequence, ...] | None = None  # in their order; None: a single sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRecord:
    """A response. None: the run, or an evaluation response, has no such number."""

    split: str  # "train", or the evaluation set's name
    group_id: int  # place in the prompt stream; in an evaluation, row of the set
    prompt_id: int  # row in the data
    sample: int  # which of the responses to this prompt
    prompt: str
    response: str
    score: float | None = None  # weighted sum
    scores: Mapping[str, float | None]  # each applicable reward, before its gate and weight; None: no opinion
    advantage: float | None = None  # mean over its tokens
    preferred: bool | None = None  # whether this is the chosen response of a pair
    truncated: bool
    response_tokens: int
    min_version: int  # oldest and newest weights among its tokens
    max_version: int
    mean_rollout_logprob: float | None = None
    mean_old_logprob: float | None = None
    mean_ref_logprob: float | None = None
    mean_teacher_logprob: float | None = None
    # of the rewards that are credited by steps; their ends are positions in `tokens`
    steps: Mapping[str, Sequence[StepReward]] = field(default_factory=dict)
    turns: tuple[SampleTurn, ...] | None = None  # of a conversation with an environment
    # of an agent's session: why a call did not continue earlier tokens although it seemed to, for each such call
    broken: tuple[str, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)  # of the data row, for the rewards
    result: Any = None  # of an agent's session, for the rewards
    images: tuple[str, ...] = ()  # names of the distinct images in the prompt and the turns, in order
    # length in characters of each value that was shortened to its beginning, by `columns.NAME` or `result`
    shortened: Mapping[str, int] = field(default_factory=dict)
    privileged_prompt: str | None = None  # of a policy that teaches itself; the policy never saw it while sampling
    masked: tuple[str, ...] = ()  # names, as in `shortened`, of the values in which a secret is masked
    tokens: SampleTokens | None = None  # added together with the text


@dataclass(frozen=True, slots=True)
class SampleValue:
    """A value as shown in samples: whole, or the beginning of the text."""

    value: Any
    length: int | None  # in characters, of a shortened value; None: the value is whole
    is_masked: bool  # a secret in the value is masked


def sample_columns(columns: Mapping[str, Any]) -> dict[str, SampleValue]:
    """Return the columns of a data row as samples show them, without the prompt's columns."""
    return {name: sample_value(value) for name, value in columns.items() if name not in _PROMPT_COLUMNS}


def sample_value(value: Any) -> SampleValue:
    try:
        plain = json.loads(json.dumps(value, default=str))
        shown = _changed(plain, lambda leaf: redact(leaf) if isinstance(leaf, str) else leaf)
    except (TypeError, ValueError, RecursionError):  # JSON cannot hold it
        plain = str(value)
        shown = redact(plain)
    is_masked = repr(shown) != repr(plain)  # by text, because NaN differs from itself
    text = shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)
    if len(text) <= MOST_CHARACTERS:
        return SampleValue(shown, None, is_masked)
    return SampleValue(text[:MOST_CHARACTERS], len(text), is_masked)


def samples_path(folder: Path, step: int) -> Path:
    return folder / "samples" / f"step_{step:06d}.jsonl"


def write_samples(path: Path, records: Sequence[SampleRecord]) -> None:
    """Write samples of one step at `samples_path`, in place of the file's rows of the same splits.

    A step's training and evaluation samples may therefore come in any order. Non-finite numbers become null.
    """
    path.parent.mkdir(exist_ok=True)
    splits = {record.split for record in records}
    kept = [row for row in read_lines(path) if row["split"] not in splits]
    write_lines(path, [*kept, *(_changed(asdict(record), _finite) for record in records)])


def last_sample(folder: Path, step: int) -> dict[str, Any] | None:
    """Return the last written response of a step, preferably from an evaluation. None: the step has no response.

    Only the end of the file is read, because an evaluation may have written many responses.
    """
    path = samples_path(folder, step)
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
            row = json.loads(lines[-1]) if lines else None
    except (OSError, ValueError):  # not written yet, or a single response is longer than the searched end
        return None
    return row if isinstance(row, dict) else None


def remove_files_after(folder: Path, step: int) -> list[int]:
    """Remove the samples and evaluations of later steps, before a resumed run writes both again. Return the steps."""
    paths = (*folder.glob("samples/step_*.jsonl"), *folder.glob("evals/step_*.json"))
    later = {path: number for path in paths if (number := int(path.stem.removeprefix("step_"))) > step}
    for path in later:
        path.unlink()
    return sorted(set(later.values()))


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a value with every key and every leaf changed."""
    if isinstance(value, Mapping):
        return {change(key): _changed(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_changed(item, change) for item in value]
    return change(value)


def _finite(leaf: Any) -> Any:
    return None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf
