"""Run tasks of lm-evaluation-harness (the package lm-eval), with our fronts as its model.

The library chooses prompts, examples, stop strings and metrics. Its data sets come from the hub, the cache of
`datasets`, or a folder with copies of their repositories.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.suites.client import Answer, Ask, Client
from rlhf.suites.prompts import Prompts
from rlhf.suites.reasoning import REASONING_SUITES
from rlhf.suites.spec import Question, SuiteAnswers, SuiteSpec

MOST_NAMES = 5
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def load_tasks(names: Sequence[str], data: str | None) -> dict[str, dict[str, Any]]:
    """Return the library's tasks of each suite by name. UserError: unknown names, tasks or data that cannot be used."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        ours = ", ".join(REASONING_SUITES)
        raise UserError(
            f"Suite {names[0]} needs the package lm-eval, which is not installed; it comes with the extra `suites`: "
            f"pip install 'ray-rlhf[suites]'. Without a package of that extra there is {ours}."
        ) from error
    manager = TaskManager()
    known = manager.all_tasks
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, [*REASONING_SUITES, *known], n=MOST_NAMES, cutoff=0.5)
            near = f"Near names: {', '.join(close)}." if close else "`lm-eval ls tasks` lists the tasks of the library."
            raise UserError(f"Suite {name} is unknown to lm-eval {_version()}. {near}")
    loaded = {}
    for name in names:
        with _data_from(None if data is None else Path(data), name):
            loaded[name] = manager.load([name])["tasks"]
        for task_name, task in loaded[name].items():
            _refuse_unusable(name, task_name, task)
    return loaded


def _refuse_unusable(suite: str, name: str, task: Any) -> None:
    kind = task.OUTPUT_TYPE
    if kind not in ("generate_until", "multiple_choice", "loglikelihood"):
        raise UserError(f"Suite {suite}: task {name} is of kind {kind}, which engines do not answer. Leave it out.")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"Suite {suite}: task {name} runs programs that the model writes, without a sandbox. Leave it out."
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"Suite {suite}: task {name} asks about images or sound, and prompts are text. Leave it out.")


@contextmanager
def _data_from(folder: Path | None, suite: str) -> Iterator[None]:
    """Let the library load data sets from a folder in this block, and name a missing data set."""
    import datasets

    load, wanted = datasets.load_dataset, ""

    def load_copy(path: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal wanted
        wanted = path
        if folder is None or Path(path).exists() or path in ("json", "csv", "parquet", "text"):
            return load(path, *args, **kwargs)
        copy = folder / path
        if not copy.is_dir():
            raise FileNotFoundError(f"there is no folder {copy}")
        kwargs |= {"cache_dir": str(Path(datasets.config.HF_DATASETS_CACHE) / _digest(copy))}
        return load(str(copy), *args, **{key: value for key, value in kwargs.items() if key != "revision"})

    datasets.load_dataset = load_copy
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library raises errors of datasets, of the hub's client and its own
        why = " ".join(str(error).split())[:300] or type(error).__name__
        fix = (
            f"Copy the data set: hf download {wanted} --repo-type dataset --local-dir FOLDER/{wanted}, and give FOLDER "
            "as the folder of the data (--suite-data, suite_data)."
        )
        text = f"data set {wanted} cannot be loaded: {why}. {fix}" if wanted else f"the task cannot be loaded: {why}."
        raise UserError(f"Suite {suite}: {text}") from error
    finally:
        datasets.load_dataset = load


def _digest(folder: Path) -> str:
    """Return a digest of a folder's place, and of the sizes and times of its files.

    The cache of `datasets` knows a folder by its last name alone, and would return the rows of another folder.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    seen = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((str(folder.resolve()), seen)).encode()).hexdigest()[:16]


def ask_tasks(name: str, tasks: Mapping[str, Any], spec: SuiteSpec, client: Client, prompts: Prompts) -> SuiteAnswers:
    """Ask the questions of a suite's tasks. The values of each question and the totals are the library's."""
    import numpy as np
    from lm_eval.evaluator import evaluate

    random.seed(spec.seed)
    np.random.seed(spec.seed)
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=spec.seed)
    model = _model(spec, client, prompts)
    results = evaluate(
        model,
        {"tasks": dict(tasks), "groups": {}, "group_map": {}},
        limit=spec.limit,
        bootstrap_iters=0,
        apply_chat_template=prompts.has_template,
        fewshot_as_multiturn=prompts.has_template,
    )
    questions: list[Question] = []
    for task_name in tasks:
        part = task_name if len(tasks) > 1 else None
        metrics = results["results"][task_name]
        is_higher_better = results["higher_is_better"].get(task_name, {})
        rows: dict[int, list[Mapping[str, Any]]] = {}
        for row in results["samples"][task_name]:
            rows.setdefault(row["doc_id"], []).append(row)
        for doc_id, filtered in rows.items():
            answers = model.answered[task_name, doc_id]
            questions.append(_question(len(questions), part, filtered, answers, is_higher_better))
    totals = {} if len(tasks) > 1 else _totals(metrics, questions)
    return SuiteAnswers(name=name, questions=tuple(questions), totals=totals)


def _question(
    number: int,
    task: str | None,
    rows: Sequence[Mapping[str, Any]],  # a row per filter of the responses
    answers: Sequence[tuple[str, Answer]],  # a response, or a continuation for each choice
    is_higher_better: Mapping[str, bool],
) -> Question:
    values: dict[str, float] = {}
    score: float | None = None
    for row in rows:
        for metric in row["metrics"]:
            if isinstance(row[metric], (bool, int, float)) and math.isfinite(row[metric]):
                name = _metric(metric, row["filter"])
                values[name] = float(row[metric])
                if score is None and is_higher_better.get(metric):
                    score = values[name]
    drawn = [answer for _, answer in answers if answer.tokens]
    likeliest = max(answers, key=lambda answer: answer[1].logprob)
    return Question(
        number=number,
        task=task,
        prompt=str(rows[0]["arguments"][0][0]),
        response=likeliest[0],
        target=str(rows[0]["target"]),
        score=score,
        values=values,
        truncated=any(answer.truncated for answer in drawn),
        response_tokens=sum(answer.tokens for answer in drawn),
        failure=next((answer.failure for _, answer in answers if answer.failure is not None), None),
    )


def _totals(metrics: Mapping[str, Any], questions: Sequence[Question]) -> dict[str, float]:
    """Return the library's metrics that are no mean over the questions. With a failed question there are none.

    A correlation of constant answers is no number, and is left out.
    """
    if any(question.failure is not None for question in questions):
        return {}
    totals = {}
    for key, value in metrics.items():
        metric, comma, filter_name = key.partition(",")
        is_number = isinstance(value, (int, float)) and math.isfinite(value)
        if not comma or metric.endswith("_stderr") or not is_number:
            continue
        name = _metric(metric, filter_name)
        own = [question.values[name] for question in questions if name in question.values]
        if len(own) < len(questions) or abs(sum(own) / len(own) - value) > 1e-6:
            totals[name] = float(value)
    return totals


def _metric(metric: str, filter_name: str) -> str:
    name = metric if filter_name == "none" else f"{metric}.{filter_name}"
    return re.sub(r"[^A-Za-z0-9_.@-]+", "_", name)


def _model(spec: SuiteSpec, client: Client, prompts: Prompts) -> Any:
    """Return the fronts as a model of the library. `answered` has the answers by task and question."""
    from lm_eval.api.model import TemplateLM

    tokenizer = prompts.tokenizer

    class Fronts(TemplateLM):  # type: ignore[misc]
        answered: dict[tuple[str, int], list[tuple[str, Answer]]]
        tokenizer_name = spec.tokenizer
        eot_token_id = tokenizer.eos_token_id
        prefix_token_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return prompts.encode(string)

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return prompts.text(chat_history, add_generation_prompt=add_generation_prompt)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            repeats: Counter[int] = Counter()  # of a request; each repeat is drawn with another seed
            asks = []
            for request in requests:
                asks.append(_sampled(request.args[0], request.args[1], spec.seed + repeats[id(request)], prompts))
                repeats[id(request)] += 1
            return [answer.text for answer in self._note(requests, asks, lambda request, answer: answer.text)]

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            asks = []
            for context, continuation in (request.args for request in requests):
                if context:
                    before, scored = self._encode_pair(context, continuation)
                else:
                    before, scored = [self.prefix_token_id], tokenizer.encode(continuation, add_special_tokens=False)
                room = 1  # of the token that an engine samples after the prompt
                asks.append(Ask(prompt_ids=prompts.fitting([*before, *scored], room), scored=len(scored), sampling={}))
            answers = self._note(requests, asks, lambda request, answer: request.args[1])
            return [(answer.logprob, answer.is_greedy) for answer in answers]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            raise NotImplementedError  # load_tasks refuses these tasks

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            raise NotImplementedError  # loglikelihood does not come here

        def _note(
            self, requests: Sequence[Any], asks: Sequence[Ask], text: Callable[[Any, Answer], str]
        ) -> list[Answer]:
            answers = client.answer(asks)
            for request, answer in zip(requests, answers, strict=True):
                place = request.task_name, request.doc_id
                self.answered.setdefault(place, []).append((text(request, answer), answer))
            return answers

    model = Fronts()
    model.answered = {}
    return model


def _sampled(context: str, settings: dict[str, Any], seed: int, prompts: Prompts) -> Ask:
    """Return the request for a response, with the task's settings as the library reads them."""
    from lm_eval.models.utils import normalize_gen_kwargs

    read = normalize_gen_kwargs(settings)
    most = prompts.room(read["max_gen_toks"])
    drawn = {name: read[name] for name in _SAMPLING if read.get(name) is not None}
    drawn.setdefault("temperature", 1.0 if read["do_sample"] else 0.0)
    stop = [text for text in read["until"] if text]
    sampling = {"max_tokens": most, "seed": seed, **drawn, **prompts.ends(), **({"stop": stop} if stop else {})}
    return Ask(prompt_ids=prompts.ids(context, most), sampling=sampling)


def _version() -> str:
    from importlib.metadata import version

    return version("lm-eval")
