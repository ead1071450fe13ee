"""Make the teacher's prompts of a policy that teaches itself. Decide which responses have a teacher, and which better
response or feedback the teacher reads.

The module uses only scalars and the texts of rewards. The reward workers write the prompts, because they hold the text
of responses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from rlhf.algorithms.privileged import SelfTeaching
from rlhf.data.privileged import BETTER, FEEDBACK, needs_late_text
from rlhf.roles import RemoteColumns, RewardRole, ScoredGroup
from rlhf.types import PrivilegedContext, PrivilegedPrompts

Contexts = Mapping[int, PrivilegedContext]  # by sequence id


def contexts_of(scored: ScoredGroup, section: SelfTeaching) -> Contexts:
    """Return the context of each response with a teacher.

    The better response is the group's first other response of at least `success_score`, as in TRL's SDPO.
    """
    late, infos, scores = section.late_fields, scored.group.infos, scored.scores
    successes = []
    if BETTER in late:
        least = section.privileged.success_score
        successes = [info.sequence_id for info, score in zip(infos, scores.scores, strict=True) if score >= least]
    texts = scores.feedback if FEEDBACK in late and scores.feedback else (None,) * len(infos)
    contexts = {
        info.sequence_id: PrivilegedContext(
            better=next((i for i in successes if i != info.sequence_id), None), feedback=text
        )
        for info, text in zip(infos, texts, strict=True)
    }
    if not needs_late_text(section.privileged.template):
        return contexts
    return {i: context for i, context in contexts.items() if context != PrivilegedContext()}


async def privileged_prompts(
    reward: RewardRole, groups: Sequence[ScoredGroup], contexts: Sequence[Contexts]
) -> list[RemoteColumns[PrivilegedPrompts]]:
    """Return a column for each group with a taught response. `contexts` are in the order of the groups."""
    pairs = zip(groups, contexts, strict=True)
    return list(await asyncio.gather(*(reward.privileged_prompts(one.group, of) for one, of in pairs if of)))
