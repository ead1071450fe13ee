"""Play groups of multi-turn conversations with an environment.

prompt -> turn of the policy -> step of the environment -> next turn -> ... -> one sequence with a reward

An environment is a class with `reset(seed, **columns)` and `step(response)`; docs/environments.md has the protocol.
Environments run in separate processes (rlhf.rollouts.environments.host). Conversations are independent, so a slow
environment delays only one conversation. A failed environment is recorded, and never counts as a reward of 0.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from rlhf.data.images import RowImages
from rlhf.data.templates import UNCHANGED, ChatTemplate
from rlhf.errors import UserError
from rlhf.extensions import CodeSource
from rlhf.rollouts.environments.host import Conversation, EnvironmentFailure, EnvironmentHost, Step
from rlhf.rollouts.environments.observations import Observation, num_images
from rlhf.rollouts.environments.process import Description
from rlhf.rollouts.environments.tool_calls import ToolCallParser, read_calls
from rlhf.rollouts.environments.tool_servers import ToolServer
from rlhf.rollouts.environments.turns import ChatTurns, RawTurns, TurnWriter, first_prompt, turn_text
from rlhf.rollouts.records.spans import InsertedSpan, Played, Sampled, assemble
from rlhf.types import GroupRequest, Prompt, RewardError, RolloutInfo, Rollouts, Sampling

ENVIRONMENT = "environment"  # name of the environment in place of a reward's name in failures


class Environment(Protocol):
    """The interface of a user's environment.

    The class may also have `tools` and `close()`. Each conversation has a separate object, whose methods are never
    called concurrently.
    """

    def reset(self, seed: int, **columns: Any) -> str | list[dict[str, Any]] | None:
        """Begin a conversation and return the first observation, or None if the prompt is complete.

        An observation with images is a list of parts: `{"type": "text", "text": ...}` and
        `{"type": "image", "image": ...}`, where an image is an image of Pillow or the bytes of an image file.

        All conversations of a group have the same seed and columns, and must begin with the same observation.
        """

    def step(self, response: str) -> tuple[str | list[Any], float, bool]:
        """Take a turn of the policy and return (observation, reward, done).

        With tools, `step` also takes `tool_calls`, a list of `{name, arguments}`. The observation may then be a list
        with a result for each call.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentSpec:
    """An environment with limits, as used by an engine."""

    source: CodeSource
    max_turns: int  # turns of the policy
    max_tokens: int  # tokens of a whole conversation including the prompt
    step_timeout_s: float
    memory_gib: float
    processes: int  # number of conversations open at once
    tool_parser: str
    tokenizer: str
    trust_remote_code: bool
    template: ChatTemplate = UNCHANGED  # changes to the tokenizer's chat template
    servers: tuple[ToolServer, ...] = ()  # whose tools the policy may call
    key: str = "rollouts.environment"  # config section named in messages

    def host(self) -> EnvironmentHost:
        """Return the host of the environment and of all conversations."""
        return EnvironmentHost(
            self.source, step_timeout_s=self.step_timeout_s, memory_gib=self.memory_gib, servers=self.servers
        )

    def fingerprint(self) -> str:
        """Return a digest of the environment's settings with an effect on the tokens of a conversation.

        The digest includes the environment's file, but no imported files.
        """
        settings = repr((self.max_turns, self.max_tokens, self.tool_parser, self.template, *self.servers))
        return hashlib.blake2b(self.source.digest() + settings.encode(), digest_size=16).hexdigest()


Draw = Callable[[int, tuple[int, ...], int, Sampling, int | None], Awaitable[Sampled]]


class Conversations:
    """Plays groups of conversations, at most `processes` at once.

    `draw` samples a turn of the policy. The arguments of `draw` are the group id, the tokens so far, the seed, the
    sampling settings and the token at the end of a turn. `ends` are the model's end tokens.
    """

    def __init__(
        self,
        spec: EnvironmentSpec,
        tokenizer: Any,
        draw: Draw,
        ends: Collection[int] = (),
        images: RowImages | None = None,
    ) -> None:
        self.spec = spec
        self.images = images  # None: the model reads only text
        self.tokenizer = tokenizer
        self.ends = ends
        self.draw = draw
        self.parser: ToolCallParser | None = None  # required by an environment with tools
        self.host = spec.host()
        self.places = asyncio.Semaphore(spec.processes)
        self.description: Description
        self._writers: dict[bool, TurnWriter] = {}

    async def start(self) -> Description:
        """Load the environment. UserError for an invalid environment."""
        self.description = await self.host.start()
        return self.description

    async def stop(self) -> None:
        await self.host.stop()

    async def group(self, request: GroupRequest, sampling: Sampling) -> tuple[Rollouts, tuple[RolloutInfo, ...]]:
        """Play a conversation for each seed, and return the columns and scalars of the group."""
        return assemble(request, await self.play(request, sampling))

    async def play(self, request: GroupRequest, sampling: Sampling) -> list[Played]:
        """Play a conversation for each seed, all with the same beginning."""
        self.host.new_log_budget()
        game = _Game(request=request, sampling=sampling)
        tasks = [asyncio.create_task(self._conversation(game, sample)) for sample in range(len(request.seeds))]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # wait for the end of their processes

    async def _conversation(self, game: _Game, sample: int) -> Played:
        """Play a conversation from reset to end. The result has an error if the environment failed."""
        played = Played(prompt_token_ids=game.request.prompt.token_ids, spans=(), finish_reason="length")
        async with self.places:
            conversation = await self.host.open()
            try:
                played = replace(played, prompt_token_ids=await self._begin(conversation, game))
                return await self._play_turns(conversation, game, sample, played)
            except EnvironmentFailure as failure:
                place = {"prompt_id": game.request.prompt.prompt_id, "sample": sample}
                error = RewardError(reward=ENVIRONMENT, kind=failure.kind, message=str(failure), **place)
                return replace(played, error=error)
            finally:
                await conversation.end()

    async def _begin(self, conversation: Conversation, game: _Game) -> tuple[int, ...]:
        """Reset the environment, and return the prompt's tokens, the same for the whole group."""
        prompt = game.request.prompt
        seed = game.request.seeds[0]  # the same for all conversations of a group
        observation = await conversation.reset(seed, self.description.select(prompt.columns))
        if game.observation is None:
            game.observation = observation
        if observation != game.observation:
            raise EnvironmentFailure(
                "raised",
                f"reset returned {observation!r:.80} and, for another response to the same prompt, "
                f"{game.observation!r:.80}: it may depend only on the seed and the columns",
            )
        try:
            token_ids = first_prompt(prompt, observation, self.tokenizer, self.images)
        except (ValueError, UserError) as error:
            raise EnvironmentFailure("raised", str(error)) from error
        if len(token_ids) >= self.spec.max_tokens:
            raise EnvironmentFailure(
                "raised",
                f"the prompt with its first observation has {len(token_ids)} tokens, which leaves no room for a "
                f"response: {self.spec.key}.max_tokens is {self.spec.max_tokens}",
            )
        return token_ids

    async def _play_turns(self, conversation: Conversation, game: _Game, sample: int, played: Played) -> Played:
        """Play turns until the environment is done or a limit is reached. The text after the last turn is left out."""
        writer = self._writer(game.request.prompt)
        given = game.request.prompt.columns.get("images") or () if self.images is not None else ()
        self._refuse_many_images(shown := len(given) + num_images(game.observation or ""))
        tokens = played.prompt_token_ids
        spans: list[Sampled | InsertedSpan] = []
        rewards: list[float] = []
        observation: Observation | tuple[Observation, ...] = game.observation or ""
        anchors: list[str] = []
        for turn in range(self.spec.max_turns):
            room = min(game.sampling.max_new_tokens, self.spec.max_tokens - len(tokens))
            sampling = replace(game.sampling, max_new_tokens=room)
            seed = turn_seed(game.request.seeds[sample], turn)
            sampled = await self.draw(game.request.group_id, tokens, seed, sampling, writer.stop_token)
            spans.append(sampled)
            step = await self._step(conversation, sampled, writer)
            rewards.append(step.reward)
            anchors.append(_anchor(observation))
            observation = step.observation
            ended = replace(played, spans=tuple(spans), rewards=tuple(rewards), anchors=tuple(anchors))
            if step.done:
                return replace(ended, finish_reason="stop")
            try:
                inserted = writer.after(sampled.token_ids, step.observation)
            except UserError as error:
                raise EnvironmentFailure("raised", str(error)) from error
            tokens = (*tokens, *sampled.token_ids, *inserted)
            if turn + 1 == self.spec.max_turns or len(tokens) >= self.spec.max_tokens:
                break
            self._refuse_many_images(shown := shown + num_images(step.observation))
            spans.append(InsertedSpan(token_ids=inserted))
        return replace(ended, finish_reason="length")

    def _refuse_many_images(self, count: int) -> None:
        """Raise EnvironmentFailure if a conversation has more images than the engine takes."""
        if self.images is not None and count > (most := self.images.reader.limits.max_images):
            raise EnvironmentFailure(
                "raised",
                f"the conversation has {count} images, more than data.max_images, {most}. Raise data.max_images, or "
                "return fewer images.",
            )

    async def _step(self, conversation: Conversation, sampled: Sampled, writer: TurnWriter) -> Step:
        """Return the environment's step, or the errors of invalid tool calls as the observation."""
        text = partial(turn_text, sampled.token_ids, self.tokenizer, stop_token=writer.stop_token)
        response = text(skip_special_tokens=True)
        if self.parser is None:
            return await conversation.step(response)
        calls, problems = read_calls(self.parser.parse(text(skip_special_tokens=False)), self.description.tools)
        if problems:
            return Step(observation=problems, reward=0.0, done=False)
        return await conversation.step(response, calls)

    def _writer(self, prompt: Prompt) -> TurnWriter:
        chat, tools = prompt.is_chat, bool(self.description.tools)
        if chat not in self._writers:
            self._writers[chat] = (
                ChatTurns(self.tokenizer, with_tools=tools, ends=self.ends, images=self.images)
                if chat
                else RawTurns(self.tokenizer, self.images)
            )
        return self._writers[chat]


@dataclass(slots=True, kw_only=True)
class _Game:
    """The common state of a group's conversations. `observation` is the first observation, known after a reset."""

    request: GroupRequest
    sampling: Sampling
    observation: Observation | None = None


def _anchor(observation: Observation | tuple[Observation, ...]) -> str:
    """Return a digest that is equal for equal observations. A text and a list with this text have different digests."""
    return hashlib.blake2b(repr(observation).encode(), digest_size=8).hexdigest()


def turn_seed(seed: int, turn: int) -> int:
    """Return the sampling seed of a turn, from 1 to 2**31 - 1. The first turn uses the seed of the sample."""
    if turn == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) % (2**31 - 1) + 1
