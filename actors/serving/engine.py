"""A rollout engine with HTTP access, through a front in the same process."""

from __future__ import annotations

import ray

from actors.rollout.engine_creation import RolloutEngine
from actors.serving.front import Front, FrontSpec


class ServingEngine(RolloutEngine):
    """An engine as a Ray actor, with a front. The front begins after the engine."""

    front: Front | None = None

    async def open_front(self, spec: FrontSpec, caller: str) -> str:
        """Start the front and return its base URL. Only this machine reaches the front, unless `caller` is another."""
        here = str(ray.util.get_node_ip_address())
        self.front = await Front.open(
            self.calls,
            spec,
            lora=lambda: self.weights.lora,
            host="127.0.0.1" if here == caller else here,
            images=self.images,
        )
        return self.front.base_url

    async def admit(self, key: str, name: str, caller: str) -> str:
        """Let calls with a key use the front, under this name of the model. Start the front if there is none."""
        if self.front is None:
            return await self.open_front(FrontSpec(name=name, own_key=key), caller)
        self.front.admit(key, name)
        return self.front.base_url

    async def shutdown(self) -> None:
        """End the front, the engine and the environment."""
        if self.front is not None:
            await self.front.close()
        await super().shutdown()
