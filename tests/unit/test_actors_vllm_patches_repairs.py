"""The repairs of vLLM work, mostly on models and runners of the same form without vLLM's layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xgrammar
from torch import Tensor, nn

from rlhf.errors import RunError
from rlhf.models.files.tiny import byte_tokenizer

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.v1.sample import rejection_sampler

from actors.vllm_patches import experts_cpu, grammar_time
from actors.vllm_patches.delta_cpu import attend_by_sequence
from actors.vllm_patches.drafts_cpu import repeated_for_drafts
from actors.vllm_patches.experts_cpu import RecordedExperts
from actors.vllm_patches.models import embed_for_layers, spare_unused_norms
from actors.vllm_patches.reload import name_loaders, num_constants
from actors.vllm_patches.router_biases import load_biases_of_experts
from actors.vllm_patches.routers_cpu import put_in_a_group
from actors.vllm_patches.unread import UnreadWeights, note_unread_weights, unread_weights


def test_every_draft_has_the_parameters_of_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", repeated_for_drafts)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(5, 1)
    sampling: Any = SimpleNamespace(
        all_greedy=False,
        temperature=torch.tensor([0.5, 0.0, 2.0]),  # the second is greedy
        top_k=torch.tensor([4, 4, 2], dtype=torch.int32),
        top_p=torch.tensor([1.0, 1.0, 1.0]),
    )
    found = rejection_sampler.apply_sampling_constraints(logits.clone(), torch.tensor([2, 3, 5]), sampling)
    expected = logits / torch.tensor([0.5, 0.5, 1.0, 2.0, 2.0])[:, None]
    expected[3:, :2] = float("-inf")
    torch.testing.assert_close(found, expected)


def test_the_gated_delta_rule_continues_each_sequence_in_float32() -> None:
    """The rule of arXiv:2412.06464, eq. 10, token by token: S = a S (I - b k k^T) + b v k^T, and the result S q."""
    torch.manual_seed(0)
    key_heads, heads, size, width = 1, 2, 4, 4
    channels = (2 * key_heads + heads) * size
    layer = SimpleNamespace(
        conv1d=nn.Conv1d(channels, channels, width, groups=channels, bias=False),
        kv_cache=(torch.full((5, width - 1, channels), 9.0), torch.full((5, heads, size, size), 9.0)),
        A_log=torch.randn(heads),
        dt_bias=torch.randn(heads),
        rearrange_mixed_qkv=lambda mixed: [
            part.view(1, len(mixed), -1, size) for part in mixed.split([size * key_heads] * 2 + [size * heads], 1)
        ],
    )
    rows = [torch.randn(length, channels + 2 * heads) for length in (7, 70, 3)]  # channels, b, a

    def expected(row: Tensor) -> Tensor:
        before = torch.cat([torch.zeros(width - 1, channels), row[:, :channels]])
        windows = torch.stack([before[t : t + width].T for t in range(len(row))])
        mixed = nn.functional.silu((windows * layer.conv1d.weight[:, 0]).sum(-1))
        state, results = torch.zeros(heads, size, size), []
        for t in range(len(row)):
            query, key, value = (part[0, 0] for part in layer.rearrange_mixed_qkv(mixed[t : t + 1]))
            query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
            b = row[t, channels : channels + heads].sigmoid()
            a = (-layer.A_log.exp() * nn.functional.softplus(row[t, channels + heads :] + layer.dt_bias)).exp()
            for h in range(heads):
                forgotten = torch.eye(size) - b[h] * torch.outer(key[0], key[0])
                state[h] = a[h] * state[h] @ forgotten + b[h] * torch.outer(value[h], key[0])
            results.append(state @ query[0] * size**-0.5)
        return torch.stack(results)

    def step(parts: list[tuple[int, slice]], *, decodes: int) -> list[Tensor]:
        tokens = [rows[i][part] for i, part in parts]
        ends = torch.tensor([0, *itertools.accumulate(map(len, tokens))])
        batch = SimpleNamespace(
            non_spec_query_start_loc=ends,
            non_spec_state_indices_tensor=torch.tensor([(3, 1, 4)[i] for i, _ in parts]),
            num_decodes=decodes,
            num_prefills=len(parts) - decodes,
            has_initial_state=torch.tensor([part.start > 0 for _, part in parts]),
        )
        whole = torch.cat(tokens)
        out = torch.zeros(len(whole), heads, size)
        attend_by_sequence(layer, batch, *whole.split([channels, heads, heads], 1), out)
        return list(out.split([len(part) for part in tokens]))

    with torch.no_grad():
        first = step([(0, slice(0, 5)), (1, slice(0, 66))], decodes=0)
        second = step([(1, slice(66, 67)), (0, slice(5, 6)), (2, slice(0, 2))], decodes=2)
        third = step([(0, slice(6, 7)), (2, slice(2, 3)), (1, slice(67, 70))], decodes=2)
        found = [
            [first[0], second[1], third[0]],
            [first[1], second[0], third[2]],
            [second[2], third[1]],
        ]
        for row, parts in zip(rows, found, strict=True):
            torch.testing.assert_close(torch.cat(parts), expected(row), rtol=1e-4, atol=1e-5)
    layer.kv_cache = (torch.zeros(5, width, channels), layer.kv_cache[1])  # wider states, for drafts
    with pytest.raises(RunError, match=r"only in bfloat16\. Set policy\.dtype"):
        step([(0, slice(0, 5))], decodes=0)


def test_files_may_lack_norms_and_embeddings_for_layers_are_computed() -> None:
    layers = [SimpleNamespace(is_layer_sparse=False), SimpleNamespace(is_layer_sparse=True), SimpleNamespace()]
    model: Any = SimpleNamespace(model=SimpleNamespace(layers=layers), load_weights=set)
    spare_unused_norms(model)
    assert model.load_weights(["head"]) == {"head", "model.layers.0.post_mlp_layernorm.weight"}

    def embed(input_ids: Tensor) -> Tensor:
        return torch.stack([input_ids * scale for scale in (1, 2, 3, 4)], dim=-1)

    model = SimpleNamespace(
        model=SimpleNamespace(get_per_layer_input_embeddings=embed),
        config=SimpleNamespace(num_hidden_layers=2),
        forward=lambda input_ids, positions, *, per_layer_inputs: per_layer_inputs,
    )
    embed_for_layers(model)
    assert model.forward(torch.tensor([1, 10]), None).tolist() == [[[1, 2], [3, 4]], [[10, 20], [30, 40]]]
    assert model.forward(torch.tensor([1]), None, per_layer_inputs="given") == "given"
    assert model.forward(None, None) is None


def test_experts_load_their_bias_beside_their_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's loader gets every other weight, and the bias that an engine lacks."""
    monkeypatch.setattr(RoutedExperts, "load_weights", lambda _, weights: (f"other {name}" for name, _ in weights))
    load_biases_of_experts()
    weights = {"0.up_proj.weight": torch.ones(1), "e_score_correction_bias": torch.ones(2), "1.x": torch.ones(1)}
    bias = nn.Parameter(torch.zeros(2), requires_grad=False)
    experts: Any = SimpleNamespace(e_score_correction_bias=bias)
    found = set(RoutedExperts.load_weights(experts, weights.items()))
    assert found == {"other 0.up_proj.weight", "e_score_correction_bias", "other 1.x"}
    assert bias.tolist() == [1.0, 1.0]
    experts.e_score_correction_bias = None
    assert "other e_score_correction_bias" in RoutedExperts.load_weights(experts, weights.items())


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_bias_without_groups_chooses_experts_and_does_not_weigh_them(scoring: str) -> None:
    logits, bias = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 0.0, 9.0])
    router = CPURouter(2, 4, scoring_func=scoring, e_score_correction_bias=bias)
    put_in_a_group(router)
    weights, chosen = router.select_experts(torch.zeros(1, 8), logits)
    order = chosen[0].argsort()
    scores = (logits.softmax(-1) if scoring == "softmax" else logits.sigmoid())[0, [0, 3]]
    assert chosen[0][order].tolist() == [0, 3]
    torch.testing.assert_close(weights[0][order], scores / scores.sum())


@pytest.mark.parametrize(
    ("use", "is_read"),
    [
        (lambda weight, model: None, False),
        (lambda weight, model: weight.narrow(0, 0, 1).t().detach(), False),
        (lambda weight, model: model.weight.data[:1].copy_(weight.narrow(0, 0, 1)), True),
        (lambda weight, model: model.weight.data.__setitem__(0, weight[1]), True),
        (lambda weight, model: weight.to(torch.bfloat16), True),
        (lambda weight, model: -torch.exp(weight), True),
    ],
)
def test_a_weight_is_read_by_an_operation_on_its_values(use: Callable[..., Any], is_read: bool) -> None:
    model, unread = nn.Linear(2, 2), UnreadWeights()
    with unread, torch.no_grad():
        for _, weight in unread.note([("used", torch.ones(2, 2)), ("other", torch.ones(2, 2))]):
            use(weight, model)
            use = lambda *_: None  # noqa: E731
    assert unread.names == ({"other"} if is_read else {"used", "other"})


def test_other_values_in_the_memory_of_a_weight_that_is_gone_are_not_the_weight() -> None:
    unread = UnreadWeights()
    with unread:
        for _ in unread.note(("dropped", torch.ones(2)) for _ in range(1)):
            pass
        for _ in range(9):
            torch.ones(2).sum()
    assert unread.names == {"dropped"}


def test_a_model_loaded_from_files_names_what_it_has_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.copied, self.taken = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def weights(*_: Any) -> Iterator[tuple[str, Tensor]]:
        return iter([("copied", torch.ones(2)), ("taken", torch.full((2,), 3.0)), ("bias", torch.ones(2))])

    def load(loader: Any, model: Any, config: Any) -> None:
        for name, weight in loader.get_all_weights(config, model):
            if name == "copied":
                model.copied.data.copy_(weight)
            elif name == "taken":
                model.taken.data = weight

    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", weights)
    monkeypatch.setattr(DefaultModelLoader, "load_weights", load)
    note_unread_weights()
    model: Any = Model()
    loader: Any = DefaultModelLoader.__new__(DefaultModelLoader)
    loader.load_weights(model, None)
    assert unread_weights(model) == {"bias"}
    Model.__module__ = "vllm.model_executor.models.transformers"
    assert not unread_weights(model)
    assert not unread_weights(nn.Linear(2, 2))
    assert (model.copied.tolist(), model.taken.tolist()) == ([1.0, 1.0], [3.0, 3.0])


BLOCK = 4


class Runner:
    """The parts of vLLM's runner for the record. Each step computes tokens of one request by given weights."""

    def __init__(self) -> None:
        shape = SimpleNamespace(get_total_num_hidden_layers=lambda: 1, get_num_experts_per_tok=lambda: 1)
        self.model_config = shape
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[None])
        self.cache_config = SimpleNamespace(block_size=BLOCK, num_gpu_blocks=8)
        self.requests: dict[str, Any] = {}

    def get_model(self) -> None:
        return None

    def _update_states(self, scheduled: Any) -> None:
        for name in scheduled.finished_req_ids:
            self.requests.pop(name, None)
        for name, blocks, num_tokens in scheduled.given:
            self.requests[name] = SimpleNamespace(block_ids=(blocks,), num_tokens=num_tokens)


Step = tuple[str, list[int], range, int, set[str]]  # request, blocks, tokens, version of the weights, preempted


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        pytest.param(
            [
                ("a-0", [1, 2], range(3), 1, set()),
                ("a-0", [1, 2], range(3, 4), 1, set()),
                ("a-0", [5, 1], range(5), 2, {"a-0"}),
                ("a-0", [5, 1], range(5, 6), 2, set()),
                ("a-0", [3, 4], range(7), 3, {"a-0"}),
            ],
            {"a": [1, 1, 1, 1, 2, 2, 3]},
            id="computed twice again in other places",
        ),
        pytest.param(
            [
                ("a-0", [1, 2], range(5), 1, set()),
                ("b-0", [1, 2], range(8), 2, {"a-0"}),
                ("b-0", [3, 2, 6], range(9), 3, {"b-0"}),
                ("a-0", [1, 4], range(5, 6), 3, set()),
            ],
            {"a": [1] * 5 + [3], "b": [2] * 8 + [3]},
            id="waiting through two updates, with the places in use",
        ),
    ],
)
def test_a_token_keeps_its_first_experts(
    steps: list[Step], expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version of the weights is the number of each expert."""
    monkeypatch.setattr(experts_cpu, "bind_routed_experts_capturer", lambda *_: None)
    runner = Runner()
    record = RecordedExperts(runner)
    for name, blocks, computed, version, preempted in steps:
        given = [(name, blocks, computed.stop)]
        runner._update_states(SimpleNamespace(finished_req_ids=(), preempted_req_ids=preempted, given=given))
        slots = torch.tensor([blocks[i // BLOCK] * BLOCK + i % BLOCK for i in computed])
        context = SimpleNamespace(slot_mapping={"layer": slots})
        monkeypatch.setattr(experts_cpu, "get_forward_context", lambda context=context: context)
        record.capture(0, torch.full((len(slots), 1), version))
        runner.requests[name].num_tokens = computed.stop + 1  # one more token is sampled
    for request, experts in expected.items():
        for count in (len(experts), 3):
            assert record.of(request, count)[:, 0, 0].tolist() == experts[:count]


REPEATED = 'root ::= ((("a"{1,1000}){1,1000}){1,1000}){1,1000}'  # each `a` may end any of the repetitions


def accepted(grammar: str, text: str) -> int:
    """Return the number of characters of a text accepted by the engine's grammar, in order."""
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    tokenizer = byte_tokenizer()
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer)
    compiled = xgrammar.GrammarCompiler(info).compile_grammar(grammar)
    made = grammar_time.bounded(XgrammarGrammar)(
        vocab_size=info.vocab_size, matcher=xgrammar.GrammarMatcher(compiled), ctx=compiled
    )
    mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
    ids = tokenizer(text, add_special_tokens=False).input_ids

    def takes(token: int) -> bool:
        made.fill_bitmask(mask, 0)
        return bool(made.accept_tokens("r", [token]))

    return sum(1 for _ in itertools.takewhile(takes, ids))


@pytest.mark.slow
def test_a_grammar_that_takes_ever_longer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_time, "STEP_S", 0.02)
    assert 1 <= accepted(REPEATED, "a" * 200) < 200
    assert accepted('root ::= "a" root', "a" * 200) == 200


def test_loaders_get_names_and_constants_are_buffers_outside_of_files() -> None:
    model = nn.Linear(2, 2)
    model.weight.weight_loader = partial(print, end="")
    name_loaders(model)
    assert model.weight.weight_loader.__name__ == "print"
    layer = nn.Sequential(nn.Linear(2, 2))
    layer.register_buffer("scale", torch.ones(3), persistent=False)
    layer.register_buffer("absent", None, persistent=False)
    layer.register_buffer("bias", torch.ones(5))
    layer[0].register_buffer("below", torch.ones(7), persistent=False)
    assert num_constants(layer) == 3
