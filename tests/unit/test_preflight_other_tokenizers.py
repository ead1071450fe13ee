"""rlhf/preflight/other_tokenizers.py: settings refused beside a teacher with another tokenizer, and its texts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rlhf.preflight.inputs import StageInputs, load_inputs
from rlhf.preflight.training_data import OfflineInputs, OnlineInputs, translated_sets
from tests.fakes.runs import loaded, refusal
from tests.fixtures.other_tokenizer import build_other, merging_tokenizer

TEACHER = merging_tokenizer()
CHAT = [{"role": "system", "content": "the"}, {"role": "user", "content": "12"}]
ROWS: list[dict[str, Any]] = [
    {"messages": [*CHAT, {"role": "assistant", "content": "abcd"}], "source": "other"},
    {"prompt": "1+1", "completion": "ö", "source": "same"},
]
ROLLOUTS = {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_other(tmp_path_factory.mktemp("other") / "teacher", seed=1)


def run(
    tmp_path: Path, other: Path, *, online: bool = True, keys: dict[str, Any] | None = None, **sections: Any
) -> Any:
    """Return a run with two teachers by column. keys: of the algorithm."""
    data = tmp_path / "rows.jsonl"
    rows = ROWS if not online else [{**row, "messages": CHAT} if "messages" in row else row for row in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"name": "on_policy_distillation", "divergence": "jsd"} if online else {"name": "distillation"}
    given: dict[str, Any] = {
        "policy": {"model": "tiny:llama"},
        "teacher": {"other": {"model": str(other)}, "same": {"model": "tiny:llama"}},
        "algorithm": {**named, "teacher_column": "source", **(keys or {})},
        "data": {"train": str(data), **({"max_prompt_tokens": 64} if online else {})},
        **({"rollouts": ROLLOUTS} if online else {}),
    }
    train = {
        "steps": 1,
        "lr": 1e-3,
        "sequences_per_update": 2,
        "max_tokens_per_microbatch": 128,
        **sections.pop("train", {}),
    }
    return loaded(tmp_path, **given | sections | {"train": train})


def inputs(config: Any, *, notes: int | None = None) -> Any:
    (stage,) = load_inputs(config, only_checks=True)
    assert isinstance(stage, StageInputs)
    assert notes is None or len(stage.notes) == notes
    return stage.inputs


def test_a_prompt_is_written_in_the_teachers_template(
    tmp_path: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rlhf")
    found = inputs(run(tmp_path, other), notes=1)
    assert isinstance(found, OnlineInputs)
    first, second = found.prompts
    assert second.teacher_prompt is None
    assert first.teacher_prompt is not None
    assert (
        TEACHER.decode(first.teacher_prompt.token_ids) == "[role]system: the[end][role]user: 12[end][role]assistant: "
    )
    assert first.teacher_prompt.end == TEACHER.eos_token_id
    said = [record.getMessage() for record in caplog.records if "another tokenizer" in record.getMessage()]
    assert len(said) == 1
    assert f"teacher {other} has another tokenizer" in said[0]
    assert "257 common tokens" in said[0]


def test_a_plain_prompt_is_written_as_plain_text(tmp_path: Path, other: Path) -> None:
    data = {"train": str(tmp_path / "rows.jsonl"), "max_prompt_tokens": 64, "apply_chat_template": False}
    config = run(tmp_path, other, teacher={"model": str(other)}, keys={"teacher_column": None}, data=data)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "12the"}\n{"prompt": "x"}\n')
    first = inputs(config).prompts[0]
    assert first.teacher_prompt.token_ids == tuple(TEACHER("12the").input_ids)


def test_a_cut_prompt_is_cut_for_the_teacher_too(tmp_path: Path, other: Path) -> None:
    turns = [
        {"role": "user", "content": "9" * 60},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "12"},
    ]
    data = {"train": str(tmp_path / "rows.jsonl"), "max_prompt_tokens": 20, "too_long": "cut"}
    config = run(tmp_path, other, teacher={"model": str(other)}, keys={"teacher_column": None}, data=data)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(2)))
    first = inputs(config).prompts[0]
    assert TEACHER.decode(first.teacher_prompt.token_ids) == "[role]user: 12[end][role]assistant: "


def test_rows_of_fixed_data_are_read_with_both_tokenizers(tmp_path: Path, other: Path) -> None:
    found = inputs(run(tmp_path, other, online=False))
    assert isinstance(found, OfflineInputs)
    (both,) = translated_sets([found.rows])
    assert both.lengths[1] == len(found.rows[1].token_ids)  # the second row's teacher has the policy's tokenizer
    ids = both.token_ids[: int(both.lengths[0])]
    assert TEACHER.decode(ids) == "[role]system: the[end][role]user: 12[end][role]assistant: abcd[end]"
    assert TEACHER.decode(ids[both.loss_mask[: len(ids)]]) == "abcd[end]"
    same = run(tmp_path, other, online=False, teacher={name: {"model": "tiny:llama"} for name in ("other", "same")})
    assert translated_sets([inputs(same, notes=0).rows]) == []


@pytest.mark.parametrize(
    ("sections", "key", "fix"),
    [
        ({"keys": {"top_k": 4}}, "algorithm.top_k", "Set algorithm.top_k to null"),
        ({"keys": {"divergence": "sampled_reverse_kl"}}, "algorithm.divergence", "forward_kl, reverse_kl or jsd"),
        (
            {"cluster": {"roles": {"policy": {"workers": 2, "sequence_parallel": 2}}}},
            "cluster.roles.policy.sequence_parallel",
            "to 1",
        ),
        (
            {
                "rollouts": {**ROLLOUTS, "environment": {"name": "guess_number", "max_turns": 3, "max_tokens": 99}},
                "rewards": {"won": {"environment": True}},
            },
            "rollouts.environment",
            "Remove rollouts.environment",
        ),
    ],
)
def test_a_setting_that_needs_the_same_tokens_is_refused(
    tmp_path: Path, other: Path, sections: dict[str, Any], key: str, fix: str
) -> None:
    message = refusal(run(tmp_path, other, **sections))
    start = f"teacher.other.model: {other} has another tokenizer than policy.model "
    assert message.startswith(start), message
    assert f", but {key}" in message
    assert fix in message
    assert message.endswith("or name a teacher with the same tokenizer.")


@pytest.mark.parametrize("online", [True, False])
def test_a_prompt_too_long_for_the_teacher_is_refused(tmp_path: Path, other: Path, online: bool) -> None:
    # 8 tokens of the policy's template and text, and 22 of the teacher's
    data = {"train": str(tmp_path / "rows.jsonl"), **({"max_prompt_tokens": 16} if online else {})}
    settings: dict[str, Any] = {"teacher": {"model": str(other)}, "keys": {"teacher_column": None}, "data": data}
    rollouts = {"rollouts": {**ROLLOUTS, "max_new_tokens": 4}} if online else {}
    config = run(tmp_path, other, online=online, train={"max_tokens_per_microbatch": 20}, **settings, **rollouts)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "12the", "completion": "a"}\n' * 2)
    message = refusal(config)
    assert "row 1" in message or ":1" in message or "line 1" in message, message
    assert "tokens of the teacher's tokenizer, and train.max_tokens_per_microbatch" in message


def test_a_teacher_without_a_template_is_refused_for_a_chat(tmp_path: Path, other: Path) -> None:
    bare = merging_tokenizer()
    bare.chat_template = None
    folder = build_other(tmp_path / "bare", seed=1)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    bare.save_pretrained(folder)
    assert "has no chat template" in refusal(run(tmp_path, folder))
