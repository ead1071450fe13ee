"""Make tokenizers like SentencePiece's: legacy or not, prepending, with byte fallback, and swallowing white space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence, Strip
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

SPACE = "▁"
_SPECIAL = ["<unk>", "<s>", "</s>"]
_WORDS = ("yes", "no", "hi", "answer", "question", "more", "the", "[INST]", "[/INST]", "user", "assistant")
LLAMA2 = (
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{- bos_token + '[INST] ' + m.content + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + m.content + ' ' + eos_token -}}{%- endif -%}{%- endfor -%}"
)
ZEPHYR = (
    "{%- for m in messages -%}{{- '<|' + m.role + '|>\n' + m.content + eos_token + '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)
PHI = (
    "{%- for m in messages -%}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return bytes, letters and whole words, with and without a space before them, and the merges."""
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), SPACE]
    tokens += [chr(code) for code in range(33, 127)]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
        tokens.append(SPACE + word)
        merges.append((SPACE, word))
    tokens += [SPACE * 2, SPACE * 4]
    merges += [(SPACE, SPACE), (SPACE * 2, SPACE * 2)]
    return {token: index for index, token in enumerate(tokens)}, merges


def llama(*, legacy: bool) -> Any:
    """As transformers loads Llama 2's: legacy puts a space behind each special token too."""
    vocab, merges = _vocabulary()
    made = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, add_bos_token=True)
    return _named(made, LLAMA2)


def prepend() -> Any:
    """Return a tokenizer like Zephyr's and TinyLlama's: a normaliser writes the space before each stretch."""
    vocab, merges = _vocabulary()
    backend = Backend(BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = Sequence([Replace(SPACE, " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    return _named(_with_beginning(backend), ZEPHYR)


def swallowing() -> Any:
    """Return a tokenizer like Phi 3's: special tokens swallow the white space after them."""
    made = prepend()
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    made.add_special_tokens(
        {"additional_special_tokens": [AddedToken(n, rstrip=True, normalized=False, special=True) for n in names]}
    )
    made.chat_template = PHI
    return made


def unigram() -> Any:
    """A Unigram vocabulary, where a word is cut by likelihood."""
    vocab, _ = _vocabulary()
    scores = [(token, -1.0 if token.startswith(SPACE) else -2.0 * len(token)) for token in vocab]
    backend = Backend(Unigram(scores, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    backend.decoder = Sequence([Replace(SPACE, " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    return _named(_with_beginning(backend), ZEPHYR)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "legacy": lambda: llama(legacy=True),
    "first": lambda: llama(legacy=False),
    "prepend": prepend,
    "swallowing": swallowing,
    "unigram": unigram,
}


def _with_beginning(backend: Backend) -> Any:
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _SPECIAL])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _named(tokenizer: Any, template: str) -> Any:
    tokenizer.chat_template = template
    tokenizer.name_or_path = "sentencepiece"
    return tokenizer
