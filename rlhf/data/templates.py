"""Change a tokenizer's chat template: replace the text, and set values of variables.

Both become part of the tokenizer, so every renderer agrees, and both are saved with the tokenizer in `final/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

# Variables set by the renderer for every template.
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """Changes to a chat template."""

    text: str | None = None  # Jinja text of a replacement; None keeps the tokenizer's template
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # default variables; a call may override them

    def apply(self, tokenizer: Any) -> None:
        """Apply the changes to a tokenizer. A second application changes nothing."""
        if self.text is not None:
            tokenizer.chat_template = self.text
        template, defaults = tokenizer.chat_template, self._defaults()
        if isinstance(template, Mapping):  # templates by name, such as one for conversations with tools
            tokenizer.chat_template = {name: _prepend(defaults, text) for name, text in template.items()}
        elif template is not None:
            tokenizer.chat_template = _prepend(defaults, template)

    def then(self, later: ChatTemplate) -> ChatTemplate:
        """Return the changes merged with later changes; the later changes win."""
        return later if later.text is not None else replace(self, kwargs={**self.kwargs, **later.kwargs})

    def apply_checked(self, tokenizer: Any, *, key: str) -> None:
        """Apply the changes to an unchanged tokenizer. UserError for changes without an effect.

        `key` is the section named in messages.
        """
        template = tokenizer.chat_template if self.text is None else self.text
        if self.kwargs and template is None:
            raise UserError(
                f"{key}.chat_template_kwargs: the tokenizer of {tokenizer.name_or_path} has no chat template that "
                f"would read them. Remove them, or name a template as {key}.chat_template."
            )
        text = "".join(template.values()) if isinstance(template, Mapping) else template or ""
        for name in self.kwargs:
            if not name.isidentifier() or name in _RESERVED:
                raise UserError(
                    f"{key}.chat_template_kwargs: {name!r} is no variable that may be set; "
                    f"{', '.join(sorted(_RESERVED))} come from the data and the tokenizer. Remove it."
                )
            if not re.search(rf"\b{name}\b", text):
                raise UserError(
                    f"{key}.chat_template_kwargs.{name}: has no effect: the chat template of {tokenizer.name_or_path} "
                    f"does not read {name}. Remove it, or correct its name."
                )
        self.apply(tokenizer)

    def _defaults(self) -> str:
        """Return the Jinja text for the default values of the variables."""
        lines = [
            f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}"
            for name, value in self.kwargs.items()
        ]
        return "".join(lines) + "{{ '' }}" if lines else ""  # the template would lose a newline directly after a block


UNCHANGED = ChatTemplate()


def _prepend(defaults: str, template: str) -> str:
    return template if template.startswith(defaults) else defaults + template


def read_template(path: str, *, key: str) -> str:
    """Return the text of a template's file. UserError for an unreadable or empty file, or a text that is no Jinja."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {path} cannot be read: {error}. Name a Jinja file.") from error
    if not text.strip():
        raise UserError(f"{key}: {path} is empty. Write the template into it.")
    return text
