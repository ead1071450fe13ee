"""Load models and tokenizers from a hub name or a local folder: safetensors only, no remote code unless allowed.

Nothing here moves a model to a device or wraps a model for training. Inside `rlhf.engine.sharded_loading` transformers
shards the weights during loading.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub.errors import StrictDataclassError

from rlhf.data.templates import ChatTemplate
from rlhf.deferred import torch, transformers
from rlhf.errors import UserError
from rlhf.models.files.folder_check import refuse_strange_folder
from rlhf.models.files.small_models import SMALL_MODELS, fetched_from, fetched_to
from rlhf.models.quantized import Quantize, is_quantized, keep_storage, quantization_options
from rlhf.vision.kinds import reads_images

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
ADAPTER_CONFIG = "adapter_config.json"  # peft's file

# Entries of a config without effect on any weight's shape or meaning. They may differ between a run and its checkpoint.
_NOT_ARCHITECTURE = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "dtype",
        "id2label",
        "label2id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def load_tokenizer(
    path: str, *, trust_remote_code: bool = False, template: ChatTemplate | None = None, kind: type[Any] | None = None
) -> Any:
    """Return the tokenizer of a hub name or folder, with the changes to the chat template.

    The end of sequence becomes the padding token of a tokenizer without a padding token. kind: the tokenizer's class.
    None: AutoTokenizer finds the class, with an import of a second.
    """
    load = (transformers.AutoTokenizer if kind is None else kind).from_pretrained
    tokenizer = _load(path, load, trust_remote_code=trust_remote_code)
    if template is not None:
        template.apply(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers config without reading weights. An attention function named in the config is ignored."""
    config: Any = _load(path, transformers.AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
    config._attn_implementation = None  # the config may name a kernel to download and run
    return config


def split_revision(source: str) -> tuple[str, str | None]:
    """Split NAME or NAME@REVISION, a model on the hub, into name and revision. A folder has no revision."""
    name, at, revision = source.partition("@")
    if not at or _is_folder_name(name) or Path(source).exists():
        return source, None
    return name, revision


def with_revision(name: str, revision: str | None) -> str:
    """Return NAME@REVISION for a model on the hub. A folder has no revision."""
    return name if not revision or _is_folder_name(name) or Path(name).exists() else f"{name}@{revision}"


def refuse_missing_weights(path: str, *, scalar: bool = False, trust_remote_code: bool = False) -> None:
    """Raise UserError if a model folder lacks weights, or has weights of wrong shapes. Reads only headers.

    scalar: the model gets a head of one value, initialised randomly without a head in the folder.
    """
    if not Path(path).is_dir() or is_adapter(Path(path)):
        return
    config = load_model_config(path, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        return  # stored names differ; loading compares the weights
    try:
        with _quiet():
            _with_all_weights(path, scalar=scalar, trust_remote_code=trust_remote_code, device_map="meta")
    except RuntimeError as error:  # impossible sizes, or missing experts
        raise UserError(_damaged(path, error)) from error


def load_causal_lm(
    path: str,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    quantize: Quantize | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Return a causal language model in evaluation mode with dropout off, and weights in dtype, on the host.

    quantize: the linear layers except the head are frozen in 4 bits, on `device`.
    """
    options = quantization_options(quantize, dtype=dtype, device=device)
    model = _with_all_weights(path, scalar=False, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    return _prepared(model, gradient_checkpointing=gradient_checkpointing)


def load_critic(
    path: str,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    quantize: Quantize | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Return a model with one scalar per token. On a language model the head starts at zero, so all values start at 0.

    The head of a checkpoint with a scalar head (a saved critic, a reward model) stays. quantize: as in load_causal_lm.
    """
    has_head = has_score_head(load_model_config(path, trust_remote_code=trust_remote_code))
    options = quantization_options(quantize, dtype=dtype, device=device)
    model = load_scalar_model(path, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    if not has_head:
        with whole([model.score.weight]):
            torch.nn.init.zeros_(model.score.weight)
    return _prepared(model, gradient_checkpointing=gradient_checkpointing)


def no_reward_head(path: str, what: str) -> UserError:
    """Return the error for a model without a reward head. `what` describes the model."""
    return UserError(
        f"The reward model {path} is a {what}: it has no reward head. A reward model is a sequence-classification "
        "checkpoint with one label, or a LoRA adapter of such a model. Train a reward model first (algorithm "
        "reward_model), or name another model."
    )


def refuse_no_language_model(path: str, *, trust_remote_code: bool = False) -> None:
    """Raise UserError for a model without a language-model head: a new head is random. Reads only the config."""
    config = load_model_config(path, trust_remote_code=trust_remote_code)
    if not reads_images(config) and not _is_causal_lm(config):
        classes = ", ".join(config.architectures or []) or f"model of type {config.model_type}"
        raise UserError(
            f"The model {path} is a {classes}, not a causal language model: it has no head for the next token. Name "
            "a language model."
        )


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter, not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def whole(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Gather sharded parameters inside. Changes made on rank 0 are kept. Collective."""
    if not any(hasattr(p, "ds_id") for p in parameters):  # set by DeepSpeed on sharded parameters
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    return gathered


def architecture_fingerprint(config: Any) -> str:
    """Return a fingerprint, equal for models with interchangeable weights."""
    kept = {key: value for key, value in config.to_dict().items() if key not in _NOT_ARCHITECTURE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load_scalar_model(path: str, *, dtype: torch.dtype, trust_remote_code: bool = False, **options: Any) -> Any:
    """Return a model with a linear head of one value, in evaluation mode. A missing head becomes random."""
    model = _with_all_weights(path, scalar=True, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    if not isinstance(model.score, torch.nn.Linear):
        raise UserError(
            f"{path} is a {type(model).__name__}, whose head is not a single linear layer. Such models are not "
            "supported. Use another model."
        )
    return model


def _with_all_weights(path: str, *, scalar: bool, trust_remote_code: bool, **options: Any) -> Any:
    """Load a model. Raise UserError if a weight is missing or has another shape, except for a new scalar head."""
    config = load_model_config(path, trust_remote_code=trust_remote_code)
    auto = class_of(config, scalar=scalar)
    made_new = {"score.weight"} if scalar and not has_score_head(config) else set()
    if scalar:
        config.num_labels = 1
    model, report = _load(
        path,
        auto.from_pretrained,
        config=config,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(set(report["missing_keys"]) - made_new):
        raise UserError(
            f"The model {path} lacks {len(missing)} of its weights, which would be random: {_some(missing)}. Its files "
            "do not belong together, or some files are missing. Download or copy the model again."
        )
    if other := sorted(report["mismatched_keys"]):
        shapes = [f"{name} is {list(stored)}, expected {list(wanted)}" for name, stored, wanted in other]
        raise UserError(
            f"The weights of the model {path} do not fit its config.json: {_some(shapes)}. Download or copy the model "
            "again."
        )
    model.config.name_or_path = path  # transformers leaves out the revision
    if reads_images(config):
        from rlhf.models.packed.images import ImageReader, set_image_reader
        from rlhf.vision.processor import ImageProcessing

        processing = ImageProcessing.of_model(path)
        assert processing is not None
        set_image_reader(model, ImageReader(processing))
    return model


def class_of(config: Any, *, scalar: bool) -> Any:
    """Return the class, or automatic class, of a model of this config. scalar: with a linear head of one value.

    Raise UserError for a vision model of an unknown kind.
    """
    sees = reads_images(config)
    if not scalar:
        return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    if not sees or type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return transformers.AutoModelForSequenceClassification
    return _vision_scorer(config.model_type)


@cache
def _vision_scorer(model_type: str) -> Any:
    """Return the class of a vision model's layers with a scalar head, as transformers has one for language models.

    The files of the model with a vocabulary head have the same names of weights, so transformers converts both alike.
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.modeling_layers import GenericForSequenceClassification

    whole_model: Any = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[transformers.CONFIG_MAPPING[model_type]]
    parent = next(base for base in whole_model.__mro__ if base.__name__.endswith("PreTrainedModel"))
    name = whole_model.__name__.replace("ForConditionalGeneration", "ForSequenceClassification")
    if (conversions := get_checkpoint_conversion_mapping(whole_model.__name__)) is not None:
        register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
    members = {"base_model_prefix": "model", "__module__": whole_model.__module__}
    return type(name, (GenericForSequenceClassification, parent), members)


def _some(names: Sequence[str]) -> str:
    """Join the first few names for a message."""
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' loading reports and progress bars inside."""
    verbosity = transformers.logging.get_verbosity()
    shows_progress = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if shows_progress:
            transformers.logging.enable_progress_bar()


def has_score_head(config: Any) -> bool:
    """Return whether the config describes a sequence classifier with one label."""
    return config.num_labels == 1 and any(
        name.endswith("ForSequenceClassification") for name in config.architectures or []
    )


def _is_causal_lm(config: Any) -> bool:
    """Return whether a config is a causal language model's, by the class in the config, otherwise by the type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS  # takes a second

    if not config.architectures:
        return config.model_type in CAUSAL_LMS
    brought = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM", "").rpartition(".")[2]
    known = {*CAUSAL_LMS.values(), brought}
    return any(name.endswith("ForCausalLM") or name in known for name in config.architectures)


def _prepared(model: Any, *, gradient_checkpointing: bool) -> Any:
    """Set evaluation mode, without dropout: with dropout, each pass of a policy is another distribution."""
    from rlhf.models.linear import widen_linear_layers  # torch, which the checks of a model's folder need not import

    model.eval()
    _disable_randomness(model)
    widen_linear_layers(model)
    if is_quantized(model):
        del model.config.quantization_config  # the entry describes the weights in memory, not the exported model
        keep_storage(model)
    model.config.use_cache = False
    model.config.architectures = [type(model).__name__]
    if gradient_checkpointing:
        enable_checkpointing(model)
    return model


def _disable_randomness(model: nn.Module) -> None:
    """Set the rates of dropout, skipped layers and router noise to 0, also in layers with functional dropout."""
    module: Any
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def enable_checkpointing(model: Any) -> None:
    """Recompute layers in the backward pass. transformers recomputes only layers in training mode."""
    if not model.supports_gradient_checkpointing:
        raise UserError(f"gradient_checkpointing: {type(model).__name__} does not support it. Set it to false.")
    from rlhf.models.packed.packed_row import checkpoint_contexts  # with PyTorch's compiler, which takes half a second

    options = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # only for the layer itself; its submodules stay in evaluation mode


def _load(path: str, load: Callable[..., T], **options: Any) -> T:
    """Call a from_pretrained function and turn each failure into advice."""
    name, revision = split_revision(path)
    if revision is not None:
        options["revision"] = revision
    if _is_folder_name(path) and not Path(path).is_dir():
        raise UserError(f"The model folder {path} does not exist. Name a folder with config.json, or a hub model.")
    if Path(path).is_dir():
        refuse_strange_folder(Path(path))
    try:
        return load(name, **options)
    except (ImportError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ImportError):
            message = f"The model {path} needs a package that is not here: {reason}"
        elif not isinstance(error, OSError) or Path(path).is_dir():
            message = _no_model(path) or f"The model {path} cannot be loaded: {reason}"
        else:
            fix = "Check the name, the network and HF_HUB_OFFLINE, or download it once and name its folder."
            if (known := fetched_to(path)) is not None:
                fix = f"Make this folder with `rlhf models fetch {known}`."
            elif (known := fetched_from(name)) is not None:
                fix = f"Make {SMALL_MODELS[known].folder} with `rlhf models fetch {known}`, and name this folder."
            message = (
                f"The model {path} is neither a folder here nor could it be obtained from the hub ({reason}) {fix}"
            )
        raise UserError(message) from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise UserError(_damaged(path, error)) from error
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, StrictDataclassError):  # tokenizers raises the first
            raise
        raise UserError(_damaged(path, error)) from error


def _damaged(path: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"The model {path} cannot be loaded ({reason}): a file of it is damaged. Get it again."


def _no_model(path: str) -> str | None:
    """Describe a folder without a model. None: the folder looks like a model."""
    folder = Path(path)
    if (folder / "config.json").exists():
        return None
    if is_adapter(folder):
        return (
            f"{path} is an adapter, and this needs a whole model. Name the model it was trained on, and of a policy or "
            "critic the folder as `adapter` beside `model`; or merge it into that model (`rlhf merge`, method fold)."
        )
    if (folder / "config.resolved.yaml").exists():
        finals = ", ".join(map(str, sorted([*folder.glob("final"), *folder.glob("*/final")])))
        return f"{path} is the folder of a run, not a model: " + (
            f"name what it has trained, {finals}." if finals else "it has no final/, so it has not ended."
        )
    return None


def _is_folder_name(path: str) -> bool:
    """Return whether a path can only be a folder, since hub names are NAME or OWNER/NAME."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1
