"""Load and check all inputs of an evaluation, of a stage, a run or options, before any actor starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from rlhf.config.derive import eval_sets
from rlhf.config.files.load import LoadedConfig
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.data import DataSource, PresetConfig, TaskConfig
from rlhf.config.schema.evaluate import EvaluateConfig, EvaluationStage
from rlhf.config.schema.model import RewardModelConfig
from rlhf.config.schema.rewards import RewardConfig, RewardPolicy
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import MergeStage, final_folder, run_folder
from rlhf.data.examples import Reading
from rlhf.data.shapes import SHAPES
from rlhf.data.tasks import REASONING_GYM, RUNNING_TOTALS
from rlhf.data.templates import UNCHANGED, ChatTemplate, read_template
from rlhf.errors import UserError, prefix_errors
from rlhf.evaluation.decoding import Decoding
from rlhf.evaluation.results import Marking, Marks, marking_of
from rlhf.models.on_disk import refuse_unservable
from rlhf.preflight.candidates import IN_OPTIONS, IN_RUN, Candidate, Names, SetReader
from rlhf.preflight.models import StageResults, refuse_unusable_reward_model, resolve_model
from rlhf.preflight.sources import as_evaluation, in_options, load_rewards, local_model, reading_of
from rlhf.process.stopping import run_async
from rlhf.rewards.scoring import RewardSpec
from rlhf.suites.process import plan_suites
from rlhf.suites.spec import SuiteSpec
from rlhf.tracking.run_folder.folder import images_folder

logger = logging.getLogger(__name__)
TASK_ROWS = 200  # rows of `--data TASK` without a size
_PRESET = "preset:"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalInputs:
    candidates: tuple[Candidate, ...]  # the model, then the compared model if there is one
    decoding: Decoding
    marking: Marking
    rewards: tuple[RewardSpec, ...]
    reward_model: RewardModelConfig | None
    reward_policy: RewardPolicy
    max_tokens_per_microbatch: int
    cluster: ClusterConfig
    images: Path  # the folder with the images of the sets


def inputs_of_run(loaded: LoadedConfig, *, model: str | None, against: str | None, marks: Marks) -> EvalInputs:
    """Return the inputs for evaluating a run's model, or `model`, on the held-out sets of the run.

    For a pipeline, the last training or evaluation stage counts.
    """
    stages = [stage for stage in loaded.stages.values() if not isinstance(stage, MergeStage)]
    if not stages:
        raise UserError(f"{loaded.source} has only merges: evaluate their models on --data")
    stage = stages[-1]
    if isinstance(stage, Config):
        if not stage.eval.suites:
            _refuse_other_measures(stage, model or str(final_folder(stage)))
        if not eval_sets(stage) and not stage.eval.suites:
            raise UserError(
                f"data.eval: {loaded.source} names no held-out set; add a held-out set, or evaluate a model on --data"
            )
    given: dict[str, Any] = {"model": model, "against": against, "k": marks.ks}
    given |= {"pass_score": marks.pass_score, "answer": marks.answers, "by": marks.by}
    given["exchange_images"] = marks.exchange_images or None
    changes = {key: value for key, value in given.items() if value is not None}
    section = stage.evaluate if isinstance(stage, EvaluationStage) else as_evaluation(stage)
    _refuse_without_rewards(section.rewards, against, marks, suites=section.suites)
    section = section.model_copy(update=changes)
    if isinstance(stage, EvaluationStage):
        return inputs_of_stage(stage.model_copy(update={"evaluate": section}), loaded)
    makers = [other for other in loaded.stages.values() if not isinstance(other, EvaluationStage)]
    if model is None and stage.policy.model in map(str, map(final_folder, makers)):
        logger.warning(
            "policy.model is %s, the result of an earlier stage, and this model is measured; --model %s measures the "
            "model that stage %s trains",
            *(stage.policy.model, run_folder(stage), stage.run.name),
        )
    return _load(
        section,
        IN_RUN if model is None else replace(IN_RUN, model="--model"),
        reading=reading_of(stage),
        seed=stage.run.seed,
        cluster=stage.cluster,
        beside=Path(loaded.source).resolve().parent,
        models=loaded.folder,
        images=images_folder(loaded.folder),
        tokenizer=stage.policy.tokenizer,
    )


def _refuse_other_measures(config: Config, model: str) -> None:
    """Raise UserError if the run measures its held-out sets neither by responses nor by given completions."""
    if config.rewards or config.algorithm.kind == "supervised":
        return
    others: Mapping[str, str] = {
        "reward_model": f"let it score a model's responses: rlhf eval MODEL --data PROMPTS --reward-model {model}",
        "step_rewards": "read them there",
    }
    instead = f"name prompts or SFT examples: rlhf eval {model} --data SET, with --reward NAME to score responses"
    raise UserError(
        f"algorithm.name: is {config.algorithm.name}, whose held-out sets only the run itself measures (eval/ in its "
        f"metrics.jsonl); {others.get(config.algorithm.kind, instead)}"
    )


def inputs_of_stage(stage: EvaluationStage, loaded: LoadedConfig, *, made: StageResults | None = None) -> EvalInputs:
    """Return the inputs of an evaluation section. `made` holds the results of earlier stages, checked by configuration.

    The models of earlier stages may not exist yet: a stage's initial model stands in, with equal tokenizer and context.
    """
    made = made or StageResults()
    _refuse_unfit_results(stage, made)
    return _load(
        stage.evaluate,
        Names(),
        seed=stage.run.seed,
        cluster=stage.cluster,
        beside=Path(loaded.source).resolve().parent,
        models=loaded.folder,
        images=images_folder(loaded.folder),
        made=made,
    )


def _refuse_unfit_results(stage: EvaluationStage, made: StageResults) -> None:
    """Raise UserError if an earlier stage's result will not be of the kind expected by the evaluation."""
    config = stage.evaluate
    for key, model in (("model", config.model), ("against", config.against)):
        if model is not None and model in made.scored:
            model_kind = made.scored[model].replace("_", " ")
            raise UserError(f"evaluate.{key}: {model} will be a {model_kind}, expected a language model")
        lora = made.adapters.get(model or "")
        if config.rewards and lora is not None and (lora.dora or lora.modules_to_save):
            kind = "dora" if lora.dora else "modules_to_save"
            text = f"will be an adapter with {kind}, which engines cannot serve; merge it into its base before"
            raise UserError(f"evaluate.{key}: {model} {text}")
    models = config.reward.models if stage.uses_reward_model and config.reward is not None else {}
    for key, member in models.items():
        if member.model in made.finals and member.model not in made.scored:
            raise UserError(f"evaluate.reward.{key}: {member.model} will be a language model, expected a reward model")


def inputs_of_model(
    model: str,
    *,
    data: Sequence[str],
    rewards: Sequence[str],
    reward_model: str | None,
    against: str | None,
    decoding: Decoding,
    marks: Marks,
    device: Literal["cpu", "cuda"],
    trust_remote_code: bool,
    images: Path,
    suites: Sequence[str] = (),
    suite_limit: int | None = None,
    suite_data: str | None = None,
) -> EvalInputs:
    """Return the inputs for evaluating a model on named data: prompts with rewards, examples without; and on suites.

    images: the folder that gets the images of the data.
    """
    sets, configs = _named_sets(data) if data or not suites else {}, _named_rewards(rewards)
    if rewards and not data and suites:
        raise UserError(
            f"--reward {rewards[0]} has no effect: suites have their own metrics. Give --data, or remove --reward"
        )
    if both := sorted({*suites} & {*sets}):
        raise UserError(f"--suite {both[0]}: there is a set of --data with this name; rename the file")
    if reward_model is not None:
        configs["reward_model"] = RewardConfig(role="reward")
    _refuse_without_rewards(configs, against, marks, suites=suites)
    section = EvaluateConfig.model_construct(
        model=model,
        against=against,
        trust_remote_code=trust_remote_code,
        data=sets,
        columns=dict(decoding.columns),
        system_prompt=decoding.system_prompt,
        apply_chat_template=decoding.apply_chat_template,
        rewards=configs,
        reward=None if reward_model is None else RewardModelConfig(model=reward_model),
        k=marks.ks,
        pass_score=marks.pass_score,
        answer=marks.answers,
        by=marks.by,
        exchange_images=marks.exchange_images,
        suites=tuple(suites),
        suite_limit=suite_limit,
        suite_data=suite_data,
    )
    with in_options():
        cluster = ClusterConfig(device=device)
        return _load(
            section,
            IN_OPTIONS,
            seed=decoding.seed,
            cluster=cluster,
            beside=Path.cwd(),
            images=images,
            decoding=decoding,
        )


def _named_sets(data: Sequence[str]) -> dict[str, DataSource]:
    if not data:
        raise UserError(
            "--data is missing: name a file, a dataset or a task to evaluate the model on, or a suite, such as --suite "
            "reasoning-basic. The held-out sets of a run are evaluated by its configuration: "
            "rlhf eval RUN/config.resolved.yaml --model RUN"
        )
    sets: dict[str, DataSource] = {}
    for text in data:
        name, source = _source(text)
        if name in sets:
            raise UserError(f"--data {text}: there is a set called {name} already; rename the file")
        sets[name] = source
    return sets


def _named_rewards(rewards: Sequence[str]) -> dict[str, RewardConfig]:
    configs: dict[str, RewardConfig] = {}
    for text in rewards:
        name = text.rpartition(":")[2]
        if name in configs:
            raise UserError(f"--reward {text}: there is a reward called {name} already")
        configs[name] = RewardConfig(function=text)
    return configs


def _load(
    section: EvaluateConfig,
    names: Names,
    *,
    seed: int,
    cluster: ClusterConfig,
    beside: Path,  # the folder searched for code before the current folder
    images: Path,  # the folder that gets the images of the sets
    models: Path | None = None,  # the folder for tiny:llama; None: this model is not available
    reading: Reading | None = None,  # `reading` and `decoding` replace the section's settings
    decoding: Decoding | None = None,
    tokenizer: str | None = None,  # in place of each model's tokenizer
    made: StageResults | None = None,  # results of earlier stages, by the names of models
) -> EvalInputs:
    """Load everything named by an evaluation section."""
    decoding = decoding or _decoding(section, seed, template_key=names.template)
    reading = reading or Reading(
        system_prompt=section.system_prompt,
        apply_chat_template=section.apply_chat_template,
        max_tokens=section.max_tokens_per_microbatch,
    )
    memory_gib = section.reward_policy.memory_gib
    rewards = load_rewards(section.rewards, beside=beside, memory_gib=memory_gib, key=names.rewards)
    how: dict[str, Any] = {"decoding": decoding, "reading": reading, "rewards": rewards}
    reader = SetReader(section=section, names=names, beside=beside, images=images, **how)
    candidates, results = [], made or StageResults()
    for key, wanted in ((names.model, section.model), (names.against, section.against)):
        if wanted is None:
            continue
        with prefix_errors(key):
            name = results.finals.get(wanted, wanted)
            local = name if models is None else local_model(name, models, seed=seed)
            model = resolve_model(local, trust_remote_code=section.trust_remote_code, device=cluster.device)
        shown = model.name if made is None else wanted
        dtype, tokenizer_source = section.dtype or model.dtype, tokenizer or model.tokenizer
        model = replace(model, name=shown, dtype=dtype, tokenizer=tokenizer_source)
        made_template = results.templates.get(wanted, UNCHANGED)
        candidates.append(_with_suites(reader.candidate(model, made_template), made_template, section, decoding))
    reward_model = section.reward if any(spec.is_model for spec in rewards) else None
    for key, member in ({} if reward_model is None else reward_model.models).items():
        if member.model not in results.finals:
            place = names.reward_model if key == "model" else f"{names.reward_model.removesuffix('model')}{key}"
            refuse_unusable_reward_model(member, key=place)
    longest = max(candidate.longest_sequence(decoding.max_new_tokens) for candidate in candidates)
    return EvalInputs(
        candidates=tuple(candidates),
        decoding=decoding,
        marking=_marking(section, rewards, samples=decoding.samples),
        rewards=rewards,
        reward_model=reward_model,
        reward_policy=section.reward_policy,
        max_tokens_per_microbatch=max(section.max_tokens_per_microbatch, longest),
        cluster=cluster,
        images=images,
    )


def _with_suites(candidate: Candidate, made: ChatTemplate, section: EvaluateConfig, decoding: Decoding) -> Candidate:
    """Return the candidate with the section's suites. UserError: a suite is unknown, or its data cannot be loaded."""
    if not section.suites:
        return candidate
    model = candidate.model
    refuse_unservable(model)
    spec = SuiteSpec(
        names=tuple(dict.fromkeys(section.suites)),
        limit=section.suite_limit,
        data=section.suite_data,
        seed=decoding.seed,
        tokenizer=model.tokenizer,
        trust_remote_code=model.trust_remote_code,
        template=made.then(decoding.template),
        apply_chat_template=decoding.apply_chat_template,
        max_length=model.max_length,
    )
    plan = run_async(plan_suites(spec))
    return replace(candidate, suites=spec, suite_tokens=plan.longest)


def _marking(section: EvaluateConfig, rewards: Sequence[RewardSpec], *, samples: int) -> Marking:
    marks = Marks(ks=section.k, pass_score=section.pass_score, answers=section.answer, by=section.by)
    try:
        return marking_of(marks, rewards, samples=samples)
    except ValueError as error:
        raise UserError(f"--k: {error}") from error


def _decoding(section: EvaluateConfig, seed: int, *, template_key: str) -> Decoding:
    """Return the section's settings for sampling. Without rewards, nothing is sampled."""
    text = section.chat_template and read_template(section.chat_template, key=f"{template_key}.chat_template")
    return Decoding(
        samples=section.samples_per_prompt if section.rewards else 1,
        temperature=section.temperature,
        max_new_tokens=section.max_new_tokens if section.rewards else 1,
        stop=section.stop,
        stop_token_ids=section.stop_token_ids,
        seed=seed,
        system_prompt=section.system_prompt,
        apply_chat_template=section.apply_chat_template,
        template=ChatTemplate(text=text, kwargs=section.chat_template_kwargs),
    )


def _refuse_without_rewards(
    rewards: Mapping[str, RewardConfig], against: str | None, marks: Marks, *, suites: Sequence[str]
) -> None:
    if not rewards and ((against is not None and not suites) or replace(marks, exchange_images=False) != Marks()):
        raise UserError(
            "--against, --by, --k, --answer and --pass-score have no effect: no reward scores responses; give a reward"
        )


def _source(text: str) -> tuple[str, DataSource]:
    """Return a set's name and source. TASK[:ROWS] generates rows of the task's eval split, and preset:NAME[:SPLIT] is
    a preset, by default its eval split."""
    task, _, rows = text.partition(":")
    if task in (RUNNING_TOTALS, SHAPES) or task.startswith(REASONING_GYM):
        if rows and not (rows.isdecimal() and int(rows) > 0):
            raise UserError(f"--data {text}: a number of rows follows the task's name, such as {task}:100")
        return task, TaskConfig(task=task, split="eval", size=int(rows) if rows else TASK_ROWS)
    if text.startswith(_PRESET):
        name, _, split = text.removeprefix(_PRESET).partition(":")
        try:
            return name, PresetConfig(preset=name, split=split or "eval")
        except ValidationError as error:
            raise UserError(f"--data {text}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
    return Path(text).stem, text
