"""A teacher's states agree with transformers' own in tokens, order, dtype and head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.config.schema.model import TeacherConfig
from rlhf.types import LearntStates, Rollouts
from rlhf.workers.frozen.teacher import OnlineTeacherWorker, TeacherWorker
from tests.fixtures.workers import PLACE, random_examples, rollouts_of

EXAMPLES = random_examples()


def worker(model: Path, *, max_tokens: int, dtype: str = "float32") -> TeacherWorker:
    config = TeacherConfig.model_validate({"model": str(model), "dtype": dtype})
    made = TeacherWorker(config, PLACE, max_tokens_per_microbatch=max_tokens)
    made.start()
    made.load_data(EXAMPLES, EXAMPLES.take([2]))
    return made


@pytest.mark.parametrize("max_tokens", [9, 64])
def test_states_are_those_that_predict_the_learnt_tokens(tiny_model: Path, max_tokens: int) -> None:
    *columns, count = worker(tiny_model, max_tokens=max_tokens).states(0, [(3, 0), (), (1, 3)])
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    lengths = EXAMPLES.lengths.tolist()
    ids, masks = EXAMPLES.token_ids.split(lengths), EXAMPLES.loss_mask.split(lengths)
    for column, rows in zip(columns, [(3, 0), (), (1, 3)], strict=True):
        assert isinstance(column, LearntStates)
        assert column.sequence_ids.tolist() == list(rows)
        assert column.lengths.tolist() == [int(masks[row].sum()) for row in rows]
        for row, found in zip(rows, column.hidden.split(column.lengths.tolist()), strict=False):
            with torch.no_grad():
                states = plain.model(ids[row][None]).last_hidden_state[0]
            torch.testing.assert_close(found, states[:-1][masks[row][1:]], rtol=1e-4, atol=1e-5)
    assert count == sum(len(column.hidden) for column in columns if isinstance(column, LearntStates))


def test_states_and_head_have_the_models_dtype(tiny_model: Path) -> None:
    made = worker(tiny_model, max_tokens=64, dtype="bfloat16")
    column, _ = made.states(1, [(0,)])
    head, size = made.head()
    assert isinstance(column, LearntStates)
    assert column.hidden.dtype == head.weight.dtype == torch.bfloat16
    assert size == len(head.weight)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    assert torch.equal(head.weight, plain.lm_head.weight)
    assert (head.bias, head.softcap, head.logit_scale) == (None, None, 1.0)
    assert not head.weight.requires_grad


def group_of(group: int) -> Rollouts:
    """Return a prompt of 3 tokens with two responses, of 4 tokens and of 2."""
    generator = torch.Generator().manual_seed(group)
    prompt, long, short = (torch.randint(0, 256, (size,), generator=generator).tolist() for size in (3, 4, 2))
    return rollouts_of((2 * group, prompt + long, range(3, 7)), (2 * group + 1, prompt + short, range(3, 5)))


@pytest.mark.parametrize("max_tokens", [7, 64])
def test_of_sampled_responses_there_are_states_and_log_probabilities(tiny_model: Path, max_tokens: int) -> None:
    config = TeacherConfig.model_validate({"model": str(tiny_model), "dtype": "float32"})
    teacher = OnlineTeacherWorker(
        config, PLACE, temperature=0.5, samples_per_prompt=2, max_tokens_per_microbatch=max_tokens
    )
    teacher.start()
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    given = [group_of(0), group_of(1)]
    *columns, count = teacher.states([(3, 0), (), (1,)], *given)
    told = [one for one in teacher.logprobs(None, {}, *given)[:-1] if not isinstance(one, int)]
    means = teacher.mean_logprobs(2.0, 2, *given)
    assert count == 2 + 4 + 2
    assert sorted(means) == [0, 1, 2, 3]
    for ids, column in zip([(3, 0), (), (1,)], columns, strict=True):
        assert isinstance(column, LearntStates)
        assert column.sequence_ids.tolist() == list(ids)
        for i, found in zip(ids, column.hidden.split(column.lengths.tolist()), strict=False):
            part, place = given[i // 2], i % 2
            tokens = part.token_ids.split([7, 5])[place]
            with torch.no_grad():
                states = plain.model(tokens[None]).last_hidden_state[0, 2:-1]
                logits = plain(tokens[None]).logits[0, 2:-1]
            torch.testing.assert_close(found, states, rtol=1e-4, atol=1e-5)
            at = [(logits / t).log_softmax(-1).gather(-1, tokens[3:, None])[:, 0] for t in (0.5, 2.0)]
            torch.testing.assert_close(told[i // 2].values.split([7, 5])[place][3:], at[0], rtol=1e-4, atol=1e-5)
            assert means[i] == pytest.approx(at[1].mean().item(), rel=1e-4)
