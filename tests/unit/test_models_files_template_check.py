"""Chat templates that use up time or memory are refused before a row is rendered."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.models.files.template_check import refuse_runaway_template
from rlhf.models.files.tiny import byte_tokenizer

LOOP = "{% for a in range(90000) %}"


def tokenizer_with(template: str | None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "template",
    [LOOP * 3 + "x" + "{% endfor %}" * 3, "{{ 'a' * 10**11 }}", "{{ 'abcdef' * 10**9 * 10 }}"],
    ids=["loops", "text", "product"],
)
def test_a_template_that_runs_away_is_refused(template: str) -> None:
    with pytest.raises(UserError, match="does not render a message of a few words within 1 s and 1 GiB of memory"):
        refuse_runaway_template(tokenizer_with(template), limit_s=1.0)


@pytest.mark.parametrize(
    "template", [byte_tokenizer().chat_template, None, "{{ raise_exception('no') }}", "{{ nothing.at.all }}", "{% for"]
)
def test_other_templates_are_let_through(template: str | None) -> None:
    refuse_runaway_template(tokenizer_with(template))
