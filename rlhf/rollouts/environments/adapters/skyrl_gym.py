"""Play environments of skyrl-gym: text in, text out, with a reward at each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class SkyRLGym:
    """The environment registered as `env`, created for each row with the row's columns as `extras`.

    `config` becomes `env_config` of the environment's class. `extras` are the same for every row (`max_turns`, for
    example). The data supplies the prompt, and an environment with a different first prompt is refused.
    """

    def __init__(
        self, env: str, config: Mapping[str, Any] | None = None, extras: Mapping[str, Any] | None = None
    ) -> None:
        try:
            import skyrl_gym
        except ImportError as error:
            raise ImportError(
                f"skyrl-gym is not installed ({error}); install the extra: pip install 'ray-rlhf[skyrl-gym]'"
            ) from error
        skyrl_gym.spec(env)  # raises for an unknown environment
        self.gym = skyrl_gym
        self.env = env
        self.config = dict(config or {})
        self.extras = dict(extras or {})

    def reset(self, seed: int, **columns: Any) -> None:
        """Create the environment for a row."""
        prompt = columns.pop("messages", [])
        self.instance = self.gym.make(
            self.env, env_config=self.config, extras={"extra_info": {}, **columns, **self.extras}
        )
        first_prompt, _ = self.instance.init(prompt)
        if first_prompt != prompt:
            raise ValueError(f"{self.env} begins with {first_prompt!r:.200} and not with the prompt of the data")

    def step(self, response: str) -> tuple[str, float, bool]:
        """Play a turn. Several observations are joined by newlines."""
        result = self.instance.step(response)
        observation = "\n".join(str(message["content"]) for message in result["observations"])
        return observation, float(result["reward"]), bool(result["done"])

    def close(self) -> None:
        self.instance.close()
