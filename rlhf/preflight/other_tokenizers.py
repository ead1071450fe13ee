"""Check teachers with another tokenizer than the student's, and load the translators of the student's texts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from rlhf.config import derive
from rlhf.config.schema.model import TeacherConfig
from rlhf.config.schema.root import Config
from rlhf.data.spans import Translator
from rlhf.errors import UserError, prefix_errors
from rlhf.preflight.models import StageResults
from rlhf.workers.frozen.translators import load_translator

logger = logging.getLogger(__name__)


def load_translators(config: Config, made: StageResults, tokenizer: Any) -> Mapping[str, Translator]:
    """Return a translator for each teacher with another tokenizer. `tokenizer`: the policy's.

    UserError: a setting of the run needs the same tokens.
    """
    translators = {}
    most = config.train.max_tokens_per_microbatch
    for name, teacher in derive.teachers(config).items():
        if teacher.url is not None or teacher.model == config.policy.model:
            continue  # the server's tokenizer is checked when the server is asked
        shape = made.finals.get(teacher.model, teacher.model)
        source = made.tokenizers.get(teacher.model, shape)
        with prefix_errors(f"{'.'.join(derive.teacher_keys(config)[name])}.model"):
            translator = load_translator(tokenizer, teacher, source=source, shape=shape, max_tokens=most)
            if translator is None:
                continue
            if (problem := _problem(config)) is not None:
                key, text, fix = problem
                raise UserError(
                    f"{teacher.model} has another tokenizer than policy.model {config.policy.model}, but {key} {text}. "
                    f"{fix}, or name a teacher with the same tokenizer."
                )
        translators[name] = translator
        logger.info("%s", sentence(teacher, translator))
    return translators


def sentence(teacher: TeacherConfig, translator: Translator) -> str:
    """Return a sentence on a teacher with another tokenizer, for the log and for the plan."""
    return (
        f"teacher {teacher.model} has another tokenizer than the policy: both are compared over spans of text, by "
        f"{len(translator.pairs)} common tokens and by the order of the probabilities of all others; "
        "update/compared/fraction is the share of tokens in such spans"
    )


def _problem(config: Config) -> tuple[str, str, str] | None:
    """Return the key, the rule and the fix of a setting that needs the same tokenizer, or None."""
    rollouts = config.rollouts
    if getattr(config.algorithm, "top_k", None) is not None:
        fix = "Set algorithm.top_k to null"
        return "algorithm.top_k", "compares the teacher's likeliest tokens with the same tokens of the student", fix
    if not derive.reads_teacher_heads(config):
        fix = "Set algorithm.divergence to forward_kl, reverse_kl or jsd"
        return "algorithm.divergence sampled_reverse_kl", "compares the probabilities of the same tokens", fix
    if rollouts is not None and (rollouts.environment is not None or rollouts.agent is not None):
        key = "rollouts.environment" if rollouts.environment is not None else "rollouts.agent"
        return key, "writes the texts between turns only in the policy's tokens", f"Remove {key}"
    if config.cluster.roles.policy.sequence_parallel > 1:
        key = "cluster.roles.policy.sequence_parallel"
        return key, "may divide a span between ranks", f"Set {key} to 1"
    return None
