"""Find out whether a teacher has another tokenizer than the student. This module does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.config.schema.model import TeacherConfig
from rlhf.data.spans import Translator, maps_alike
from rlhf.deferred import transformers
from rlhf.errors import UserError
from rlhf.models.files.loading import load_model_config, load_tokenizer
from rlhf.models.files.tiny import described_config
from rlhf.workers.frozen.top_settings import Spans


def translator_of(spans: Spans, teacher: TeacherConfig, *, max_tokens: int) -> Translator | None:
    """Return the translator of a run's teacher, or None for a teacher with the student's tokenizer."""
    student = spans.student
    if teacher.model in (student.model, student.tokenizer_source):
        return None
    remote = student.trust_remote_code
    tokenizer = load_tokenizer(student.tokenizer_source, trust_remote_code=remote, template=spans.template)
    return load_translator(tokenizer, teacher, source=teacher.model, shape=teacher.model, max_tokens=max_tokens)


def load_translator(
    student: Any, teacher: TeacherConfig, *, source: str, shape: str, max_tokens: int
) -> Translator | None:
    """Return the translator of the student's tokenizer and of another tokenizer, or None without another one.

    `source` and `shape` are the models with the teacher's tokenizer and with its shape. A sequence of the teacher has
    at most `max_tokens` and fits the teacher's context. UserError: the tokenizers cannot be compared.
    """
    remote, described = teacher.trust_remote_code, described_config(Path(shape))
    kind = transformers.PreTrainedTokenizerFast if described_config(Path(source)) else None
    try:
        tokenizer = load_tokenizer(source, trust_remote_code=remote, kind=kind)
    except UserError:  # a model without a tokenizer reads the student's tokens
        return None
    if maps_alike(student, tokenizer):
        return None
    config = described or load_model_config(shape, trust_remote_code=remote).get_text_config()
    context = getattr(config, "max_position_embeddings", None) or max_tokens
    return Translator(student, tokenizer, max_tokens=min(max_tokens, context))
