"""Remember cancelled prompts with begun responses, for the next step to continue (rollouts.carry_over)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf.config.schema.rollouts import MAX_STALENESS
from rlhf.types import GroupRequest


class CarriedPrompts:
    """The prompts with begun responses. The engines keep the tokens in the spool."""

    def __init__(self) -> None:
        # By epoch and prompt id: the cancelled request, and the oldest version of a token.
        self._begun: dict[tuple[int, int], tuple[int, int]] = {}
        self.num_restarted = 0  # requests of this step that start again, since the tokens were too old

    def continuing(self, request: GroupRequest, version: int) -> GroupRequest:
        """Return a request that continues the prompt's begun responses, unless missing or too old."""
        key = request.epoch, request.prompt.prompt_id
        group_id, oldest = self._begun.get(key, (None, version))
        if version - oldest <= MAX_STALENESS:
            return replace(request, continues=group_id)
        del self._begun[key]
        self.num_restarted += 1
        return request

    def update(self, requests: Sequence[GroupRequest], answered: Collection[int], version: int) -> None:
        """Remember the cancelled requests of `version`, and forget the answered requests."""
        for request in requests:
            key = request.epoch, request.prompt.prompt_id
            _, oldest = self._begun.pop(key, (None, version))
            if request.group_id not in answered:
                self._begun[key] = request.group_id, oldest

    def state(self) -> list[tuple[int, int, int, int]]:
        return [(*key, *begun) for key, begun in self._begun.items()]

    def restore(self, state: Iterable[Sequence[int]]) -> None:
        self._begun = {(epoch, prompt_id): (group_id, oldest) for epoch, prompt_id, group_id, oldest in state}


def begun_requests(position: Mapping[str, Any]) -> frozenset[int]:
    """Return the ids of the cancelled requests for later steps to continue, from a position in the prompts."""
    return frozenset(group_id for _, _, group_id, _ in position.get("begun", ()))


def first_untrained_group(position: Mapping[str, Any]) -> int:
    """Return the first untrained group, from a position in the prompts."""
    first: int = min((group_id for group_id, *_ in position.get("outstanding", ())), default=position["next_group"])
    return first
