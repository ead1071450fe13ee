"""Turn parameters into trials: all combinations, and numbered random draws.

parameters -> trials -> processes -> results. All functions are pure. A draw depends only on the seed and the trial's
number. So earlier trials stay the same in a larger sweep, and a resumed sweep repeats the draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

from rlhf.config.files.sweep import Sweep, ends
from rlhf.config.schema.sweep import AshaMethod, GridMethod, Parameter, RandomMethod
from rlhf.errors import UserError

MOST_TRIALS = 10_000

Values = Mapping[str, Any]  # values by parameter


def known_trials(sweep: Sweep) -> list[Values] | None:
    """Return all trials in order; None for bayesian, whose trials depend on results. UserError: an invalid trial."""
    config, method = sweep.config, sweep.config.method
    trials: list[Values] | None = None
    if isinstance(method, GridMethod):
        count = math.prod(_count(parameter) or 0 for parameter in config.parameters.values())
        if count > MOST_TRIALS:
            raise UserError(f"{sweep.source}: sweep.parameters: have {count} combinations, more than {MOST_TRIALS}")
        trials = grid(config.parameters)
    elif isinstance(method, RandomMethod | AshaMethod):
        trials = [draw(config.parameters, seed=config.seed, number=number) for number in range(method.trials)]
    for values in (*([] if isinstance(method, GridMethod) else corners(config.parameters)), *(trials or ())):
        sweep.trial(values, "trial")
    return trials


def grid(parameters: Mapping[str, Parameter]) -> list[Values]:
    """Return every combination. The last parameter changes fastest."""
    lists = [[_at(parameter, place) for place in range(_count(parameter) or 0)] for parameter in parameters.values()]
    return [dict(zip(parameters, values, strict=True)) for values in itertools.product(*lists)]


def corners(parameters: Mapping[str, Parameter]) -> Iterator[Values]:
    """Yield each value or range end of every parameter once, with the first value of all other parameters."""
    first = {key: next(ends(parameter)) for key, parameter in parameters.items()}
    yield first
    for key, parameter in parameters.items():
        for value in itertools.islice(ends(parameter), 1, None):
            yield {**first, key: value}


def draw(parameters: Mapping[str, Parameter], *, seed: int, number: int) -> Values:
    random = Random(f"{seed} {number}")
    return {key: drawn(parameter, random) for key, parameter in parameters.items()}


def drawn(parameter: Parameter, random: Random) -> Any:
    if (count := _count(parameter)) is not None:
        return _at(parameter, random.randrange(count))
    low, high = bounds(parameter)
    if parameter.scale == "log":
        return fitting(parameter, math.exp(random.uniform(math.log(low), math.log(high))))
    return fitting(parameter, random.uniform(low, high))


def fitting(parameter: Parameter, number: float) -> float | int:
    """Clip a number to the range. Round to an integer if required, else to six significant digits."""
    low, high = bounds(parameter)
    if parameter.integer:
        return int(min(max(round(number), low), high))
    return min(max(float(f"{number:.6g}"), low), high)


def format_values(values: Values) -> str:
    return ", ".join(f"{k}={value:.4g}" if isinstance(value, float) else f"{k}={value}" for k, value in values.items())


def _count(parameter: Parameter) -> int | None:
    """Return the number of values of a parameter, or None for a continuous range."""
    if parameter.values is not None:
        return len(parameter.values)
    if parameter.scale == "log" or (parameter.step is None and not parameter.integer):
        return None
    low, high = bounds(parameter)
    return math.floor((high - low) / (parameter.step or 1.0) + 1e-9) + 1


def _at(parameter: Parameter, place: int) -> Any:
    if parameter.values is not None:
        return parameter.values[place]
    return fitting(parameter, bounds(parameter)[0] + place * (parameter.step or 1.0))


def bounds(parameter: Parameter) -> tuple[float, float]:
    """Return the ends of a range."""
    assert parameter.min is not None
    assert parameter.max is not None
    return parameter.min, parameter.max
