"""Define suites of generated questions that need no download. A definition never changes: a change gets a new name.

The rows depend on the version of reasoning-gym in the extra `tasks` and on rlhf.data.tasks. A test pins their digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.data.tasks import REASONING_GYM, TaskSource, make_rows
from rlhf.suites.client import Ask, Client
from rlhf.suites.prompts import Prompts
from rlhf.suites.spec import Question, SuiteAnswers, SuiteSpec

QUESTIONS = 24  # of each task
MAX_NEW_TOKENS = 512
BASIC: Mapping[str, Mapping[str, Any]] = {
    "gcd": {"max_value": 20},
    "lcm": {"max_value": 20},
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2},
    "simple_equations": {"max_terms": 2, "min_value": 1, "max_value": 20},
    "number_sequence": {"max_value": 20},
    "leg_counting": {"max_animals": 3, "max_instances": 4},
}
REASONING_SUITES = {"reasoning-basic": BASIC}


def reasoning_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of a suite. UserError: reasoning-gym is not installed."""
    tasks = {f"{REASONING_GYM}{task}": args for task, args in REASONING_SUITES[name].items()}
    size = QUESTIONS * len(tasks)
    return make_rows(TaskSource(task=", ".join(tasks), split="eval", size=size, seed=0, args=tasks))


def ask_reasoning(name: str, spec: SuiteSpec, client: Client, prompts: Prompts) -> SuiteAnswers:
    """Ask all questions, greedily with one response each. The score is that of reasoning-gym for the last number."""
    rows = reasoning_rows(name)  # the tasks take turns
    rows = rows[: None if spec.limit is None else spec.limit * len(REASONING_SUITES[name])]
    texts = [prompts.text(row["messages"]) for row in rows]
    most = prompts.room(MAX_NEW_TOKENS)
    sampling = {"max_tokens": most, "temperature": 0.0, "seed": spec.seed, **prompts.ends()}
    if not prompts.has_template:
        sampling["stop"] = ["\n"]
    answers = client.answer([Ask(prompt_ids=prompts.ids(text, most), sampling=sampling) for text in texts])
    from rlhf.rewards.functions.matching import ReasoningGym

    grade = ReasoningGym()
    return SuiteAnswers(
        name=name,
        questions=tuple(
            Question(
                number=number,
                task=row["task"].removeprefix(REASONING_GYM),
                prompt=text,
                response=answer.text,
                target=str(row["answer"]),
                score=grade(text, answer.text, row["answer"], row["metadata"], row["question"]),
                values={},
                truncated=answer.truncated,
                response_tokens=answer.tokens,
                failure=answer.failure,
            )
            for number, (row, text, answer) in enumerate(zip(rows, texts, answers, strict=True))
        ),
    )
