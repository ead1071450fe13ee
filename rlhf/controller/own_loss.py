"""Make what a user gives as a loss ready for the ranks: an algorithm's name or section, or a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from rlhf.algorithms import algorithm_of
from rlhf.algorithms.microbatch import PolicyMicrobatch
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.config.mistakes.explain import parse
from rlhf.config.problem import refuse
from rlhf.config.schema.root import Config
from rlhf.config.validation.run import problems
from rlhf.errors import UserError
from rlhf.extensions import find_code
from rlhf.passed_objects import name_of_code
from rlhf.types import OwnLoss

Loss: TypeAlias = str | Mapping[str, Any] | Callable[[PolicyMicrobatch], Any]


def own_loss(loss: Loss, config: Config) -> OwnLoss:
    """Return a loss for the ranks. UserError: it is no algorithm with a policy loss, or cannot be sent to the ranks."""
    if callable(loss):
        name = name_of_code(loss, "loss", {})
        return OwnLoss(source=find_code("loss", name, folders=(Path(),), key="loss"))
    if not isinstance(loss, str | Mapping):
        raise UserError(f"loss: is a {type(loss).__name__}, expected an algorithm's name or section, or a function.")
    settings = {"name": loss} if isinstance(loss, str) else dict(loss)
    parsed = parse({**config.model_dump(mode="json", exclude_unset=True), "algorithm": settings})
    if isinstance(parsed, tuple):
        refuse(parsed, lambda _: "loss")
    assert isinstance(parsed, Config)
    section = parsed.algorithm
    if section.kind != "advantages" or section.has_critic or algorithm_of(section, OnlineAlgorithm).reads_whole_step:
        raise UserError(
            f"loss: {section.short_name} is no loss of single micro-batches. Name another algorithm, such as cispo."
        )
    refuse(problems(parsed), lambda _: "loss")
    return OwnLoss(section=section)
