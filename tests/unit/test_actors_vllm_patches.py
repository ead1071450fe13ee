"""vLLM without the repairs of actors/vllm_patches still has the defects.

A failed test shows a vLLM without the defect: remove the repair, the row in `actors.vllm_patches`, and the test.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import actors.vllm_patches
from actors.vllm_patches import inspection
from actors.vllm_patches.models import nest_vision_model
from rlhf.models.files.tiny import byte_tokenizer

pytest.importorskip("vllm")

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.model_executor.model_loader import reload
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.models import registry

ROWS = re.findall(r"^(\w+) {2,}\S.*? {2,}(\S.*)$", actors.vllm_patches.__doc__ or "", flags=re.MULTILINE)[1:]
TABLE = [(module, test) for module, tests in ROWS for test in tests.split(", ")]
BIAS = torch.tensor([0.0, 0.0, 0.0, 9.0])
VLLM = Path(inspect.getfile(DefaultModelLoader)).parents[2]


def class_in(path: str, name: str) -> ast.ClassDef:
    body = ast.parse((VLLM / path).read_text(encoding="utf-8")).body
    (found,) = [node for node in body if isinstance(node, ast.ClassDef) and node.name == name]
    return found


@pytest.fixture(autouse=True)
def unpatched() -> None:
    assert "actors.weights.vllm_extension" not in sys.modules, "it has patched vLLM in this process"


def test_the_table_names_each_module_and_its_test_here() -> None:
    folder = Path(actors.vllm_patches.__file__).parent
    assert {module for module, _ in TABLE} == {path.stem for path in folder.glob("[!_]*.py")}
    tests = {name.removeprefix("test_") for name in globals()}
    assert {test for _, test in TABLE} - {"an engine"} <= tests


def test_delta_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = object.__new__(gdn_attention.GDNAttentionMetadata)
    batch.num_actual_tokens = 1
    context = SimpleNamespace(no_compile_layers={"l": SimpleNamespace(prefix="l")}, attn_metadata={"l": batch})
    monkeypatch.setattr(gdn_attention, "get_forward_context", lambda: context)
    one = torch.zeros(1, 1)
    with pytest.raises(AssertionError, match="requires BF16"):
        gdn_attention.cpu_gdn_attention_core(one, one, one, one, "l")


def test_drafts() -> None:
    """The kernel for CPUs writes into a copy of the output."""
    from vllm import _custom_ops  # noqa: F401  # loads the kernels
    from vllm.utils.cpu_triton_utils import _expand_kernel_impl

    output = torch.zeros(3)
    _expand_kernel_impl(output, torch.tensor([1.5, 2.5]), torch.tensor([2, 3]), 0, 0)
    assert output.tolist() == [0.0] * 3


def test_first_runner() -> None:
    """The second runner draws by seed and position, and returns the experts."""
    runner = class_in("v1/worker/cpu_model_runner.py", "CPUModelRunner")
    assert [ast.unparse(base) for base in runner.bases] == ["GPUModelRunner"]
    first = (VLLM / "v1/worker/gpu_model_runner.py").read_text(encoding="utf-8")
    assert "class GPUModelRunner" in first
    assert "routed_experts" not in first


class Largest(TorchDispatchMode):
    """Records the largest number of values returned by an operation."""

    values = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not operation.is_view:
            self.values = max(self.values, result.numel())
        return result


def test_adapter() -> None:
    tokens, rank, width = 64, 4, 8
    wrapper = PunicaWrapperCPU(tokens, 1, "cpu")
    mapping: Any = SimpleNamespace(index_mapping=(1,) * tokens, prompt_mapping=(1,), is_prefill=False)
    wrapper.update_metadata(mapping, [1], 1, 10)
    lora_a, lora_b = torch.ones(1, 1, rank, width), torch.ones(1, 1, width, rank)
    with Largest() as largest:
        y, x = torch.zeros(tokens, width), torch.ones(tokens, width)
        wrapper.add_lora_linear(y, x, (lora_a,), (lora_b,), 1.0, (width,))
    assert largest.values >= tokens * rank * width


def test_base_tokens() -> None:
    wrapper = PunicaWrapperCPU(4, 4, "cpu")
    mapping: Any = SimpleNamespace(index_mapping=(5, 0), prompt_mapping=(5, 0), is_prefill=True)
    wrapper.update_metadata(mapping, [5], 1, 10)
    y, lora = torch.zeros(2, 4), torch.ones(1, 1, 4, 4)
    wrapper.add_lora_linear(y, torch.ones(2, 4), (lora,), (lora,), 1.0, (4,))
    assert y[1].any()  # without an adapter


def test_each_token_gets_its_own_adapter() -> None:
    from actors.vllm_patches.lora_cpu import SharedAdapterWrapper

    generator = torch.Generator().manual_seed(0)
    slots, rank, width, sizes = 3, 4, 8, (8, 6)
    x = torch.randn(9, width, generator=generator)
    lora_a = [torch.randn(slots, 1, rank, width, generator=generator) for _ in sizes]
    lora_b = [torch.randn(slots, 1, size, rank, generator=generator) for size in sizes]
    slot_of = {7: 0, 5: 2}
    for index in ((5, 5, 7, 0, 5, 0, 7, 7, 5), (5,) * 9, (0,) * 9):
        wrapper = SharedAdapterWrapper(16, 16, "cpu")
        wrapper.update_metadata(
            SimpleNamespace(index_mapping=index, prompt_mapping=index, is_prefill=True), [7, None, 5], slots, 10
        )
        linear, embedded, logits = torch.ones(9, sum(sizes)), torch.ones(9, 6), torch.ones(9, 8)
        wrapper.add_lora_linear(linear, x, lora_a, lora_b, 1.0, sizes)
        wrapper.add_lora_embedding(embedded, x[:, :rank], lora_b[1])
        wrapper.add_lora_logits(logits, x, lora_a[0], lora_b[0], 1.0)
        for row, adapter in enumerate(index):
            slot = slot_of.get(adapter)
            pairs = list(zip(lora_a, lora_b, strict=True))
            parts = [b[0, 0, :, 0] * 0.0 if slot is None else b[slot, 0] @ a[slot, 0] @ x[row] for a, b in pairs]
            torch.testing.assert_close(linear[row], 1.0 + torch.cat(parts))
            torch.testing.assert_close(logits[row], 1.0 + parts[0])
            of_token = 0.0 if slot is None else lora_b[1][slot, 0] @ x[row, :rank]
            torch.testing.assert_close(embedded[row], 1.0 + of_token + torch.zeros(6))


def test_gemma_3n() -> None:
    from vllm.model_executor.models.gemma3n import Gemma3nForCausalLM, Gemma3nSelfDecoder

    given: list[Any] = []

    def note(*args: Any, per_layer_inputs: Any = "none given", **options: Any) -> None:
        given.append(per_layer_inputs)

    Gemma3nForCausalLM.forward(SimpleNamespace(model=note), torch.tensor([1]), torch.tensor([0]))
    decoder = SimpleNamespace(
        per_layer_model_projection=lambda hidden: hidden,
        per_layer_projection_scale=1.0,
        per_layer_projection_norm=lambda hidden: hidden,
        config=SimpleNamespace(num_hidden_layers=1, hidden_size_per_layer_input=2),
        per_layer_input_scale=1.0,
    )
    hidden = torch.tensor([[1.0, 2.0]])
    assert given == [None]
    assert Gemma3nSelfDecoder.get_per_layer_inputs(decoder, hidden.clone(), None).tolist() == [[[1.0, 2.0]]]


def test_a_x_k1() -> None:
    layer = class_in("model_executor/models/AXK1.py", "AXK1DecoderLayer")
    (build,) = [node for node in layer.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    always = [ast.unparse(node.targets[0]) for node in build.body if isinstance(node, ast.Assign)]
    assert "self.post_mlp_layernorm" in always


def test_towers() -> None:
    from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration

    tower = class_in("model_executor/models/siglip.py", "SiglipVisionModel")
    (build,) = [node for node in tower.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    assert "self.vision_model" in [ast.unparse(n.targets[0]) for n in build.body if isinstance(n, ast.Assign)]
    mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper
    assert mapper.apply_list(["model.vision_tower.encoder.weight"]) == ["vision_tower.encoder.weight"]
    loaded: list[str] = []
    model = SimpleNamespace(load_weights=lambda weights: loaded.extend(name for name, _ in weights))
    nest_vision_model(model)
    names = ["model.vision_tower.encoder.w", "model.vision_tower.vision_model.encoder.w", "lm_head.weight"]
    model.load_weights((name, BIAS) for name in names)
    assert loaded == ["model.vision_tower.vision_model.encoder.w"] * 2 + ["lm_head.weight"]


def test_bias_in_files() -> None:
    experts: Any = SimpleNamespace(
        get_expert_mapping=lambda **_: [("experts.w13_weight", "experts.0.up_proj.weight", 0, "w3")],
        layer_name="model.layers.0.mlp.experts",
        e_score_correction_bias=nn.Parameter(torch.zeros(4), requires_grad=False),
    )
    assert list(RoutedExperts.load_weights(experts, [("e_score_correction_bias", BIAS)])) == []
    assert experts.e_score_correction_bias.tolist() == [0.0] * 4


def test_bias_without_groups() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    router = CPURouter(2, 4, scoring_func="softmax", e_score_correction_bias=BIAS)
    assert sorted(router.select_experts(torch.zeros(1, 8), logits)[1][0].tolist()) == [0, 1]
    with pytest.raises(AssertionError):
        CPURouter(2, 4, scoring_func="sigmoid", e_score_correction_bias=BIAS).select_experts(torch.zeros(1, 8), logits)


def test_unread_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    loader: Any = DefaultModelLoader.__new__(DefaultModelLoader)
    loader.counter_before_loading_weights, loader.enable_weights_track = 0.0, None
    for name in ("_init_ep_weight_filter", "_init_mm_encoder_only_weight_filter"):
        monkeypatch.setattr(loader, name, lambda *_: None)
    monkeypatch.setattr(loader, "get_all_weights", lambda *_: iter([("weight", torch.ones(2, 2)), ("bias", BIAS)]))
    model: Any = nn.Linear(2, 2, bias=False)
    model.load_weights = lambda weights: {name for name, _ in weights if name == "weight"}
    loader.load_weights(model, SimpleNamespace(quantization=None))


def test_reload() -> None:
    layer = nn.Linear(2, 2)
    layer.register_buffer("scale", torch.ones(3), persistent=False)
    reload.record_metadata_for_reloading(layer)
    reload.initialize_layerwise_reload(layer)
    info = get_layerwise_info(layer)
    assert info.load_numel_total == 2 * 2 + 2 + 3
    layer.weight.weight_loader(layer.weight, torch.ones(2, 2))  # then the update fails before the bias comes
    reload.initialize_layerwise_reload(layer)
    assert info.load_numel == 4

    named = nn.Linear(2, 2)
    named.weight.weight_loader = partial(print, end="")
    reload.record_metadata_for_reloading(named)
    with pytest.raises(AttributeError, match="__name__"):
        reload.initialize_layerwise_reload(named)


def test_cut_call() -> None:
    from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

    text = '<tool_call>{"name": "find", "arguments": {"city": "Par'
    request: Any = SimpleNamespace(tools=[object()], tool_choice="auto", skip_special_tokens=True)
    found = Hermes2ProToolParser(byte_tokenizer()).extract_tool_calls(text, request)
    assert not found.tool_calls
    assert found.content == text


def test_inspection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that inspects a model begins with vLLM's module, and the repair hides packages from the process."""
    assert registry._SUBPROCESS_COMMAND[1:] == ["-m", inspection.MODULE]
    monkeypatch.setattr(registry, "_SUBPROCESS_COMMAND", registry._SUBPROCESS_COMMAND)
    monkeypatch.setattr(inspection, "broken_cuda_builds", lambda: iter(["torchaudio"]))
    inspection.hide_cuda_builds_from_inspection()
    assert registry._run_in_subprocess(lambda: __import__("sys").modules.get("torchaudio", "not hidden")) is None
