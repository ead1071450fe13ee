"""Read the sizes of a model from config.json for all estimates. No weights are read and no hub is contacted.

The sources, in order: a folder; a model made by an earlier stage; the folder given as --shapes; the hub's cache on
this machine; the table of well-known models below. Unknown models are reported, never guessed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.deferred import torch, transformers
from rlhf.errors import UserError
from rlhf.models.files.folder_check import num_experts, read_json_object
from rlhf.models.files.small_models import SMALL_MODELS, fetched_to
from rlhf.vision.kinds import is_vision_weight

DENSE_CLASSES = ("Llama", "Mistral", "Qwen2", "Qwen3")  # decoders with the layers counted here
MIXTURES = ("Mixtral", "Qwen3Moe", "Glm4Moe", "GptOss")
KNOWN_CLASSES = (*DENSE_CLASSES, *MIXTURES)
_DECODERS = {  # of vision models, by model_type
    **{"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"},
    **{"qwen2_vl": "Qwen2", "qwen2_5_vl": "Qwen2", "qwen3_vl": "Qwen3"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """Describe a vision tower with its projector. Zeros: the model reads text alone."""

    parameters: int = 0
    edges: int = 0  # inputs and outputs of the layers that LoRA adapts on request
    hidden: int = 0
    ffn: int = 0
    layers: int = 0
    patches: int = 0  # of an image for each token of the language model


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Describe a decoder: attention with grouped heads, a gated MLP or a mixture of gated MLPs, two norms a layer."""

    source: str  # source of the sizes, in words
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0  # of a layer; 0: dense
    experts_per_token: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0  # width of the experts that every token passes
    dense_layers: int = 0  # first layers of a mixture, with an MLP of width ffn
    extra: int = 0  # biases and sinks of a layer that are not counted otherwise
    tower: Tower = Tower()

    @property
    def query(self) -> int:
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        """Return the width of all key heads, equal to the width of the values."""
        return self.kv_heads * self.head_size

    @property
    def block_parameters(self) -> int:
        return self._blocks_with(self.experts)

    @property
    def active_parameters(self) -> int:
        """Return the number of parameters in the products of a token: of a mixture, only the chosen experts'."""
        return self._blocks_with(self.experts_per_token) + self.embedding

    def _blocks_with(self, experts: int) -> int:
        attention = 2 * self.hidden * (self.query + self.key)
        small = 2 * self.hidden + self.qkv_bias * (self.query + 2 * self.key) + self.qk_norm * 2 * self.head_size
        every_layer = self.layers * (attention + small + self.extra)
        dense, mixed = (self.dense_layers, self.layers - self.dense_layers) if self.experts else (self.layers, 0)
        mixture = self.hidden * (3 * (experts * self.expert_ffn + self.shared_ffn) + self.experts)  # with the router
        return every_layer + dense * 3 * self.hidden * self.ffn + mixed * mixture

    @property
    def widest_mlp(self) -> int:
        """Return the MLP elements of a token in the widest layer."""
        mixed = self.experts_per_token * self.expert_ffn + self.shared_ffn
        return max(mixed, self.ffn) if self.dense_layers or not self.experts else mixed

    @property
    def layer_experts(self) -> int:
        """Return the number of parameters in the experts of a layer. At stage 3 a rank gathers all experts together."""
        return self.experts * 3 * self.expert_ffn * self.hidden

    @property
    def largest_weight(self) -> int:
        """Return the size of the largest parameter. The experts of a layer form one parameter."""
        return max(self.embedding, self.experts * 2 * self.expert_ffn * self.hidden)

    @property
    def embedding(self) -> int:
        """Return the number of parameters in the embedding. An untied head has the same number."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.embedding * (1 if self.tied else 2) + self.block_parameters + self.hidden + self.tower.parameters

    @property
    def scalar_parameters(self) -> int:
        """Return the number of parameters with a scalar head, as in critics and reward models."""
        return self.embedding + self.block_parameters + 2 * self.hidden + self.tower.parameters

    @property
    def _linear_layers(self) -> tuple[tuple[int, int], ...]:
        """Return the shapes of the linear layers of all blocks. Routers and stacked experts are no linear layers."""
        h, q, k = self.hidden, self.query, self.key
        dense = self.dense_layers if self.experts else self.layers
        mlps = [self.ffn] * dense + [self.shared_ffn] * (self.layers - dense if self.shared_ffn else 0)
        attention = ((q, h), (k, h), (k, h), (h, q)) * self.layers
        return (*attention, *(shape for f in mlps for shape in ((f, h), (f, h), (h, f))))

    @property
    def matrix_parameters(self) -> int:
        return sum(rows * columns for rows, columns in self._linear_layers)

    def factored(self, *, lora_rank: int | None, scalar: bool) -> int:
        """Return the values kept by Adafactor: a row and a column of each trained matrix, and norms and biases."""
        if lora_rank is not None:
            return sum(rows + columns + 2 * lora_rank for rows, columns in self._linear_layers)
        tables = 1 if self.tied or scalar else 2
        mixed = self.layers - self.dense_layers if self.experts else 0
        routers = mixed * self.experts * self.hidden
        stacked = mixed * self.experts * 3 * self.hidden * self.expert_ffn
        vectors = self.block_parameters - self.matrix_parameters - routers - stacked + self.hidden
        factors = mixed * (self.experts * (3 * self.expert_ffn + 2 * self.hidden) + self.experts + self.hidden)
        return sum(map(sum, self._linear_layers)) + factors + tables * (self.vocab + self.hidden) + vectors

    def lora_parameters(self, rank: int, stacks: Collection[str] = (), *, vision: bool = False) -> int:
        """Return the parameters of an adapter on the linear layers of all blocks: rank * (in + out) each.

        stacks: names of stacked experts. Each expert is adapted too. vision: the tower is adapted too.
        """
        widths = {"gate_up_proj": 2 * self.expert_ffn, "down_proj": self.expert_ffn}
        experts = self.experts * (self.layers - self.dense_layers) if self.experts else 0
        of_stacks = experts * sum(self.hidden + widths.get(name, 0) for name in stacks)
        tower = self.tower.edges if vision else 0
        return rank * (of_stacks + tower + sum(rows + columns for rows, columns in self._linear_layers))


def shape_of(config: Mapping[str, Any], source: str) -> Shape:
    """Read a shape from config.json values. Raise UserError for an unknown architecture or a missing size."""
    if config.get("vision_config"):
        return _seeing_shape(config, source)
    names = config.get("architectures") or []
    kind = str(names[0]) if names else str(config.get("model_type", "no class at all"))
    family = kind.removesuffix("ForCausalLM").removesuffix("ForSequenceClassification")
    if family not in KNOWN_CLASSES:
        raise UserError(f"{source} is of {kind}, whose memory is not modelled; known are {', '.join(KNOWN_CLASSES)}")
    wanted = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for key in wanted:
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise UserError(f"{source}: `{key}` is {config.get(key)!r}, expected a positive integer")
    hidden, ffn, layers, heads, vocab = (config[key] for key in wanted)
    return Shape(
        source=source,
        hidden=hidden,
        ffn=ffn,
        layers=layers,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or hidden // heads,
        vocab=vocab,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "Qwen2" or bool(config.get("attention_bias", False)),
        qk_norm=family in ("Qwen3", "Qwen3Moe") or bool(config.get("use_qk_norm", False)),
        **(_mixture(family, config, source) if family in MIXTURES else {}),
    )


def _seeing_shape(config: Mapping[str, Any], source: str) -> Shape:
    """Read the shape of a vision model: the decoder's sizes, and the size of its tower."""
    text: Mapping[str, Any] = config.get("text_config") or config  # older files of Qwen2-VL have no section
    kind = str(text.get("model_type", config.get("model_type")))
    if (family := _DECODERS.get(kind.removesuffix("_text"))) is None:
        known = ", ".join(sorted(_DECODERS))
        raise UserError(f"{source} has a decoder of type {kind}, whose memory is not modelled; known are {known}")
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    named = {**text, "vision_config": None, "architectures": [f"{family}ForCausalLM"], "tie_word_embeddings": tied}
    return replace(shape_of(named, source), tower=_tower_of(config))


def _tower_of(config: Mapping[str, Any]) -> Tower:
    """Count the parameters outside the decoder, in transformers' model without memory."""
    from rlhf.models.files.loading import class_of  # takes seconds, like transformers' model

    settings = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = class_of(settings, scalar=False).from_config(settings)
    parts = {name: part for name, part in model.named_modules() if is_vision_weight(name)}
    linear = {name.rpartition(".")[2] for name, part in parts.items() if isinstance(part, torch.nn.Linear)}
    adapted = {name: part for name, part in parts.items() if name.rpartition(".")[2] in linear}  # by names, as LoRA is
    weights = [part.weight.flatten(1) for name, part in adapted.items() if not name.rpartition(".")[2].isdigit()]
    vision = settings.vision_config.to_dict()
    both = {**settings.to_dict(), **vision}
    hidden = vision.get("embed_dim") or vision["hidden_size"]  # the second is the decoder's width in Qwen2-VL
    merged = both.get("spatial_merge_size") or both.get("scale_factor") or 1 / both.get("downsample_ratio", 1)
    return Tower(
        parameters=sum(weight.numel() for name, weight in model.named_parameters() if is_vision_weight(name)),
        edges=sum(sum(weight.shape) for weight in weights),
        hidden=hidden,
        ffn=vision.get("intermediate_size") or int(hidden * vision["mlp_ratio"]),
        layers=vision.get("depth") or vision["num_hidden_layers"],
        patches=round(merged**2),
    )


def _mixture(family: str, config: Mapping[str, Any], source: str) -> dict[str, Any]:
    experts, width = num_experts(config), config.get("moe_intermediate_size") or config["intermediate_size"]
    chosen = config.get("num_experts_per_tok")
    if not experts or not isinstance(chosen, int):
        raise UserError(f"{source}: its numbers of experts and of experts for each token are missing")
    if config.get("decoder_sparse_step", 1) != 1:
        raise UserError(f"{source}: `decoder_sparse_step` is {config['decoder_sparse_step']}; only 1 is modelled")
    dense = config.get("first_k_dense_replace", len(config.get("mlp_only_layers") or ()))
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    biases = hidden + heads + experts + experts * (2 * width + hidden)  # output, sinks, router, experts
    return {
        "experts": experts,
        "experts_per_token": chosen,
        "expert_ffn": width,
        "shared_ffn": width * (config.get("n_shared_experts") or 0),
        "dense_layers": dense,
        "extra": biases if family == "GptOss" else 0,
    }


def find_shape(model: str, *, shapes: Path | None, made: Mapping[str, str]) -> Shape:
    """Return the sizes of a model named in a configuration. Raise UserError if no source has the model.

    shapes: a folder of config.json files, at OWNER/NAME/config.json or OWNER--NAME.json. made: maps each final folder
    of an earlier stage to the original model.
    """
    if model == "tiny:llama":
        return TINY
    if model.startswith("tiny:"):
        from rlhf.models.files.tiny_vision import KINDS  # with tokenizers

        if (make := KINDS.get(model.removeprefix("tiny:"))) is not None:
            return shape_of(make()[0].to_dict(), "rlhf/models/files/tiny_vision.py")
    if model in made:
        return find_shape(made[model], shapes=shapes, made=made)
    if (stored := find_config(model, shapes=shapes)) is not None:
        config, path = stored
        return shape_of(config, str(path))
    if (name := fetched_to(model)) is not None:  # not fetched yet
        model = SMALL_MODELS[name].repo
    if model in _SEEING_TABLE:
        decoder, tower = _SEEING_TABLE[model]
        return replace(shape_of(_known(*decoder), f"the built-in table ({model})"), tower=tower)
    if model in _MIXTURE_TABLE or model in _TABLE:
        config = _known(*_TABLE[model]) if model in _TABLE else dict(_MIXTURE_TABLE[model])
        return shape_of(config, f"the built-in table ({model})")
    raise UserError(
        f"the sizes of {model} are not known here: there is no {_places(model, shapes)[0]}, it is not in the hub's "
        "cache, and not among the well-known models. Put its config.json there, or into a folder given as --shapes"
    )


def find_config(model: str, *, shapes: Path | None) -> tuple[dict[str, Any], Path] | None:
    """Return the values and path of a model's config.json, or None if there is no file."""
    path = next((path for path in _places(model, shapes) if path.is_file()), None)
    return None if path is None else (read_json_object(path), path)


def _places(model: str, shapes: Path | None) -> list[Path]:
    snapshots = (hub_folder("models", model) / "snapshots").glob("*/config.json")
    newest_first = sorted(snapshots, key=lambda path: path.stat().st_mtime, reverse=True)
    given = [] if shapes is None else [shapes / model / "config.json", shapes / f"{model.replace('/', '--')}.json"]
    return [Path(model) / "config.json", *given, *newest_first]


def hub_folder(kind: str, name: str) -> Path:
    """Return the folder of a model or a data set (kind `models` or `datasets`) in the hub's cache."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    return cache / f"{kind}--{name.replace('/', '--')}"


_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "tie_word_embeddings"),
)
# Class and _SIZES, from each model's config.json. A test compares the resulting parameters with the published counts.
_TABLE: Mapping[str, tuple[str, int, int, int, int, int, int, int, bool]] = {
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


def _known(family: str, *sizes: int, **experts: int) -> dict[str, Any]:
    return {"architectures": [f"{family}ForCausalLM"], **dict(zip(_SIZES, sizes, strict=True)), **experts}


_QWEN_TOWER = {"edges": 699_416, "hidden": 1280, "ffn": 3420, "layers": 32, "patches": 4}
# The decoder as in _TABLE, and the tower with the projector.
_SEEING_TABLE: Mapping[str, tuple[tuple[str, int, int, int, int, int, int, int, bool], Tower]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": (_TABLE["Qwen/Qwen2.5-3B-Instruct"], Tower(parameters=668_684_288, **_QWEN_TOWER)),
    "Qwen/Qwen2.5-VL-7B-Instruct": (_TABLE["Qwen/Qwen2.5-7B-Instruct"], Tower(parameters=676_550_144, **_QWEN_TOWER)),
}

TINY = shape_of(_known("Llama", 96, 256, 3, 4, 2, 32, 320, False), "rlhf/models/files/tiny.py")


def _qwen(*sizes: int, width: int, experts: int = 128) -> Mapping[str, Any]:
    of_model = {"num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": width}
    return _known("Qwen3Moe", *sizes, False, **of_model)


def _glm(*sizes: int, experts: int, width: int, dense: int, norm: int) -> Mapping[str, Any]:
    of_model = {"n_routed_experts": experts, "moe_intermediate_size": width, "first_k_dense_replace": dense}
    of_family = {"n_shared_experts": 1, "num_experts_per_tok": 8, "attention_bias": 1}
    return _known("Glm4Moe", *sizes, False, use_qk_norm=norm, **of_model, **of_family)


def _local(family: str, *sizes: int, experts: int, chosen: int) -> Mapping[str, Any]:
    counts = {"num_local_experts": experts, "num_experts_per_tok": chosen}
    return _known(family, *sizes, False, **counts, attention_bias=family == "GptOss")


_QWEN3_30B = _qwen(2048, 6144, 48, 32, 4, 128, 151936, width=768)
_QWEN3_235B = _qwen(4096, 12288, 94, 64, 4, 128, 151936, width=1536)
_GLM_4_5 = _glm(5120, 12288, 92, 96, 8, 128, 151552, experts=160, width=1536, dense=3, norm=1)
# Sizes as in _TABLE, then the experts. A test compares all and active parameters with the published counts.
_MIXTURE_TABLE: Mapping[str, Mapping[str, Any]] = {
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
