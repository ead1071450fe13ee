"""Define a simulation's system, schedule of rollouts and training, and outcome, without any configuration."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.planning.lengths import Lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How rollouts and training overlap: in turns, streamed, pipelined or in flight."""

    max_staleness: int = 0
    streamed: bool = False  # only with a max_staleness of 0
    in_flight: bool = False  # only with a max_staleness of 1 and more, as is by_completion
    by_completion: bool = False

    def __str__(self) -> str:
        if self.max_staleness == 0:
            return "streamed" if self.streamed else "in turns"
        order = ", by completion" if self.by_completion else ""
        return f"{'in flight' if self.in_flight else 'pipelined'}, {self.max_staleness} ahead{order}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedGroup:
    """The measured times and lengths of a real run's group."""

    lengths: tuple[int, ...]  # of its responses
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    lengths: Lengths
    recorded: tuple[RecordedGroup, ...] = ()  # the groups in their order, in place of drawn ones
    prompts_per_step: int
    samples_per_prompt: int
    prompt_tokens: float
    engines: int
    colocated: bool  # engines and trainer take turns on the same GPUs
    max_num_seqs: int
    base_s: float  # of a decoding step: reading the weights
    each_s: float  # of a decoding step: additional time per sequence
    train_tokens_per_s: float  # experience and updates together
    streamed_share: float = 1.0  # fraction of the trainer's work that can begin before the batch is whole
    sync_s: float  # from the update until the engines hold the new weights
    load_s: float  # in flight: pause of the engines within sync_s, without recomputed keys and values
    prefill_s: float = 0.0  # per prompt token, and per token with recomputed keys and values
    images_s: float = 0.0  # of the vision tower, per prompt
    recomputes: bool = False  # in flight: new weights compute the keys and values again


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Hold averages over the steps after the pipeline has filled."""

    step_s: float
    tokens_per_s: float  # trained prompt and response tokens
    engines_busy: float  # fraction of the time with a decoding engine
    trainer_busy: float
    lag: float  # average age of the weights at the start of trained groups, in versions
