"""A rollout engine with sessions of an agent as groups. The agent calls the engine's own front."""

from __future__ import annotations

from urllib.parse import urlsplit

import ray

from actors.rollout.engine_actor import Players
from actors.rollout.engine_creation import RolloutEngine
from actors.serving.engine import ServingEngine
from actors.serving.front import FrontSpec
from rlhf.agents.hosted import MODEL
from rlhf.agents.sessions import AgentSessions, AgentSpec
from rlhf.data.chat import turn_end
from rlhf.models.files.loading import load_tokenizer
from rlhf.rollouts.environments.conversations import EnvironmentSpec
from rlhf.serving import is_loopback


class AgentEngine(ServingEngine):
    """An engine as a Ray actor, with a front and an agent."""

    async def start_players(self, spec: EnvironmentSpec | AgentSpec) -> Players:
        """Open the front, and load the agent into a process of this machine."""
        if isinstance(spec, EnvironmentSpec):
            return await super().start_players(spec)
        tokenizer = load_tokenizer(spec.tokenizer, trust_remote_code=spec.trust_remote_code, template=spec.template)
        end, template = turn_end(tokenizer), tokenizer.chat_template
        front = FrontSpec(
            name=MODEL,
            template=template if isinstance(template, str) else None,
            turn_ends=() if end is None else (end,),
        )
        is_local = spec.program is not None or is_loopback(urlsplit(spec.source.args["url"]).hostname or "")
        address = await self.open_front(front, str(ray.util.get_node_ip_address()) if is_local else "")
        assert self.front is not None
        sessions = AgentSessions(spec, self.front.sessions, address)
        await sessions.start()
        return sessions


def engine_for(environment: EnvironmentSpec | AgentSpec | None, *, with_suites: bool = False) -> type[RolloutEngine]:
    if isinstance(environment, AgentSpec):
        return AgentEngine
    return ServingEngine if with_suites else RolloutEngine
