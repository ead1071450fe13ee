"""Define the base classes of every algorithm and of every algorithm's configuration section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from rlhf.sections import Section

OnlineKind = Literal["advantages", "sampled_pairs", "sampled_distillation", "self_distillation"]
OfflineKind = Literal["supervised", "distillation", "preference", "reward_model", "step_rewards", "unpaired"]
Kind = OnlineKind | OfflineKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """Facts about the responses of an online run, for the checks of an algorithm."""

    samples_per_prompt: int
    prompts_per_step: int
    updates_per_step: int  # in one epoch over a batch
    trained_per_prompt: int
    trained_key: str  # the configuration key behind trained_per_prompt
    max_tokens: int  # of one response
    max_tokens_key: str
    num_rewards: int  # with a weight other than 0
    step_reward: str | None  # name of the first reward with credit by steps
    num_steps: int | None  # None: follows from the data


@dataclass(frozen=True, slots=True, kw_only=True)
class UnusedKey:
    """Name a key of an algorithm without effect beside the algorithm's other keys."""

    key: str
    why: str  # the rule and the values behind it
    fix: str  # the change to make if the key was meant


class AlgorithmConfig(Section):
    """Keys of every algorithm, and facts needed before a run starts."""

    kind: ClassVar[Kind]  # selects the learner, the worker, and the form of the data
    off_policy_keys: ClassVar[tuple[str, ...]] = ()  # keys without effect while every importance ratio is 1
    has_critic: ClassVar[bool] = False
    needs_gold: ClassVar[bool] = False  # whether a row has a gold response in addition to its pair
    normalizes_rewards: ClassVar[bool] = False  # whether each reward is normalised within its group
    wants_greedy: ClassVar[bool] = False  # whether each prompt also gets a greedy response as a baseline
    code_digest: ClassVar[str] = ""  # of the code, if the algorithm is not built in
    name: str
    """The algorithm."""

    @property
    def short_name(self) -> str:
        """The name without a folder, the same on every machine."""
        return self.name

    @property
    def is_online(self) -> bool:
        """Whether the algorithm learns from rollouts."""
        return self.kind in get_args(OnlineKind)

    @property
    def has_teacher(self) -> bool:
        """Whether the algorithm learns from another model."""
        return self.kind in ("distillation", "sampled_distillation")

    @property
    def distils_rollouts(self) -> bool:
        """Whether the algorithm learns the predictions of a teacher, or of itself, on rollouts."""
        return self.kind in ("sampled_distillation", "self_distillation")

    @property
    def privileged_template(self) -> str | None:
        """The template of the prompt with which the policy teaches itself. None: the policy does not teach itself."""
        return None

    @property
    def has_scalar_head(self) -> bool:
        """Whether the result is a scoring model instead of a language model."""
        return self.kind in ("reward_model", "step_rewards")

    @property
    def has_ratio(self) -> bool:
        """Whether the loss compares the policy with the policy before the update."""
        return bool(self.off_policy_keys)

    @property
    def reads_teacher_states(self) -> bool:
        """Whether rollouts are compared with the teacher's distributions, not only with its log-probabilities."""
        return False

    @property
    def uses_reference(self) -> bool:
        """Whether a reference's log-probabilities enter the objective."""
        return False

    @property
    def needs_rewards(self) -> bool:
        """Whether responses must have scores."""
        return self.is_online

    @property
    def compares_responses(self) -> bool:
        """Whether training on a response depends on the rest of the group."""
        return False

    @property
    def compares_turns(self) -> bool:
        """Whether turns of conversations or sessions are compared from equal states."""
        return False

    @property
    def reads_given_responses(self) -> bool:
        """Whether an online run also learns from responses in the rows of the prompts."""
        return False

    @property
    def needs_given_responses(self) -> bool:
        """Whether every row of the prompts must have a response."""
        return False

    @property
    def most_kept(self) -> int | None:
        """The largest number of responses per prompt to train on. None: all."""
        return None

    @property
    def trusts_sampler(self) -> bool:
        """Whether the loss takes the policy's log-probabilities before the update for the sampler's."""
        return False

    @property
    def num_value_samples(self) -> int:
        """The number of responses to each training prompt before the first step, to estimate the prompt's value."""
        return 0

    @property
    def critic_only_steps(self) -> int:
        """The number of first steps for training the critic alone."""
        return 0

    @property
    def compares_with_divergence(self) -> bool:
        """Whether a row also pairs the prompt with another row's response."""
        return False

    @property
    def row_options(self) -> Mapping[str, Any]:
        """Return further arguments for loading the rows of a data set."""
        return {"with_gold": True} if self.needs_gold else {}

    def problems(self, responses: Responses) -> Iterator[tuple[str, str]]:
        """Yield contradictions with the rest of an online run: the key and the text of the message after the key."""
        return iter(())

    def unused_keys(self) -> Iterator[UnusedKey]:
        """Yield keys without effect by rules beyond the marks of rlhf.sections."""
        return iter(())


class Algorithm:
    """The mathematics of an algorithm. The annotation of `config` names the class of the configuration section."""

    config: AlgorithmConfig

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def config_class(cls) -> type[AlgorithmConfig]:
        """Return the class of the configuration section."""
        config_class: type[AlgorithmConfig] = get_type_hints(cls)["config"]
        return config_class
