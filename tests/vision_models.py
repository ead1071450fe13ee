"""Make tiny folders of vision models' processors, without weights and without a network."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import transformers
from PIL import Image, ImageDraw

from rlhf.models.files.tiny import byte_tokenizer

QWEN_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
IDEFICS_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)
KINDS = ("qwen2_5_vl", "qwen3_vl", "idefics3")
_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|' + message.role + '|>' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- 'MARK' -}}{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- eos_token -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def processor_folder(folder: Path, kind: str) -> Path:
    """Write config, tokenizer and processor of a tiny model of this kind. Return the folder."""
    tokenizer = byte_tokenizer()
    tokens = QWEN_TOKENS if kind.startswith("qwen") else IDEFICS_TOKENS
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    mark = "".join(QWEN_TOKENS[:3]) if kind.startswith("qwen") else "<image>"
    tokenizer.chat_template = _TEMPLATE.replace("MARK", mark)
    processor, marks = _processor(tokenizer, kind)
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"model_type": "llama"} if kind == "idefics3" else {}
    transformers.AutoConfig.for_model(kind, text_config=text, **marks).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _processor(tokenizer: Any, kind: str) -> tuple[Any, dict[str, int]]:
    token = tokenizer.convert_tokens_to_ids
    if kind == "idefics3":
        images = transformers.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
        processor = transformers.Idefics3Processor(
            images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
        )
        return processor, {"image_token_id": token("<image>")}
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
    patches = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    images = transformers.Qwen2VLImageProcessor(**patches, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64})
    of_kind = {
        "qwen2_5_vl": (transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor),
        "qwen3_vl": (transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor),
    }
    whole, video = of_kind[kind]
    processor = whole(images, tokenizer, video(**patches), chat_template=tokenizer.chat_template)
    return processor, {name: token(text) for name, text in zip(names, QWEN_TOKENS, strict=True)}


def drawn(colour: str = "red", size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Return a grey image with a square of the colour at the upper left."""
    image = Image.new("RGB", size, (90, 90, 90))
    ImageDraw.Draw(image).rectangle((6, 6, 24, 24), fill=colour)
    return image


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """Return the encoded bytes of an image."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
