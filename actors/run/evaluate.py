"""Evaluate models (`rlhf eval`) on prompts, with rollout engines and reward workers, or on examples.

The models of a comparison run in turn, each with separate engines and reward workers.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from actors.cluster.connect import connected
from actors.cluster.placement import reserve_roles
from actors.roles.group import Stoppable, ending, spawn
from actors.roles.worker_pools import LikelihoodWorkers, RewardWorkers
from actors.rollout.engine_creation import serve_engines
from actors.rollout.engine_group import RolloutEngines
from actors.run.run_record import recording
from actors.serving.agent_engine import engine_for
from actors.serving.offline import requests_of
from rlhf.config.files.load import LoadedConfig
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.evaluate import EvaluationStage
from rlhf.config.schema.stages import result_of
from rlhf.controller.rollout_scorer import error_record, note_errors, process_answers
from rlhf.errors import RunError, UserError, prefix_errors
from rlhf.evaluation.results import (
    Evaluation,
    ExampleResult,
    PromptResult,
    SetReport,
    example_metrics,
    example_rows,
    prompt_reports,
    prompt_rows,
)
from rlhf.evaluation.voting import AnswerForm, answer_of
from rlhf.models.on_disk import ModelOnDisk
from rlhf.preflight.candidates import Candidate
from rlhf.preflight.eval_inputs import EvalInputs, inputs_of_stage
from rlhf.preflight.exchanged import SUFFIX
from rlhf.preflight.start import Start
from rlhf.process.stopping import run_async
from rlhf.rewards.failure_rule import ends_run, held_out_rules
from rlhf.rewards.scoring import describe_errors, rules_of_specs
from rlhf.roles import CompletedGroup, ScoredGroup
from rlhf.rollouts.records.texts import Transcript
from rlhf.suites.process import ask_suites
from rlhf.suites.reports import suite_failures, suite_reports, suite_rows
from rlhf.suites.spec import SuiteAnswers
from rlhf.tracking.run_folder.atomic import write_atomic, write_lines
from rlhf.tracking.run_folder.errors import write_error
from rlhf.tracking.run_folder.folder import images_folder
from rlhf.tracking.run_folder.samples import EVAL_SAMPLES, samples_path
from rlhf.vision.store import ImageStore
from rlhf.workers.frozen.likelihood import LikelihoodWorker
from rlhf.workers.frozen.reward import RewardSettings

logger = logging.getLogger(__name__)
REPORT, SAMPLES = "eval.json", EVAL_SAMPLES
STORED_ANSWERS = "suite_answers_"  # the beginning of the names of files with answers to suites
SAYS_EVERY_S = 15.0
ResponseTexts = Sequence[str] | Sequence[Transcript]  # responses to a prompt; conversations as transcripts


def refuse_unusable_results_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise UserError if the folder is not writable, or holds results and `overwrite` is not given."""
    if (folder / REPORT).exists() and not overwrite:
        text = f"{folder} holds an evaluation already. Name another folder with --out, or replace it with --overwrite."
        raise UserError(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; name another folder with --out") from error


def evaluate_inputs(inputs: EvalInputs, folder: Path) -> Evaluation:
    """Write eval.json and samples.jsonl into the folder, and errors.jsonl if a reward or an environment failed.

    RunError: a reward with `on_error: fail` failed, or a set has no score at all.
    """
    (folder / "errors.jsonl").unlink(missing_ok=True)  # left by a failed evaluation

    def note(model: str, split: str, scored: ScoredGroup) -> None:
        for error in (*scored.scores.errors, *scored.scores.scored_errors):
            write_error(folder, error_record(error, step=0, split=split, model=model))

    with connected(inputs.cluster):
        evaluation, rows = run_async(_evaluate(inputs, note, folder))
    keep_images(rows, inputs.images, folder)
    write_lines(folder / SAMPLES, rows)
    _write_report(folder / REPORT, evaluation)
    _forget_answers(folder)
    return evaluation


def keep_images(rows: Sequence[Mapping[str, Any]], images: Path, folder: Path) -> None:
    """Store the images that the samples name in the folder of the results, for `rlhf view`."""
    store = ImageStore(images_folder(folder))
    for name in dict.fromkeys(name for row in rows for name in row.get("images") or ()):
        store.add_file(images / name)


def _write_report(path: Path, evaluation: Evaluation) -> None:
    write_atomic(path, json.dumps(evaluation.to_json(), indent=2, allow_nan=False) + "\n")


def run_evaluation(stage: EvaluationStage, loaded: LoadedConfig, start: Start) -> None:
    """Run an evaluation as a stage of a pipeline. The metrics are row 0, and eval.json marks the end."""
    with recording(stage, resume=start.resume, trackers=start.trackers) as (record, _):
        with prefix_errors(f"stages.{record.folder.path.name}"):
            inputs = inputs_of_stage(stage, loaded)
        record.begin_step(0)
        engines = inputs.rewards or inputs.candidates[0].suites is not None
        with record.stage("eval", role=RolloutEngines.role if engines else LikelihoodWorkers.role):

            def note(model: str, split: str, scored: ScoredGroup) -> None:
                note_errors(scored, record, step=0, split=split, model=model)

            evaluation, rows = run_async(_evaluate(inputs, note, record.folder.path))
        keep_images(rows, inputs.images, record.folder.path)
        write_lines(samples_path(record.folder.path, 0), rows)
        metrics = evaluation.to_metrics()
        record.write_row(0, {**record.row(), **metrics})
        _write_report(result_of(stage), evaluation)
        _forget_answers(record.folder.path)
    logger.info("%s: %s", stage.run.name, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


async def _evaluate(
    inputs: EvalInputs, note: Callable[[str, str, ScoredGroup], None], folder: Path
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Evaluate all models, and also return the samples. Call `note` with model, set and scored group. The folder gets
    the answers to suites as they come, for a repetition after an interruption."""
    sets: list[SetReport] = []
    rows: list[dict[str, Any]] = []
    if inputs.candidates[0].examples:
        sets, rows = _example_reports(inputs, await _measured(inputs.candidates[0], inputs))
    if inputs.rewards or inputs.candidates[0].suites is not None:
        answered = [await _answers(candidate, inputs, note, folder) for candidate in inputs.candidates]
        if inputs.rewards:
            sets, rows = _prompt_reports(inputs, [answers for answers, _ in answered])
        suites = [suites for _, suites in answered]
        sets += suite_reports(suites[0], suites[1] if len(suites) > 1 else None, seed=inputs.decoding.seed)
        for candidate, answers in zip(inputs.candidates, suites, strict=True):
            rows += suite_rows(candidate.model.name, answers)
    _warn_of_blindness(rows)
    names, passing = [candidate.model.name for candidate in inputs.candidates], inputs.marking.passing
    evaluation = Evaluation(
        model=names[0],
        against=names[1] if len(names) > 1 else None,
        seed=inputs.decoding.seed,
        samples=inputs.decoding.samples if inputs.rewards else None,
        passing=None if passing is None else str(passing),
        sets=tuple(sets),
    )
    return evaluation, rows


def _warn_of_blindness(rows: Sequence[Mapping[str, Any]]) -> None:
    """Warn if a model's results do not change with exchanged images (`exchange_images`)."""
    results: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        if "set" in row:
            results.setdefault((row["model"], row["set"]), []).append(row.get("response", row.get("logprob")))
    for (model, name), own in results.items():
        if results.get((model, f"{name}{SUFFIX}")) == own:
            what = "%s cannot see its images: all results on %s are the same with exchanged images"
            logger.warning(f"{what}. Check the vision tower and the processor in the model's folder", model, name)


async def _answers(
    candidate: Candidate, inputs: EvalInputs, note: Callable[[str, str, ScoredGroup], None], folder: Path
) -> tuple[dict[str, list[PromptResult]], list[SuiteAnswers]]:
    """Return a model's scored responses to the prompts of every set, and the answers to the suites. Prompts with a
    failed reward are left out."""
    cluster, decoding, policy = inputs.cluster, inputs.decoding, inputs.reward_policy
    roles = {RolloutEngines.role, *((RewardWorkers.role,) if inputs.rewards else ())}
    placement = await reserve_roles(roles, cluster, with_reward_model=inputs.reward_model is not None)
    groups: list[Stoppable] = []
    async with ending(groups, placement.release, heartbeat_timeout_s=cluster.heartbeat_timeout_s):
        engines = serve_engines(
            candidate.model,
            cluster,
            placement,
            max_model_len=candidate.longest_sequence(decoding.max_new_tokens),
            environment=candidate.environment,
            images=candidate.images,
            engine=engine_for(candidate.environment, with_suites=candidate.suites is not None),
        )
        groups.append(engines)
        if not inputs.rewards:
            await engines.start(deadline_s=cluster.start_timeout_s)
            return {}, await _suite_answers(candidate, engines, cluster, folder)
        settings = RewardSettings(
            specs=inputs.rewards,
            tokenizer=candidate.model.tokenizer,
            trust_remote_code=candidate.model.trust_remote_code,
            template=decoding.template,
            model=inputs.reward_model,
            timeout_s=policy.timeout_s,
            processes=policy.processes,
            memory_gib=policy.memory_gib,
            max_tokens_per_microbatch=inputs.max_tokens_per_microbatch,
        )
        longest = max(one.longest_sequence(decoding.max_new_tokens) for one in inputs.candidates)
        reward = RewardWorkers.create(cluster, placement, settings, longest_sequence=longest)
        groups.append(reward)
        # Sequential: an engine measures the free memory of its GPU, so no other process may start or end at that time.
        await engines.start(deadline_s=cluster.start_timeout_s)
        await reward.start(deadline_s=cluster.start_timeout_s)

        async def judge(name: str, group: CompletedGroup, _: int) -> tuple[ScoredGroup, ResponseTexts]:
            async def read() -> ResponseTexts:
                has_images = min(group.request.prompt.token_ids, default=0) < 0  # named and placed by transcripts
                is_told = candidate.environment is not None or has_images
                return await (reward.transcripts(group) if is_told else reward.texts(group))

            scores, responses = await asyncio.gather(reward.score(group), read())
            scored = ScoredGroup(group=group, scores=scores)
            note(candidate.model.name, name, scored)
            return scored, responses

        results = {}
        for name, prompts in candidate.prompts.items():
            counts = (len(prompts), decoding.samples)
            logger.info("%s answers %s: %d prompts, %d samples", candidate.model.name, name, *counts)
            requests, sampling = requests_of(prompts, decoding)
            answers = engines.generate(requests, sampling, version=0)
            results[name] = _results(name, await process_answers(answers, requests, partial(judge, name)), inputs)
        return results, await _suite_answers(candidate, engines, cluster, folder)


async def _suite_answers(
    candidate: Candidate, engines: RolloutEngines, cluster: ClusterConfig, folder: Path
) -> list[SuiteAnswers]:
    """Return a model's answers to the suites. Questions without an answer are written to errors.jsonl."""
    if candidate.suites is None:
        return []
    model = candidate.model
    logger.info("%s answers %s", model.name, ", ".join(candidate.suites.names))
    said_at = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= SAYS_EVERY_S:
            said_at = time.monotonic()
            logger.info("%s: %d of %d requests answered", model.name, done, total)

    stored = folder / f"{STORED_ANSWERS}{_identity(model)}.jsonl"
    deadline_s = cluster.call_timeout_s
    answers = await ask_suites(candidate.suites, engines.fronts, stored=stored, deadline_s=deadline_s, progress=say)
    for failure in suite_failures(answers, step=0, model=model.name):
        logger.warning("%s, question %s is left out, because %s", failure.split, failure.prompt_id, failure.message)
        write_error(folder, failure)
    return answers


def _identity(model: ModelOnDisk) -> str:
    """Return a digest of a model's name and dtype and, for folders, of the sizes and times of the files."""
    folders = [Path(folder) for folder in (model.base, model.adapter) if folder is not None]
    files = sorted(file for folder in folders for file in folder.glob("*") if file.is_file())
    seen = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((model, seen)).encode()).hexdigest()[:16]


def _forget_answers(folder: Path) -> None:
    for path in folder.glob(f"{STORED_ANSWERS}*.jsonl"):
        path.unlink()


def _results(name: str, judged: Sequence[tuple[ScoredGroup, ResponseTexts]], inputs: EvalInputs) -> list[PromptResult]:
    """Return a set's results without prompts of failed rewards. RunError: all failed, or a failure ends the run."""
    rules = held_out_rules(rules_of_specs(inputs.rewards))
    errors = [scored.scores.errors for scored, _ in judged if scored.scores.errors]
    fatal = [failed for failed in errors if ends_run(failed, rules, inputs.reward_policy.on_error)]
    if errors and (fatal or len(errors) == len(judged)):
        raise RunError(f"eval {name}: {describe_errors((fatal or errors)[0])}")
    for failed in errors:
        logger.warning("%s is left out, because %s", name, describe_errors(failed))
    form = inputs.marking.answers if inputs.marking.passing is not None else None
    return [_result(scored, responses, form) for scored, responses in judged if not scored.scores.errors]


async def _measured(candidate: Candidate, inputs: EvalInputs) -> dict[str, list[ExampleResult]]:
    """Return a model's results on the examples of every set."""
    cluster = inputs.cluster
    placement = await reserve_roles({LikelihoodWorkers.role}, cluster, with_reward_model=False)
    spawned = spawn(
        cluster,
        placement,
        LikelihoodWorkers.role,
        LikelihoodWorker,
        candidate.model,
        longest_sequence=max(example.longest for examples in candidate.examples.values() for example in examples),
        max_tokens_per_microbatch=inputs.max_tokens_per_microbatch,
    )
    workers = LikelihoodWorkers(*spawned, deadline_s=cluster.call_timeout_s)
    async with ending([workers], placement.release, heartbeat_timeout_s=cluster.heartbeat_timeout_s):
        await workers.start(deadline_s=cluster.start_timeout_s)
        results = {}
        for name, examples in candidate.examples.items():
            logger.info("%s is measured on %s: %d examples", candidate.model.name, name, len(examples))
            results[name] = await workers.measure(examples)
    return results


def _result(scored: ScoredGroup, responses: ResponseTexts, answers: AnswerForm | None) -> PromptResult:
    group, prompt = scored.group, scored.group.request.prompt
    conversations = tuple(response for response in responses if isinstance(response, Transcript))
    texts = [response.response if isinstance(response, Transcript) else response for response in responses]
    return PromptResult(
        prompt_id=prompt.prompt_id,
        prompt=conversations[0].turns[0].text if conversations else prompt.text,  # includes the first observation
        responses=tuple(texts),
        transcripts=conversations or None,
        scores=scored.scores.scores,
        by_name=scored.scores.measured,
        answers=None if answers is None else tuple(answer_of(text, answers) for text in texts),
        truncated=tuple(info.finish_reason == "length" for info in group.infos),
        response_tokens=tuple(info.num_response_tokens for info in group.infos),
    )


def _prompt_reports(
    inputs: EvalInputs, answers: Sequence[Mapping[str, Sequence[PromptResult]]]
) -> tuple[list[SetReport], list[dict[str, Any]]]:
    """Return the first model's reports and the samples of all models."""
    first = inputs.candidates[0]
    reports = []
    for name, results in answers[0].items():
        reports += prompt_reports(
            name,
            results,
            inputs.marking,
            against=answers[1][name] if len(answers) > 1 else None,
            sources=first.sources.get(name, {}),
            prompt_ids=[prompt.prompt_id for prompt in first.prompts[name]],
            seed=inputs.decoding.seed,
        )
    rows = [
        row
        for candidate, by_set in zip(inputs.candidates, answers, strict=True)
        for name, results in by_set.items()
        for row in prompt_rows(candidate.model.name, name, results, inputs.marking)
    ]
    return reports, rows


def _example_reports(
    inputs: EvalInputs, measured: Mapping[str, Sequence[ExampleResult]]
) -> tuple[list[SetReport], list[dict[str, Any]]]:
    seed, model = inputs.decoding.seed, inputs.candidates[0].model.name
    reports = [
        SetReport(name=name, num_rows=len(results), num_failed=0, metrics=example_metrics(results, seed=seed))
        for name, results in measured.items()
    ]
    return reports, [row for name, results in measured.items() for row in example_rows(model, name, results)]
