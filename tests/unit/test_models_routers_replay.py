"""Replay of a router's own choices changes nothing. Replay of other choices is used, whatever the layout of the row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models.files.loading import enable_checkpointing
from rlhf.models.packed.branches import Branch, predecessors
from rlhf.models.packed.forward import policy_logprobs_only
from rlhf.models.packed.row_check import check_rows
from rlhf.models.packed.row_layout import RowLayout, Rows, set_rows
from rlhf.models.routers.recording import routers_of
from rlhf.models.routers.replay import UNKNOWN, RouterReplay
from tests.fixtures.models import gradient_of
from tests.tiny_architectures import VOCABULARY, tiny_model

LENGTHS = [9, 4, 6]
MIXTURES = ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss"]
IDS = torch.randint(VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def packed(model: Any, ids: Tensor, lengths: list[int], branches: list[Branch | None] | None = None) -> Tensor:
    mask = predecessors(torch.tensor(lengths), branches) >= 0
    return policy_logprobs_only(model, ids, torch.tensor(lengths), mask=mask, branches=branches)


def choices(model: Any, ids: Tensor, lengths: list[int]) -> Tensor:
    """Return the chosen experts of each token by layer. Layers without a router are unknown."""
    names = {module: name for name, module in model.named_modules()}
    shape = (model.config.num_hidden_layers, model.config.num_experts_per_tok)
    parts = []
    for part in ids.split(lengths):
        table = torch.full((len(part), *shape), UNKNOWN, dtype=torch.int16)

        def note(router: Any, inputs: Any, outputs: Any, table: Tensor = table) -> None:
            table[:, int(names[router].split(".")[2])] = outputs[2].to(torch.int16)

        hooks = [router.register_forward_hook(note) for router in routers_of(model)]
        with torch.no_grad():
            packed(model, part, [len(part)])
        for hook in hooks:
            hook.remove()
        parts.append(table)
    return torch.cat(parts)


def others(model: Any, experts: Tensor) -> Tensor:
    """Return the choices with every known choice moved to the next expert."""
    count = routers_of(model)[0].weight.shape[0]
    return torch.where(experts == UNKNOWN, experts, (experts + 1) % count)


@pytest.mark.parametrize("kind", MIXTURES)
def test_own_choices_change_nothing_and_others_are_used(kind: str) -> None:
    model = tiny_model(kind).eval()
    own = choices(model, IDS, LENGTHS)
    plain = packed(model, IDS, LENGTHS)
    wanted = gradient_of(model, plain.sum())
    replay = RouterReplay(model)
    with replay.of(own):
        same = packed(model, IDS, LENGTHS)
    torch.testing.assert_close(same, plain)
    torch.testing.assert_close(gradient_of(model, same.sum()), wanted, rtol=1e-4, atol=1e-6)
    with replay.of(torch.full_like(own, UNKNOWN)):
        torch.testing.assert_close(packed(model, IDS, LENGTHS), plain)
    moved = others(model, own)
    with replay.of(moved):
        other = packed(model, IDS, LENGTHS)
    assert (other - plain).abs().max() > 1e-3
    torch.testing.assert_close(packed(model, IDS, LENGTHS), plain)  # a pass outside the block replays nothing


def test_the_layout_of_the_row_does_not_matter() -> None:
    model = tiny_model("qwen3_moe").eval()
    check_rows(model, torch.device("cpu"))
    first, second, third = IDS.split(LENGTHS)
    whole = torch.cat([first[:5], second])
    moved = others(model, choices(model, torch.cat([first, whole, third]), [9, 9, 6]))
    replay = RouterReplay(model)
    moved[9:14] = moved[:5]  # the prompt is computed once
    parts = []
    for ids, experts in zip((first, whole, third), moved.split([9, 9, 6]), strict=True):
        with replay.of(experts):
            parts.append(packed(model, ids, [len(ids)]))
    with replay.of(moved):
        row = packed(model, torch.cat([first, whole, third]), [9, 9, 6])
    torch.testing.assert_close(row, torch.cat(parts))
    with replay.of(torch.cat([moved[:9], moved[14:]])):
        shared = packed(model, IDS, LENGTHS, [None, Branch(of=0, length=5), None])
    torch.testing.assert_close(shared, torch.cat([parts[0], parts[1][5:], parts[2]]))


def test_recomputed_layers_replay_the_same_choices() -> None:
    model = tiny_model("qwen3_moe")
    moved = others(model, choices(model, IDS, LENGTHS))
    replay = RouterReplay(model)

    def gradient() -> Tensor:
        with replay.of(moved):
            logprobs = packed(model, IDS, LENGTHS)
        return gradient_of(model, logprobs.sum())

    wanted = gradient()
    enable_checkpointing(model)
    torch.testing.assert_close(gradient(), wanted)


def test_models_that_cannot_replay_are_refused() -> None:
    with pytest.raises(UserError, match=r"policy\.router_replay: is true, but LlamaForCausalLM has no routers"):
        RouterReplay(tiny_model("llama"))
    one_by_one = tiny_model("qwen3_moe").eval()
    set_rows(one_by_one, Rows(layout=RowLayout.ONE_BY_ONE, own_attention="sdpa"))
    with pytest.raises(UserError, match="are not packed, and a replay needs packed rows"):
        RouterReplay(one_by_one)
    model = tiny_model("phimoe").eval()
    replay = RouterReplay(model)
    known = torch.zeros(len(IDS), 2, 2, dtype=torch.int16)
    with (
        pytest.raises(UserError, match="weighs its experts in a way that this program does not know"),
        replay.of(known),
    ):
        packed(model, IDS, LENGTHS)
