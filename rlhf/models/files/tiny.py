"""The quickstart's model: a Llama of some 400 thousand parameters with a byte-level tokenizer, generated locally.

The result is an ordinary Hugging Face folder. The model must never depend on a network or on the global random state.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from rlhf.data.spans import byte_letters
from rlhf.deferred import torch, transformers
from rlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 320
MAX_LENGTH = 2048  # prompt and response, in tokens
PAD, EOS, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"

# A turn is: role token, text, <|eos|>. A tool's result is written as the user's.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set role = 'user' if message['role'] == 'tool' else message['role'] -%}"
    "{%- if role not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('roles are system, user, assistant and tool, not ' + role) -}}"
    "{%- endif -%}"
    "{{- '<|' + role + '|>' + message['content'] + eos_token -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

_SHAPE = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # vLLM's CPU attention supports no smaller head; 96 / 4 = 24 would not load
    "max_position_embeddings": MAX_LENGTH,
}
_DESCRIPTION = "tiny_llama_described.json"  # name of a file in a folder without weights
_RECIPE = "tiny_model.json"  # name of the file with the folder's arguments, so that it is never taken for another model


def build_tiny_llama(folder: Path, *, seed: int, tied: bool = False) -> Path:
    """Make the model folder, or reuse a folder made from the same seed. Return `folder`. The weights are float32.

    Raise UserError if `folder` exists and holds anything else.
    """
    recipe = json.dumps({"seed": seed, "tied": tied})
    return made_once(folder, recipe, lambda partial: _write(partial, seed=seed, tied=tied))


def made_once(folder: Path, recipe: str, write: Callable[[Path], None]) -> Path:
    """Make a tiny model's folder with `write`, or reuse a folder with the same recipe. Return `folder`.

    The folder appears complete or not at all, also when several processes make the folder at once. Raise UserError if
    `folder` exists and holds anything else.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            write(partial)
            (partial / _RECIPE).write_text(recipe)
            partial.chmod(0o755)
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process finished first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    existing_recipe = (folder / _RECIPE).read_text() if (folder / _RECIPE).is_file() else None
    if existing_recipe != recipe:
        raise UserError(
            f"{folder} exists and is not the tiny model {recipe}: it holds {existing_recipe or 'something else'}. "
            "Remove it or name another folder."
        )
    return folder


class DescribedConfig(SimpleNamespace):
    """The part of the tiny model's config read by the checks before a run."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def get_text_config(self) -> DescribedConfig:
        """Return itself, since the model is only a language model."""
        return self


def describe_tiny_llama(folder: Path) -> Path:
    """Write the tiny model without weights, for checks before a run without imports of seconds. Return `folder`."""
    byte_tokenizer().save_pretrained(folder)
    config = json.dumps({**_SHAPE, "architectures": ["LlamaForCausalLM"]})
    for name in ("config.json", _DESCRIPTION):
        (folder / name).write_text(config)
    return folder


def described_config(folder: Path) -> DescribedConfig | None:
    """Return the config of a described tiny model. None: the folder holds a different model."""
    path = folder / _DESCRIPTION
    return DescribedConfig(**json.loads(path.read_text())) if path.is_file() else None


def byte_tokenizer(
    specials: Sequence[str] = (), *, chat_template: str = CHAT_TEMPLATE, named: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with 256 bytes as ids 0-255, the special tokens, and reserved tokens, so every id decodes.

    specials: further special tokens, in place of reserved ones. named: attributes of the tokenizer for some of them.
    """
    specials = [PAD, EOS, SYSTEM, USER, ASSISTANT, *specials]
    reserved = [f"<|reserved_{i}|>" for i in range(VOCAB_SIZE - 256 - len(specials))]
    backend = Tokenizer(BPE(vocab={letter: byte for byte, letter in enumerate(byte_letters())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials + reserved])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=chat_template,
        extra_special_tokens=dict(named or {}),
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _write(folder: Path, *, seed: int, tied: bool) -> None:
    tokenizer = byte_tokenizer()
    config: Any = transformers.AutoConfig.for_model(
        **_SHAPE,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights that are replaced below
        model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # all other weights are norm scales and stay at 1
                parameter.normal_(0.0, 0.02, generator=generator)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = transformers.GenerationConfig(**ends)
    transformers.utils.logging.disable_progress_bar()  # for a single file of a few megabytes
    model.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
