"""What scores responses: where each reward comes from, how they are combined, and what becomes of one that fails."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, JsonValue, field_validator, model_validator

from rlhf.algorithms.section import Section
from rlhf.rewards.failure_rule import ErrorRule
from rlhf.tracking.logs import is_secret_name

_JUDGE_PROMPT = """\
Rate how well the response answers the prompt, from 1 (useless) to 10 (excellent).

Prompt:
{prompt}

Response:
{response}

Give your reasons in a few sentences, then end with a line `Score: N`."""


class HttpConfig(Section):
    """How a service is asked. What fails for want of an answer (the network, 408, 425, 429, 5xx) is asked again."""

    timeout_s: float = Field(default=30.0, gt=0.0, le=86_400)
    """Limit of one attempt."""
    deadline_s: float = Field(default=300.0, gt=0.0, le=86_400)
    """Limit of one request with all its attempts; after it, the reward has failed."""
    max_in_flight: int = Field(default=32, ge=1, le=1024)
    """Requests that one reward worker has under way at once."""

    @model_validator(mode="after")
    def _an_attempt_fits(self) -> Self:
        if self.timeout_s > self.deadline_s:
            raise ValueError(f"`timeout_s` {self.timeout_s:g} is above `deadline_s` {self.deadline_s:g}")
        return self


class JudgeConfig(Section):
    """A language model behind an OpenAI-compatible endpoint that is asked what a response is worth."""

    model: str = Field(min_length=1)
    """Its name at the endpoint."""
    prompt: str = _JUDGE_PROMPT
    """What it is asked. `{prompt}`, `{response}` and `{COLUMN}` are filled in; a brace of its own is doubled."""
    system: str | None = Field(default=None, min_length=1)
    """A system message before it."""
    pattern: str = r"(?i)score[\s:=*]*(-?\d+(?:\.\d+)?)"
    """Regular expression whose first group is the number; the last match counts."""
    scale: tuple[float, float] = (1.0, 10.0)
    """Numbers of the worst and the best response, which become 0 and 1. A number outside is a failure."""
    choices: dict[Annotated[str, Field(min_length=1)], float] = Field(default_factory=dict)
    """In place of a number: what each of these words is worth, as it is. The one that stands last counts."""
    request: dict[str, JsonValue] = Field(default_factory=lambda: dict[str, JsonValue](temperature=0.0, max_tokens=512))
    """Further fields of the request: sampling, or what the endpoint takes besides."""

    @field_validator("prompt")
    @classmethod
    def _can_be_filled_in(cls, prompt: str) -> str:
        if "response" not in set(placeholders(prompt)):
            raise ValueError("`prompt` must hold {response}")
        return prompt

    @field_validator("pattern")
    @classmethod
    def _has_a_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"`pattern` is no regular expression: {error}") from error
        if not groups:
            raise ValueError("`pattern` has no group; put parentheses around the number")
        return pattern

    @model_validator(mode="after")
    def _scale_rises(self) -> Self:
        if not self.scale[0] < self.scale[1]:
            raise ValueError("`scale` must rise: [worst, best]")
        if taken := sorted({"model", "messages", "n", "stream"} & self.request.keys()):
            raise ValueError(f"`request` may not have {', '.join(taken)}")
        return self


class RewardConfig(Section):
    """One reward: exactly one of function, role, url and environment."""

    function: str | None = None
    """A built-in by name, or `path/file.py:name`."""
    role: Literal["reward"] | None = None
    """The reward model of the `reward` section."""
    url: str | None = None
    """A service that scores responses, or with `judge` the endpoint of a language model, such as
    `http://127.0.0.1:8000/v1`."""
    environment: bool = False
    """true: the sum of what rollouts.environment gives in a conversation."""
    weight: float = 1.0
    """Its factor in the response's score."""
    normalize: Literal["none", "group"] = "none"
    """group: what is trained on is its distance from the mean over the prompt's responses, over their deviation."""
    credit: Literal["response", "step"] = "response"
    """step: a function gives each step of a response a value, the reward model (`reward.steps`) the probability that it
    is right, an environment what a turn earned, and that is credited to the tokens up to the step's end. response: one
    value is credited to all of its tokens."""
    gate: str | None = None
    """Name of another reward whose value, as it is, this one is multiplied by."""
    only: dict[str, Annotated[tuple[str | int | bool, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Column: values. The reward is asked about rows alone that have one of them in each of the columns."""
    truncated_score: float | None = None
    """What a response gets that was cut at rollouts.max_new_tokens (a conversation: that met one of the environment's
    limits), before the weight; null: what the reward says."""
    on_error: Literal["fail", "drop"] | Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None
    """What happens when this reward fails on a response: `fail`, `drop`, or the score that the response gets from it,
    before the weight; null: reward_policy.on_error. A score is recorded as an error all the same."""
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the function, or of the class's constructor."""
    token_env: str | None = Field(default=None, pattern=r"^[A-Z_][A-Z0-9_]*$")
    """Environment variable of the driver that holds the service's bearer token."""
    judge: JudgeConfig | None = None
    """What the language model at `url` is asked."""
    http: HttpConfig = HttpConfig()
    """How the service is asked."""

    @field_validator("url")
    @classmethod
    def _is_a_service(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment:
            raise ValueError("`url` must be http://HOST... or https://HOST...")
        if (
            parts.username
            or parts.password
            or any(name == "key" or is_secret_name(name) for name, _ in parse_qsl(parts.query))
        ):
            raise ValueError("`url` holds a secret, and the config is written to the run folder: use `token_env`")
        return url

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.function, self.role, self.url)) + self.environment != 1:
            raise ValueError("give exactly one of `function`, `role`, `url` and `environment: true`")
        if self.environment and isinstance(self.on_error, float):
            raise ValueError(
                "`on_error` may be `fail` or `drop` where an environment gives the reward: a conversation whose "
                "environment failed has no end that could be scored"
            )
        if self.function is None and self.args:
            raise ValueError("`args` has an effect with `function` alone")
        if self.credit == "step" and (self.url is not None or (self.function is not None and ":" not in self.function)):
            raise ValueError(
                "`credit: step` needs a function of your own, `role: reward` or `environment: true`: services and "
                "built-ins give one number a response"
            )
        if self.credit == "step" and self.normalize == "group":
            raise ValueError("`normalize: group` compares whole responses, and `credit: step` is of their steps")
        return self


class RewardPolicy(Section):
    """What happens when a reward raises, hangs, returns no finite number, or has a service that does not answer."""

    on_error: Literal["fail", "drop"] = "fail"
    """Of a reward that has no `on_error` itself. fail: the run stops. drop: the prompt's group is replaced by another
    prompt's."""
    timeout_s: float = Field(default=10.0, gt=0.0, le=1_000_000)
    """Limit of one call of a function."""
    max_dropped_fraction: float = Field(default=0.25, gt=0.0, lt=1.0)
    """With drop: the share of the groups asked last, over steps (32, or prompts_per_step if that is more), above which
    dropped groups stop the run after all."""
    processes: int = Field(default=1, ge=1, le=1024)
    """Processes that run reward functions, for each reward worker."""
    memory_gib: float = Field(default=8.0, ge=0.25, le=65536)
    """Memory that one of these processes may map, libraries included. A call that wants more has failed."""


def error_rules(rewards: Mapping[str, RewardConfig]) -> dict[str, ErrorRule]:
    """Return what each reward says of its failures, and `environment` of the environment's."""
    of_environment = next((reward.on_error for reward in rewards.values() if reward.environment), None)
    return {"environment": of_environment, **{name: reward.on_error for name, reward in rewards.items()}}


def drops(rewards: Mapping[str, RewardConfig], policy: RewardPolicy) -> bool:
    """Whether a failure can drop a group."""
    return "drop" in {policy.on_error, *(reward.on_error for reward in rewards.values())}


def placeholders(template: str) -> Iterator[str]:
    """Names in braces. ValueError for a brace that stands alone, or for more than a name in braces."""
    for _, name, form, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if form or conversion or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"`prompt` has {{{name}}}: braces hold the name of a column; write {{{{ for a brace")
        yield name
