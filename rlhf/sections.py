"""Define the base class of all configuration sections, and the marks of keys that depend on other keys.

Sections hold values and open no files. rlhf.config.validation.unused_keys reads the marks.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Sections are frozen and keyword-only, and refuse unknown keys. The string under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class OnlyIn:
    """Mark a key with an effect only in runs with certain parts, such as rollouts or a critic."""

    def __init__(self, *parts: str) -> None:
        self.parts = parts


class OnlyWith:
    """Mark a key with an effect only if the key `other` of the same section has a value among `values`.

    Example: `lr_cycles: Annotated[int, OnlyWith("lr_schedule", "cosine_with_restarts")]`
    """

    def __init__(self, other: str, *values: object, because: str = "", gives_value: bool = False) -> None:
        self.other = other
        self.values = values
        self.because = because  # explains a rule that is not obvious
        self.gives_value = gives_value  # `other` then names the source of the marked key's value

    def allows(self, value: object) -> bool:
        return value in self.values


class NotWith(OnlyWith):
    """Mark a key without an effect if the key `other` of the same section has a value among `values`."""

    def allows(self, value: object) -> bool:
        return value not in self.values
