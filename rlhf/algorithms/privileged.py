"""Sections of algorithms whose policy teaches itself: the teacher's prompt, and the teacher's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rlhf.algorithms.algorithm import AlgorithmConfig, Responses, UnusedKey
from rlhf.data.privileged import BETTER, FEEDBACK, LATE_FIELDS, PROMPT, fields_of, is_late
from rlhf.sections import OnlyWith, Section


class PrivilegedConfig(Section):
    """The teacher's prompt."""

    template: str
    """The teacher's prompt, in place of the last message of the user, or of a prompt without a chat template.
    `{prompt}` is the student's text, `{better_response}` a better response to the same prompt, `{feedback}` the text
    that rewards returned with the response's score. Every further `{name}` is a column of the row. A paragraph with a
    better response or feedback is left out if the response has none."""
    success_score: float = 1.0
    """Smallest score of a response that may be the `{better_response}` of other responses."""

    @field_validator("template")
    @classmethod
    def _names_prompt_and_context(cls, value: str) -> str:
        names = fields_of(value)
        if names.count(PROMPT) != 1:
            raise ValueError(f"has {{{PROMPT}}} {names.count(PROMPT)} times, expected once")
        if any(PROMPT in fields_of(paragraph) and is_late(paragraph) for paragraph in value.split("\n\n")):
            raise ValueError(f"has {{{PROMPT}}} in a paragraph that may be left out: put an empty line between them")
        if len(names) < 2:
            raise ValueError(f"has no field besides {{{PROMPT}}}: name a column, {{{BETTER}}} or {{{FEEDBACK}}}")
        return value


class SelfTeaching(AlgorithmConfig):
    """The prompt and the weights of the teacher, which computes in the ranks of the policy."""

    privileged: PrivilegedConfig
    """The teacher's prompt."""
    teacher_weights: Literal["current", "average", "snapshot"]
    """The weights of the teacher: the policy's at the start of the step; their moving average; or a snapshot of the
    policy. With policy.lora, only adapters are averaged or copied."""
    teacher_rate: Annotated[float, OnlyWith("teacher_weights", "average")] = Field(default=0.05, gt=0.0, lt=1.0)
    """Share of the policy in the average, at every optimizer step."""
    teacher_every: Annotated[int | None, OnlyWith("teacher_weights", "snapshot")] = Field(default=None, ge=1)
    """Steps between two snapshots. null: the teacher keeps the weights before training."""

    @field_validator("privileged", mode="before")
    @classmethod
    def _with_own_template(cls, value: Any) -> Any:
        """Take a missing template from the algorithm's default."""
        own = cls.model_fields["privileged"].default
        if isinstance(value, Mapping) and isinstance(own, PrivilegedConfig):
            return {"template": own.template, **value}
        return value

    @property
    def privileged_template(self) -> str:
        """Return the template of the teacher's prompt."""
        return self.privileged.template

    @property
    def late_fields(self) -> frozenset[str]:
        """Return the fields of the template that exist only after sampling."""
        return frozenset(fields_of(self.privileged.template)).intersection(LATE_FIELDS)

    def problems(self, responses: Responses) -> Iterator[tuple[str, str]]:
        """Yield also the contradictions of the teacher's prompt with the responses of the run."""
        yield from super().problems(responses)
        if BETTER in self.late_fields and responses.samples_per_prompt < 2:
            rule = "rollouts.samples_per_prompt is 1; set rollouts.samples_per_prompt to 2 or more"
            yield "algorithm.privileged.template", f"names {{{BETTER}}}, but {rule}"

    def unused_keys(self) -> Iterator[UnusedKey]:
        """Yield also the least score of better responses, if the teacher's prompt has no better response."""
        yield from super().unused_keys()
        if BETTER not in self.late_fields:
            why = f"algorithm.privileged.template has no {{{BETTER}}}"
            yield UnusedKey(key="privileged.success_score", why=why, fix=f"write {{{BETTER}}} into the template")
