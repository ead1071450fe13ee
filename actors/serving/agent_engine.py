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
from rlhf.errors import RunError, UserError
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
        try:
            await sessions.start()
        except UserError as error:  # the driver could load it, so this machine differs from the driver's
            raise RunError(f"{self.spec.name}: {spec.key}: {error}") from error
        return sessions


def engine_for(environment: EnvironmentSpec | AgentSpec | None) -> type[RolloutEngine]:
    """Return the class of the engines of a run."""
    return AgentEngine if isinstance(environment, AgentSpec) else RolloutEngine
