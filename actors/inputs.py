"""Everything a run reads, loaded and checked before any actor starts: models' folders, tokenizer, data, rewards."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from actors.eval_inputs import inputs_of_stage
from actors.hub import use_cache_if_silent
from actors.made import Made
from actors.merge import foresee, with_local_models
from actors.reading import check_rewards, load_rewards, local_model, named, source_of
from rlhf.algorithms.process_reward_model import ProcessRewardModelConfig
from rlhf.config.data import DataSource
from rlhf.config.derive import (
    OfflineKind,
    adapter_options,
    critic_model,
    eval_sets,
    has_scalar_head,
    is_online,
    max_sequence_tokens,
    needs,
    needs_gold,
    offline_kind,
    reference_model,
    saved_rank,
    train_sets,
    uses_reward_model,
)
from rlhf.config.evaluate import EvaluationStage
from rlhf.config.load import LoadedConfig
from rlhf.config.model import CriticConfig, LoraConfig, ModelConfig, PolicyConfig
from rlhf.config.root import Config
from rlhf.config.stages import MergeStage, final_folder
from rlhf.data.examples import Example, Reading, collate, load_examples
from rlhf.data.labelled import Labelled, collate_labelled, load_labelled
from rlhf.data.preferences import Pair, collate_pairs, load_pairs
from rlhf.data.prompts import load_prompts
from rlhf.data.sources import FILE_SUFFIXES, read_rows
from rlhf.data.steps import StepLabelled, collate_steps, load_step_labelled
from rlhf.data.stream import Share
from rlhf.data.usable import Loaded, Unusable
from rlhf.errors import UserError
from rlhf.models.loading import (
    architecture_fingerprint,
    load_config,
    load_tokenizer,
    refuse_no_language_model,
    refuse_without_head,
)
from rlhf.models.on_disk import refuse_broken_weights
from rlhf.models.quantized import refuse_unquantizable
from rlhf.models.sequence_parallel import refuse_uneven_heads
from rlhf.rewards.scoring import RewardSpec
from rlhf.types import Examples, Pairs, Prompt

OfflineRow = Example | Pair | StepLabelled | Labelled

logger = logging.getLogger(__name__)
LOADERS: Mapping[OfflineKind, Callable[..., Loaded[Any]]] = {
    "supervised": load_examples,
    "distillation": load_examples,
    "preference": load_pairs,
    "reward_model": load_pairs,
    "step_rewards": load_step_labelled,
    "unpaired": load_labelled,
}
COLLATE: Mapping[OfflineKind, Callable[[Sequence[Any]], Examples | Pairs]] = {
    "supervised": collate,
    "distillation": collate,
    "preference": collate_pairs,
    "reward_model": collate_pairs,
    "step_rewards": collate_steps,
    "unpaired": collate_labelled,
}
PROBE_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineInputs:
    """What an online run reads."""

    prompts: tuple[Prompt, ...]  # of all training sets, one behind the other
    shares: tuple[Share, ...]
    eval_sets: Mapping[str, tuple[Prompt, ...]]
    rewards: tuple[RewardSpec, ...]
    max_model_len: int  # tokens of the longest prompt with the longest response
    probe_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineInputs:
    """What a run without rollouts reads."""

    rows: tuple[OfflineRow, ...]  # of all training sets, one behind the other
    shares: tuple[Share, ...]
    eval_sets: Mapping[str, tuple[OfflineRow, ...]]
    unusable: tuple[Unusable, ...]  # rows that were left out, of all sets


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInputs:
    """One run, ready to start."""

    config: Config  # model names are those that can be loaded
    written: Config  # as the user has it: what goes into the run folder
    inputs: OnlineInputs | OfflineInputs


def load_inputs(loaded: LoadedConfig) -> list[StageInputs | MergeStage | EvaluationStage]:
    """The inputs of every run, and merges and evaluations as they are, since what they read may not be made yet.

    UserError for the first thing that is wrong, whichever stage it is in.
    """
    made = Made()
    finals, scored, adapters = made.finals, made.scored, made.adapters
    stages: list[StageInputs | MergeStage | EvaluationStage] = []
    for name, config in loaded.stages.items():
        with named(f"stages.{name}") if loaded.is_pipeline else nullcontext():
            if not isinstance(config, Config):
                if isinstance(config, MergeStage):
                    foresee(with_local_models(config, loaded.folder), made, final=str(final_folder(config)))
                else:
                    inputs_of_stage(config, loaded, made=made)
                stages.append(config)
                continue
            local = with_tiny(config, loaded.folder)
            _refuse_other_results(local, finals, adapters)
            local = with_adapters(local, adapters)
            if _asks_the_hub(local, finals):
                use_cache_if_silent()
            source = finals.get(local.policy.model, local.policy.model)
            for section, model in _models(local).items():
                if model.model in finals:
                    _refuse_other_kind(section, model.model, local, trained_by=scored.get(model.model))
                    with named(f"{section}.model"):
                        _refuse_other_vocabulary(section, finals[model.model], source, model.trust_remote_code)
                else:
                    _refuse_unusable_model(section, model, local, finals, vocabulary_of=source)
            inputs = _online(local, source, loaded) if is_online(local) else _offline(local, source)
        stages.append(StageInputs(config=local, written=config, inputs=inputs))
        final = str(final_folder(config))
        finals[final] = source
        if local.policy.lora is not None:
            adapters[final] = local.policy.lora
        if local.policy.model in made.restacked:
            made.restacked.add(final)
        if has_scalar_head(config):
            scored[final] = config.algorithm.name
    return stages


def _refuse_unusable_model(
    section: str, model: ModelConfig, config: Config, finals: Mapping[str, str], *, vocabulary_of: str
) -> None:
    """UserError if a section's model is not there, is of another kind than it must be, or has another vocabulary."""
    remote = model.trust_remote_code
    is_scalar = section == "critic" or (section == "policy" and has_scalar_head(config))
    with named(f"{section}.model"):
        shape = load_config(model.model, trust_remote_code=remote)
        refuse_broken_weights(Path(model.model))
        if section == "reward":
            refuse_without_head(model.model, trust_remote_code=remote)
        elif is_scalar:
            _refuse_other_head(model.model, shape)
        else:
            refuse_no_language_model(model.model, trust_remote_code=remote)
        _refuse_other_vocabulary(section, model.model, vocabulary_of, remote)
    _refuse_misfit(section, model, finals, scalar=is_scalar)
    _refuse_unquantizable(section, model, shape, device=config.cluster.device)
    if isinstance(model, PolicyConfig | CriticConfig):
        with named(f"cluster.roles.{section}"):
            refuse_uneven_heads(shape, getattr(config.cluster.roles, section).sequence_parallel)
        if model.lora is not None and model.adapter is None:
            from rlhf.models.lora import refuse_unfit  # with peft, which takes seconds

            try:
                refuse_unfit(shape, scalar=is_scalar, trust_remote_code=remote, **adapter_options(model.lora))
            except UserError as error:
                raise UserError(f"{section}.{error}") from error


def _refuse_other_head(path: str, shape: Any) -> None:
    names = shape.architectures or []
    if any(name.endswith("ForSequenceClassification") for name in names) and shape.num_labels != 1:
        raise UserError(f"{path} has a head of {shape.num_labels} labels, expected one label, or a language model")


def _refuse_other_vocabulary(section: str, path: str, policy: str, trust_remote_code: bool) -> None:
    """UserError if a model would take the policy's token ids for others. Without a tokenizer of its own it may do.

    A teacher says something of every token, so it may have no others either.
    """
    if path == policy:
        return
    tokenizer = load_tokenizer(policy, trust_remote_code=trust_remote_code)
    try:
        other = load_tokenizer(path, trust_remote_code=trust_remote_code)
    except UserError:
        size = load_config(path, trust_remote_code=trust_remote_code).get_text_config().vocab_size
        fits = size >= len(_words(tokenizer))
    else:
        ours, theirs = tokenizer.get_vocab(), other.get_vocab()
        fits = _words(tokenizer).items() <= theirs.items()
        if section == "teacher":
            fits = fits and _words(other).items() <= ours.items()
    if not fits:
        raise UserError(
            f"{path} has another vocabulary than policy.model {policy}, whose token ids it is given: name a model with "
            "the same tokenizer"
        )


def _words(tokenizer: Any) -> dict[str, int]:
    """Its tokens but one that only pads: that is often added for training, and no sequence has it."""
    words: dict[str, int] = tokenizer.get_vocab()
    if tokenizer.pad_token != tokenizer.eos_token:
        words.pop(tokenizer.pad_token, None)
    return words


def _refuse_other_kind(section: str, folder: str, config: Config, *, trained_by: str | None) -> None:
    """UserError if the result of an earlier stage is not what a section holds. trained_by: None: a language model."""
    if section == "reward":
        fits, wanted = trained_by == "reward_model", "a reward model"
    elif section == "critic" or (section == "policy" and has_scalar_head(config)):
        return  # a new head, or the one that is there
    else:
        fits, wanted = trained_by is None, "a language model"
    if not fits:
        will = "language model" if trained_by is None else trained_by.replace("_", " ")
        raise UserError(f"{section}.model: {folder} will be a {will}, expected {wanted}")


def refuse_other_model(config: Config, state: Mapping[str, Any], *, checkpoint: Path) -> None:
    """UserError if a checkpoint is of another model than the run's policy."""
    policy = config.policy
    ours = architecture_fingerprint(load_config(policy.model, trust_remote_code=policy.trust_remote_code))
    if state["policy"] != ours:
        raise UserError(
            f"{checkpoint} is a checkpoint of another model than policy.model {policy.model}: their architectures "
            "differ. Resume with the model that it was made with, or choose another run.name."
        )
    if state["algorithm"] != config.algorithm.name:
        raise UserError(
            f"{checkpoint} is a checkpoint of algorithm {state['algorithm']}, not of {config.algorithm.name}. Resume "
            "with the one that it was made with, or choose another run.name."
        )


def with_tiny(config: Config, folder: Path) -> Config:
    """The same run with tiny:llama as a folder, made now if it is not there."""
    changed: dict[str, Any] = {}
    for name in ("policy", "reference", "teacher", "critic"):
        section: ModelConfig | None = getattr(config, name)
        if section is not None:
            path = local_model(section.model, folder, seed=config.run.seed)
            changed[name] = section.model_copy(update={"model": path})
    return config.model_copy(update=changed)


def with_adapters(config: Config, ours: Mapping[str, LoraConfig]) -> Config:
    """The same run with the shape of each adapter that it goes on from. `ours`: shapes of folders yet to be made."""
    changed: dict[str, Any] = {}
    for name in ("policy", "critic"):
        section: PolicyConfig | CriticConfig | None = getattr(config, name)
        if section is None or section.adapter is None or section.lora is None:
            continue
        from rlhf.models.adapter_folder import AdapterShape, read_adapter_shape  # with peft, which takes seconds

        if section.adapter in ours:
            made = ours[section.adapter]
            shape = AdapterShape(
                rank=saved_rank(made),
                alpha=made.alpha,
                rslora=made.rslora,
                dora=made.dora,
                modules_to_save=made.modules_to_save,
            )
        else:
            with named(f"{name}.adapter"):
                shape = read_adapter_shape(Path(section.adapter))
        lora = section.lora.model_copy(update=dataclasses.asdict(shape))
        changed[name] = section.model_copy(update={"lora": lora})
    return config.model_copy(update=changed)


def _refuse_unquantizable(name: str, section: ModelConfig, shape: Any, *, device: Literal["cpu", "cuda"]) -> None:
    """UserError if the section's base is to be kept in 4 bits and cannot be, here."""
    if (
        isinstance(section, PolicyConfig | CriticConfig)
        and section.lora is not None
        and section.lora.quantize is not None
    ):
        refuse_unquantizable(f"{name}.lora.quantize", shape, device=device)


def _refuse_other_results(config: Config, finals: Mapping[str, str], adapters: Mapping[str, LoraConfig]) -> None:
    """UserError if a stage's adapter is taken for a model, or its model for an adapter."""
    for name, section in _models(config).items():
        if section.model in adapters:
            raise UserError(
                f"{name}.model: {section.model} will be an adapter, not a model, as its stage has lora. Name the base "
                f"as {name}.model and the stage as {name}.adapter (policy and critic), or train without lora there."
            )
        adapter = section.adapter if isinstance(section, PolicyConfig | CriticConfig) else None
        if adapter in finals and adapter not in adapters:
            raise UserError(
                f"{name}.adapter: {adapter} will be a whole model, as its stage has no lora; name it as {name}.model."
            )


def _refuse_misfit(name: str, section: ModelConfig, finals: Mapping[str, str], *, scalar: bool) -> None:
    """UserError if an adapter was trained on another model than the section's."""
    if isinstance(section, PolicyConfig | CriticConfig) and section.adapter is not None:
        if section.adapter in finals:
            return
        from rlhf.models.adapter_folder import refuse_misfit  # with peft, which takes seconds

        with named(f"{name}.adapter"):
            refuse_misfit(
                Path(section.adapter),
                section.model,
                scalar=scalar,
                trust_remote_code=section.trust_remote_code,
            )


def _models(config: Config) -> dict[str, ModelConfig]:
    """The models that the run will load, by section."""
    roles = needs(config)
    found: dict[str, ModelConfig] = {"policy": config.policy}
    if "reference" in roles:
        found["reference"] = reference_model(config)
    if "teacher" in roles and config.teacher is not None:
        found["teacher"] = config.teacher
    if "critic" in roles:
        found["critic"] = critic_model(config)
    if uses_reward_model(config) and config.reward is not None:
        found["reward"] = config.reward
    return found


def _asks_the_hub(config: Config, finals: Mapping[str, str]) -> bool:
    """Whether a model or a data set may be a name on the hub."""
    models = [model.model for model in _models(config).values() if model.model not in finals]
    sources = [*(one.source for one in train_sets(config).values()), *eval_sets(config).values()]
    data = [source.partition(":")[0] for source in sources if isinstance(source, str)]
    names = [*models, *(name for name in data if not name.endswith(FILE_SUFFIXES))]
    return any(not name.startswith(("/", ".", "~")) and not Path(name).exists() for name in names)


def _online(config: Config, source: str, loaded: LoadedConfig) -> OnlineInputs:
    assert config.rollouts is not None
    with named("policy.model"):
        tokenizer = load_tokenizer(source, trust_remote_code=config.policy.trust_remote_code)
    data = config.data

    def prompts_of(name: str, source: DataSource, first_id: int = 0) -> tuple[Prompt, ...]:
        with named(name):
            rows = read_rows(source_of(source), columns=data.columns)
        check_rewards(specs, rows, name)
        with named(name):
            return load_prompts(
                rows,
                tokenizer,
                system_prompt=data.system_prompt,
                apply_chat_template=data.apply_chat_template,
                max_prompt_tokens=data.max_prompt_tokens,
                first_id=first_id,
            )

    specs = load_rewards(
        config.rewards, beside=Path(loaded.source).resolve().parent, memory_gib=config.reward_policy.memory_gib
    )
    prompts: tuple[Prompt, ...] = ()
    shares = []
    for name, one in train_sets(config).items():
        more = prompts_of(name, one.source, len(prompts))
        prompts += more
        shares.append(Share(name=name, weight=one.weight, size=len(more)))
    held_out = {name: prompts_of(f"data.eval.{name}", one) for name, one in eval_sets(config).items()}
    longest = max(len(p.token_ids) for group in (prompts, *held_out.values()) for p in group)
    max_model_len = longest + config.rollouts.max_new_tokens
    _refuse_too_long(source, config, longest=longest, wanted=max_model_len)
    if max_model_len > config.train.max_tokens_per_microbatch:
        raise UserError(
            f"train.max_tokens_per_microbatch: {config.train.max_tokens_per_microbatch} holds no sequence of "
            f"{max_model_len} tokens, and the longest prompt ({longest}) with rollouts.max_new_tokens "
            f"({config.rollouts.max_new_tokens}) can become one."
        )
    probe = [token for prompt in prompts[:PROBE_TOKENS] for token in prompt.token_ids]
    return OnlineInputs(
        prompts=prompts,
        shares=tuple(shares),
        eval_sets=held_out,
        rewards=specs,
        max_model_len=max_model_len,
        probe_ids=tuple(probe[: min(PROBE_TOKENS, max_model_len - 1)]),
    )


def _offline(config: Config, source: str) -> OfflineInputs:
    with named("policy.model"):
        tokenizer = load_tokenizer(source, trust_remote_code=config.policy.trust_remote_code)
    data = config.data
    reading = Reading(
        system_prompt=data.system_prompt,
        apply_chat_template=data.apply_chat_template,
        max_tokens=max_sequence_tokens(config),
        too_long=data.too_long,
        max_unusable_fraction=data.max_unusable_fraction,
    )
    unusable: list[Unusable] = []
    load = LOADERS[offline_kind(config)]
    if isinstance(config.algorithm, ProcessRewardModelConfig):
        load = partial(load, step_separator=config.algorithm.step_separator)
    if needs_gold(config):
        load = partial(load, with_gold=True)

    def rows_of(name: str, source: DataSource, first_id: int = 0) -> tuple[OfflineRow, ...]:
        with named(name):
            rows = read_rows(source_of(source), columns=data.columns)
            loaded = load(rows, tokenizer, reading, first_id=first_id)
        if loaded.unusable:
            logger.warning("%s: %d of %d rows cannot be used and are left out", name, len(loaded.unusable), len(rows))
        unusable.extend(loaded.unusable)
        return loaded.items

    rows: tuple[OfflineRow, ...] = ()
    shares = []
    for name, one in train_sets(config).items():
        more = rows_of(name, one.source, len(rows))
        rows += more
        shares.append(Share(name=name, weight=one.weight, size=len(more)))
    held_out = {name: rows_of(f"data.eval.{name}", one) for name, one in eval_sets(config).items()}
    for name, group in {"data.train": rows, **{f"data.eval.{name}": one for name, one in held_out.items()}}.items():
        prompts = {row.token_ids[: row.prompt_tokens] for row in group if isinstance(row, Labelled)}
        if len(prompts) == 1:
            raise UserError(f"{name}: all rows have one prompt; algorithm {config.algorithm.name} needs two or more.")
    longest = max(row.longest for group in (rows, *held_out.values()) for row in group)
    _refuse_too_long(source, config, longest=longest, wanted=longest)
    return OfflineInputs(
        rows=rows,
        shares=tuple(shares),
        eval_sets=held_out,
        unusable=tuple(unusable),
    )


def _refuse_too_long(source: str, config: Config, *, longest: int, wanted: int) -> None:
    shape = load_config(source, trust_remote_code=config.policy.trust_remote_code).get_text_config()
    limit: int | None = getattr(shape, "max_position_embeddings", None)  # BLOOM has none
    if limit is not None and wanted > limit:
        room = f" with rollouts.max_new_tokens {config.rollouts.max_new_tokens}" if config.rollouts else ""
        raise UserError(
            f"policy.model {config.policy.model} takes at most {limit} tokens, and the longest sequence of the data "
            f"({longest} tokens{room}) would have {wanted}. Shorten the data, or use a model with a longer context."
        )
