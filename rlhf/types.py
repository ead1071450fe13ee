"""Define the types exchanged between stages: frozen batches in flat (ragged) token columns, and the batches' scalars.

Layout: B sequences of unequal length follow each other in columns of N = sum(lengths) tokens, without padding. Every
column is aligned to its token: `logprobs[t]` is the log-probability of token t given the preceding tokens of the
sequence, and `values[t]` is the value of the state in which token t was chosen. Token 0 of a sequence has neither: both
columns hold 0 there, and `response_mask` is always False there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from rlhf.deferred import torch
from rlhf.extensions import CodeSource
from rlhf.sections import Section

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

FinishReason = Literal["stop", "length"]
RewardErrorKind = Literal["raised", "timeout", "not_a_number", "no_opinion", "died", "refused", "unavailable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ragged:
    """B sequences in flat columns. Every other field of a subclass has one entry (or row) per token.

    Adjacent sequences with the same id are a sample. A response is one sequence; an agent's session may be several.

    Example: sequences 4 and 7 of 2 and 3 tokens:

        sequence_ids = [4, 7]   lengths = [2, 3]   token_ids = [a0 a1 b0 b1 b2]
    """

    sequence_ids: Int[Tensor, " B"]  # index of the sequence's sample in its step
    lengths: Int[Tensor, " B"]  # tokens of each sequence

    def __post_init__(self) -> None:
        total = int(self.lengths.sum())
        for name in self.columns():
            column = getattr(self, name)
            if column.shape[:1] != (total,):
                raise ValueError(
                    f"{type(self).__name__}.{name} has {tuple(column.shape)} entries, lengths sum to {total}"
                )
        if self.sequence_ids.shape != self.lengths.shape:
            raise ValueError(f"{len(self.sequence_ids)} sequence ids for {len(self.lengths)} lengths")

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls) if f.name not in ("sequence_ids", "lengths"))

    @property
    def sample_ids(self) -> list[int]:
        """Return the ids of the samples in their order, each once."""
        ids: list[int] = self.sequence_ids.unique_consecutive().tolist()
        return ids

    @property
    def sample_lengths(self) -> Int[Tensor, " S"]:
        """Return the number of tokens of each sample, over all sequences of the sample."""
        ids, places = self.sequence_ids.unique_consecutive(return_inverse=True)
        return torch.zeros_like(ids).index_add_(0, places, self.lengths)

    @classmethod
    def gather(cls, parts: Sequence[Self], sequence_ids: Sequence[int]) -> Self:
        """Return the named samples' sequences, in this order, from several parts. KeyError names missing samples."""
        where: dict[int, list[tuple[int, int, int]]] = {}
        for index, part in enumerate(parts):
            start = 0
            held: dict[int, list[tuple[int, int, int]]] = {}
            for sequence_id, length in zip(part.sequence_ids.tolist(), part.lengths.tolist(), strict=True):
                held.setdefault(sequence_id, []).append((index, start, length))
                start += length
            where |= held
        missing = [i for i in sequence_ids if i not in where]
        if missing:
            raise KeyError(f"{cls.__name__}: sequences {missing[:8]} are in none of the {len(parts)} parts")
        places = [place for i in sequence_ids for place in where[i]]
        taken = {
            name: torch.cat([getattr(parts[part], name)[start : start + length] for part, start, length in places])
            for name in cls.columns()
        }
        return cls(
            sequence_ids=torch.tensor([i for i in sequence_ids for _ in where[i]], dtype=torch.int64),
            lengths=torch.tensor([length for _, _, length in places], dtype=torch.int64),
            **taken,
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return the sequences of all parts, in order."""
        names = ("sequence_ids", "lengths", *cls.columns())
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def of_samples(self, sequence_ids: Sequence[int]) -> Self:
        """Return all sequences of the named samples, in this order. There may be no name."""
        held = self.sequence_ids.tolist()
        return self.take([row for i in sequence_ids for row, sequence_id in enumerate(held) if sequence_id == i])

    def take(self, places: Sequence[int]) -> Self:
        """Return the sequences at the given positions, in the given order."""
        at = torch.tensor(places, dtype=torch.int64)
        starts, lengths = (self.lengths.cumsum(0) - self.lengths)[at].tolist(), self.lengths[at]
        ranges = [torch.arange(s, s + n) for s, n in zip(starts, lengths.tolist(), strict=True)]
        tokens = torch.cat([at[:0], *ranges])
        taken = {name: getattr(self, name)[tokens] for name in self.columns()}
        return type(self)(sequence_ids=self.sequence_ids[at], lengths=lengths, **taken)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts(Ragged):
    """Sampled responses with their prompts: made by the rollout engine, read by every trainer, never re-tokenised."""

    token_ids: Int[Tensor, " N"]  # prompt, then response; in a conversation, turns of the policy and the environment
    response_mask: Bool[Tensor, " N"]  # True where the policy sampled the token
    rollout_logprobs: Float[Tensor, " N"]  # by the sampler while sampling (temperature applied); 0 outside the mask
    versions: Int[Tensor, " N"]  # weight version that sampled the token; -1 outside the mask


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedRollouts(Rollouts):
    """Rollouts of a mixture with the experts chosen by the sampler's routers."""

    experts: Int[Tensor, "N L K"]  # int16, by layer; -1: not known, as for the last token, which is never read


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedRollouts(Rollouts):
    """Rollouts with the k likeliest tokens of the sampler's distribution at each sampled token."""

    top_ids: Int[Tensor, "N k"]  # int32; 0 outside the mask
    top_logprobs: Float[Tensor, "N k"]  # float32, by the sampler while sampling; 0 outside the mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples(Ragged):
    """Supervised sequences: loss where `loss_mask` is True."""

    token_ids: Int[Tensor, " N"]
    loss_mask: Bool[Tensor, " N"]  # True where the token counts in the loss; never on token 0 of a sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledExamples(Examples):
    """Responses sampled by the policy during the run. `loss_mask` is True on sampled tokens."""

    rollout_logprobs: Float[Tensor, " N"]  # by the sampler while sampling
    versions: Int[Tensor, " N"]  # weight version that sampled the token; -1 outside the mask
    temperatures: Float[Tensor, " N"]  # at which the response was sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSteps(Examples):
    """Responses divided into steps. `loss_mask` is True at the last token of a step."""

    step_labels: Bool[Tensor, " N"]  # True if the step ending here is correct; False elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """P rows of two or three sequences with a common prompt. In rows of two, row i is sequences 2i and 2i + 1.

    For preferences, the sequences are the chosen and the rejected response and, for triples, the gold response. For
    unpaired feedback, the second sequence is the prompt with the response of another row, used to estimate the
    divergence from the reference.
    """

    examples: Examples
    prompt_tokens: Int[Tensor, " P"]  # length of the row's common prompt, which is outside the loss mask
    margins: Float[Tensor, " P"]  # margins of preferences in the data; 0 if not given
    labels: Bool[Tensor, " P"]  # unpaired feedback: True if the response is desirable

    @property
    def num_sides(self) -> int:
        return len(self.examples.lengths) // len(self.prompt_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenValues(Ragged):
    """One number per token, passed between workers: reference logprobs, critic values or returns."""

    values: Float[Tensor, " N"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivilegedPrompts(Ragged):
    """The prompt of each response for a policy that teaches itself. The student and the engines never see it."""

    token_ids: Int[Tensor, " N"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivilegedDraft:
    """The teacher's prompt of a row, before sampling."""

    text: str  # with the marks of rlhf.data.privileged
    max_tokens: int  # of the completed prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivilegedContext:
    """The context of a response's teacher that exists only after sampling."""

    better: int | None = None  # sequence id of a better response to the prompt; None: there is none
    feedback: str | None = None  # of the rewards; None: no reward returned a text


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSignals(Ragged):
    """Training signals of single tokens, for the samples file; nan where a token has none."""

    old_logprobs: Float[Tensor, " N"]  # under the weights at the start of the step, by the trainer
    ref_logprobs: Float[Tensor, " N"]
    teacher_logprobs: Float[Tensor, " N"]
    advantages: Float[Tensor, " N"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearntStates(Ragged):
    """A teacher's last hidden states, one for each token in the loss mask: the state predicting this token.

    `lengths` counts loss-mask tokens only. The states have the teacher's dtype.
    """

    hidden: Float[Tensor, "N H"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprobs(Ragged):
    """A teacher's k largest log-probabilities, one row for each token in the loss mask: predictions of this token.

    `lengths` counts loss-mask tokens only. The log-probabilities are of softmax(logits / temperature) over the whole
    vocabulary, so that the exponentials of a row sum to at most 1. The ids of a row differ.
    """

    ids: Int[Tensor, "N k"]  # int32
    logprobs: Float[Tensor, "N k"]  # float32, at the run's temperature
    token_logprobs: Float[Tensor, " N"]  # float32, of the token itself, which may be none of the k


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanStates(Ragged):
    """The predictions of a teacher with another tokenizer, one row for each token in the loss mask.

    `lengths` counts loss-mask tokens only. Both tokenizers write the text of a span with whole tokens
    (rlhf.data.spans). The values of a span are in the row of the student's last token, and all remaining rows are 0.
    """

    hidden: Float[Tensor, "N H"]  # the teacher's state that predicts the last teacher's token of the span
    before: Float[Tensor, " N"]  # float32, the teacher's log-probability of the span's tokens before the last one
    logprobs: Float[Tensor, " N"]  # float32, of the whole span
    num_tokens: Int[Tensor, " N"]  # int32, the student's tokens in the span; 0: no span ends here


TeacherColumn = LearntStates | TopLogprobs | SpanStates
ONLY_TEACHER = "teacher"  # the name of a run's single teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyHead:
    """The output head of a model: logits = softcap(logit_scale * (hidden @ weight.T + bias))."""

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None
    softcap: float | None
    logit_scale: float
    pairs: Int[Tensor, "P 2"] | None = None
    # ids (student's, teacher's) of the tokens for the same text; None: the student has the same vocabulary

    def to(self, device: torch.device) -> Self:
        bias, pairs = (None if x is None else x.to(device) for x in (self.bias, self.pairs))
        return replace(self, weight=self.weight.to(device), bias=bias, pairs=pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters of responses. Temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None  # None: all tokens
    min_p: float = 0.0  # minimum probability relative to the likeliest token; 0: all tokens
    repetition_penalty: float = 1.0  # above 1: tokens already in prompt or response become less likely
    stop: tuple[str, ...] = ()  # strings that end a response and stay in the response
    stop_token_ids: tuple[int, ...] = ()  # tokens that end a response and stay in the response
    top_logprobs: int = 0  # likeliest tokens to report with each sampled token; at most the whole vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenResponse:
    """A response from the data, after its prompt, tokenised as one sequence."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]  # True where the token is learned; always False for the first token


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherPrompt:
    """A prompt in the tokens of a teacher with another tokenizer."""

    token_ids: tuple[int, ...]
    end: int  # token with which the teacher ends a response


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt, tokenised once, with the columns of the data row for the rewards."""

    prompt_id: int  # row in the data
    token_ids: tuple[int, ...]
    text: str  # the tokenizer's input
    columns: Mapping[str, Any]
    temperature: float | None = None  # in training; None: the run's temperature
    max_new_tokens: int | None = None  # of a response, or of each turn; None: the limit of the sampling parameters
    is_chat: bool = False  # written by the chat template
    question: str = ""  # the prompt without the marks of the chat template; empty: as `text`
    turn_end: int | None = None  # token ending a response in the template; None: the model's end tokens
    given: GivenResponse | None = None  # None: the row has no response, or the algorithm reads no responses
    privileged: PrivilegedDraft | None = None  # of a policy that teaches itself; engines get None
    teacher_prompt: TeacherPrompt | None = None  # None: the teacher has the policy's tokenizer; engines get None

    @property
    def non_token_bytes(self) -> bytes:
        """Return temperature, limit and given response as bytes. Reward columns are left out: a user may correct
        rewards and resume."""
        temperature = "" if self.temperature is None else str(self.temperature)
        numbers = temperature if self.max_new_tokens is None else f"{temperature}/{self.max_new_tokens}"
        return numbers.encode() if self.given is None else f"{numbers} {self.given.token_ids}".encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """A prompt to be answered len(seeds) times. The unit of rollout, scoring and group advantages."""

    group_id: int  # position in the run's prompt stream; unique in a run
    prompt: Prompt
    seeds: tuple[int, ...]  # one per sample, from (run, epoch, prompt id, sample index); independent of scheduling
    first_sequence_id: int  # the samples are sequences first_sequence_id, +1, ... of the step
    temperature: float | None = None  # of this group; None: the run's temperature
    epoch: int = 0  # in which the prompt stream gave this prompt
    continues: int | None = None  # id of the prompt's cancelled request; its responses are continued

    def for_engine(self) -> GroupRequest:
        """Return the request without the teacher's prompt."""
        prompt = self.prompt
        if prompt.privileged is None and prompt.teacher_prompt is None:
            return self
        return replace(self, prompt=replace(prompt, privileged=None, teacher_prompt=None))

    def drawn_by(self, sampling: Sampling) -> Sampling:
        """Return the defaults with the prompt's limit, and in training with the request's temperature."""
        if self.prompt.max_new_tokens is not None:
            sampling = replace(sampling, max_new_tokens=self.prompt.max_new_tokens)
        return sampling if self.temperature is None else replace(sampling, temperature=self.temperature)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReward:
    """The reward of one step of a response. A turn is a step of a conversation."""

    end: int  # index in the sample of the step's last token, which was sampled; several sequences follow each other
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A turn of the policy in a conversation, or a call in an agent's session."""

    end: int  # index in the sample of the turn's last token; several sequences follow each other
    state: str  # a digest of the observation before the turn, equal for equal observations


RESULT_COLUMN = "result"  # the name under which rewards get the result of an agent's session


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionEnd:
    """Scalars of an agent's session, with the result for the rewards."""

    result: str | None  # as JSON; None: the agent failed
    num_calls: int
    broken: tuple[str, ...]  # for each call whose prompt only seems to continue earlier tokens: why not
    restricted: Mapping[str, int]  # sampled tokens left out of training, by the request's field with the grammar


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutInfo:
    """Scalars of a response, seen by the controller in place of the tokens."""

    sequence_id: int
    num_prompt_tokens: int  # before the first sampled token
    num_response_tokens: int  # sampled tokens that are trained
    finish_reason: FinishReason
    min_version: int  # oldest and newest weights that sampled a token; -1: no sampled token
    max_version: int
    mean_logprob: float  # of the sampled tokens, by the sampler
    num_turns: int = 1  # turns of the policy
    num_environment_tokens: int = 0  # tokens between the policy's turns; shared tokens count once
    environment_rewards: tuple[StepReward, ...] | None = None  # per turn; None: no environment, or a failure
    turns: tuple[Turn, ...] = ()  # of a conversation or a session, in the order of play; empty: none, or a failure
    environment_error: RewardError | None = None  # of an environment or an agent
    session: SessionEnd | None = None  # of an agent; None: no agent

    @property
    def environment_reward(self) -> float | None:
        given = self.environment_rewards
        return None if given is None else sum((step.value for step in given), 0.0)

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of the whole sample. A shared prefix counts once."""
        return self.num_prompt_tokens + self.num_tokens_after_prompt

    @property
    def num_tokens_after_prompt(self) -> int:
        """Return the length after the prompt. The prompt is shared with the group."""
        return self.num_response_tokens + self.num_environment_tokens


def oldest_version(infos: Sequence[RolloutInfo]) -> int | None:
    """Return the oldest version of any sampled token. None: the responses have no token."""
    return min((info.min_version for info in infos if info.num_response_tokens), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnLoss:
    """A policy loss in place of the algorithm's: the section of another algorithm, or a function, not yet loaded."""

    section: Section | None = None
    source: CodeSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScores:
    """The rewards of one group, or the errors. Built by the reward role."""

    scores: tuple[float, ...]  # weighted reward sum per response; empty if there are errors or no rewards
    by_name: Mapping[str, tuple[float | None, ...]]
    # each reward that applies to the row, before gate and weight; None: no opinion on the response
    errors: tuple[RewardError, ...]  # not empty: the group cannot be trained on
    scored_errors: tuple[RewardError, ...] = ()  # failed calls whose responses still got a score
    # rewards credited by steps, per response, before gate and weight; by_name holds their sums
    steps: Mapping[str, tuple[tuple[StepReward, ...], ...]] = field(default_factory=dict)
    # values that are only measured, under `<reward>/<name>`: criteria of a rubric, agreement, disagreement
    parts: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    feedback: tuple[str | None, ...] = ()  # texts of rewards on each response; empty: no reward returned a text

    @property
    def measured(self) -> dict[str, tuple[float | None, ...]]:
        """Return the values of all rewards, followed by their parts."""
        return {**self.by_name, **self.parts}


def is_unnamed(name: str) -> bool:
    """Return whether the name of a measured value ends in the number of a criterion in a row's rubric."""
    return "/" in name and name.rpartition("/")[2].isdigit()


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardError:
    """A failed reward call (an error, a hang, no finite number, no answer), or a response without any opinion."""

    reward: str
    kind: RewardErrorKind
    message: str
    prompt_id: int
    sample: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MinibatchPlan:
    """A plan of an optimizer step, or of a chunk of an evaluation: each rank's sequences, and the counts that divide
    the losses.

    The counts cover the whole step, or the whole evaluation set. A negative id stands for a given response
    of a prompt.
    """

    sequences_by_rank: tuple[tuple[int, ...], ...]  # ids of the samples of each data-parallel rank
    num_tokens: int  # sampled tokens, over all ranks; for pairs, of the chosen responses
    num_sequences: int  # samples, over all ranks; an agent's session counts once
    teachers: Mapping[int, str] = field(default_factory=dict)  # by sequence id; empty: there is a single teacher
    given_share: float = 0.0  # of the given responses in the loss
    num_given_tokens: int = 0  # learned tokens of given responses, part of num_tokens

    def teacher_of(self, sequence_id: int) -> str:
        return self.teachers.get(sequence_id, ONLY_TEACHER)

    def weight_of(self, *, is_given: bool) -> float:
        """Return the weight of a token's loss in the mean over num_tokens, so that both kinds get their shares."""
        if not self.given_share:
            return 1.0
        count = self.num_given_tokens if is_given else self.num_tokens - self.num_given_tokens
        return (self.given_share if is_given else 1.0 - self.given_share) * self.num_tokens / max(count, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenBatch:
    """A rank's given responses, learned beside the rollouts of an optimizer step."""

    share: float  # of the loss, above 0; the loss of the rollouts has the rest
    num_tokens: int  # learned tokens, over all ranks; 0: the step has no given response
    responses: tuple[GivenResponse, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """The plan of one batch of rollouts for the trained roles. Made by the controller from scalars.

    The minibatches' composition does not depend on the number of ranks. Each epoch visits the minibatches in a new
    order. With train.streamed a batch comes in portions. A portion's plan has its sequences of all minibatches.
    """

    step: int
    minibatches: tuple[MinibatchPlan, ...]
    scores: Mapping[int, float]  # by sequence id, without rewards credited by steps
    kl_coef: float
    entropy_coef: float = 0.0
    temperatures: Mapping[int, float] = field(default_factory=dict)  # by sequence id, for prompts with a temperature
    steps: Mapping[int, tuple[StepReward, ...]] = field(default_factory=dict)  # by sequence id, with training values
    turns: Mapping[int, tuple[StepReward, ...]] = field(default_factory=dict)  # advantages of turns, by sequence id
    portion: int = 0  # index of the portion in its batch
    imitation: Mapping[int, float] = field(default_factory=dict)  # weights of the supervised loss, by sequence id

    def sequences_of(self, rank: int) -> tuple[int, ...]:
        """Return all sequences of a rank, in the order of the minibatches."""
        return tuple(i for minibatch in self.minibatches for i in minibatch.sequences_by_rank[rank])

    def some_sequence(self) -> tuple[int]:
        """Return the first sequence of any rank. A rank without sequences computes this sequence without training."""
        return (next(i for minibatch in self.minibatches for ids in minibatch.sequences_by_rank for i in ids),)

    def received_by(self, rank: int) -> tuple[int, ...]:
        """Return the sequences of a rank's received columns."""
        return self.sequences_of(rank) or self.some_sequence()

    def for_rank(self, rank: int) -> Self:
        """Return the plan with the numbers of a rank's sequences alone."""
        received = self.received_by(rank)
        return replace(
            self,
            scores={i: self.scores[i] for i in received if i in self.scores},
            temperatures={i: self.temperatures[i] for i in received if i in self.temperatures},
            steps={i: self.steps[i] for i in received if i in self.steps},
            turns={i: self.turns[i] for i in received if i in self.turns},
            imitation={i: self.imitation[i] for i in received if i in self.imitation},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Peak memory of a process, or of a role's largest process, in GiB."""

    rss_gib: float
    gpu_gib: float | None  # None: no GPU
