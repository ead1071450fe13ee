"""Play single-player games of TextArena."""

from __future__ import annotations

from typing import Any


class TextArena:
    """The game with an id (`GuessTheNumber-v0`, ...), with `args` for its class. The rules are the first observation.

    The reward is the game's final reward. A conversation truncated before the end has no reward.
    """

    def __init__(self, game: str, args: dict[str, Any] | None = None) -> None:
        try:
            import textarena
        except ImportError as error:
            raise ImportError(
                f"textarena is not installed ({error}); install the extra: pip install 'ray-rlhf[textarena]'"
            ) from error
        # Without wrappers the game returns only new messages, and not the whole history each time.
        self.game = textarena.make(f"{game}-raw", **(args or {}))

    def reset(self, seed: int) -> str:
        """Begin a game, and return the rules."""
        self.game.reset(num_players=1, seed=seed)
        return self._new_messages()

    def step(self, response: str) -> tuple[str, float, bool]:
        """Play a move, and return the new messages, the reward and the end."""
        done, _ = self.game.step(response)
        if not done:
            return self._new_messages(), 0.0, False
        rewards, _ = self.game.close()
        return "", float(rewards[0]), True

    def _new_messages(self) -> str:
        """Return the game's messages since the last call, without the player's."""
        player, messages = self.game.get_observation()
        return "\n".join(text for sender, text, _ in messages if sender != player)
