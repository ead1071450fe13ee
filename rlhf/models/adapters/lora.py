"""Low-rank adapters through peft, injected into the model. The model's class and calls stay the same.

LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353) and PiSSA (arXiv:2404.02948). The frozen
weights never change, not even where peft would change weights: PiSSA is W, plus the trained adapter, minus a frozen
copy of the initial adapter. The initial model is therefore exact, and saved adapters fit the original base.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.adapters.config import load_adapter_config
from rlhf.models.files.loading import class_of, split_revision, whole
from rlhf.models.files.weights import ADAPTER, INITIAL, is_pissa
from rlhf.models.routers.recording import routers_of
from rlhf.vision.kinds import is_vision_weight

Init = Literal["default", "pissa"]

_WITHOUT_OUT_PROJ = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})  # peft refuses out_proj


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: str | Sequence[str] = "all-linear",
    target_parameters: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    rslora: bool = False,
    dora: bool = False,
    init: Init = "default",
    modules_to_save: Sequence[str] = (),
    vision: bool = False,
) -> Any:
    """Return the model with an adapter. Only the adapter, modules_to_save and a scalar head are trainable.

    The adapter starts as the identity. `target_modules`: names of linear layers, or "all-linear" for all but the head.
    `target_parameters`: names of stacked experts. `layers`: numbers of the blocks to adapt; None: all.
    `modules_to_save`: names of modules to train whole. `vision`: adapt a vision tower and the projector too. A head
    tied to a trained embedding stays tied. Raise UserError for an unknown name or number, or if peft cannot keep the
    head tied.
    """
    base, revision = split_revision(model.config._name_or_path)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_targets(model, target_modules, vision=vision),
        target_parameters=list(target_parameters) or None,
        layers_to_transform=None if layers is None else list(layers),
        use_rslora=rslora,
        use_dora=dora,
        modules_to_save=_with_tied_head(model, modules_to_save) or None,
        ensure_weight_tying=bool(modules_to_save) and _is_tied(model),
        task_type=peft.TaskType.SEQ_CLS if hasattr(model, "score") else peft.TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        revision=revision,
    )
    _refuse_unknown_names(model, config)
    model = inject(model, config)
    if init == "pissa":
        _start_at_principal_part(model, config)
    return model


def inject(model: Any, config: peft.LoraConfig) -> Any:
    """Return the model with a new adapter of the config's shape. model.peft_config then has the config to save.

    Raise UserError if the head is adapted: log-probabilities read the head's weight directly, without an adapter.
    """
    saved = copy.deepcopy(config)
    model = peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    if isinstance(_head(model), LoraLayer):
        raise UserError(
            "lora.target_modules: the head cannot have LoRA matrices. To train the head, name it in "
            "lora.modules_to_save."
        )
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
        saved.modules_to_save = [*(config.modules_to_save or ()), "score"]
    model.peft_config = {ADAPTER: saved}
    return model


def refuse_unfit(architecture: Any, *, scalar: bool, trust_remote_code: bool = False, **adapter: Any) -> None:
    """Raise UserError if a model of this config, scalar or not, cannot get the adapter (arguments of add_lora)."""
    init = adapter.pop("init", "default")
    with torch.device("meta"):
        model = add_lora(model_of(architecture, scalar=scalar, trust_remote_code=trust_remote_code), **adapter)
    if init == "pissa":
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                _refuse_few_components(layer, rank=adapter["rank"])


def model_of(architecture: Any, *, scalar: bool = False, trust_remote_code: bool) -> Any:
    """Return a model of the config, with random weights. scalar: with a head of one value."""
    architecture = copy.deepcopy(architecture)
    if scalar:
        architecture.num_labels = 1
    kind = class_of(architecture, scalar=scalar)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind(architecture)
    return kind.from_config(architecture, trust_remote_code=trust_remote_code)


def _refuse_few_components(layer: Any, *, rank: int) -> None:
    if rank > (most := min(layer.in_features, layer.out_features)):
        raise UserError(
            f"lora.rank: is {rank}, but a {layer.out_features} x {layer.in_features} weight has only {most} principal "
            "components for init pissa; lower it"
        )


def keep_initial(model: Any, config: peft.LoraConfig) -> None:
    """Freeze a copy of the adapter and of the modules trained whole, as the initial model."""
    frozen = copy.deepcopy(config)
    frozen.lora_dropout = 0.0
    frozen.ensure_weight_tying = False  # the config already lists the tied modules
    saved = model.peft_config
    del model.peft_config
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    peft.inject_adapter_in_model(frozen, model, adapter_name=INITIAL)
    model.peft_config = saved
    for part in _adapted_parts(model):
        part._active_adapter = [ADAPTER]  # injection activates the newest adapter
    now = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in now.items():
            if f".{INITIAL}." in name:
                parameter.copy_(now[name.replace(f".{INITIAL}.", f".{ADAPTER}.")])
            parameter.requires_grad_(name in trained)


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Use the initial model inside: the base without adapter, or with the frozen copy of a continued adapter.

    Unlike peft's switch, this context leaves requires_grad alone.
    """
    parts = _adapted_parts(model)
    before = [(part._disable_adapters, part._active_adapter) for part in parts]
    for part in parts:
        if _has_initial(part):
            part._active_adapter = [INITIAL]
        else:
            part._disable_adapters = True
    try:
        yield
    finally:
        for part, (disabled, active) in zip(parts, before, strict=True):
            part._disable_adapters, part._active_adapter = disabled, active


def with_adapter(model: Any, folder: str) -> Any:
    """Return the model with the adapter of a folder, for inference. Raise UserError if the adapter does not fit."""
    return _adapted(model, folder).get_base_model()


def with_merged_adapter(model: Any, folder: str) -> Any:
    """Return the model with a folder's adapter merged, in the weights' dtype. UserError if the adapter does not fit."""
    return _adapted(model, folder).merge_and_unload(safe_merge=True)


def principal_pair(
    weight: Float[Tensor, "o i"], *, rank: int, scaling: float
) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
    """Return (A, B), with scaling * B A as the best approximation of W of this rank, in float32.

    A = S^1/2 V^T and B = U S^1/2 (arXiv:2404.02948, eq. 2 and 3), from the SVD of W / scaling.
    """
    left, singular, right = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (singular[:rank] / scaling).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _start_at_principal_part(model: Any, config: peft.LoraConfig) -> None:
    """Start PiSSA: the adapter is the principal part of each weight, and a frozen copy is subtracted."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        weight = layer.get_base_layer().weight
        with whole([weight]), torch.no_grad():
            _refuse_few_components(layer, rank=config.r)
            pair = principal_pair(weight, rank=config.r, scaling=layer.scaling[ADAPTER])
            for matrix, start in zip((layer.lora_A, layer.lora_B), pair, strict=True):
                matrix[ADAPTER].weight.copy_(start)
    kept = copy.deepcopy(config)
    kept.modules_to_save = None  # peft keeps their originals
    keep_initial(model, kept)
    for layer in layers:
        layer.scaling[INITIAL] = -layer.scaling[INITIAL]
        layer._active_adapter = [ADAPTER, INITIAL]
    saved = model.peft_config[ADAPTER]
    saved.r = 2 * config.r
    saved.lora_alpha = config.lora_alpha * (math.sqrt(2.0) if config.use_rslora else 2.0)  # keeps the scaling unchanged


def _adapted(model: Any, folder: str) -> Any:
    try:
        return peft.PeftModel.from_pretrained(model, folder, config=load_adapter_config(Path(folder)))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the adapter in {folder} cannot be put on its base model: {reason}") from error


def _adapted_parts(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer | ModulesToSaveWrapper)]


def _has_initial(part: Any) -> bool:
    """Return whether the initial model includes the part's frozen copy. A model with PiSSA does not."""
    if isinstance(part, ModulesToSaveWrapper):
        return INITIAL in part.modules_to_save
    return INITIAL in part.lora_A and not is_pissa(part)


def _head(model: Any) -> Any:
    return model.score if hasattr(model, "score") else model.get_output_embeddings()


def _targets(model: Any, names: str | Sequence[str], *, vision: bool) -> list[str]:
    """Return the names of the layers to adapt. Without `vision`, a name also found in a tower becomes a path."""
    wanted = _linear_names(model, vision=vision) if isinstance(names, str) else list(names)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    in_tower = {name.rpartition(".")[2] for name in linear if is_vision_weight(name)}
    if vision or in_tower.isdisjoint(wanted):
        return wanted
    paths = [name for name in linear if name.rpartition(".")[2] in in_tower and not is_vision_weight(name)]
    if alone := sorted(in_tower.intersection(wanted).difference(path.rpartition(".")[2] for path in paths)):
        raise UserError(
            f"lora.target_modules: {', '.join(alone)} exist only in the vision tower, which is frozen. Set vision_lr "
            "beside lora to adapt the tower too."
        )
    return [name for name in wanted if name not in in_tower] + [p for p in paths if p.rpartition(".")[2] in wanted]


def _linear_names(model: Any, *, vision: bool = False) -> list[str]:
    """Return the last names of all linear layers, except the head, routers, and layers that no name can select."""
    others = {_head(model), *(part for router in routers_of(model) for part in router.modules())}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module not in others}
    linear = linear if vision else {name for name in linear if not is_vision_weight(name)}
    names = {name.rpartition(".")[2] for name in linear}
    unfit = {"out_proj"} if model.config.model_type in _WITHOUT_OUT_PROJ else set()
    unfit.add("dt_proj")  # Mamba layers read the weight of dt_proj directly, so an adapter would do nothing
    return sorted(name for name in names - unfit if not name.isdigit())  # numbered blocks are no names of layers


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _with_tied_head(model: Any, names: Sequence[str]) -> list[str]:
    """Return the names of the modules to train whole, in a form for which peft keeps a head and an embedding tied.

    peft needs one of the two names in EMBEDDING_LAYER_NAMES. Raise UserError if neither name is there.
    """
    if not names or not _is_tied(model):
        return list(names)
    pair = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = {path.rpartition(".")[2] for path, module in model.named_modules() if module in pair}
    known = tied.intersection(EMBEDDING_LAYER_NAMES)
    if tied.isdisjoint(names) or not known.isdisjoint(names):
        return list(names)
    if not known:
        raise UserError(
            f"lora.modules_to_save: the model ties {' and '.join(sorted(tied))}, and peft keeps trained modules tied "
            f"only if one is named {' or '.join(EMBEDDING_LAYER_NAMES)}. Remove them from the list."
        )
    return [*names, *sorted(known)]


def _refuse_unknown_names(model: Any, config: peft.LoraConfig) -> None:
    by_name: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        by_name.setdefault(path.rpartition(".")[2], []).append(module)
    for key, wanted, kind, fits in (
        ("target_modules", config.target_modules, "linear layers", lambda m: isinstance(m, nn.Linear)),
        ("modules_to_save", config.modules_to_save or (), "modules", lambda m: not isinstance(m, nn.ModuleList)),
    ):
        if missing := sorted(name for name in wanted if not any(map(fits, by_name.get(name.rpartition(".")[2], ())))):
            raise UserError(f"lora.{key}: the model has no {kind} named {', '.join(missing)}.")
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in model.named_parameters()}
    stacks = {name.rpartition(".")[2] for name, shape in shapes.items() if len(shape) == 3}
    if missing := sorted(set(config.target_parameters or ()) - stacks):
        known = f"they are {', '.join(sorted(stacks))}" if stacks else "it has none"
        raise UserError(
            f"lora.target_parameters: the model has no stacked experts named {', '.join(missing)}; {known}."
        )
    if both := sorted(set(config.target_modules) & set(config.modules_to_save or ())):
        raise UserError(f"lora.modules_to_save: {', '.join(both)} cannot be adapted and trained whole; name it once.")
    depth = model.config.get_text_config().num_hidden_layers
    if unknown_layers := [str(n) for n in config.layers_to_transform or () if n >= depth]:
        raise UserError(f"lora.layers: the model has layers 0 to {depth - 1}, not {', '.join(unknown_layers)}.")
