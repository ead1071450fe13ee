"""A student learns from a teacher with another tokenizer, beside a teacher with the student's tokenizer.

A plain loop over unpacked sequences gives the expected gradients, with products of probabilities, and with the letters
of ByteLevel for the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.config import derive
from rlhf.data.examples import Example, Reading, collate, load_examples
from rlhf.data.row import Row
from rlhf.data.spans import Translator
from rlhf.errors import RunError
from rlhf.models.files.tiny import build_tiny_llama, byte_tokenizer
from rlhf.models.packed.row_layout import row_layout
from rlhf.objectives.distillation import forward_kl, generalized_jsd, reverse_kl
from rlhf.tracking.metrics.declarations import results
from rlhf.types import BatchPlan, MinibatchPlan, SpanStates, TeacherPrompt
from rlhf.workers.frozen.teacher import OnlineTeacherWorker, TeacherWorker
from rlhf.workers.frozen.top_settings import spans_of
from rlhf.workers.offline.distillation import DistillationWorker
from rlhf.workers.online.student import StudentWorker
from tests.fakes.configs import offline_config, online_config
from tests.fixtures.other_tokenizer import build_other, merging_tokenizer
from tests.fixtures.workers import PLACE, assert_same_gradient, engine_of, gradient, make_update, rollouts_of

STUDENT, TEACHER = byte_tokenizer(), merging_tokenizer()
EOS, END = STUDENT.eos_token_id, TEACHER.eos_token_id
PROMPT, OTHER_PROMPT = STUDENT("<|user|>12<|assistant|>").input_ids, TEACHER("[role]user: 12[role]").input_ids
TEXTS: dict[int, tuple[list[int], str]] = {  # the responses by sequence id, and the responses' text
    0: ([*STUDENT("abcd the ö").input_ids, EOS], "abcd the ö"),
    1: ([0xFF, *STUDENT("ab").input_ids], ""),  # no span
    2: (STUDENT("12🙂").input_ids[:-1], "12"),  # cut inside a character
    3: (STUDENT("x34").input_ids, "x34"),  # of the teacher with the same tokenizer
    4: ([EOS], ""),
}
COMPARED = {0: 12, 1: 0, 2: 2, 4: 1}
OWNERS = {i: "same" if i == 3 else "other" for i in TEXTS}
WEIGHTS = {"other": 2.0, "same": 0.5}
DIVERGENCES: dict[str, Any] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": lambda p, q: generalized_jsd(p, q, beta=0.5),
}


@dataclass(frozen=True)
class World:
    """A student's model and the models of both teachers, with the teachers' workers."""

    folders: dict[str, Path]
    models: dict[str, Any]
    online: OnlineTeacherWorker
    offline: TeacherWorker


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("spans")
    folders = {name: build_tiny_llama(folder / name, seed=seed) for seed, name in enumerate(("student", "same"))}
    folders["other"] = build_other(folder / "other", seed=3)
    models = {}
    for name, path in folders.items():
        models[name] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
        models[name].requires_grad_(name == "student")
        with torch.no_grad():
            models[name].get_output_embeddings().weight.mul_(8.0)  # else all distributions are nearly even
    config = offline_config(**sections(folders, "jsd"))
    options: dict[str, Any] = {"spans": spans_of(config), "max_tokens_per_microbatch": 200}
    kinds: dict[str, Any] = {"temperature": 0.7, "samples_per_prompt": 5}
    online = OnlineTeacherWorker(derive.teachers(config), PLACE, **options, **kinds)
    online.start()
    online.model, online.parked["other"] = models["same"], (models["other"], [])
    offline = TeacherWorker(derive.teachers(config), PLACE, **options)
    offline.student_rows, offline.translators = online.student_rows, online.translators
    offline.present, offline.model, offline.host_weights = "same", models["same"], []
    offline.parked = {"other": (models["other"], [])}
    return World(folders=folders, models=models, online=online, offline=offline)


def sections(folders: dict[str, Path], divergence: str) -> dict[str, Any]:
    teachers = {n: {"model": str(folders[n]), "dtype": "float32", "weight": w} for n, w in WEIGHTS.items()}
    return {
        "policy": {"model": str(folders["student"])},
        "teacher": teachers,
        "algorithm": {"name": "distillation", "teacher_column": "source", "divergence": divergence, "temperature": 0.7},
        "train": {"steps": 1, "lr": 1e-2, "sequences_per_update": 5, "max_tokens_per_microbatch": 200},
    }


def ends(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return the number of bytes before the end of each token, where the bytes are letters of the byte level."""
    letters = ["" if i in tokenizer.all_special_ids else tokenizer.convert_ids_to_tokens(i) for i in ids]
    return [len("".join(letters[: n + 1])) for n in range(len(ids))]


def distributions(model: Any, ids: list[int], first: int) -> Tensor:
    """Return the probabilities of the predictions of the tokens from `first` on, at the temperature."""
    model.set_attn_implementation("eager")
    probs: Tensor = (model(torch.tensor([ids])).logits[0, first - 1 : -1] / 0.7).softmax(-1)
    return probs


def plain_distance(student: Any, teacher: Any, response: list[int], text: str, divergence: Any, prompts: Any) -> Tensor:
    """Return the sum of the distances of a response's spans."""
    prompt, other_prompt = prompts
    theirs = [*TEACHER(text).input_ids, *([END] if response[-1:] == [EOS] else [])]
    if not theirs:
        return torch.zeros(())
    p, q = (
        distributions(student, prompt + response, len(prompt)),
        distributions(teacher, other_prompt + theirs, len(other_prompt)),
    )
    letters, others = ends(STUDENT, response), ends(TEACHER, theirs)
    if response[-1:] == [EOS]:  # an end counts as a byte
        letters[-1], others[-1] = letters[-1] + 1, others[-1] + 1
    total, start, first = torch.zeros(()), 0, 0
    words, other_words = STUDENT.get_vocab(), TEACHER.get_vocab()
    same = {i: other_words[word] for word, i in words.items() if word in other_words} | {EOS: END}
    ids, other_ids = torch.tensor([*same]), torch.tensor([*same.values()])
    for end in sorted({*letters} & {*others}):
        stop, last = letters.index(end) + 1, others.index(end) + 1
        ours, taught = p[stop - 1], q[last - 1]
        for n in range(start, stop - 1):
            ours = ours * p[n, response[n]]
        for n in range(first, last - 1):
            taught = taught * q[n, theirs[n]]
        weight = len(ids) / len(taught)
        rest = [
            x[[i not in kept for i in range(len(x))]].sort().values.flip(0)
            for x, kept in ((ours, {*same}), (taught, {*same.values()}))
        ]
        size = min(map(len, rest))
        unequal = (rest[0][:size] - rest[1][:size]).abs().sum() + rest[0][size:].sum() + rest[1][size:].sum()
        total = total + weight * divergence(ours[ids].clamp(min=1e-8).log(), taught[other_ids].clamp(min=1e-8).log())
        total = total + (1 - weight) * unequal
        start, first = stop, last
    return total


@pytest.mark.parametrize(("divergence", "tokens"), [("forward_kl", 24), ("reverse_kl", 24), ("jsd", 200), ("jsd", 24)])
def test_the_gradient_is_that_of_a_plain_loop(world: World, divergence: str, tokens: int) -> None:
    found, row = updated(world, divergence, TEXTS, OWNERS, tokens=tokens)
    student = world.models["student"]
    student.zero_grad(set_to_none=True)
    for i, (response, text) in TEXTS.items():
        whole, own = PROMPT + response, DIVERGENCES[divergence]
        if OWNERS[i] == "other":
            prompts = PROMPT, OTHER_PROMPT
            distance = plain_distance(student, world.models["other"], response, text, own, prompts)
        else:
            p, q = (distributions(world.models[name], whole, len(PROMPT)).log() for name in ("student", "same"))
            distance = own(p, q).sum()
        if distance.requires_grad:
            (WEIGHTS[OWNERS[i]] * distance / 24).backward()
    assert_same_gradient(found, gradient(student))
    assert row["update/compared/fraction"] == pytest.approx((sum(COMPARED.values()) + 3) / 24)
    assert row["update/compared_by_teacher/other/fraction"] == pytest.approx(sum(COMPARED.values()) / 21)
    assert row["update/compared_by_teacher/same/fraction"] == 1.0


def test_a_step_without_a_span_has_no_gradient_and_no_nan(world: World) -> None:
    found, row = updated(world, "jsd", {0: TEXTS[1], 1: TEXTS[1]}, {0: "other", 1: "other"}, tokens=100)
    assert row["update/compared/fraction"] == 0.0
    assert not [name for name, value in row.items() if math.isnan(value)]
    assert not found.any()


def updated(
    world: World, divergence: str, texts: Mapping[int, tuple[list[int], str]], owners: dict[int, str], *, tokens: int
) -> tuple[Tensor, dict[str, float]]:
    """Return the gradient and the metrics of an update on the responses."""
    given = sections(world.folders, divergence)
    given["train"]["max_tokens_per_microbatch"] = tokens
    given["algorithm"] = {"name": "on_policy_distillation", "teacher_column": "source", "divergence": divergence}
    rollouts = {"prompts_per_step": 1, "max_new_tokens": 16, "samples_per_prompt": 5, "temperature": 0.7}
    worker = student_of(StudentWorker, online_config(**given, rollouts=rollouts, rewards={}), world)
    world.online.max_tokens = tokens
    batch = rollouts_of(*((i, PROMPT + ids, range(len(PROMPT), 99)) for i, (ids, _) in texts.items()))
    states = [
        world.online.states([rows], batch, teacher=name, prompts=prompts_of(texts))[0]
        for name in dict.fromkeys(owners.values())
        if (rows := [i for i in reversed(texts) if owners[i] == name])
    ]
    count = sum(len(ids) for ids, _ in texts.values())
    plan = MinibatchPlan(sequences_by_rank=(tuple(texts),), num_tokens=count, num_sequences=len(texts), teachers=owners)
    worker.prepare(BatchPlan(step=1, minibatches=(plan,), scores={}, kl_coef=0.0), batch)
    world.models["student"].zero_grad(set_to_none=True)
    row = results(make_update(worker, 0, *states))
    return gradient(world.models["student"]), row


def prompts_of(texts: Mapping[int, Any]) -> dict[int, TeacherPrompt]:
    return {i: TeacherPrompt(token_ids=tuple(OTHER_PROMPT), end=END) for i in texts}


def student_of(kind: type[Any], config: Any, world: World) -> Any:
    """Return a student on one rank, with the model as the engine."""
    worker = type("Alone", (kind,), {})(config, PLACE, optimizer_steps=1)
    worker.layout, worker.engine = row_layout(world.models["student"]), engine_of(world.models["student"])
    for name in WEIGHTS:
        worker.take_teacher(name, world.online.head(teacher=name)[0])
    return worker


def test_a_response_has_the_mean_over_the_students_compared_tokens(world: World) -> None:
    world.online.max_tokens = 200
    batch = rollouts_of(*((i, PROMPT + TEXTS[i][0], range(len(PROMPT), 99)) for i in (0, 1, 4)))
    means = world.online.mean_logprobs(0.7, 5, batch, teacher="other", prompts=prompts_of(TEXTS))
    assert sorted(means) == [0, 4]
    theirs = [*TEACHER("abcd the ö").input_ids, END]
    with torch.no_grad():
        probs = distributions(world.models["other"], OTHER_PROMPT + theirs, len(OTHER_PROMPT))
    logprobs = probs.gather(-1, torch.tensor(theirs)[:, None]).log().sum().item()
    assert means[0] == pytest.approx(logprobs / COMPARED[0], rel=1e-4)


def test_a_given_response_of_several_turns_is_refused(world: World) -> None:
    batch = rollouts_of((0, PROMPT + TEXTS[0][0], (len(PROMPT), len(PROMPT) + 3)))
    with pytest.raises(RunError, match="a given response has several turns, and a teacher with another tokenizer"):
        world.online.states([(0,)], batch, teacher="other", prompts=prompts_of(TEXTS))


ROWS = [
    {"messages": [{"role": "user", "content": "12"}, {"role": "assistant", "content": "abcd ö"}], "source": "other"},
    {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "the 12"}], "source": "same"},
    {
        "messages": [
            {"role": "user", "content": "12"},
            {"role": "assistant", "content": "ab"},
            {"role": "user", "content": "34"},
            {"role": "assistant", "content": "34 the"},
        ],
        "source": "other",
    },
]


def examples_of(translators: dict[str, Translator], **settings: Any) -> tuple[Example, ...]:
    rows = [Row(file="rows", line=i, columns=row) for i, row in enumerate(ROWS)]
    reading: dict[str, Any] = {"system_prompt": None, "apply_chat_template": True, "max_tokens": 100}
    reading |= {"teacher_column": "source", "translators": translators}
    return load_examples(rows, STUDENT, Reading(**reading | settings)).items


def test_fixed_data_is_learned_in_the_teachers_template(world: World) -> None:
    models, teacher = world.models, world.offline
    config = offline_config(**sections(world.folders, "reverse_kl"))
    examples = examples_of({"other": Translator(STUDENT, TEACHER, max_tokens=100)})
    first, second, third = examples
    assert second.translated is None
    assert first.translated is not None
    assert TEACHER.decode(first.translated.token_ids) == "[role]user: 12[end][role]assistant: abcd ö[end]"
    teacher.load_data(collate(examples))
    teacher.load_translations(collate([example.translated or example for example in examples]))
    owners = {0: "other", 1: "same", 2: "other"}
    worker = student_of(DistillationWorker, config, world)
    worker.load_data(collate(examples))
    num_tokens = sum(example.num_targets for example in examples)
    plan = MinibatchPlan(sequences_by_rank=((0, 1, 2),), num_tokens=num_tokens, num_sequences=3, teachers=owners)
    states = [teacher.states(0, [rows], teacher=name)[0] for name, rows in (("other", (2, 0)), ("same", (1,)))]
    assert isinstance(states[0], SpanStates)
    student = models["student"]
    student.zero_grad(set_to_none=True)
    row = results(worker.update_on(plan, *states))
    found = gradient(student)
    student.zero_grad(set_to_none=True)
    terms = []
    for example, text in ((first, "abcd ö"), (third, "34 the")):  # the last turn of each conversation
        at, ids = len(example.token_ids) - len(STUDENT(text).input_ids) - 1, list(example.token_ids)
        assert example.translated is not None
        other = list(example.translated.token_ids)
        start = len(other) - len(TEACHER(text).input_ids) - 1
        prompts = ids[:at], other[:start]
        terms.append(plain_distance(student, models["other"], ids[at:], text, reverse_kl, prompts))
        if example is third:  # and the first turn of the longer one
            ids, other = ids[:8], other[: len(TEACHER("[role]user: 12[end][role]assistant: ab[end]").input_ids)]
            terms.append(plain_distance(student, models["other"], ids[-3:], "ab", reverse_kl, (ids[:-3], other[:-2])))
    p, q = (
        distributions(models[name], list(second.token_ids), second.prompt_tokens).log() for name in ("student", "same")
    )
    total = WEIGHTS["other"] * sum(terms, torch.zeros(())) + WEIGHTS["same"] * reverse_kl(p, q.detach()).sum()
    (total / num_tokens).backward()
    assert_same_gradient(found, gradient(student))
    assert row["update/compared/fraction"] == 1.0
    assert row["update/loss/mean"] == pytest.approx(float(total.detach()) / num_tokens, rel=1e-4)
    evaluated = results(worker.evaluate(0, "held", plan, *states))
    assert evaluated["eval/held/compared_by_teacher/other/fraction"] == 1.0
