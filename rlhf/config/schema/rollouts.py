"""Define how many responses are sampled, and how."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from rlhf.config.schema.tools import PublicUrl, ToolsConfig
from rlhf.limits import MAX_TEMPERATURE, MIN_TEMPERATURE
from rlhf.sections import NotWith, OnlyIn, OnlyWith, Section

UNTIL_ANSWER = "until_answer"  # the built-in environment that only ends conversations
MAX_STALENESS = 16  # most versions by which the oldest token of a trained response may lag
OF_A_PROCESS = OnlyWith("url", None, because="a service limits its own resources")
ENDS_WITH_THE_STEP = "a conversation cannot be continued, since its processes end with the step"


class EnvironmentConfig(Section):
    """An environment for conversations of several turns. docs/environments.md describes the protocol."""

    name: str = UNTIL_ANSWER
    """A built-in environment, `path/file.py:CLASS`, or an entry point `rlhf.environments` of an installed package.
    until_answer: the conversation ends with the first turn without a call of a tool."""
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the class's constructor."""
    max_turns: int = Field(default=8, ge=1, le=10_000)
    """Largest number of policy turns, each of at most rollouts.max_new_tokens. A longer conversation is truncated, and
    the rewards of earlier turns count."""
    max_tokens: int = Field(ge=2)
    """Largest number of tokens in a conversation with its prompt. A longer conversation is truncated too."""
    step_timeout_s: float = Field(default=10.0, gt=0.0, le=1_000_000)
    """Time limit of one environment call, in seconds. A slower call counts as failed; see reward_policy."""
    memory_gib: float = Field(default=4.0, ge=0.25, le=65536)
    """Memory that a conversation's process may map, including libraries, in GiB. Exceeding this is a failure."""
    processes: int = Field(default=256, ge=1, le=100_000)
    """Conversations open at once in an engine, each in a separate process. Further conversations are queued."""
    tool_parser: Literal["hermes", "llama3_json", "pythonic"] = "hermes"
    """Format of the model's tool calls. hermes: JSON within `<tool_call>`, as in Qwen and many models."""
    tools: ToolsConfig | None = None
    """Servers whose tools the policy may call. null: the tools of the environment's class, if any."""

    @model_validator(mode="after")
    def _has_turns(self) -> Self:
        if self.name == UNTIL_ANSWER and self.tools is None:
            raise ValueError("give `name`, `tools` or both: without tools, the first turn would end the conversation")
        return self


class AgentConfig(Section):
    """An agent: a program that calls the model over OpenAI's or Anthropic's protocol. docs/agents.md describes agents.
    Give exactly one of function, command and url."""

    function: str | None = Field(default=None, pattern=r".+:.+")
    """`path/file.py:NAME` of an async function `NAME(task, client)`, run in a separate process for each session."""
    command: tuple[str, ...] | None = Field(default=None, min_length=1)
    """A program with its arguments, started for each session. The program gets the task as JSON on standard input."""
    url: PublicUrl | None = None
    """A service that gets the task of each session and answers with the result."""
    columns: tuple[str, ...] = ()
    """Columns of a row for the agent, besides the prompt. A model may read everything that the agent gets: leave out
    the answers."""
    max_calls: int = Field(default=32, ge=1, le=100_000)
    """Largest number of calls of the model in a session, each of at most rollouts.max_new_tokens. A session with more
    calls counts as failed; see reward_policy."""
    max_tokens: int = Field(ge=2)
    """Largest number of tokens in a call, prompt and response. A response is truncated there; a session with a longer
    prompt counts as failed."""
    timeout_s: float = Field(default=600.0, gt=0.0, le=1_000_000)
    """Time limit of a session, in seconds. A slower session counts as failed."""
    memory_gib: Annotated[float, OF_A_PROCESS] = Field(default=4.0, ge=0.25, le=65536)
    """Memory that all processes of a session together may take and each process may map, including libraries, in GiB.
    Exceeding the limit counts as a failure."""
    max_threads: Annotated[int, OF_A_PROCESS] = Field(default=512, ge=1, le=1_000_000)
    """Largest number of threads of all processes of a session, at least one thread per process. Exceeding the number
    counts as a failure."""
    disk_gib: Annotated[float, OF_A_PROCESS] = Field(default=4.0, gt=0.0, le=1_000_000)
    """Disk space of the files of a session, in GiB. Exceeding the limit counts as a failure."""
    sandbox: Annotated[bool, NotWith("command", None, because="only a program can be confined")] = False
    """Run the command in a sandbox. The command reads the system's libraries, the run's Python, and the files named in
    the command, with the packages of a named virtual environment. The command writes only to the working folder, and
    reaches nothing but the model. A sandbox needs bubblewrap."""
    tools: Annotated[ToolsConfig | None, NotWith("function", None, because="only functions get `client.tools`")] = None
    """Servers with the tools that the function calls as `client.tools`."""
    concurrency: int = Field(default=256, ge=1, le=100_000)
    """Sessions open at once in an engine. Further sessions are queued."""

    @property
    def name(self) -> str:
        return self.function or self.url or " ".join(self.command or ())

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(kind is not None for kind in (self.function, self.command, self.url)) != 1:
            raise ValueError("give exactly one of `function`, `command` and `url`")
        return self


class DynamicSampling(Section):
    """Filter groups without a learning signal, and replace such groups with other prompts' groups until the batch is
    full (DAPO, arXiv:2503.14476, section 3.2). A group is filtered if all its responses have equal scores, or by its
    mean score."""

    min_mean: float | None = Field(default=None, allow_inf_nan=False)
    """Filter groups with a lower mean score too. null: no lower limit."""
    max_mean: float | None = Field(default=None, allow_inf_nan=False)
    """Filter groups with a higher mean score too. null: no upper limit."""
    max_filtered_fraction: float = Field(default=4.0, gt=0.0, le=1000.0)
    """Number of groups filtered in one step, divided by prompts_per_step, at which the run stops. In flight, groups of
    later batches are filtered too. The divisor is then the number of kept groups, if larger."""

    @model_validator(mode="after")
    def _a_band(self) -> Self:
        if self.min_mean is not None and self.max_mean is not None and self.min_mean > self.max_mean:
            raise ValueError(f"`min_mean` {self.min_mean:g} is above `max_mean` {self.max_mean:g}: nothing is between")
        return self


class KeepPerPrompt(Section):
    """Train on a subset of each prompt's responses. Only responses in the subset are compared with each other."""

    count: int = Field(ge=1)
    """Number of responses to keep."""
    by: Literal["spread", "best"] = "spread"
    """spread: keep the subset with the largest score variance, some highest and some lowest scores (arXiv:2504.13818).
    best: keep the highest scores."""


class RolloutsConfig(Section):
    """How responses are sampled. A step's batch is prompts_per_step * samples_per_prompt responses."""

    prompts_per_step: int = Field(default=64, ge=1, le=1_000_000)
    """Prompts sampled between two weight syncs."""
    samples_per_prompt: int = Field(default=4, ge=1, le=10_000)
    """Responses to each prompt, forming one group."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Largest number of tokens in a response. A longer response is truncated. A column `max_new_tokens` sets a lower
    limit for each row."""
    temperature: float = Field(default=1.0, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)
    """Sampling temperature. The trainer computes log-probabilities at the same temperature. In training, a column
    `temperature` sets the temperature of each row."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling. 1.0 keeps all tokens."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample among the k most likely tokens. null: keep all tokens."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Sample among tokens with at least this fraction of the most likely token's probability. 0 keeps all tokens."""
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    """Values above 1 make tokens of the prompt or response less likely; 1 changes nothing. The policy is trained
    without the penalty, so other values need importance weights towards the sampler (algorithm.correction)."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a response. The strings stay in the response and may contain special tokens."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Token ids that end a response, besides the model's and the chat template's. The ids stay in the response."""
    dynamic_sampling: Annotated[DynamicSampling | None, OnlyIn("rewards", "filtered groups")] = None
    """Replace groups without a learning signal. null: train on all groups."""
    oversample: float = Field(default=1.0, ge=1.0, le=10.0)
    """Number of prompts to sample for each prompt of the batch. Above 1, the slowest prompts are cancelled once the
    batch is full, and are the first prompts of the next step. Steps wait less for long responses and train on fewer
    long responses."""
    carry_over: Annotated[
        bool,
        NotWith("oversample", 1.0, because="a step awaits all its responses, and none is left to continue"),
        OnlyWith("max_staleness", 0, because="a continued response would lag by more than this bound"),
        OnlyWith("environment", None, because=ENDS_WITH_THE_STEP),
        OnlyWith("agent", None, because=ENDS_WITH_THE_STEP),
    ] = False
    """Keep the tokens of the prompts that oversample cancels. The next step continues these responses instead of
    sampling them from the start. Such a response mixes versions of the weights, and algorithm.correction must be given.
    A response whose oldest token lags by more than 16 versions is sampled from the start."""
    keep_per_prompt: Annotated[KeepPerPrompt | None, OnlyIn("a choice of responses")] = None
    """Train on some of a prompt's responses. null: train on all."""
    max_staleness: int = Field(default=0, ge=0, le=MAX_STALENESS)
    """Steps by which the weights used for sampling a response may lag behind the weights in training. 0: rollouts and
    training take turns. 1 and more: the engines sample later batches during a training step, and algorithm.correction
    must be given. Between batches, every response after the first steps lags by exactly this number. In flight, this is
    a limit: groups are requested as late as training allows."""
    weight_updates: Annotated[
        Literal["between_batches", "in_flight"],
        NotWith("max_staleness", 0, because="in turns, no response is in progress at an update"),
    ] = "between_batches"
    """When the engines load new weights. between_batches: after a whole batch, so that runs repeat bit for bit.
    in_flight: between two decoding steps, so a response may span versions. max_staleness is the largest lag of a
    response's oldest token."""
    batch_order: Literal["prompt", "completion"] = "prompt"
    """Order in which groups are trained. prompt: the order of the data. completion: the order in which groups finish,
    which favours short responses; needs weight_updates in_flight."""
    kv_after_update: Annotated[
        Literal["recompute", "keep"],
        NotWith("weight_updates", "between_batches", because="no response is in progress at an update"),
    ] = "recompute"
    """What happens at an update to the cached keys and values of responses in progress. recompute: the new weights
    compute the keys and values again, so later log-probabilities are exactly the new weights'. keep: the update costs
    no prefill, and later log-probabilities depend on earlier weights through the kept keys and values."""
    environment: EnvironmentConfig | None = None
    """The environment for conversations. null: a single turn answers a prompt."""
    agent: AgentConfig | None = None
    """The agent that solves each prompt by calls of the model. null: no agent."""

    @model_validator(mode="after")
    def _one_player(self) -> Self:
        if self.environment is not None and self.agent is not None:
            raise ValueError("give one of `environment` and `agent`: an agent has its own tools and observations")
        return self

    @property
    def max_lag(self) -> int:
        """Return the largest lag of a trained response's oldest token, in versions."""
        return MAX_STALENESS if self.carry_over else self.max_staleness

    @property
    def max_response_tokens(self) -> int:
        """Return the largest number of tokens sampled by the policy in one response, or in all calls of an agent."""
        if self.environment is not None:
            return min(self.environment.max_turns * self.max_new_tokens, self.environment.max_tokens)
        if self.agent is not None:
            return self.agent.max_calls * self.max_new_tokens
        return self.max_new_tokens

    def longest_sequence(self, prompt_tokens: int) -> int:
        """Return the most tokens of a sequence beginning with a prompt of `prompt_tokens`."""
        player = self.environment or self.agent
        return prompt_tokens + self.max_new_tokens if player is None else player.max_tokens
