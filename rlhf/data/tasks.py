"""Generate rows: tasks with answers a program can check.

Tasks and the files of `rlhf.data.sources` are the two beginnings of the data flow. The splits of a task, except
guessing_game, are disjoint by construction: the split of a question depends only on the question, never on a seed or a
size.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlhf.data.environment_tasks import ENVIRONMENT_TASKS
from rlhf.data.shapes import SHAPES, Scene, scenes
from rlhf.errors import UserError

Split = Literal["sft", "pairs", "labelled", "steps", "train", "eval"]
Columns = dict[str, Any]

RUNNING_TOTALS = "running_totals"
COMPARISONS = "comparisons"
REASONING_GYM = "reasoning_gym/"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSource:
    """Rows of `running_totals`, of `reasoning_gym/NAME`, of a task for an environment, or of several tasks in turn,
    joined by commas.
    """

    task: str
    split: Split  # sft, pairs, labelled, steps: rows with responses; train, eval: prompts with an answer
    size: int
    seed: int = 0
    args: Mapping[str, Any] = field(default_factory=dict)  # for several tasks: the args of each task under its name

    @property
    def name(self) -> str:
        """Return the name used in messages in place of a file name."""
        return f"{self.task}[{self.split}]"


def make_rows(source: TaskSource) -> list[Columns]:
    """Return `size` distinct rows, the same for the same source. UserError for a `size` beyond the task's rows.

    With `args.shows_answer` a prompt of running_totals begins with the answer, and a completion repeats the answer.
    Rows of environments (rlhf.data.environment_tasks) may repeat, since only the games are drawn at random. Every row
    has `answer` and `task`. running_totals has a string `prompt`. reasoning_gym has `messages`, in split sft up to the
    assistant's answer, and the columns for the scorer: `question`, `answer`, `metadata`. shapes has a string `prompt`
    and `images`, an encoded PNG.

    All splits with responses share the questions. Split sft has `completion`. Split pairs has `chosen`, `rejected` and
    `reference`, a copy of the chosen answer. Split labelled has `completion` and `label`, with right and wrong answers
    in turn. Split steps (running_totals only) has `completions` and `labels`, a total each.
    """
    names = [name.strip() for name in source.task.split(",")]
    if len(set(names)) < len(names):
        raise UserError(f"Task {source.task} names a task twice: its rows would repeat.")
    if len(names) > 1 and not all(name in names and isinstance(args, Mapping) for name, args in source.args.items()):
        raise UserError(
            f"The args of several tasks are objects under each task's name ({', '.join(names)}); "
            f"found {dict(source.args)}."
        )
    if source.size < len(names):
        raise UserError(
            f"Task {source.task} is {len(names)} tasks and size: {source.size} leaves {names[-1]} without a row. "
            f"Raise size to {len(names)} or more."
        )
    shares = [source.size // len(names) + (i < source.size % len(names)) for i in range(len(names))]
    args = [source.args if len(names) == 1 else source.args.get(name, {}) for name in names]
    rows_by_task = [
        _maker(name)(replace(source, task=name, size=share, args=task_args))
        for name, share, task_args in zip(names, shares, args, strict=True)
    ]
    return [row for turn in itertools.zip_longest(*rows_by_task) for row in turn if row is not None]


def _maker(name: str) -> Callable[[TaskSource], list[Columns]]:
    if name == RUNNING_TOTALS:
        return _running_totals
    if name == SHAPES:
        return _shapes
    if name.startswith(REASONING_GYM):
        return _reasoning_gym
    if name in ENVIRONMENT_TASKS:
        return _environment_rows
    if name == COMPARISONS:  # made by rlhf.data.sources, which reads the preferences
        raise UserError(f"Task `{COMPARISONS}` cannot be joined with other tasks: name two data sets in data.train.")
    known = ", ".join([RUNNING_TOTALS, SHAPES, COMPARISONS, *ENVIRONMENT_TASKS])
    raise UserError(f"Task `{name}` is unknown; the tasks are {known} and {REASONING_GYM}NAME.")


def _environment_rows(source: TaskSource) -> list[Columns]:
    if source.split not in ("sft", "train", "eval"):
        raise UserError(f"{source.name}: this task has the splits sft, train and eval.")
    rows = ENVIRONMENT_TASKS[source.task](source.split, source.size, source.seed, source.args)
    return [row | {"task": source.task} for row in rows]


# Running totals of four digits. 6,561 questions: 2,500 with responses, 3,000 for RL, 512 held out.
_WITH_RESPONSES, _PROMPTS = slice(0, 2500), {"train": slice(2500, 5500), "eval": slice(5500, 6012)}


def _running_totals(source: TaskSource) -> list[Columns]:
    shows_answer = source.args.get("shows_answer", False)
    if source.args.keys() - {"shows_answer"} or not isinstance(shows_answer, bool):
        found = ", ".join(f"{name}: {value!r}" for name, value in source.args.items())
        raise UserError(f"Task {RUNNING_TOTALS} takes the arg shows_answer, true or false; found {found}.")
    questions = list(itertools.product(range(1, 10), repeat=4))
    random.Random(RUNNING_TOTALS).shuffle(questions)
    questions = questions[_PROMPTS.get(source.split, _WITH_RESPONSES)]
    if source.size > len(questions):
        raise UserError(f"{source.name} has {len(questions)} rows; size: {source.size} asks for more.")
    random.Random(f"{source.seed}/{source.split}").shuffle(questions)
    rows = []
    for index, digits in enumerate(questions[: source.size]):
        row: Columns = {"prompt": "+".join(map(str, digits)) + "=", "answer": running_totals(digits)}
        if source.split == "sft":
            row["completion"] = careless_totals(digits) if index % 2 and not shows_answer else row["answer"]
        elif source.split in ("pairs", "labelled"):
            row |= _responses(source.split, row["answer"], _wrong_totals(digits, careless=index % 4 < 2), index)
        elif source.split == "steps":
            right = row["answer"].split(",")
            steps = _wrong_totals(digits, careless=index % 4 < 2).split(",") if index % 2 else right
            row |= {"completions": steps, "labels": [a == b for a, b in zip(steps, right, strict=True)]}
        if shows_answer:
            row["prompt"] = f"{row['answer']};{row['prompt']}"
        rows.append(row | {"task": RUNNING_TOTALS})
    return rows


def _responses(split: Split, right: Any, wrong: Any, index: int) -> Columns:
    if split == "pairs":
        return {"chosen": right, "rejected": wrong, "reference": right}
    return {"completion": wrong if index % 2 else right, "label": index % 2 == 0}


def _wrong_totals(digits: tuple[int, ...], *, careless: bool) -> str:
    """Return wrong totals: without carries if `careless` and wrong, or else with a small error in one total."""
    right, wrong = running_totals(digits), careless_totals(digits)
    if careless and wrong != right:
        return wrong
    slips = random.Random(f"slip {digits}")
    totals = right.split(",")
    place = slips.randrange(len(totals))
    totals[place] = str(int(totals[place]) + slips.choice([-2, -1, 1, 2]))
    return ",".join(totals)


def running_totals(digits: tuple[int, ...]) -> str:
    """Return the totals after the second digit and each later digit: (8, 3, 8, 4) -> `11,19,23`."""
    return ",".join(map(str, list(itertools.accumulate(digits))[1:]))


def careless_totals(digits: tuple[int, ...]) -> str:
    """Return the totals without carrying: (8, 3, 8, 4) -> `1,9,3`. The totals are right only if no sum reaches 10."""
    totals = itertools.accumulate(digits, lambda total, digit: total // 10 * 10 + (total % 10 + digit) % 10)
    return ",".join(map(str, list(totals)[1:]))


def _shapes(source: TaskSource) -> list[Columns]:
    if source.split == "steps":
        raise UserError(f"{source.name}: its answers have no steps; {RUNNING_TOTALS} has that split.")
    wanted = "sft" if source.split in ("pairs", "labelled") else source.split
    drawn: dict[Scene, Columns] = {}
    for scene in itertools.islice(scenes(source.seed, source.args), _DRAWS_A_ROW * max(source.size, 20)):
        if len(drawn) == source.size:
            break
        if scene in drawn or _split_of(repr(scene)) != wanted:
            continue
        row: Columns = {"prompt": scene.question, "images": [{"bytes": scene.image()}], "answer": scene.answer}
        if source.split == "sft":
            row["completion"] = scene.answer
        elif source.split in ("pairs", "labelled"):
            others = [answer for answer in scene.answers if answer != scene.answer]
            row |= _responses(source.split, scene.answer, random.Random(repr(scene)).choice(others), len(drawn))
        drawn[scene] = row | {"task": SHAPES}
    if len(drawn) < source.size:
        raise UserError(
            f"{source.name} has about {len(drawn)} distinct images with these args; size: {source.size} asks for more. "
            "Lower size, or raise args.pixels."
        )
    return list(drawn.values())


_SYSTEM_PROMPT = "Answer with the result only."
_DEFAULT_SHOTS = 3
_DRAWS_A_ROW = 50  # candidates per requested row before the task counts as exhausted
_SEED_STRIDE = 1_000_000  # item i of reasoning-gym depends on seed + i: neighbouring seeds must not share items


def _reasoning_gym(source: TaskSource) -> list[Columns]:
    """Return few-shot chat rows: `args.shots` worked examples first; the remaining args configure the generator."""
    if source.split == "steps":
        raise UserError(f"{source.name}: its answers have no steps; {RUNNING_TOTALS} has that split.")
    shots = source.args.get("shots", _DEFAULT_SHOTS)
    if not isinstance(shots, int) or isinstance(shots, bool) or shots < 0:
        raise UserError(f"{source.name}: args.shots is {shots!r}, expected a whole number from 0.")
    args = {name: value for name, value in source.args.items() if name != "shots"}
    first = (source.seed + 1) * _SEED_STRIDE  # the worked examples start at 0
    examples = list(itertools.islice(_distinct(source, args, seed=0, draws=_DRAWS_A_ROW * max(shots, 1)), shots))
    if len(examples) < shots:
        raise UserError(
            f"{source.name} has only {len(examples)} distinct questions; args.shots: {shots} asks for more."
        )
    messages = [{"role": "system", "content": _SYSTEM_PROMPT}]
    for example in examples:
        messages += _turns(example)
    shown = {example["question"] for example in examples}
    rows: list[Columns] = []
    wanted = "sft" if source.split in ("pairs", "labelled") else source.split
    for entry in _distinct(source, args, seed=first, draws=_DRAWS_A_ROW * max(source.size, 20)):
        if len(rows) == source.size:
            break
        if entry["question"] in shown or _split_of(entry["question"]) != wanted:
            continue
        turns = _turns(entry) if source.split == "sft" else _turns(entry)[:1]
        columns = {name: entry[name] for name in ("question", "answer", "metadata")}
        rows.append({"messages": messages + turns, "task": source.task, **columns})
    if len(rows) < source.size:
        raise UserError(
            f"{source.name} has about {len(rows)} distinct questions with these args; size: {source.size} asks for "
            "more. Lower size, or let args cover a wider range."
        )
    return _with_responses(rows, source) if source.split in ("pairs", "labelled") else rows


def _with_responses(rows: list[Columns], source: TaskSource) -> list[Columns]:
    """Return the same prompts with right and wrong responses. A wrong response is the answer to another question."""
    answers = [str(row["answer"]) for row in rows]
    others = sorted(set(answers))
    if len(others) < 2:
        raise UserError(
            f"{source.name}: all {len(rows)} rows have the same answer, but a wrong answer is the answer to another "
            "question. Raise size, or let args cover a wider range."
        )
    result = []
    for index, (row, right) in enumerate(zip(rows, answers, strict=True)):
        draw = random.Random(f"wrong {source.seed} {index}")
        wrong = draw.choice([answer for answer in others if answer != right])
        columns = {name: value for name, value in row.items() if name != "messages"} | {"prompt": row["messages"]}
        turn, other = ([{"role": "assistant", "content": text}] for text in (right, wrong))
        result.append(columns | _responses(source.split, turn, other, index))
    return result


def _turns(entry: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": entry["question"]}, {"role": "assistant", "content": str(entry["answer"])}]


def _split_of(question: str) -> Split:
    """Return the split of a question: an eighth is held out, a quarter is for SFT, the rest for RL."""
    bucket = hashlib.blake2b(question.encode(), digest_size=8).digest()[0] % 8
    return "eval" if bucket == 0 else "sft" if bucket <= 2 else "train"


def _distinct(source: TaskSource, args: Mapping[str, Any], *, seed: int, draws: int) -> Iterator[Mapping[str, Any]]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            f"Task {source.task} needs the package reasoning-gym, which is not installed; it comes with the extra "
            "`tasks`: pip install 'ray-rlhf[tasks]'."
        ) from error
    name = source.task.removeprefix(REASONING_GYM)
    try:
        dataset = reasoning_gym.create_dataset(name, seed=seed, size=draws, **args)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"Task {source.task} with args {dict(args)} cannot be made: {error}.") from error
    seen = set()
    for index in range(draws):
        entry = dataset[index]
        if entry["question"] not in seen:
            seen.add(entry["question"])
            yield entry
