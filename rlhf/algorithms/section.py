"""Define the base class of all configuration sections. Sections hold values and open no files."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Sections are frozen and keyword-only, and refuse unknown keys. The string under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)
