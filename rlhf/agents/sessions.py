"""Run a session of an agent for each sample of a group.

task -> session at the engine's front -> the agent, calling the front -> the calls and the result -> sequences

Sessions are independent, so a slow agent delays a single session. A failure of an agent is recorded, and never counts
as a reward of 0.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rlhf.agents.calls import AgentResult, AgentRun, Call
from rlhf.agents.limits import ProcessLimits, SessionLimits
from rlhf.agents.runners import KEY, AgentTask, HostedRunner, ServiceRunner, result_json
from rlhf.agents.trees import assemble_sessions
from rlhf.data.templates import UNCHANGED, ChatTemplate
from rlhf.extensions import CodeSource
from rlhf.rewards.failure_rule import AGENT
from rlhf.rollouts.environments.host import EnvironmentFailure
from rlhf.rollouts.environments.tool_servers import ToolServer
from rlhf.types import GroupRequest, Prompt, RewardError, RolloutInfo, Rollouts, Sampling, SessionEnd

FUNCTION = "rlhf.agents.hosted:HostedFunction"
COMMAND = "rlhf.agents.hosted:HostedCommand"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSpec:
    """An agent with limits, as used by an engine."""

    source: CodeSource  # of a program, its only argument is `command`
    program: str | None  # FUNCTION or COMMAND; None: a service, whose source has the argument `url`
    columns: tuple[str, ...]  # of a row, for the agent
    max_calls: int
    max_tokens: int  # prompt and response of one call
    timeout_s: float
    process_limits: ProcessLimits  # of a session that runs on this machine
    processes: int  # sessions open at once
    tokenizer: str
    trust_remote_code: bool
    template: ChatTemplate = UNCHANGED  # changes to the tokenizer's chat template
    servers: tuple[ToolServer, ...] = ()  # whose tools a function may call
    key: str = KEY  # config section named in messages

    def fingerprint(self) -> str:
        """Return a digest of the agent's settings. The digest includes the file of a function, but no other files."""
        settings = repr((self.program, self.columns, self.max_calls, self.max_tokens, self.template, *self.servers))
        return hashlib.blake2b(self.source.digest() + settings.encode(), digest_size=16).hexdigest()

    def runner(self) -> HostedRunner | ServiceRunner:
        if self.program is None:
            return ServiceRunner(self.source.args["url"], timeout_s=self.timeout_s, key=self.key)
        return HostedRunner(
            self.source,
            program=self.program,
            timeout_s=self.timeout_s,
            limits=self.process_limits,
            servers=self.servers,
            key=self.key,
        )


class SessionState(Protocol):
    """A session at the front while the agent runs."""

    exceeded: str | None  # the key of the limit exceeded by the agent's calls
    is_over: asyncio.Event  # set after a limit has been exceeded


class AgentFront(Protocol):
    """The sessions of an engine's front."""

    def open(self, key: str, sampling: Sampling, limits: SessionLimits) -> SessionState:
        """Answer calls with this key from now on."""

    def close(self, key: str) -> list[Call]:
        """Refuse the key from now on, and return the finished calls in the order of their end."""


class AgentSessions:
    """Runs groups of sessions, at most `processes` at once."""

    def __init__(self, spec: AgentSpec, front: AgentFront, address: str) -> None:
        self.spec = spec
        self.front = front
        self.address = address
        self.runner = spec.runner()
        self.places = asyncio.Semaphore(spec.processes)

    async def start(self) -> None:
        """Load the agent. UserError for an invalid agent."""
        await self.runner.start()

    async def stop(self) -> None:
        await self.runner.stop()

    async def group(self, request: GroupRequest, sampling: Sampling) -> tuple[Rollouts, tuple[RolloutInfo, ...]]:
        """Run a session for each seed, and return the columns and scalars of the group."""
        self.runner.begin_group()
        sessions = [asyncio.create_task(self._session(request, sampling, n)) for n in range(len(request.seeds))]
        try:
            ended = await asyncio.gather(*sessions)
        finally:
            for session in sessions:
                session.cancel()
            await asyncio.gather(*sessions, return_exceptions=True)  # wait for the end of their processes
        rollouts, infos = assemble_sessions(request, [session for session, _ in ended])
        return rollouts, tuple(
            replace(info, session=session_end(session), environment_error=error)
            for info, (session, error) in zip(infos, ended, strict=True)
        )

    async def _session(
        self, request: GroupRequest, sampling: Sampling, sample: int
    ) -> tuple[AgentRun, RewardError | None]:
        """Run a session from the opening to the end. Return the record, with any failure of the agent."""
        prompt, seed = request.prompt, request.seeds[sample]
        result: AgentResult | None = None
        error: RewardError | None = None
        async with self.places:
            key = f"sk-{secrets.token_urlsafe(24)}"
            limits = SessionLimits(max_calls=self.spec.max_calls, max_tokens=self.spec.max_tokens, seed=seed)
            opened = self.front.open(key, sampling, limits)
            calls: list[Call] = []
            try:
                columns = task_of(prompt, self.spec.columns)
                task = AgentTask(task=columns, address=self.address, api_key=key, seed=seed)
                result = await self._solve(task, opened)
            except EnvironmentFailure as failure:
                error = _error(failure, prompt, sample)
            finally:
                calls = self.front.close(key)
        if error is None and (problem := self._problem(opened.exceeded, calls)) is not None:
            error = _error(problem, prompt, sample)
        return AgentRun(calls=calls, result=result if error is None else None), error

    async def _solve(self, task: AgentTask, opened: SessionState) -> AgentResult | None:
        """Run the agent to the end, or until a call exceeds a limit and the session has failed."""
        agent = asyncio.ensure_future(self.runner.solve(task))
        over = asyncio.ensure_future(opened.is_over.wait())
        try:
            await asyncio.wait((agent, over), return_when=asyncio.FIRST_COMPLETED)
            return await agent if agent.done() else None
        finally:
            over.cancel()
            agent.cancel()
            await asyncio.gather(agent, over, return_exceptions=True)  # wait for the end of its processes

    def _problem(self, exceeded: str | None, calls: list[Call]) -> EnvironmentFailure | None:
        """Return why a session has no score although the agent has ended without an error."""
        if exceeded is not None:
            limit = f"{self.spec.key}.{exceeded}: {getattr(self.spec, exceeded)}"
            return EnvironmentFailure("refused", f"a call of the agent was over {limit}")
        if not any(len(call.response_ids) for call in calls):
            return EnvironmentFailure("raised", "the agent ended without an answer of the model")
        return None


def _error(failure: EnvironmentFailure, prompt: Prompt, sample: int) -> RewardError:
    return RewardError(reward=AGENT, kind=failure.kind, message=str(failure), prompt_id=prompt.prompt_id, sample=sample)


def session_end(session: AgentRun) -> SessionEnd:
    """Return the scalars of a session for the driver, with the result for the rewards."""
    restricted: Counter[str] = Counter()
    for call in session.calls:
        if call.restriction is not None:
            restricted[call.restriction] += len(call.free) - int(call.free.sum())
    return SessionEnd(
        result=None if session.result is None else result_json(session.result),
        num_calls=len(session.calls),
        broken=tuple(call.broke for call in session.calls if call.broke is not None),
        restricted=dict(restricted),
    )


def task_of(prompt: Prompt, columns: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the agent's task: the prompt's text or messages, and the given columns of the row."""
    said = {"messages": prompt.columns["messages"]} if prompt.is_chat else {"prompt": prompt.text}
    return {**said, **{name: prompt.columns[name] for name in columns}}
