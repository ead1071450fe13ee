"""Load and check all inputs of every stage before any actor starts: model folders, tokenizer, data, rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rlhf.config.derive import (
    chat_template,
    eval_sets,
    hub_name,
    loaded_models,
    source_of,
    teacher_keys,
    teachers,
    train_sets,
)
from rlhf.config.files.load import LoadedConfig
from rlhf.config.schema.data import DataSource
from rlhf.config.schema.evaluate import EvaluationStage
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import MergeStage, final_folder, run_folder
from rlhf.data.files import FILE_SUFFIXES
from rlhf.data.images import RowImages, has_images
from rlhf.data.sources import open_shards, read_rows
from rlhf.data.templates import UNCHANGED
from rlhf.deferred import transformers
from rlhf.errors import prefix_errors
from rlhf.models.files.hub import use_cache_if_silent
from rlhf.models.files.loading import load_tokenizer
from rlhf.models.files.publish import refuse_unpublishable
from rlhf.models.files.template_check import refuse_runaway_template
from rlhf.models.files.tiny import described_config
from rlhf.models.on_disk import may_ask_the_hub
from rlhf.preflight.engine_args import refuse_unknown_engine_args
from rlhf.preflight.eval_inputs import inputs_of_stage
from rlhf.preflight.models import StageResults, check_models, refuse_other_results, with_adapters, with_sources
from rlhf.preflight.other_tokenizers import load_translators, sentence
from rlhf.preflight.sources import (
    check_rewards,
    installed_trackers,
    load_rewards,
    refuse_image_keys,
    row_images,
    served_models,
    with_template,
)
from rlhf.preflight.training_data import OfflineInputs, OnlineInputs, load_training_data
from rlhf.tracking.run_folder.folder import images_folder
from rlhf.types import RESULT_COLUMN
from rlhf.workers.frozen.top_settings import top_of


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInputs:
    """One run, ready to start."""

    config: Config  # with loadable model names
    written: Config  # as written by the user; saved in the run folder
    inputs: OnlineInputs | OfflineInputs
    tokenizer: Any  # the policy's
    images: RowImages | None = None  # None: the policy reads only text
    notes: tuple[str, ...] = ()  # sentences on teachers with another tokenizer


CheckedStage = StageInputs | MergeStage | EvaluationStage


def load_inputs(loaded: LoadedConfig, *, only_checks: bool = False, trackers: Sequence[Any] = ()) -> list[CheckedStage]:
    """Return the inputs of every run. UserError: the first error found, in any stage.

    Merges and evaluations are returned as they are, because their models may not exist yet. only_checks: the inputs are
    not used, so tiny:llama gets no weights unless a merge or an evaluation reads them, and no server of a teacher is
    asked. trackers: objects passed to the call.
    """
    made = StageResults()
    weights = not only_checks or not all(isinstance(config, Config) for config in loaded.stages.values())
    stages: list[CheckedStage] = []
    for name, stage in loaded.stages.items():
        with prefix_errors(f"stages.{name}") if loaded.is_pipeline else nullcontext():
            if isinstance(stage, MergeStage):
                from rlhf.preflight.merge import foresee, with_local_models  # imports peft, which takes seconds

                foresee(with_local_models(stage, loaded.folder), made, final=str(final_folder(stage)))
                stages.append(stage)
                continue
            installed_trackers(stage, trackers)
            refuse_unknown_engine_args(stage.cluster)
            if isinstance(stage, EvaluationStage):
                inputs_of_stage(stage, loaded, made=made)
                stages.append(stage)
            else:
                folder = loaded.folder if only_checks else run_folder(stage)
                ready = _load_run(stage, loaded, made, weights=weights, images=images_folder(folder))
                if not only_checks:
                    _refuse_unfit_servers(ready)
                stages.append(ready)
    return stages


def _load_run(written: Config, loaded: LoadedConfig, made: StageResults, *, weights: bool, images: Path) -> StageInputs:
    """Return the inputs of a training run, and add the properties of the trained model to `made`.

    images: the folder that gets the images of the data.
    """
    config = with_template(with_sources(written, loaded.folder, weights=weights))
    refuse_other_results(config, made)
    config = with_adapters(config, made.adapters)
    if _asks_the_hub(config, made.finals):
        use_cache_if_silent()
    if config.run.repository is not None:
        refuse_unpublishable(config.run.repository, key="run.push_to_hub")
    model = config.policy.model
    source = made.finals.get(model, model)
    tokenizer_source = config.policy.tokenizer or made.tokenizers.get(model, source)
    check_models(config, made, vocabulary_of=tokenizer_source)
    earlier = UNCHANGED if config.policy.tokenizer else made.templates.get(model, UNCHANGED)
    with prefix_errors("policy.model"):
        tokenizer = load_tokenizer(
            tokenizer_source,
            trust_remote_code=config.policy.trust_remote_code,
            template=earlier,
            kind=transformers.PreTrainedTokenizerFast if described_config(Path(tokenizer_source)) else None,
        )
    template = chat_template(config)
    template.apply_checked(tokenizer, key="data")
    refuse_runaway_template(tokenizer)
    translators = load_translators(config, made, tokenizer)
    with prefix_errors("policy.model"):
        of_rows = row_images(source, images, config.data)
    refuse_image_keys(config.data, of_rows, section="data", model=written.policy.model)
    beside = Path(loaded.source).resolve().parent
    how: dict[str, Any] = {"translators": translators, "images": of_rows}
    config, inputs = load_training_data(config, source, tokenizer, beside=beside, **how)
    final = str(final_folder(written))
    made.finals[final] = source
    made.tokenizers[final] = tokenizer_source
    made.templates[final] = earlier.then(template)
    if config.policy.lora is not None:
        made.adapters[final] = config.policy.lora
    if model in made.restacked:
        made.restacked.add(final)
    if written.algorithm.has_scalar_head:
        made.scored[final] = written.algorithm.short_name
    notes = tuple(sentence(teachers(config)[name], translator) for name, translator in translators.items())
    return StageInputs(config=config, written=written, inputs=inputs, tokenizer=tokenizer, images=of_rows, notes=notes)


def _refuse_unfit_servers(stage: StageInputs) -> None:
    """Raise UserError if the server of a teacher does not fit the run. RunError: no answer."""
    config, top = stage.config, top_of(stage.config)
    for name, served in served_models(config).items():
        with prefix_errors(f"{'.'.join(teacher_keys(config)[name])}.url"):
            longest = stage.inputs.longest_sequence
            served.refuse_unfit(stage.tokenizer, longest_sequence=longest, top_k=0 if top is None else top.k)


def _asks_the_hub(config: Config, finals: Mapping[str, str]) -> bool:
    """Return whether a model or a data set may be a name on the hub."""
    models = [model.model for _, _, model in loaded_models(config) if model.model not in finals]
    sources = [*(section.source for section in train_sets(config).values()), *eval_sets(config).values()]
    data = [name for source in sources if (name := hub_name(source)) is not None]
    names = [*models, *(name for name in data if not name.endswith(FILE_SUFFIXES))]
    absent = [name for name in names if not Path(name).exists()]
    bases = [model for model in models if model not in absent and may_ask_the_hub(model)]  # base models of adapters
    return bool(bases) or any(not name.startswith(("/", ".", "~")) for name in absent)


def check_files_and_rewards(loaded: LoadedConfig) -> None:
    """Raise UserError if training stages lack a data file, a reward, or a reward's column. No model is looked at."""
    beside = Path(loaded.source).resolve().parent
    for name, config in loaded.runs.items():
        sets: dict[str, DataSource] = {key: section.source for key, section in train_sets(config).items()}
        sets |= {f"data.eval.{held_out}": source for held_out, source in eval_sets(config).items()}
        is_agent = config.rollouts is not None and config.rollouts.agent is not None
        with prefix_errors(f"stages.{name}") if loaded.is_pipeline else nullcontext():
            specs = load_rewards(config.rewards, beside=beside, memory_gib=config.reward_policy.memory_gib)
            for key, source in sets.items():
                if (place := hub_name(source)) is not None and not place.endswith(FILE_SUFFIXES):
                    continue
                with prefix_errors(key):
                    of, columns, window = source_of(source), config.data.columns, config.data.stream_window
                    if window is None or key.startswith("data.eval"):
                        rows = read_rows(of, columns=columns)
                    else:  # as much as the start of the run would check
                        shards = open_shards(of, columns=columns)
                        read = chain.from_iterable(shard.read(0) for shard in shards)
                        rows = list(islice(read, window))
                if specs:
                    added = [RESULT_COLUMN] * is_agent + ["images"] * all(map(has_images, rows))
                    check_rewards(specs, rows, key, of_sessions=added)
