"""How many responses are sampled, and how."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from rlhf.algorithms.section import Section
from rlhf.limits import MAX_TEMPERATURE, MIN_TEMPERATURE


class EnvironmentConfig(Section):
    """What the policy converses with, instead of answering in one turn. docs/environments.md has the protocol."""

    name: str
    """A built-in, or `path/file.py:CLASS`."""
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the class's constructor."""
    max_turns: int = Field(default=8, ge=1, le=10_000)
    """Turns of the policy, each of at most rollouts.max_new_tokens. A conversation that is not over by then is cut, as
    truncated, with the rewards that it has."""
    max_tokens: int = Field(ge=2)
    """Tokens of a whole conversation with its prompt, at which it is cut likewise."""
    step_timeout_s: float = Field(default=10.0, gt=0.0, le=1_000_000)
    """Limit of one call of the environment. One that takes longer has failed; see reward_policy."""
    memory_gib: float = Field(default=4.0, ge=0.25, le=65536)
    """Memory that a conversation's process may map, libraries included. One that wants more has failed."""
    processes: int = Field(default=256, ge=1, le=100_000)
    """Conversations open at once in an engine, each in a process of its own; others wait for a place."""
    tool_parser: Literal["hermes", "llama3_json", "pythonic"] = "hermes"
    """How the model writes tool calls. hermes: JSON within `<tool_call>`, as Qwen and others do."""


class DynamicSampling(Section):
    """Groups that teach nothing are filtered, and replaced by other prompts' until the batch is whole (DAPO,
    arXiv:2503.14476, section 3.2). A group is filtered if all its responses score alike, or by its mean score."""

    min_mean: float | None = Field(default=None, allow_inf_nan=False)
    """A group whose mean score is lower is filtered too; null: none."""
    max_mean: float | None = Field(default=None, allow_inf_nan=False)
    """A group whose mean score is higher is filtered too; null: none."""
    max_filtered_fraction: float = Field(default=4.0, gt=0.0, le=1000.0)
    """Groups filtered in one step, as a share of prompts_per_step, at which the run stops."""

    @model_validator(mode="after")
    def _a_band(self) -> Self:
        if self.min_mean is not None and self.max_mean is not None and self.min_mean > self.max_mean:
            raise ValueError(f"`min_mean` {self.min_mean:g} is above `max_mean` {self.max_mean:g}: nothing is between")
        return self


class KeepPerPrompt(Section):
    """Of a prompt's responses the step trains on these alone. They are compared with each other only."""

    count: int = Field(ge=1)
    """How many."""
    by: Literal["spread", "best"] = "spread"
    """spread: those whose scores have the largest variance, some highest and some lowest (arXiv:2504.13818);
    best: those with the highest scores."""


class RolloutsConfig(Section):
    """Sampling of one step. A step's batch is prompts_per_step * samples_per_prompt responses."""

    prompts_per_step: int = Field(default=64, ge=1, le=1_000_000)
    """Prompts answered between two weight syncs."""
    samples_per_prompt: int = Field(default=4, ge=1, le=10_000)
    """Responses to each prompt: one group."""
    max_new_tokens: int = Field(default=256, ge=1)
    """A response that reaches it is cut and counted as truncated."""
    temperature: float = Field(default=1.0, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)
    """Sampling temperature; the trainer's log-probabilities are taken at the same one. In training, a row with a column
    `temperature` has its own."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling; 1.0 keeps all tokens."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample among the k likeliest tokens; null keeps all."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Sample among the tokens whose probability is at least this share of the likeliest token's; 0 keeps all."""
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    """Above 1, tokens that the prompt or the response has are less likely; 1 changes nothing. The policy is trained
    without it, so another value needs importance weights towards the sampler (algorithm.correction)."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a response; they stay in it, and may hold special tokens."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Token ids that end a response, besides the model's own and the chat template's; they stay in it."""
    dynamic_sampling: DynamicSampling | None = None
    """Replace groups that teach nothing; null: all groups are trained on."""
    oversample: float = Field(default=1.0, ge=1.0, le=10.0)
    """Prompts asked for each that is needed. Above 1, the slowest are cancelled once the batch is whole and come first
    in the next step: steps wait less for long responses, and train on fewer of them."""
    keep_per_prompt: KeepPerPrompt | None = None
    """Train on some of a prompt's responses; null: on all."""
    max_staleness: Literal[0] = 0
    """Optimizer phases by which a rollout may lag behind the weights it trains. 0: rollouts and training take turns."""
    environment: EnvironmentConfig | None = None
    """null: one turn answers a prompt."""

    @property
    def max_response_tokens(self) -> int:
        """Most tokens that the policy samples in one sequence."""
        environment = self.environment
        if environment is None:
            return self.max_new_tokens
        return min(environment.max_turns * self.max_new_tokens, environment.max_tokens)

    def longest_sequence(self, prompt_tokens: int) -> int:
        """Most tokens of a sequence that begins with a prompt of so many."""
        return prompt_tokens + self.max_new_tokens if self.environment is None else self.environment.max_tokens
