"""Check the models of a run: existence, loading, and fit to each other and to the configuration."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.algorithms.sft import SFTConfig
from rlhf.config.derive import (
    adapter_options,
    has_value_head,
    loaded_models,
    model_sections,
    saved_rank,
    with_model_sections,
)
from rlhf.config.files.differences import differences
from rlhf.config.schema.model import CriticConfig, LoraConfig, ModelConfig, PolicyConfig
from rlhf.config.schema.root import Config
from rlhf.config.yaml_tree import Key
from rlhf.controller.loop import trained_models
from rlhf.data.row import Row
from rlhf.data.spans import words_of
from rlhf.data.templates import ChatTemplate
from rlhf.errors import UserError, prefix_errors
from rlhf.models.adapters.settings import base_of
from rlhf.models.files.folder_check import num_experts, refuse_broken_weights
from rlhf.models.files.hub import use_cache_if_silent
from rlhf.models.files.loading import (
    architecture_fingerprint,
    is_adapter,
    load_model_config,
    load_tokenizer,
    refuse_missing_weights,
    refuse_no_language_model,
)
from rlhf.models.files.tiny import described_config
from rlhf.models.on_disk import ModelOnDisk, find_model, may_ask_the_hub, tokenizer_of
from rlhf.models.packed.row_layout import refuse_uneven_heads, refuse_unpackable
from rlhf.models.quantized import refuse_unquantizable
from rlhf.models.reward_models import refuse_without_head
from rlhf.preflight.sources import local_model
from rlhf.role_table import ROLES, TRAINED_ROLES, Role
from rlhf.types import Prompt

logger = logging.getLogger(__name__)


def check_models(config: Config, made: StageResults, *, vocabulary_of: str) -> None:
    """Raise UserError if a model is missing, is of the wrong kind for its section, or has a different vocabulary.

    Results of earlier stages (`made`) are checked by configuration.
    """
    if config.policy.tokenizer is not None and config.policy.model not in made.finals:
        _refuse_larger_vocabulary(config.policy)
    if config.train.optimizer == "adamw_8bit":
        from rlhf.engine.optimizers import refuse_absent_bitsandbytes  # imports torch

        refuse_absent_bitsandbytes()
    for section, key, model in loaded_models(config):
        if model.model in made.finals:
            _refuse_other_kind(section, key, model.model, config, trained_by=made.scored.get(model.model))
            with prefix_errors(f"{section}.{key}"):
                if not _reads_as_policy(model, config):
                    source = made.tokenizers.get(model.model, made.finals[model.model])
                    _refuse_other_vocabulary(section, source, vocabulary_of, model.trust_remote_code)
        else:
            _refuse_unusable_model(section, key, model, config, made.finals, vocabulary_of=vocabulary_of)
            with prefix_errors(f"{section}.{key}"):
                policy = made.finals.get(config.policy.model, config.policy.model)
                _refuse_other_sight(model.model, policy, model.trust_remote_code)


def _refuse_unusable_model(
    section: Role, key: str, model: ModelConfig, config: Config, finals: Mapping[str, str], *, vocabulary_of: str
) -> None:
    remote, is_scalar = model.trust_remote_code, has_value_head(config, section)
    with prefix_errors(f"{section}.{key}"):
        if ROLES[section].kind == "scoring":
            _refuse_without_scores(model)
            _refuse_other_vocabulary(section, tokenizer_of(model.model), vocabulary_of, remote)
            return
        shape: Any = described_config(Path(model.model))
        if shape is None:
            shape = load_model_config(model.model, trust_remote_code=remote)
            refuse_broken_weights(Path(model.model))
            if is_scalar:
                _refuse_other_head(model.model, shape)
            else:
                refuse_no_language_model(model.model, trust_remote_code=remote)
            refuse_missing_weights(model.model, scalar=is_scalar, trust_remote_code=remote)
        if not _reads_as_policy(model, config):
            _refuse_other_vocabulary(section, model.model, vocabulary_of, remote)
    if isinstance(model, PolicyConfig | CriticConfig):
        _refuse_untrainable(section, model, config, finals, shape)


def _refuse_untrainable(
    section: Role, model: PolicyConfig | CriticConfig, config: Config, finals: Mapping[str, str], shape: Any
) -> None:
    """Raise UserError if a trained model does not fit the adapter, the routers' keys or the ranks of a shared row."""
    remote, lora, is_scalar = model.trust_remote_code, model.lora, has_value_head(config, section)
    if model.adapter is not None and model.adapter not in finals:
        from rlhf.models.adapters.folder import refuse_misfit_adapter  # imports peft, which takes seconds

        with prefix_errors(f"{section}.adapter"):
            refuse_misfit_adapter(Path(model.adapter), model.model, scalar=is_scalar, trust_remote_code=remote)
    if lora is not None and lora.quantize is not None:
        whole = load_model_config(model.model, trust_remote_code=remote)
        refuse_unquantizable(f"{section}.lora.quantize", whole, device=config.cluster.device)
    if model.vision_lr is not None and getattr(shape, "vision_config", None) is None:
        raise UserError(
            f"{section}.vision_lr: is {model.vision_lr:g}, but {model.model} has no vision tower. Remove the key."
        )
    sees, algorithm = getattr(shape, "vision_config", None) is not None, config.algorithm
    if sees and isinstance(algorithm, SFTConfig) and algorithm.neftune_alpha is not None:
        raise UserError(
            f"algorithm.neftune_alpha: is {algorithm.neftune_alpha:g}, but {model.model} sees images, and embeddings "
            "of images get no noise. Set neftune_alpha to null."
        )
    routed = {"router_balance_coef": model.router_balance_coef}
    if isinstance(model, PolicyConfig):
        routed["router_replay"] = model.router_replay
    for key, value in routed.items():
        if value and not num_experts(shape.to_dict()):
            shown = "true" if value is True else f"{value:g}"
            raise UserError(f"{section}.{key}: is {shown}, but {model.model} is no mixture of experts. Remove the key.")
    with prefix_errors(f"cluster.roles.{section}"):
        shared_by = getattr(config.cluster.roles, section).sequence_parallel
        refuse_uneven_heads(shape, shared_by)
        refuse_unpackable(shape.to_dict(), shared_by)
    if lora is not None and model.adapter is None:
        from rlhf.models.adapters.lora import refuse_unfit  # imports peft, which takes seconds

        whole = load_model_config(model.model, trust_remote_code=remote)
        options = adapter_options(lora, vision_lr=model.vision_lr)
        try:
            refuse_unfit(whole, scalar=is_scalar, trust_remote_code=remote, **options)
        except UserError as error:
            raise UserError(f"{section}.{error}") from error


def _refuse_without_scores(model: ModelConfig) -> None:
    refuse_without_head(model.model, trust_remote_code=model.trust_remote_code)
    refuse_broken_weights(Path(model.model))
    refuse_missing_weights(model.model, scalar=True, trust_remote_code=model.trust_remote_code)


def refuse_unusable_reward_model(model: ModelConfig, *, key: str) -> None:
    """Raise UserError if a reward model of an evaluation is missing, broken or of another kind."""
    if not Path(model.model).exists():
        use_cache_if_silent()
    with prefix_errors(key):
        _refuse_without_scores(model)


def _reads_as_policy(model: ModelConfig, config: Config) -> bool:
    """Return whether the policy's replacement tokenizer applies to a model because the model is the policy's."""
    return config.policy.tokenizer is not None and model.model == config.policy.model


def _refuse_larger_vocabulary(policy: PolicyConfig) -> None:
    """Raise UserError if a policy's replacement tokenizer has token ids beyond the model's embedding rows."""
    remote = policy.trust_remote_code
    with prefix_errors("policy.tokenizer"):
        most = max(load_tokenizer(policy.tokenizer_source, trust_remote_code=remote).get_vocab().values())
    rows = load_model_config(policy.model, trust_remote_code=remote).get_text_config().vocab_size
    if most >= rows:
        raise UserError(
            f"policy.tokenizer: {policy.tokenizer} has token ids up to {most}, but the embedding of {policy.model} has "
            f"{rows} rows. Name a tokenizer of this model."
        )


def _refuse_other_head(path: str, shape: Any) -> None:
    names = shape.architectures or []
    if any(name.endswith("ForSequenceClassification") for name in names) and shape.num_labels != 1:
        raise UserError(f"{path} has a head of {shape.num_labels} labels, expected one label, or a language model")


def _refuse_other_vocabulary(section: Role, path: str, policy: str, trust_remote_code: bool) -> None:
    """Raise UserError if a model maps the policy's token ids to different tokens.

    A model without a tokenizer is accepted, and so is a teacher with any (see rlhf.preflight.other_tokenizers).
    """
    if path == policy:
        return
    tokenizer = load_tokenizer(policy, trust_remote_code=trust_remote_code)
    try:
        other = load_tokenizer(path, trust_remote_code=trust_remote_code)
    except UserError:
        size = load_model_config(path, trust_remote_code=trust_remote_code).get_text_config().vocab_size
        fits = size >= len(words_of(tokenizer))
    else:
        fits = ROLES[section].translates or words_of(tokenizer).items() <= other.get_vocab().items()
    if not fits:
        raise UserError(
            f"{path} has another vocabulary than policy.model {policy}, but gets its token ids; name a model with "
            "the same tokenizer"
        )


def _refuse_other_sight(path: str, policy: str, trust_remote_code: bool) -> None:
    """Raise UserError if a policy sees images that a model of another role cannot see, or sees as other tokens."""
    if path == policy or described_config(Path(policy)) is not None:
        return
    if getattr(load_model_config(policy, trust_remote_code=trust_remote_code), "vision_config", None) is None:
        return
    from rlhf.vision.processor import ImageProcessing  # with the processors of transformers, which take seconds

    whole = base_of(Path(path))[0] if is_adapter(Path(path)) else path
    own, other = ImageProcessing.of_model(policy), ImageProcessing.of_model(whole)
    if own is None or other is None:
        raise UserError(f"{path} reads only text, but policy.model {policy} sees images; name a model that sees too")
    if any(own.expansion(*size) != other.expansion(*size) for size in ((64, 48), (640, 480), (1600, 400))):
        raise UserError(
            f"{path} turns an image into different tokens than policy.model {policy}, but gets its token ids; name a "
            "model with the same image processor"
        )


def _refuse_other_kind(section: Role, key: str, folder: str, config: Config, *, trained_by: str | None) -> None:
    """Raise UserError if an earlier stage's result is the wrong kind of model. trained_by None: a language model."""
    scores = ROLES[section].kind == "scoring"
    if not scores and has_value_head(config, section):
        return  # any language model: its head is kept or replaced
    if scores == (trained_by is None):
        will, wanted = (trained_by or "language_model").replace("_", " "), "reward" if scores else "language"
        raise UserError(f"{section}.{key}: {folder} will be a {will}, expected a {wanted} model")


def refuse_other_model(config: Config, state: Mapping[str, Any], *, checkpoint: Path) -> None:
    """Raise UserError if a checkpoint's models differ from policy and critic. Ranks and ZeRO stage may differ."""
    policy = config.policy
    fingerprint = architecture_fingerprint(load_model_config(policy.model, trust_remote_code=policy.trust_remote_code))
    if state["policy"] != fingerprint:
        raise UserError(
            f"{checkpoint} is a checkpoint of another model than policy.model {policy.model}: their architectures "
            "differ. Resume with the model of the checkpoint, or choose another run.name."
        )
    algorithm = config.algorithm
    if state["algorithm"] != algorithm.short_name:
        raise UserError(
            f"{checkpoint} is a checkpoint of algorithm {state['algorithm']}, not of {algorithm.short_name}. Resume "
            "with the algorithm of the checkpoint, or choose another run.name."
        )
    if state.get("algorithm_code", "") != algorithm.code_digest:
        logger.warning("the code of algorithm %s has changed since %s", algorithm.short_name, checkpoint)
    there, here = state["trained"], trained_models(config)
    differing = list(differences({**there, "cluster": None}, {**here, "cluster": None}))
    if differing:
        raise UserError(
            f"{checkpoint} cannot be continued by this run: {'; '.join(differing)}. Resume with the settings of the "
            "checkpoint, or choose another run.name."
        )
    resharded = list(differences({"cluster": there.get("cluster")}, {"cluster": here.get("cluster")}))
    if resharded:
        logger.info("the state of %s is sharded again: %s", checkpoint, "; ".join(resharded))


def with_sources(config: Config, folder: Path, *, weights: bool = True) -> Config:
    """Return the run with each model under the name for loading: tiny:llama becomes a folder (see `local_model`)."""
    changed: dict[Key, ModelConfig] = {}
    for key, section in model_sections(config).items():
        loaded = section.as_loaded()
        path = local_model(loaded.model, folder, seed=config.run.seed, weights=weights)
        changed[key] = loaded.model_copy(update={"model": path})
    return with_model_sections(config, changed)


def with_adapters(config: Config, ours: Mapping[str, LoraConfig]) -> Config:
    """Return the run with the shape of each continued adapter. ours: the shapes of folders not yet written."""
    changed: dict[str, Any] = {}
    for name in TRAINED_ROLES:
        section: PolicyConfig | CriticConfig | None = getattr(config, name)
        if section is None or section.adapter is None or section.lora is None:
            continue
        if section.adapter in ours:
            made = ours[section.adapter]
            keys = {"alpha", "rslora", "dora", "modules_to_save", "target_parameters"}
            shape = made.model_dump(include=keys) | {"rank": saved_rank(made)}
        else:
            from rlhf.models.adapters.folder import read_adapter_shape  # imports peft, which takes seconds

            with prefix_errors(f"{name}.adapter"):
                shape = read_adapter_shape(Path(section.adapter))
        lora = section.lora.model_copy(update=shape)
        changed[name] = section.model_copy(update={"lora": lora})
    return config.model_copy(update=changed)


def refuse_other_results(config: Config, made: StageResults) -> None:
    """Raise UserError if a stage's adapter is used as a model, or a stage's model as an adapter."""
    for name, key, section in loaded_models(config):
        if section.model in made.adapters and ROLES[name].kind != "scoring":
            merge = "merge it into its base in a stage between (method fold)."
            if name in TRAINED_ROLES:
                merge = f"name the base as {name}.model and the stage as {name}.adapter, or {merge}"
            raise UserError(f"{name}.{key}: {section.model} will be an adapter, since its stage has lora; {merge}")
        adapter = section.adapter if isinstance(section, PolicyConfig | CriticConfig) else None
        if adapter in made.finals and adapter not in made.adapters:
            raise UserError(
                f"{name}.adapter: {adapter} will be a whole model, as its stage has no lora; name it as {name}.model."
            )


ANY_LENGTH = sys.maxsize  # prompt limit if only the model's context length counts


def resolve_model(name: str, *, trust_remote_code: bool, device: str) -> ModelOnDisk:
    """Return the model named by the user. Checks that the hub answers before anything is loaded from there."""
    if may_ask_the_hub(name):
        use_cache_if_silent()
    return find_model(name, trust_remote_code=trust_remote_code, device=device)


def refuse_too_long(prompts: Sequence[Prompt], rows: Sequence[Row], model: ModelOnDisk, *, max_new_tokens: int) -> None:
    """Raise UserError if the model has no room for the longest prompt with the longest response."""
    if model.max_length is None:
        return
    for prompt, row in zip(prompts, rows, strict=True):
        if len(prompt.token_ids) + max_new_tokens > model.max_length:
            raise UserError(
                f"{row.place}: the prompt has {len(prompt.token_ids)} tokens. With {max_new_tokens} new tokens, this "
                f"is more than the {model.max_length} that {model.name} takes. Shorten the prompt, or lower "
                "max_new_tokens."
            )


@dataclass(slots=True, kw_only=True)
class StageResults:
    """The results of earlier stages, by result folder. The folders may not exist yet."""

    finals: dict[str, str] = field(default_factory=dict)  # result folder to the model with the same tokenizer and shape
    tokenizers: dict[str, str] = field(default_factory=dict)  # source of the tokenizer, if a different source
    scored: dict[str, str] = field(default_factory=dict)  # results with a scalar head, and the algorithm training it
    adapters: dict[str, LoraConfig] = field(default_factory=dict)  # shapes of results that are adapters
    templates: dict[str, ChatTemplate] = field(default_factory=dict)  # template changes of the results
    restacked: set[str] = field(default_factory=set)  # results with a different number of layers
