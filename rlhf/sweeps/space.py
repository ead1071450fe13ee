"""From parameters to trials: all combinations, draws by number, and changes of a copied trial. Pure, by seeds.

parameters -> trials -> processes -> results. A draw depends on the seed and its number alone, so that more trials
leave the first ones as they are, and a sweep that goes on after a kill draws what it drew before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

from rlhf.config.schema.sweep import AshaMethod, GridMethod, Parameter, PbtMethod, RandomMethod, Sweep, ends
from rlhf.errors import UserError

MOST_TRIALS = 10_000
FACTORS = (0.8, 1.2)

Values = Mapping[str, Any]  # of the parameters


def known_trials(sweep: Sweep) -> list[Values] | None:
    """All trials in order, as far as they do not depend on results. None: they do (bayesian).

    UserError if one of them, or an end of a range, makes no run.
    """
    config, method = sweep.config, sweep.config.method
    trials: list[Values] | None = None
    if isinstance(method, GridMethod):
        count = math.prod(_count(parameter) or 0 for parameter in config.parameters.values())
        if count > MOST_TRIALS:
            raise UserError(f"{sweep.source}: sweep.parameters: have {count} combinations; {MOST_TRIALS} at most")
        trials = grid(config.parameters)
    elif isinstance(method, RandomMethod | AshaMethod | PbtMethod):
        trials = [draw(config.parameters, seed=config.seed, number=number) for number in range(method.trials)]
    for values in (*([] if isinstance(method, GridMethod) else corners(config.parameters)), *(trials or ())):
        sweep.trial(values, "trial")
    return trials


def grid(parameters: Mapping[str, Parameter]) -> list[Values]:
    """Every combination; the last parameter changes fastest."""
    lists = [[_at(one, place) for place in range(_count(one) or 0)] for one in parameters.values()]
    return [dict(zip(parameters, values, strict=True)) for values in itertools.product(*lists)]


def corners(parameters: Mapping[str, Parameter]) -> Iterator[Values]:
    """Each value or end of each parameter once, beside the first of the others."""
    first = {key: next(ends(parameter)) for key, parameter in parameters.items()}
    yield first
    for key, parameter in parameters.items():
        for value in itertools.islice(ends(parameter), 1, None):
            yield {**first, key: value}


def draw(parameters: Mapping[str, Parameter], *, seed: int, number: int) -> Values:
    """One random trial."""
    random = Random(f"{seed} {number}")
    return {key: drawn(parameter, random) for key, parameter in parameters.items()}


def drawn(parameter: Parameter, random: Random) -> Any:
    """One value."""
    if (count := _count(parameter)) is not None:
        return _at(parameter, random.randrange(count))
    low, high = _range(parameter)
    if parameter.scale == "log":
        return fitting(parameter, math.exp(random.uniform(math.log(low), math.log(high))))
    return fitting(parameter, random.uniform(low, high))


def changed(parameters: Mapping[str, Parameter], values: Values, *, resample: float, random: Random) -> Values:
    """The values of a copied member, each drawn anew or moved a little."""
    return {
        key: drawn(parameter, random) if random.random() < resample else _moved(parameter, values[key], random)
        for key, parameter in parameters.items()
    }


def fitting(parameter: Parameter, number: float) -> float | int:
    """A number of the range: whole if it must be, else of six digits, as people write it."""
    low, high = _range(parameter)
    if parameter.integer:
        return int(min(max(round(number), low), high))
    return min(max(float(f"{number:.6g}"), low), high)


def _moved(parameter: Parameter, value: Any, random: Random) -> Any:
    count = _count(parameter)
    if count is None:
        return fitting(parameter, value * random.choice(FACTORS))
    place = next(place for place in range(count) if _at(parameter, place) == value)
    return _at(parameter, min(max(place + random.choice((-1, 1)), 0), count - 1))


def _count(parameter: Parameter) -> int | None:
    """How many values there are. None: a number of them that nobody counts."""
    if parameter.values is not None:
        return len(parameter.values)
    if parameter.scale == "log" or (parameter.step is None and not parameter.integer):
        return None
    low, high = _range(parameter)
    return math.floor((high - low) / (parameter.step or 1.0) + 1e-9) + 1


def _at(parameter: Parameter, place: int) -> Any:
    """One of the values that can be counted."""
    if parameter.values is not None:
        return parameter.values[place]
    return fitting(parameter, _range(parameter)[0] + place * (parameter.step or 1.0))


def _range(parameter: Parameter) -> tuple[float, float]:
    assert parameter.min is not None
    assert parameter.max is not None
    return parameter.min, parameter.max
