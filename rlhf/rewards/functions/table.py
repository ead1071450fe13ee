"""The table of built-in rewards."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from rlhf.rewards.functions import length_shaping as shaping
from rlhf.rewards.functions import matching
from rlhf.rewards.functions.code_tests import CodeTests
from rlhf.rewards.functions.length_shaping import Unit


class CosineLength:
    """Right or wrong, scaled by length (arXiv:2502.03373): right and short is best, wrong and short is worst.

    Another built-in reward decides whether a response is right (`verifier`, with `verifier_args`), by a score of
    `threshold` or more. The values of right and wrong responses go from `*_at_zero` to `*_at_limit`. A response of the
    limit or longer scores `exceeded`. The defaults come from the paper.
    """

    def __init__(
        self,
        limit: float,
        unit: Unit = "words",
        verifier: str = "math_answer",
        verifier_args: Mapping[str, Any] = MappingProxyType({}),
        threshold: float = 0.5,
        right_at_zero: float = 2.0,
        right_at_limit: float = 1.0,
        wrong_at_zero: float = -10.0,
        wrong_at_limit: float = 0.0,
        exceeded: float = -10.0,
    ) -> None:
        shaping.length("", unit)
        self._limit, self._unit, self._exceeded = shaping.positive("limit", limit), unit, exceeded
        self._right, self._wrong = (right_at_zero, right_at_limit), (wrong_at_zero, wrong_at_limit)
        self._verify, self._threshold = _built_in(verifier, verifier_args), threshold
        signature = inspect.signature(self._verify)
        parameters = [parameter for name, parameter in signature.parameters.items() if name not in verifier_args]
        self.__signature__ = signature.replace(parameters=parameters)  # the reward reads the columns of the verifier

    def __call__(self, prompt: str, response: str, **columns: Any) -> float:
        measured = shaping.length(response, self._unit)
        if measured >= self._limit:
            return self._exceeded
        right = self._verify(prompt=prompt, response=response, **columns) >= self._threshold
        return shaping.cosine(measured, self._limit, *(self._right if right else self._wrong))


def _built_in(name: str, args: Mapping[str, Any]) -> Callable[..., float]:
    target = BUILT_INS.get(name)
    if target is None or target is CosineLength:
        raise ValueError(f"verifier is {name!r}; it must be another built-in reward")
    if inspect.isclass(target):
        reward: Any = target(**args)
        return reward  # type: ignore[no-any-return]
    check_args(target, args)
    return functools.partial(target, **args)


def check_args(function: Callable[..., float], args: Mapping[str, Any]) -> None:
    """Call a built-in function once with the fixed arguments, to raise for a wrong argument before a run starts.

    A column without a fixed value gets a value accepted by every function. A function with a further missing parameter
    is not called: `overlong` compares `limit` with `buffer`, and needs both.
    """
    if not args:
        return
    parameters = inspect.signature(function).parameters
    columns = {"prompt": "", "response": "a a a a", "answer": "0", "pattern": "", "target": 1.0}
    given = {name: value for name, value in columns.items() if name in parameters} | dict(args)
    if all(name in given or parameter.default is not parameter.empty for name, parameter in parameters.items()):
        function(**given)


BUILT_INS: dict[str, Callable[..., Any]] = {
    "code_tests": CodeTests,
    "contains": matching.contains,
    "cosine_length": CosineLength,
    "exact_match": matching.exact_match,
    "format_regex": matching.FormatRegex,
    "json_schema": matching.JsonSchema,
    "last_number": matching.last_number,
    "length_penalty": shaping.length_penalty,
    "math_answer": matching.MathAnswer,
    "multiple_choice": matching.multiple_choice,
    "overlong": shaping.overlong,
    "reasoning_gym": matching.ReasoningGym,
    "regex_match": matching.regex_match,
    "repetition_penalty": shaping.repetition_penalty,
    "target_length": shaping.target_length,
}


def own_limit_s(function: str, args: Mapping[str, Any]) -> float | None:
    """Return the internal time limit of a built-in reward in seconds, or None. A response beyond the limit is wrong."""
    if function not in BUILT_INS:
        return None
    if function == "cosine_length":
        verifier, verifier_args = args.get("verifier", "math_answer"), args.get("verifier_args", {})
        is_valid = isinstance(verifier, str) and isinstance(verifier_args, Mapping)
        return own_limit_s(verifier, verifier_args) if is_valid else None
    parameter = inspect.signature(BUILT_INS[function]).parameters.get("limit_s")
    limit = args.get("limit_s", parameter.default) if parameter is not None else None
    return float(limit) if isinstance(limit, int | float) else None


def score_of_killed(function: str, args: Mapping[str, Any]) -> float | None:
    """Return a built-in's score of a wrong response, given also after a hang or crash. Not built in: None."""
    if function == "cosine_length":
        return float(args.get("wrong_at_zero", -10.0))
    return 0.0 if function in BUILT_INS else None
