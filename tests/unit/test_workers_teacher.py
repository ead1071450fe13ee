"""A teacher's states against transformers' own: of which tokens, in which order, in which dtype; and its head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.config.model import TeacherConfig
from rlhf.types import Examples, LearntStates
from rlhf.workers.place import RankPlace
from rlhf.workers.teacher import TeacherWorker

PLACE = RankPlace(rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu", threads=1, deadline_s=60.0)
LENGTHS = (5, 9, 3, 7)


@pytest.fixture(scope="module")
def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(sum(LENGTHS), generator=generator) < 0.5
    mask[[0, 5, 14, 17]] = False  # nothing predicts a first token
    mask[15] = True
    return Examples(
        sequence_ids=torch.arange(4),
        lengths=torch.tensor(LENGTHS),
        token_ids=torch.randint(0, 256, (sum(LENGTHS),), generator=generator),
        loss_mask=mask,
    )


def worker(model: Path, examples: Examples, *, max_tokens: int, dtype: str = "float32") -> TeacherWorker:
    config = TeacherConfig.model_validate({"model": str(model), "dtype": dtype})
    made = TeacherWorker(config, PLACE, max_tokens_per_microbatch=max_tokens)
    made.start()
    made.load_data(examples, examples.take([2]))
    return made


@pytest.mark.parametrize("max_tokens", [9, 64])
def test_states_are_those_that_predict_the_learnt_tokens(tiny_model: Path, examples: Examples, max_tokens: int) -> None:
    *columns, count = worker(tiny_model, examples, max_tokens=max_tokens).states(0, [(3, 0), (), (1, 3)])
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids, masks = examples.token_ids.split(LENGTHS), examples.loss_mask.split(LENGTHS)
    for column, rows in zip(columns, [(3, 0), (), (1, 3)], strict=True):
        assert isinstance(column, LearntStates)
        assert column.sequence_ids.tolist() == list(rows)
        assert column.lengths.tolist() == [int(masks[row].sum()) for row in rows]
        for row, found in zip(rows, column.hidden.split(column.lengths.tolist()), strict=False):
            with torch.no_grad():
                states = plain.model(ids[row][None]).last_hidden_state[0]
            torch.testing.assert_close(found, states[:-1][masks[row][1:]], rtol=1e-4, atol=1e-5)
    assert count == sum(len(column.hidden) for column in columns if isinstance(column, LearntStates))


def test_states_and_head_have_the_models_dtype(tiny_model: Path, examples: Examples) -> None:
    made = worker(tiny_model, examples, max_tokens=64, dtype="bfloat16")
    column, _ = made.states(1, [(0,)])
    head, size = made.head()
    assert isinstance(column, LearntStates)
    assert column.hidden.dtype == head.weight.dtype == torch.bfloat16
    assert size == len(head.weight)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    assert torch.equal(head.weight, plain.lm_head.weight)
    assert (head.bias, head.softcap, head.logit_scale) == (None, None, 1.0)
    assert not head.weight.requires_grad
