"""What runs and evaluations read alike: data sources, rewards, the tiny model; and whose mistake it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf.config.data import DataSource
from rlhf.config.derive import max_sequence_tokens
from rlhf.config.rollouts import RewardConfig
from rlhf.config.root import Config
from rlhf.data.examples import Reading
from rlhf.data.sources import Row, Source
from rlhf.data.tasks import TaskSource
from rlhf.errors import UserError
from rlhf.models.tiny import build_tiny_llama
from rlhf.rewards.loading import check_columns, load_reward
from rlhf.rewards.scoring import RewardSpec

TINY = "tiny:llama"
REWARD_KEY = "rewards.{}.function"


@contextmanager
def named(key: str) -> Iterator[None]:
    """Put the key of the config before what is wrong with its value."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def local_model(name: str, folder: Path, *, seed: int) -> str:
    """The name; tiny:llama as a folder of that seed, made now below `folder` if it is not there."""
    if name != TINY:
        return name
    return str(build_tiny_llama(folder / "models" / f"tiny-llama-{seed}", seed=seed))


def source_of(source: DataSource) -> Source:
    """What the readers of data take."""
    if isinstance(source, str):
        return source
    return TaskSource(task=source.task, split=source.split, size=source.size, seed=source.seed, args=source.args)


def reading_of(config: Config) -> Reading:
    """How a run reads its examples."""
    data = config.data
    return Reading(
        system_prompt=data.system_prompt,
        apply_chat_template=data.apply_chat_template,
        max_tokens=max_sequence_tokens(config),
        too_long=data.too_long,
        max_unusable_fraction=data.max_unusable_fraction,
    )


def load_rewards(
    rewards: Mapping[str, RewardConfig], *, beside: Path, memory_gib: float, key: str = REWARD_KEY
) -> tuple[RewardSpec, ...]:
    """The rewards, their functions imported once in a process of their own.

    beside: the folder where files of rewards are looked for before the current one. key: what messages call a reward.
    """
    folders = (beside, Path.cwd())
    specs = []
    for name, reward in rewards.items():
        function = None
        if reward.function is not None:
            function = load_reward(
                reward.function,
                args=reward.args,
                folders=folders,
                key=key.format(name),
                memory_gib=memory_gib,
            )
        specs.append(
            RewardSpec(
                name=name,
                weight=reward.weight,
                function=function,
                from_environment=reward.environment,
                truncated_score=reward.truncated_score,
            )
        )
    return tuple(specs)


def check_rewards(specs: Sequence[RewardSpec], rows: Sequence[Row], data: str, *, key: str = REWARD_KEY) -> None:
    """UserError if a reward needs a column that not every row has."""
    common = set(rows[0].columns).intersection(*(row.columns for row in rows))
    for spec in specs:
        if spec.function is not None:
            check_columns(spec.function, sorted(common), key=key.format(spec.name), data=data)
