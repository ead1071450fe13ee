"""Ask the server of a language model for the log-probabilities of given tokens.

The protocol is vLLM's `prompt_logprobs` of OpenAI's /v1/completions, with token ids as prompt. `rlhf serve` speaks this
protocol. A server's values have temperature 1, and no value of another temperature follows from them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from rlhf.data.tokenization import encode
from rlhf.deferred import Float, Int, Tensor, torch
from rlhf.errors import RunError, UserError
from rlhf.process.stopping import run_async
from rlhf.rewards.services.client import Service, ServiceError, ServiceSpec

T = TypeVar("T")
logger = logging.getLogger(__name__)
PATH, MODELS_PATH = "/completions", "/models"
MAX_ANSWER_BYTES = 2**28  # 32,000 tokens with 64 alternatives each take about 200 MB
MAX_TOKENS = 2**31  # token ids are int32
TOKENS_AT_ONCE = 256  # special tokens in a text for comparison; some tokenizers have thousands
PROBES = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?",
    "def f(x):\n\n    return {'a': [x ** 2, -1.5e-3]}\t# 100 %\r\n",
    "Größe, façade, naïve: “quoted” … 12345678901",
    "Привет, мир! 你好世界。 こんにちは 안녕하세요 नमस्ते مرحبا",
    "🙂👩🏽🚀 ∑∫√ ≤β   spaces",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTokens:
    """The log-probabilities of n tokens, and of the k likeliest tokens at the same positions, the likeliest first."""

    logprobs: Float[Tensor, " n"]
    top_ids: Int[Tensor, "n k"]
    top_logprobs: Float[Tensor, "n k"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model behind a server. `name` is the value of `model` in requests."""

    service: ServiceSpec
    name: str

    def scored(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        *,
        top_k: int = 0,
        vocabulary: int = MAX_TOKENS,
    ) -> list[ScoredTokens]:
        """Return the log-probabilities of the tokens at `positions` of each sequence, given the tokens before them.

        Each sequence is a request, with up to `max_in_flight` requests at once. RunError: no usable answer before the
        deadline, or one of the likeliest tokens is not below `vocabulary`, the rows of the student's head.
        """
        bodies = [{"prompt": list(tokens), "prompt_logprobs": top_k} for tokens in sequences]
        reads = [
            partial(_read, tokens=tokens, chosen=chosen, top_k=top_k)
            for tokens, chosen in zip(sequences, positions, strict=True)
        ]
        try:
            scored = run_async(self._ask(bodies, reads))
        except ServiceError as error:
            raise RunError(f"{self.service.url}: {error}") from error
        largest = max((int(one.top_ids.max()) for one in scored if one.top_ids.numel()), default=0)
        if largest >= vocabulary:
            raise RunError(
                f"{self.service.url}: the model {self.name} names token {largest} among the {top_k} likeliest "
                f"(algorithm.top_k), and the student's head has {vocabulary} tokens. Serve a model whose head is no "
                "larger than the student's, lower algorithm.top_k, or use on_policy_distillation with divergence "
                "sampled_reverse_kl, which compares only the sampled tokens."
            )
        return scored

    def refuse_unfit(self, tokenizer: Any, *, longest_sequence: int, top_k: int = 0) -> None:
        """Raise UserError if the server reads some texts as different tokens, knows fewer token ids, or refuses top_k.

        Also if the server's sequences are shorter than the run's longest one.

        The texts are prose, code, numbers, several scripts, and all special tokens. RunError: no answer in time.
        """
        self._refuse_short(longest_sequence)
        both = f"the tokenizer of {self.name} at {self.service.url} is not the policy's, {tokenizer.name_or_path}"
        fix = "Serve a model with the policy's tokenizer"
        self._compare(PROBES, tokenizer, both, fix)
        size = max(tokenizer.get_vocab().values()) + 1
        told = f"{both}: the policy's has {size} tokens, and the server refuses the last one. {fix}"
        self._probe([{"prompt": [size - 1] * 2, "prompt_logprobs": 0}], _positions, refused=told)
        special = list(dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]))
        groups = [special[start : start + TOKENS_AT_ONCE] for start in range(0, len(special), TOKENS_AT_ONCE)]
        self._compare(["a" + "".join(group) for group in groups], tokenizer, both, fix)
        if top_k:
            told = f"{self.service.url} does not return the {top_k} likeliest tokens (algorithm.top_k)"
            self._probe([{"prompt": [0, 0], "prompt_logprobs": top_k}], _positions, refused=told)

    def _refuse_short(self, longest_sequence: int) -> None:
        """Raise UserError if the server has no room for the run's longest sequence and a token."""
        limit, needed = self._longest_of_server(), longest_sequence + 1  # the protocol samples a token
        if limit is None:
            logger.info("%s does not say how long the sequences of %s may be", self.service.url, self.name)
        elif limit < needed:
            raise UserError(
                f"the sequences of {self.name} at {self.service.url} have at most {limit} tokens (max_model_len), and "
                f"the run's longest sequence has {longest_sequence} and needs room for one more. Start the server with "
                f"{needed} or more (--max-length of rlhf serve, --max-model-len of vllm serve), or shorten the run's "
                "sequences."
            )

    def _longest_of_server(self) -> int | None:
        """Return max_model_len of /v1/models, or None if the server does not have the page or the number."""

        async def ask() -> dict[str, Any]:
            service = Service(self.service)
            try:
                return await service.request("GET", MODELS_PATH)
            finally:
                await service.close()

        try:
            models = run_async(ask()).get("data")
        except ServiceError as error:
            if error.kind == "unavailable":
                raise RunError(f"{self.service.url}: {error}") from error
            return None
        known = [one for one in models if isinstance(one, dict)] if isinstance(models, list) else []
        limit = next((one.get("max_model_len") for one in known if one.get("id") == self.name), None)
        return limit if isinstance(limit, int) else None

    def _compare(self, texts: Sequence[str], tokenizer: Any, both: str, fix: str) -> None:
        """Raise UserError if the server reads a text as other tokens. The first token of a text is not compared."""
        bodies = [{"prompt": text, "prompt_logprobs": 0, "add_special_tokens": False} for text in texts]
        read = self._probe(bodies, _token_ids, refused=self.service.url)
        for text, ids, theirs in zip(texts, encode(texts, tokenizer), read, strict=True):
            if ids[1:] != theirs[1:]:
                told = f"the server reads {text!r:.60} as {_shown(theirs)}, expected {_shown(ids)}"
                raise UserError(f"{both}: {told}. {fix}.")

    def _probe(
        self, bodies: Sequence[Mapping[str, Any]], read: Callable[[dict[str, Any]], T], *, refused: str
    ) -> list[T]:
        """Return the values read from the answers. RunError: no answer in time. UserError: `refused`, with the
        reason."""
        try:
            return run_async(self._ask(bodies, [read] * len(bodies)))
        except ServiceError as error:
            if error.kind == "unavailable":
                raise RunError(f"{self.service.url}: {error}") from error
            raise UserError(f"{refused}: {error}") from error

    async def _ask(
        self, bodies: Sequence[Mapping[str, Any]], reads: Sequence[Callable[[dict[str, Any]], T]]
    ) -> list[T]:
        """Return the value that each function has read from its answer. A whole answer is kept no longer than the
        reading takes."""
        service = Service(self.service)
        common = {"model": self.name, "max_tokens": 1, "temperature": 0.0}

        async def ask(body: Mapping[str, Any], read: Callable[[dict[str, Any]], T]) -> T:
            return read(await service.post({**common, **body}, PATH))

        tasks = [asyncio.create_task(ask(body, read)) for body, read in zip(bodies, reads, strict=True)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await service.close()


def _refused(text: str) -> ServiceError:
    return ServiceError("refused", text)


def _positions(answer: Mapping[str, Any]) -> list[dict[str, Any] | None]:
    """Return the entries of the prompt's positions. The first position has no entry."""
    try:
        entries = answer["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict | None) for entry in entries):
        raise _refused("its answer has no list `prompt_logprobs`; name a server of vLLM or `rlhf serve`")
    return entries


def _token_ids(answer: Mapping[str, Any]) -> list[int]:
    """Return the token ids of the prompt as the server read it, with -1 for the first, which has no entry."""
    try:
        return [-1 if not entry else int(next(iter(entry))) for entry in _positions(answer)]
    except ValueError as error:
        raise _refused(f"its answer names the tokens by text, expected token ids: {error}") from error


def _read(answer: Mapping[str, Any], tokens: Sequence[int], chosen: Sequence[int], top_k: int) -> ScoredTokens:
    entries = _positions(answer)
    if len(entries) != len(tokens):
        raise _refused(f"its answer has {len(entries)} positions for {len(tokens)} tokens")
    logprobs, ids, top = [], [], []
    try:
        for at in chosen:
            entry = entries[at] or {}
            logprobs.append(float(entry[str(tokens[at])]["logprob"]))
            if top_k:
                likeliest = sorted((item["rank"], int(token), item["logprob"]) for token, item in entry.items())[:top_k]
                ids.append([token for _, token, _ in likeliest])
                top.append([float(logprob) for *_, logprob in likeliest])
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(f"its answer lacks the token {tokens[at]} at position {at}, or its rank") from error
    if any(len(row) != top_k for row in ids):
        raise _refused(f"its answer has fewer than {top_k} tokens at a position")
    if not all(map(_is_logprob, [*logprobs, *(value for row in top for value in row)])):
        raise _refused("its answer has log-probabilities above 0 or that are no numbers")
    shape = (len(chosen), top_k)
    return ScoredTokens(
        logprobs=torch.tensor(logprobs, dtype=torch.float32),
        top_ids=torch.tensor(ids, dtype=torch.int32).reshape(shape),
        top_logprobs=torch.tensor(top, dtype=torch.float32).reshape(shape),
    )


def _is_logprob(value: float) -> bool:
    return value <= 1e-3  # rounding may exceed 0; nan fails this test


def _shown(ids: Sequence[int]) -> str:
    return f"{[*ids[1:9]]}{'...' if len(ids) > 9 else ''} after the first token"
