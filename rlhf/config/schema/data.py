"""Where prompts and examples come from and how their text becomes tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from rlhf.algorithms.section import Section


class TaskConfig(Section):
    """Rows made on the spot by a task with a verifier."""

    task: str = Field(min_length=1)
    """`running_totals`, `guessing_game`, `calculator`, or `reasoning_gym/NAME`, or several joined by commas."""
    split: Literal["sft", "pairs", "labelled", "steps", "train", "eval"] = "train"
    """`train` and `eval` are prompts for rollouts; `sft`, `pairs` and `labelled` are the same other questions, with
    responses. No question is in two of these three sets."""
    size: int = Field(ge=1)
    """Rows to make."""
    seed: int = 0
    """The same seed makes the same rows."""
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """Passed to the task."""


def _kind(value: Any) -> str:
    """Which form of a data source a value has, so that an error speaks of that form alone."""
    if isinstance(value, TaskConfig) or (isinstance(value, Mapping) and "task" in value):
        return "TaskConfig"
    return "dict" if isinstance(value, Mapping) else "str"


SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
DataSource = Annotated[
    Annotated[str, Tag("str")] | Annotated[TaskConfig, Tag("TaskConfig")],
    Discriminator(lambda value: "str" if _kind(value) == "str" else "TaskConfig"),
]
EvalSource = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[TaskConfig, Tag("TaskConfig")]
    | Annotated[dict[SetName, DataSource], Tag("dict")],
    Discriminator(_kind),
]


class WeightedSource(Section):
    """One of several data sets that are mixed."""

    source: DataSource
    """As `data.train` of a single set."""
    weight: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Its rows are this share of all, among the weights of all sets, whatever its size."""


TrainSource = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[TaskConfig, Tag("TaskConfig")]
    | Annotated[dict[SetName, WeightedSource], Tag("dict")],
    Discriminator(_kind),
]


class CurriculumConfig(Section):
    """Prompts that the run has measured to be too easy or too hard are passed over when they come up again. What is
    measured is the mean score of a prompt's responses: with scores of 0 and 1 that is its pass rate."""

    low: float = Field(default=0.1, allow_inf_nan=False)
    """A prompt whose measured score is lower is too hard."""
    high: float = Field(default=0.9, allow_inf_nan=False)
    """A prompt whose measured score is higher is too easy."""
    outside: float = Field(default=0.1, ge=0.001, lt=1.0)
    """Share of the times that a prompt which is too easy or too hard is asked all the same, and measured anew."""
    newest: float = Field(default=0.5, gt=0.0, le=1.0)
    """Weight of the newest group in a prompt's measured score; the groups before it share the rest."""

    @model_validator(mode="after")
    def _a_band(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"`low` {self.low:g} is above `high` {self.high:g}: no prompt is between")
        return self


class DataConfig(Section):
    """Datasets of one run. A string is a JSONL, JSON, CSV or Parquet file, a saved dataset folder, or a Hugging Face
    name with an optional `:split`."""

    train: TrainSource
    """What is trained on; several sets by name are mixed by weight."""
    eval: EvalSource | None = None
    """Held-out sets by name; a single one is called `heldout`."""
    shuffle: bool = True
    """A new order every epoch, from run.seed alone."""
    curriculum: CurriculumConfig | None = None
    """Pass over prompts by what the run has measured of them; null: all come up once an epoch."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our column name: the dataset's name for it."""
    system_prompt: str | None = None
    """Put before every prompt by the chat template."""
    apply_chat_template: bool = True
    """False: string prompts go to the model as they are. Rows with `messages` always use the template."""
    chat_template: str | None = Field(default=None, min_length=1)
    """A Jinja file that takes the place of the tokenizer's chat template, here and in `final/`."""
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Variables of the chat template, such as `enable_thinking: false`. They become the template's defaults, here and
    in `final/`."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Tokens of the longest prompt of rollouts; `too_long` says what becomes of a longer one. Offline sequences are
    bound by max_sequence_tokens."""
    max_sequence_tokens: int | None = Field(default=None, ge=2)
    """Offline: tokens of the longest sequence, prompt and completion. null: train.max_tokens_per_microbatch, of
    pairs half of it, of triples a third."""
    too_long: Literal["error", "skip", "cut"] = "error"
    """A prompt or an offline sequence that is longer stops the run before it starts, is left out, or is cut. A raw
    prompt loses its beginning, a conversation its oldest turns (not the system prompt), an offline sequence the end of
    its completion."""
    max_unusable_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of a set's rows that may be left out because they are well formed but cannot be used: prompts that are too
    long; offline also an empty completion, chosen equal to rejected, no assistant turn. More of them stop the run."""
