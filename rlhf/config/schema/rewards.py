"""Define the sources of rewards, their combination, and the handling of failures."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, PositiveInt, field_validator, model_validator

from rlhf.config.schema.services import HttpConfig, ServiceUrl, TokenEnv
from rlhf.data.comparisons import COMPARE_PROMPT
from rlhf.rewards.failure_rule import ErrorRule
from rlhf.rewards.functions.table import BUILT_INS
from rlhf.sections import NotWith, OnlyIn, OnlyWith, Section
from rlhf.types import RESULT_COLUMN

OF_NUMBERS = OnlyWith("choices", {}, because="they give the score")
OF_ONE_SCORE = (
    OnlyWith("rubric", None, because="each criterion has a scale"),
    OnlyWith("compare", None, because="the judge names the better response"),
)
OF_A_SERVICE = NotWith("url", None, because="the reward is not a service")
OF_A_WEIGHT = NotWith("weight", 0.0)
_JUDGE_PROMPT = """\
Rate how well the response answers the prompt, from 1 (useless) to 10 (excellent).

Prompt:
{prompt}

Response:
{response}

Give your reasons in a few sentences, then end with a line `Score: N`."""
_RUBRIC_PROMPT = """\
Judge a response by each of these criteria.

Prompt:
{question}

Response:
{response}

Criteria, each with the lowest and the highest score:
{criteria}

Answer with a JSON object: first `reasons`, a few short sentences, then `scores`, with a whole number for each name."""


class CriterionConfig(Section):
    """A criterion of a rubric, decided by the judge or by a function."""

    criterion: str | None = Field(default=None, min_length=1)
    """Text for the judge. `{COLUMN}` is filled in. Double a literal brace."""
    function: str | None = None
    """A function in place of the judge, given as in `rewards.NAME.function`. Its value should be from 0 to 1."""
    args: Annotated[dict[str, JsonValue], NotWith("function", None)] = Field(default_factory=dict)
    """Keyword arguments of the function."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Weight in the score. Below 0: the criterion describes a mistake."""
    scale: Annotated[tuple[int, int], OnlyWith("function", None)] = (0, 1)
    """Whole numbers for the worst and the best response, mapped to 0 and 1."""

    @model_validator(mode="after")
    def _one_decides(self) -> Self:
        if (self.criterion is None) == (self.function is None):
            raise ValueError("give either `criterion`, a text for the judge, or `function`")
        if not 0 < self.scale[1] - self.scale[0] <= 100:
            raise ValueError(f"`scale` is {list(self.scale)}; it must rise, [worst, best], by at most 100")
        if {"prompt", "question", "response"} & set(placeholders(self.criterion or "", key="criterion")):
            raise ValueError("`criterion` may hold only columns; {prompt} and {response} belong in judge.prompt")
        return self


class JudgeConfig(Section):
    """A language model behind an OpenAI-compatible endpoint, used to rate responses."""

    model: str = Field(min_length=1)
    """Name of the model at the endpoint."""
    rubric: (
        Annotated[dict[Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9_-]*$")], CriterionConfig], Field(min_length=1)]
        | Annotated[str, Field(min_length=1)]
        | None
    ) = None
    """Criteria by name, all judged in one request, or the column with each row's list of `{criterion, weight}`. The
    score is their weighted mean. null: the judge gives a single score."""
    compare: Literal["win_rate", "bradley_terry"] | None = None
    """Let the judge compare two responses at a time. win_rate: the score is the share of won comparisons.
    bradley_terry: the mean probability of winning, fitted to all comparisons in the group. null: responses are judged
    one by one."""
    opponents: Annotated[PositiveInt | str | None, NotWith("compare", None)] = None
    """Number of other responses of the group that each response is compared with, or the column with a text that each
    response is compared with. An odd number is raised by one. null: all other responses of the group."""
    samples: int = Field(default=1, ge=1, le=64)
    """Judgements of each question. The mean counts, and `rewards/<name>/agreement/mean` measures their agreement. With
    `compare`, every second judgement sees the two responses in the other order."""
    prompt: str = Field(default_factory=lambda data: _default_prompt(data))
    """The prompt for the judge. `{prompt}`, `{question}` (the prompt without the chat template's marks), `{response}`,
    `{COLUMN}` and the `{result}` of an agent are filled in; with a rubric also `{criteria}`; with `compare`,
    `{response_a}` and `{response_b}`. Double a literal brace."""
    system: str | None = Field(default=None, min_length=1)
    """A system message before the prompt."""
    pattern: Annotated[str, OF_NUMBERS, *OF_ONE_SCORE] = r"(?i)score[\s:=*]*(-?\d+(?:\.\d+)?)"
    """Regular expression whose first group is the number. The last match counts."""
    scale: Annotated[tuple[float, float], OF_NUMBERS, *OF_ONE_SCORE] = (1.0, 10.0)
    """Numbers of the worst and the best response, mapped to 0 and 1. A number outside is a failure."""
    choices: Annotated[dict[Annotated[str, Field(min_length=1)], float], *OF_ONE_SCORE] = Field(default_factory=dict)
    """Scores of words, used instead of a number and without scaling. The last such word in the answer counts."""
    request: dict[str, JsonValue] = Field(default_factory=lambda: dict[str, JsonValue](temperature=0.0, max_tokens=512))
    """Further fields of the request, such as sampling parameters."""

    @field_validator("pattern")
    @classmethod
    def _has_a_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"`pattern` is not a regular expression: {error}") from error
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

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        names = set(placeholders(self.prompt))
        if self.compare is not None:
            if not names >= {"response_a", "response_b"}:
                raise ValueError("`prompt` must hold {response_a} and {response_b}, since `compare` is set")
            if RESULT_COLUMN in names:
                raise ValueError(f"`prompt` has {{{RESULT_COLUMN}}}, but two sessions are compared; leave it out")
        elif not {"response", RESULT_COLUMN} & names:
            raise ValueError("`prompt` must hold {response}, or the {result} of an agent")
        if (self.rubric is not None) != ("criteria" in names):
            needs = "must hold {criteria}, since there is a `rubric`"
            raise ValueError(f"`prompt` {needs if self.rubric else 'has {criteria}, but there is no `rubric`'}")
        if self.rubric is not None and self.compare is not None:
            raise ValueError(
                "`rubric` judges single responses, and `compare` judges two together; make them two rewards"
            )
        if isinstance(self.opponents, str) and self.compare == "bradley_terry":
            raise ValueError("`opponents` is a column, so responses are not compared with each other; use win_rate")
        repeats = self.samples if self.compare is None else -(-self.samples // 2)
        if repeats > 1 and self.request.get("temperature") == 0:
            text = "at `request.temperature` 0 all judgements of a question are equal"
            raise ValueError(f"`samples` is {self.samples}, but {text}; set a temperature above 0, such as 1.0")
        return self

    @model_validator(mode="after")
    def _has_a_best_score(self) -> Self:
        if not isinstance(self.rubric, dict):
            return self
        criteria = self.rubric.values()
        if not any(criterion.weight > 0.0 for criterion in criteria):
            raise ValueError("`rubric` has no weight above 0, so there is no best score; give a criterion one")
        if all(criterion.criterion is None for criterion in criteria):
            raise ValueError("`rubric` leaves nothing to the judge; make the functions rewards of their own")
        return self


class RewardConfig(Section):
    """A reward with exactly one source: function, role, url or environment."""

    function: str | None = None
    """A built-in function, `path/file.py:NAME`, or an entry point `rlhf.rewards` of an installed package."""
    role: Literal["reward"] | None = None
    """Use the reward model of the `reward` section."""
    url: ServiceUrl | None = None
    """A service for scoring responses. With `judge`, the endpoint of a language model, such as
    `http://127.0.0.1:8000/v1`."""
    environment: bool = False
    """true: the sum of the rewards from rollouts.environment in a conversation."""
    weight: float = 1.0
    """Factor of the reward in the response's score."""
    normalize: Annotated[Literal["none", "group"], OF_A_WEIGHT, OnlyIn("training", "rewards as given")] = "none"
    """group: train on the difference from the group's mean, divided by the group's standard deviation."""
    credit: Literal["response", "step"] = "response"
    """step: values of single steps are credited to the tokens up to the end of each step. A function gives each step a
    value, the reward model (`reward.steps`) gives the probability of a correct step, and an environment gives the
    reward of a turn. response: a single value is credited to all tokens."""
    gate: Annotated[str | None, OF_A_WEIGHT] = None
    """Name of another reward. This reward is multiplied by the raw value of the named reward."""
    only: dict[str, Annotated[tuple[str | int | bool, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Map from columns to values. The reward applies only to rows with a listed value in each column."""
    truncated_score: float | None = None
    """Score of a response truncated at rollouts.max_new_tokens (or of a conversation at a limit of the environment),
    before the weight. null: the reward's score."""
    on_error: Literal["fail", "drop"] | Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None
    """Treatment of a response on which this reward fails: `fail`, `drop`, or a score to use before the weight. A
    replaced score is still recorded as an error. null: as in reward_policy.on_error."""
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the function, or of the constructor of a class."""
    token_env: Annotated[TokenEnv | None, OF_A_SERVICE] = None
    """Environment variable on the driver with the bearer token of the service."""
    judge: Annotated[JudgeConfig | None, OF_A_SERVICE] = None
    """Prompt and scale for the language model at `url`."""
    http: Annotated[HttpConfig, OF_A_SERVICE] = HttpConfig()
    """Timeouts and limits of requests to the service."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.function, self.role, self.url)) + self.environment != 1:
            raise ValueError("give exactly one of `function`, `role`, `url` and `environment: true`")
        if self.environment and isinstance(self.on_error, float):
            text = "`on_error` may be `fail` or `drop` where an environment gives the reward"
            raise ValueError(f"{text}: a conversation whose environment failed has no end that could be scored")
        if self.function is None and self.args:
            raise ValueError("`args` has an effect only with `function`")
        if self.credit == "step" and (self.url is not None or self.function in BUILT_INS):
            text = "`credit: step` needs a function that is not built in, `role: reward` or `environment: true`"
            raise ValueError(f"{text}: services and built-ins give one number per response")
        if self.credit == "step" and self.normalize == "group":
            raise ValueError("`normalize: group` compares whole responses, and `credit: step` is of their steps")
        return self


class RewardPolicy(Section):
    """Treatment of a reward that raises an error, hangs, or returns no finite number, and of a silent service."""

    on_error: Literal["fail", "drop"] = "fail"
    """Default for rewards without `on_error`. fail: the run stops. drop: the prompt's group is replaced by another
    prompt's group."""
    timeout_s: Annotated[float, OnlyIn("reward functions")] = Field(default=10.0, gt=0.0, le=1_000_000)
    """Time limit of one function call, in seconds."""
    max_dropped_fraction: Annotated[float, OnlyIn("training", "dropped groups")] = Field(default=0.25, gt=0.0, lt=1.0)
    """With drop: largest fraction of dropped groups among the latest groups, across steps. The run stops above this
    fraction. The window is 32 groups, or prompts_per_step if larger."""
    processes: Annotated[int, OnlyIn("reward functions")] = Field(default=1, ge=1, le=1024)
    """Processes for reward functions in each reward worker."""
    memory_gib: Annotated[float, OnlyIn("reward functions")] = Field(default=8.0, ge=0.25, le=65536)
    """Memory that each such process may map, including libraries, in GiB. Exceeding it counts as a failure."""


def functions_of_rubric(reward: RewardConfig) -> dict[str, CriterionConfig]:
    """Return the criteria of a reward's rubric that are decided by functions."""
    rubric = None if reward.judge is None else reward.judge.rubric
    items = rubric.items() if isinstance(rubric, dict) else ()
    return {name: item for name, item in items if item.function is not None}


def compares_group(reward: RewardConfig) -> bool:
    """Return whether a judge compares the responses of a group with each other."""
    judge = reward.judge
    return judge is not None and judge.compare is not None and not isinstance(judge.opponents, str)


def error_rules(rewards: Mapping[str, RewardConfig]) -> dict[str, ErrorRule]:
    """Return the `on_error` of each reward, and of the environment under `environment`."""
    of_environment = next((reward.on_error for reward in rewards.values() if reward.environment), None)
    return {"environment": of_environment, **{name: reward.on_error for name, reward in rewards.items()}}


def drops(rewards: Mapping[str, RewardConfig], policy: RewardPolicy) -> bool:
    """Return whether a failure can drop a group."""
    return "drop" in {policy.on_error, *(reward.on_error for reward in rewards.values())}


def _default_prompt(judge: Mapping[str, Any]) -> str:
    if judge.get("compare") is not None:
        return COMPARE_PROMPT
    return _JUDGE_PROMPT if judge.get("rubric") is None else _RUBRIC_PROMPT


def placeholders(template: str, *, key: str = "prompt") -> Iterator[str]:
    """Yield the names in braces. Raise ValueError for a single brace, or for anything else in braces."""
    for _, name, form, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if form or conversion or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"`{key}` has {{{name}}}: braces hold the name of a column; write {{{{ for a brace")
        yield name
