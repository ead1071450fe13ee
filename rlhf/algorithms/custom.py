"""Load algorithms of users: a class in a file, a class offered by an installed package, or a class of the script.

Such a configuration is pickled by the algorithm's name, and with the class of a script. Every process of a run loads
and compares the code.
"""

from __future__ import annotations

import functools
import inspect
import socket
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from pydantic import create_model

from rlhf.algorithms.algorithm import Algorithm, AlgorithmConfig, Kind
from rlhf.algorithms.distillation import Distillation
from rlhf.algorithms.kto import KTO
from rlhf.algorithms.on_policy_distillation import OnPolicyDistillation
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.pairs import PairAlgorithm
from rlhf.algorithms.ppo import PPO
from rlhf.algorithms.process_reward_model import ProcessRewardModel
from rlhf.algorithms.self_distillation import SelfDistillation
from rlhf.algorithms.sft import SFT
from rlhf.errors import RunError, UserError
from rlhf.extensions import LoadError, PassedObject, find_code, load_code, passed_objects, summarize

# The base class that the workers of each kind of training know.
FAMILIES: Mapping[Kind, type[Algorithm]] = {
    "advantages": OnlineAlgorithm,
    "sampled_pairs": PairAlgorithm,
    "sampled_distillation": OnPolicyDistillation,
    "self_distillation": SelfDistillation,
    "preference": PairAlgorithm,
    "reward_model": PairAlgorithm,
    "unpaired": KTO,
    "supervised": SFT,
    "distillation": Distillation,
    "step_rewards": ProcessRewardModel,
}
BASES = ", ".join(dict.fromkeys(family.__name__ for family in FAMILIES.values()))


class CustomConfig:
    """The part of a configuration class for loading the algorithm, added by `custom_config_class`."""

    algorithm_class: ClassVar[type[Algorithm]]
    short_name: ClassVar[str]
    code_digest: ClassVar[str]
    name: str

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str, PassedObject | None], Any]:
        """Pickle the name and the values, since no second process has a module for a user's file."""
        return _restore, (self.name, self.code_digest, passed_objects.get(self.name)), self.__getstate__()


def _restore(name: str, digest: str, passed: PassedObject | None) -> Any:
    """Return a configuration without values in the unpickling process."""
    if passed is not None:
        passed_objects[name] = passed
    config_class: Any = custom_config_class(name)
    if config_class.code_digest != digest:
        raise RunError(
            f"algorithm {name} on {socket.gethostname()} differs from the one that the driver loaded. Its file was "
            "changed after the start of the run, or the nodes have different copies of the file or the package."
        )
    return config_class.__new__(config_class)


def custom_config_class(name: str, *, built_ins: Collection[str] = ()) -> type[AlgorithmConfig]:
    """Load an algorithm, and return its configuration class with this name as the only value of the key `name`."""
    source = find_code("algorithm", name, built_ins=built_ins, folders=(Path(),))
    short_name = name
    if source.passed is not None:
        short_name = source.name
    elif source.path is not None:
        name, short_name = f"{source.path}:{source.name}", f"{Path(source.path).name}:{source.name}"
    try:
        algorithm: Any = _checked_class(load_code(source))
        return _config_class(algorithm, name, short_name, source.digest().hex())
    except LoadError as error:
        raise UserError(str(error)) from error


@functools.cache
def _config_class(algorithm: Any, name: str, short_name: str, digest: str) -> type[AlgorithmConfig]:
    base = algorithm.config_class()
    key: Any = (Literal[name], ...)
    made = cast("Any", create_model(base.__name__, __base__=(CustomConfig, base), __doc__=base.__doc__, name=key))
    made.algorithm_class, made.short_name, made.code_digest = algorithm, short_name, digest
    return cast("type[AlgorithmConfig]", made)


def _checked_class(target: Any) -> type[Algorithm]:
    """Return the class of an algorithm. LoadError unless the workers of its kind can use it."""
    if not inspect.isclass(target) or not issubclass(target, Algorithm):
        raise LoadError(f"{target!r:.100} is not a subclass of an algorithm's base class: {BASES}")
    shown = f"class `{target.__name__}`"
    try:
        config_class = target.config_class()
    except Exception as error:
        raise LoadError(f"the annotation `config` of {shown} cannot be read: {summarize(error, None)}") from error
    kind: Any = getattr(config_class, "kind", None)
    if kind not in FAMILIES:
        raise LoadError(
            f"{shown} needs an annotation `config: CONFIG`. CONFIG is a subclass of the configuration class of one of "
            f"{BASES}"
        )
    family = PPO if config_class.has_critic else FAMILIES[kind]
    if not issubclass(target, family):
        raise LoadError(f"{shown} must be a subclass of {family.__name__}, as its config is {config_class.__name__}")
    for base in target.__mro__:
        wanted = base.config_class() if issubclass(base, Algorithm) else object
        if not issubclass(config_class, wanted):
            raise LoadError(
                f"the config of {shown} is {config_class.__name__}, which is not a subclass of {wanted.__name__}"
            )
    return target
