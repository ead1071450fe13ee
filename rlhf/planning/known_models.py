"""The sizes of well-known models, from each model's public config.json.

A test compares the resulting parameters with the published counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Decoder = tuple[str, int, int, int, int, int, int, int, bool]  # class, and _SIZES
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "tie_word_embeddings"),
)
DENSE_MODELS: Mapping[str, Decoder] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("Llama", 576, 1536, 30, 9, 3, 64, 49152, True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": ("Llama", 960, 2560, 32, 15, 5, 64, 49152, True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("Llama", 2048, 8192, 24, 32, 32, 64, 49152, True),
    "Qwen/Qwen2.5-0.5B-Instruct": ("Qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": ("Qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "Qwen/Qwen2.5-3B-Instruct": ("Qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": ("Qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
    "Qwen/Qwen2.5-14B-Instruct": ("Qwen2", 5120, 13824, 48, 40, 8, 128, 152064, False),
    "Qwen/Qwen2.5-32B-Instruct": ("Qwen2", 5120, 27648, 64, 40, 8, 128, 152064, False),
    "Qwen/Qwen2.5-72B-Instruct": ("Qwen2", 8192, 29568, 80, 64, 8, 128, 152064, False),
    "Qwen/Qwen3-0.6B": ("Qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "Qwen/Qwen3-1.7B": ("Qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True),
    "Qwen/Qwen3-4B": ("Qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "Qwen/Qwen3-4B-Instruct-2507": ("Qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "Qwen/Qwen3-8B": ("Qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "Qwen/Qwen3-14B": ("Qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False),
    "Qwen/Qwen3-32B": ("Qwen3", 5120, 25600, 64, 64, 8, 128, 151936, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ("Qwen2", 1536, 8960, 28, 12, 2, 128, 151936, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": ("Qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
    "meta-llama/Llama-2-7b-hf": ("Llama", 4096, 11008, 32, 32, 32, 128, 32000, False),
    "meta-llama/Llama-2-13b-hf": ("Llama", 5120, 13824, 40, 40, 40, 128, 32000, False),
    "meta-llama/Llama-2-70b-hf": ("Llama", 8192, 28672, 80, 64, 8, 128, 32000, False),
    "meta-llama/Llama-3.1-8B-Instruct": ("Llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
    "meta-llama/Llama-3.1-70B-Instruct": ("Llama", 8192, 28672, 80, 64, 8, 128, 128256, False),
    "meta-llama/Llama-3.2-1B-Instruct": ("Llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "meta-llama/Llama-3.2-3B-Instruct": ("Llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "meta-llama/Llama-3.3-70B-Instruct": ("Llama", 8192, 28672, 80, 64, 8, 128, 128256, False),
    "mistralai/Mistral-7B-Instruct-v0.3": ("Mistral", 4096, 14336, 32, 32, 8, 128, 32768, False),
    "mistralai/Mistral-Nemo-Instruct-2407": ("Mistral", 5120, 14336, 40, 32, 8, 128, 131072, False),
    "mistralai/Mistral-Small-24B-Instruct-2501": ("Mistral", 5120, 32768, 40, 32, 8, 128, 131072, False),
}


def known_config(family: str, *sizes: int, **experts: int) -> dict[str, Any]:
    return {"architectures": [f"{family}ForCausalLM"], **dict(zip(_SIZES, sizes, strict=True)), **experts}


def _like(model: str, vocab: int, *, tied: bool = False) -> Decoder:
    """Return the sizes of a model, named without -Instruct, with another vocabulary."""
    return (*DENSE_MODELS[f"{model}-Instruct"][:7], vocab, tied)


# Of towers: hidden size, width of the MLP, layers, patches of an image for each token of the language model.
_QWEN2, _QWEN2_5, _QWEN2_5_32B = (1280, 5120, 32, 4), (1280, 3420, 32, 4), (1280, 3456, 32, 4)
_QWEN3, _QWEN3_8B, _IDEFICS = (1024, 4096, 24, 4), (1152, 4304, 27, 4), (1152, 4304, 27, 4)
_INTERN, _MISTRAL, _PIXTRAL, _CLIP = _QWEN3, _QWEN3, (1024, 4096, 24, 1), (1024, 4096, 24, 1)
_SMOL, _SMOL_2B, _GEMMA = (768, 3072, 12, 16), (1152, 4304, 27, 9), (1152, 4304, 27, 16)
_ONE = (1152, 4304, 26, 1)  # LLaVA-OneVision
_OF_GEMMA: Mapping[str, Decoder] = {
    "4b": ("Gemma3", 2560, 10240, 34, 8, 4, 256, 262208, True),
    "12b": ("Gemma3", 3840, 15360, 48, 16, 8, 256, 262208, True),
    "27b": ("Gemma3", 5376, 21504, 62, 32, 16, 128, 262208, True),
}
_SMALL_24B = (DENSE_MODELS["mistralai/Mistral-Small-24B-Instruct-2501"], (438_958_080, 586_752, *_MISTRAL))
# The decoder as in DENSE_MODELS, and of the tower with the projector: the parameters, inputs and outputs of the linear
# layers, both as counted in transformers' model of each config.json, and the sizes above.
SEEING_MODELS: Mapping[str, tuple[Decoder, Sequence[int]]] = {
    "Qwen/Qwen2-VL-2B-Instruct": (DENSE_MODELS["Qwen/Qwen2.5-1.5B-Instruct"], (665_271_296, 657_816, *_QWEN2)),
    "Qwen/Qwen2-VL-7B-Instruct": (DENSE_MODELS["Qwen/Qwen2.5-7B-Instruct"], (675_759_104, 657_816, *_QWEN2)),
    "Qwen/Qwen2-VL-72B-Instruct": (DENSE_MODELS["Qwen/Qwen2.5-72B-Instruct"], (699_356_672, 657_816, *_QWEN2)),
    "Qwen/Qwen2.5-VL-3B-Instruct": (DENSE_MODELS["Qwen/Qwen2.5-3B-Instruct"], (668_684_288, 699_416, *_QWEN2_5)),
    "Qwen/Qwen2.5-VL-7B-Instruct": (DENSE_MODELS["Qwen/Qwen2.5-7B-Instruct"], (676_550_144, 699_416, *_QWEN2_5)),
    "Qwen/Qwen2.5-VL-32B-Instruct": (DENSE_MODELS["Qwen/Qwen2.5-32B-Instruct"], (688_841_984, 702_872, *_QWEN2_5_32B)),
    "Qwen/Qwen2.5-VL-72B-Instruct": (DENSE_MODELS["Qwen/Qwen2.5-72B-Instruct"], (704_573_696, 702_872, *_QWEN2_5_32B)),
    "Qwen/Qwen3-VL-2B-Instruct": (DENSE_MODELS["Qwen/Qwen3-1.7B"], (406_957_056, 453_120, *_QWEN3)),
    "Qwen/Qwen3-VL-4B-Instruct": (DENSE_MODELS["Qwen/Qwen3-4B"], (415_347_712, 455_168, *_QWEN3)),
    "Qwen/Qwen3-VL-8B-Instruct": (DENSE_MODELS["Qwen/Qwen3-8B"], (576_388_336, 555_616, *_QWEN3_8B)),
    "Qwen/Qwen3-VL-32B-Instruct": (DENSE_MODELS["Qwen/Qwen3-32B"], (595_266_800, 559_712, *_QWEN3_8B)),
    "google/gemma-3-4b-it": (_OF_GEMMA["4b"], (419_816_304, 543_456, *_GEMMA)),
    "google/gemma-3-12b-it": (_OF_GEMMA["12b"], (421_290_864, 543_456, *_GEMMA)),
    "google/gemma-3-27b-it": (_OF_GEMMA["27b"], (423_060_336, 543_456, *_GEMMA)),
    "HuggingFaceM4/Idefics3-8B-Llama3": (_like("meta-llama/Llama-3.1-8B", 128259), (431_800_560, 552_160, *_IDEFICS)),
    "HuggingFaceTB/SmolVLM-256M-Instruct": (_like("HuggingFaceTB/SmolLM2-135M", 49280), (93_510_912, 178_752, *_SMOL)),
    "HuggingFaceTB/SmolVLM-500M-Instruct": (_like("HuggingFaceTB/SmolLM2-360M", 49280), (98_229_504, 179_136, *_SMOL)),
    "HuggingFaceTB/SmolVLM-Instruct": (_like("HuggingFaceTB/SmolLM2-1.7B", 49155), (434_220_912, 555_872, *_SMOL_2B)),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (
        _like("HuggingFaceTB/SmolLM2-1.7B", 49280),
        (434_220_912, 555_872, *_SMOL_2B),
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": (
        _like("Qwen/Qwen2.5-0.5B", 152000, tied=True),
        (399_585_440, 527_168, *_ONE),
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (_like("Qwen/Qwen2.5-7B", 152128), (414_732_320, 535_232, *_ONE)),
    "OpenGVLab/InternVL3-1B-hf": (_like("Qwen/Qwen2.5-0.5B", 151674), (308_495_104, 449_152, *_INTERN)),
    "OpenGVLab/InternVL3-2B-hf": (_like("Qwen/Qwen2.5-1.5B", 151674), (312_674_304, 451_072, *_INTERN)),
    "OpenGVLab/InternVL3-8B-hf": (_like("Qwen/Qwen2.5-7B", 151674), (331_552_768, 457_216, *_INTERN)),
    "OpenGVLab/InternVL3-14B-hf": (_like("Qwen/Qwen2.5-14B", 151674), (351_216_640, 461_824, *_INTERN)),
    "mistral-community/pixtral-12b": (
        DENSE_MODELS["mistralai/Mistral-Nemo-Instruct-2407"],
        (434_957_312, 581_632, *_PIXTRAL),
    ),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": _SMALL_24B,
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": _SMALL_24B,
    "llava-hf/llava-1.5-7b-hf": (
        (*DENSE_MODELS["meta-llama/Llama-2-7b-hf"][:7], 32064, False),
        (324_487_168, 455_680, *_CLIP),
    ),
}


def _qwen(*sizes: int, width: int, experts: int = 128) -> Mapping[str, Any]:
    of_model = {"num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": width}
    return known_config("Qwen3Moe", *sizes, False, **of_model)


def _glm(*sizes: int, experts: int, width: int, dense: int, norm: int) -> Mapping[str, Any]:
    of_model = {"n_routed_experts": experts, "moe_intermediate_size": width, "first_k_dense_replace": dense}
    of_family = {"n_shared_experts": 1, "num_experts_per_tok": 8, "attention_bias": 1}
    return known_config("Glm4Moe", *sizes, False, use_qk_norm=norm, **of_model, **of_family)


def _local(family: str, *sizes: int, experts: int, chosen: int) -> Mapping[str, Any]:
    counts = {"num_local_experts": experts, "num_experts_per_tok": chosen}
    return known_config(family, *sizes, False, **counts, attention_bias=family == "GptOss")


_QWEN3_30B = _qwen(2048, 6144, 48, 32, 4, 128, 151936, width=768)
_QWEN3_235B = _qwen(4096, 12288, 94, 64, 4, 128, 151936, width=1536)
_GLM_4_5 = _glm(5120, 12288, 92, 96, 8, 128, 151552, experts=160, width=1536, dense=3, norm=1)
# Sizes as in DENSE_MODELS, then the experts. A test compares all and active parameters with the published counts.
MIXTURE_MODELS: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-30B-A3B": _QWEN3_30B,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _QWEN3_30B,
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": _QWEN3_30B,
    "Qwen/Qwen3-235B-A22B": _QWEN3_235B,
    "Qwen/Qwen3-235B-A22B-Instruct-2507": _QWEN3_235B,
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": _qwen(6144, 8192, 62, 96, 8, 128, 151936, width=2560, experts=160),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _local("Mixtral", 4096, 14336, 32, 32, 8, 128, 32000, experts=8, chosen=2),
    "mistralai/Mixtral-8x22B-Instruct-v0.1": _local("Mixtral", 6144, 16384, 56, 48, 8, 128, 32768, experts=8, chosen=2),
    "zai-org/GLM-4.5-Air": _glm(4096, 10944, 46, 96, 8, 128, 151552, experts=128, width=1408, dense=1, norm=0),
    "zai-org/GLM-4.5": _GLM_4_5,
    "zai-org/GLM-4.6": _GLM_4_5,
    "openai/gpt-oss-20b": _local("GptOss", 2880, 2880, 24, 64, 8, 64, 201088, experts=32, chosen=4),
    "openai/gpt-oss-120b": _local("GptOss", 2880, 2880, 36, 64, 8, 64, 201088, experts=128, chosen=4),
}
