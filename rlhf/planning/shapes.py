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
from rlhf.planning.known_models import DENSE_MODELS, MIXTURE_MODELS, SEEING_MODELS, known_config
from rlhf.vision.kinds import is_vision_weight

DENSE_CLASSES = ("Llama", "Mistral", "Qwen2", "Qwen3")  # decoders with the layers counted here
MIXTURES = ("Mixtral", "Qwen3Moe", "Glm4Moe", "GptOss")
GEMMA = "Gemma3"  # with four norms a layer; caches of sliding windows are counted as whole
KNOWN_CLASSES = (*DENSE_CLASSES, GEMMA, *MIXTURES)
_DECODERS = {  # of vision models, by model_type
    **{"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"},
    **{"qwen2_vl": "Qwen2", "qwen2_5_vl": "Qwen2", "qwen3_vl": "Qwen3", "gemma3": GEMMA},
}


@dataclass(frozen=True, slots=True)
class Tower:
    """Describe a vision tower with its projector. Zeros: the model reads only text."""

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
        tied=bool(config.get("tie_word_embeddings", family == GEMMA)),
        qkv_bias=family == "Qwen2" or bool(config.get("attention_bias", False)),
        qk_norm=family in ("Qwen3", "Qwen3Moe", GEMMA) or bool(config.get("use_qk_norm", False)),
        **(_mixture(family, config, source) if family in MIXTURES else {"extra": 2 * hidden * (family == GEMMA)}),
    )


def _seeing_shape(config: Mapping[str, Any], source: str) -> Shape:
    """Read the shape of a vision model: the decoder's sizes, and the size of its tower."""
    settings = transformers.AutoConfig.for_model(**config)  # with the sizes that config.json leaves to transformers
    text = settings.get_text_config().to_dict()
    kind = str(text["model_type"])
    if (family := _DECODERS.get(kind.removesuffix("_text"))) is None:
        known = ", ".join(sorted(_DECODERS))
        raise UserError(f"{source} has a decoder of type {kind}, whose memory is not modelled; known are {known}")
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    named = {**text, "vision_config": None, "architectures": [f"{family}ForCausalLM"], "tie_word_embeddings": tied}
    return replace(shape_of(named, source), tower=_tower_of(settings))


def _tower_of(settings: Any) -> Tower:
    """Count the parameters outside the decoder, in transformers' model without memory."""
    from rlhf.models.files.loading import class_of  # takes seconds, like transformers' model

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
    if tokens := both.get("mm_tokens_per_image"):  # Gemma's, of each image
        merged = vision["image_size"] / vision["patch_size"] / tokens**0.5
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
    if model in SEEING_MODELS:
        decoder, tower = SEEING_MODELS[model]
        return replace(shape_of(known_config(*decoder), f"the built-in table ({model})"), tower=Tower(*tower))
    if model in MIXTURE_MODELS or model in DENSE_MODELS:
        config = known_config(*DENSE_MODELS[model]) if model in DENSE_MODELS else dict(MIXTURE_MODELS[model])
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


TINY = shape_of(known_config("Llama", 96, 256, 3, 4, 2, 32, 320, False), "rlhf/models/files/tiny.py")
