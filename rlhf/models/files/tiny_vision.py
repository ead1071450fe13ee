"""Tiny vision models for tests and recipes, generated locally: random weights, a byte-level tokenizer, a processor.

Each folder is an ordinary Hugging Face folder of one kind of vision model. An image of at most 64 by 64 pixels becomes
between 4 and some 30 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf.deferred import torch, transformers
from rlhf.models.files.tiny import MAX_LENGTH, VOCAB_SIZE, byte_tokenizer, made_once

# A turn is: role token, text and images, <|eos|>. A message's content is a string or a list of parts.
_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set role = 'user' if message['role'] == 'tool' else message['role'] -%}"
    "{%- if role not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('roles are system, user, assistant and tool, not ' + role) -}}"
    "{%- endif -%}"
    "{{- '<|' + role + '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{{- 'MARK' if part['type'] == 'image' else part['text'] -}}"
    "{%- endfor -%}{%- endif -%}"
    "{{- eos_token -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# The last one is the unknown token of Qwen3.5's own class of tokenizers.
_QWEN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>", "<|endoftext|>")
_IDEFICS = (
    *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)),
)
_NEWLINES = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")  # tokens of Gemma's tokenizers, which vLLM's processor looks up
_PIXTRAL = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
_SIDE = 64  # pixels of the largest image; larger ones are scaled down
_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,  # heads of 32, since vLLM's CPU attention supports no smaller head
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "tie_word_embeddings": True,
}
_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
# Linear attention on a CPU takes heads of 128 in vLLM.
_LINEAR = {
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
}


def build_tiny_vision(folder: Path, kind: str, *, seed: int) -> Path:
    """Make the folder of a model with tokenizer and processor, or reuse a folder of this kind and seed. Return it.

    The weights are float32. Raise KeyError for a kind outside KINDS, and UserError if the folder holds anything else.
    """
    recipe = json.dumps({"kind": kind, "seed": seed})
    return made_once(folder, recipe, lambda partial: _write(partial, *KINDS[kind](), seed=seed))


def _write(folder: Path, config: Any, processor: Any, *, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1 and not parameter.any():  # Gemma 3's projector, which would hide every image
                    parameter.normal_(0.0, 0.02)
    ends = {"eos_token_id": config.text_config.eos_token_id, "pad_token_id": config.text_config.pad_token_id}
    model.generation_config = transformers.GenerationConfig(**ends)
    transformers.utils.logging.disable_progress_bar()  # for a single file of a few megabytes
    model.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    processor.save_pretrained(folder)


def _tokenizer(*specials: str, mark: str, **named: str) -> Any:
    """Return the byte-level tokenizer with further special tokens. mark: the text of an image in a chat."""
    return byte_tokenizer(specials, chat_template=_TEMPLATE.replace("MARK", mark), named=named)


def _config(kind: str, tokenizer: Any, *, text: Mapping[str, Any], vision: Mapping[str, Any], **marks: Any) -> Any:
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return transformers.AutoConfig.for_model(
        kind, text_config={**_TEXT, **ends, **text}, vision_config=dict(vision), tie_word_embeddings=True, **marks
    )


def _qwen(
    kind: str, processor: str, video: str, *, text: Mapping[str, Any], vision: Mapping[str, Any], **rope: Any
) -> tuple[Any, Any]:
    tokenizer = _tokenizer(*_QWEN, mark="".join(_QWEN[:3]))
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(_QWEN[:4])), strict=True))
    config = _config(
        kind,
        tokenizer,
        text={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope}, **text},
        vision={"depth": 2, "num_heads": 2, "patch_size": 8, **vision},
        **ids,
    )
    patches = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    images = transformers.Qwen2VLImageProcessor(**patches, size={"shortest_edge": 32 * 32, "longest_edge": _SIDE**2})
    videos = getattr(transformers, video)(**patches)
    return config, getattr(transformers, processor)(images, tokenizer, videos, chat_template=tokenizer.chat_template)


def _qwen2_vl() -> tuple[Any, Any]:
    vision = {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}
    section = {"mrope_section": [4, 6, 6]}
    return _qwen("qwen2_vl", "Qwen2VLProcessor", "Qwen2VLVideoProcessor", text={}, vision=vision, **section)


def _qwen2_5_vl() -> tuple[Any, Any]:
    vision: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128}
    vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
    section = {"mrope_section": [4, 6, 6]}
    return _qwen("qwen2_5_vl", "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", text={}, vision=vision, **section)


_LATER_QWEN = {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128, "num_position_embeddings": 64}


def _qwen3_vl() -> tuple[Any, Any]:
    vision = {**_LATER_QWEN, "deepstack_visual_indexes": [0]}
    rope = {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {"head_dim": 32}
    return _qwen("qwen3_vl", "Qwen3VLProcessor", "Qwen3VLVideoProcessor", text=text, vision=vision, **rope)


def _qwen3_5() -> tuple[Any, Any]:
    rope = {"mrope_section": [3, 3, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
    return _qwen("qwen3_5", "Qwen3VLProcessor", "Qwen3VLVideoProcessor", text=_LINEAR, vision=_LATER_QWEN, **rope)


def _idefics3() -> tuple[Any, Any]:
    tokenizer = _tokenizer(*_IDEFICS, mark="<image>")
    config = _config(
        "idefics3",
        tokenizer,
        text={"model_type": "llama", "head_dim": 32},
        vision=_TOWER,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": _SIDE}, max_image_size={"longest_edge": 32})
    processor = transformers.Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
    )
    return config, processor


def _llava_onevision() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>", "<video>", mark="<image>\n")
    grids = [[32, 32], [32, 64], [64, 32], [64, 64]]
    config = _config(
        "llava_onevision",
        tokenizer,
        text={"model_type": "qwen2"},
        vision={**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grids,
    )
    size = {"height": 32, "width": 32}
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grids),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def _internvl() -> tuple[Any, Any]:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(*named.values(), mark="<IMG_CONTEXT>\n", **named)
    config = _config(
        "internvl",
        tokenizer,
        text={"model_type": "qwen2"},
        vision={**_TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    size = {"height": 32, "width": 32}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def _pixtral(kind: str, merge: int, **settings: Any) -> tuple[Any, Any]:
    tokenizer = _tokenizer(*_PIXTRAL, mark="[IMG]")
    config = _config(
        kind,
        tokenizer,
        text={"model_type": "mistral", "head_dim": 32},
        vision={**_TOWER, "model_type": "pixtral", "image_size": _SIDE, "head_dim": 32},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        **settings,
    )
    patch = {"height": 8 * merge, "width": 8 * merge}
    processor = transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(size={"longest_edge": _SIDE}, patch_size=patch),
        tokenizer,
        patch_size=8,
        spatial_merge_size=merge,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def _gemma3() -> tuple[Any, Any]:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = _tokenizer(*named.values(), *_NEWLINES, mark="<start_of_image>", **named)
    config = _config(
        "gemma3",
        tokenizer,
        text={"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
        vision={**_TOWER, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    images = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    processor = transformers.Gemma3Processor(
        images, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
    )
    return config, processor


KINDS: Mapping[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_5": _qwen3_5,
    "idefics3": _idefics3,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "mistral3": lambda: _pixtral("mistral3", 2, spatial_merge_size=2),
    "pixtral": lambda: _pixtral("llava", 1, vision_feature_select_strategy="full"),
    "gemma3": _gemma3,
}
