"""Write the page of `rlhf view` as a single file for `rlhf report`. The file contains the server's answers.

The browser runs only the page's scripts (named by their hashes) and loads nothing else. Text of a model can therefore
neither run as a script nor send a request. A PNG of the main curves is written next to the page.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf.errors import RunError, UserError
from rlhf.tracking.diagnosis.findings import Findings
from rlhf.tracking.display.plots import plot_curves
from rlhf.tracking.metrics.declarations import is_declared
from rlhf.tracking.run_folder.atomic import write_atomic
from rlhf.tracking.run_folder.folder import images_folder
from rlhf.tracking.sinks.tracker import read_metrics
from rlhf.viewing.runs import RunPlace, RunPlaces
from rlhf.viewing.samples import SampleFiles, SampleIndex
from rlhf.viewing.server import DECLARED, STATIC
from rlhf.viewing.summary import MetricsSoFar, intact_rows, summary_of
from rlhf.vision.thumbnails import CONTENT_TYPE, encoded_thumbnail

MOST_POINTS = 1500  # of a curve
MOST_PROMPTS = 8  # of a set
MOST_RESPONSES = 2  # to a prompt at a step
MOST_TOKENS = 4000  # of a response, or characters of a text
MOST_ERRORS = 300
MOST_IMAGES = 64
MOST_IMAGE_BYTES = 2 * 2**20  # of all images
_IMAGE_SIDE = 160  # pixels
_NUM_PANELS = 6
_FRAME_PIXELS = 720  # height in a notebook
_SCANNED_STEPS = 25  # sample files at each end to search for the same prompt
_IMPORT = re.compile(r'^import (\{.+\}) from "\./(.+)";$', re.M)
_EXPORT = re.compile(r"^export ((?:async )?(?:function|const|class) (\w+))", re.M)
_EXPORTS = re.compile(r"\bexport\{(.+)\};\s*$")
_LINK = re.compile(r'<(link|script)[^>]*"/static/([^"]+)".*>')


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    html: Path
    pictures: tuple[Path, ...]  # one for each stage with curves
    findings: dict[str, Findings]  # by run

    def _repr_html_(self) -> str:
        """Return the page in a frame, for the cell of a notebook."""
        page = self.html.read_text(encoding="utf-8").replace("&", "&amp;").replace("'", "&#39;")
        return f"<iframe srcdoc='{page}' width='100%' height='{_FRAME_PIXELS}' style='border:0'></iframe>"


def write_report(folders: Sequence[Path], out: Path | None = None) -> Report:
    """Read the runs, and write the page to `out`.

    out: None: report.html in the folder of the run, or for several runs comparison.html in the first run's folder.
    UserError: a folder holds no run, a run is named twice, or the page cannot be written.
    """
    if not folders:
        raise UserError("report needs the folder of a run, such as runs/NAME")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"{', '.join(map(str, folders))}: a run is named twice. Name each run once.")
    runs = list(RunPlaces(folders).by_name().values())
    html = out or folders[0] / ("report.html" if len(folders) == 1 else "comparison.html")
    rows = {run.name: metric_rows(run.path) for run in runs}
    metrics = {run.name: MetricsSoFar(rows[run.name]) for run in runs}
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    answers = {"written": written, **_answers(runs, rows, metrics)}
    try:
        write_atomic(html, page(answers))
        pictures = tuple(_pictures(runs, metrics, html))
    except OSError as error:
        raise UserError(f"{html}: cannot be written: {error.strerror}. Name another file with --out.") from error
    return Report(html=html, pictures=pictures, findings={run.name: metrics[run.name].findings() for run in runs})


def metric_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl. UserError: a row is damaged."""
    try:
        return read_metrics(folder)
    except ValueError as error:
        raise UserError(
            f"{error}. Correct or remove this line, so that the report can show the remaining lines."
        ) from error


def _pictures(runs: Sequence[RunPlace], metrics: Mapping[str, MetricsSoFar], html: Path) -> list[Path]:
    """Write report.png, or for a pipeline report.STAGE.png of each stage with curves."""
    written = []
    stages = dict.fromkeys(run.stage for run in runs)
    for stage in stages:
        paths = {run.name: run.path for run in runs if run.stage == stage}
        if shown := shown_metrics([metrics[name] for name in paths]):
            end = f".{stage}.png" if len(stages) > 1 else ".png"
            written.append(plot_curves(paths, shown, output=html.with_suffix(end)))
    return written


def shown_metrics(runs: Sequence[MetricsSoFar]) -> list[str]:
    """Return the metrics of the curves to read first: the metrics of problems, then the main metrics."""
    problems = [of.metrics[0] for run in runs for of in run.findings() if of.severity != "notice"]
    keys = dict.fromkeys([*problems[:2], *(key for run in runs for key in run.main())])
    return [key for key in keys if is_declared(key) and any(key in run.columns for run in runs)][:_NUM_PANELS]


# ---- the answers of the server


def _answers(
    runs: Sequence[RunPlace], rows: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Mapping[str, MetricsSoFar]
) -> dict[str, Any]:
    samples = {run.name: _samples(run, rows[run.name]) for run in runs}
    shown = {run.path: [row for of in samples[run.name].values() for row in of["whole"]] for run in runs}
    return {
        "runs": [{**run.state(), "steps": list(samples[run.name])} for run in runs],
        "metrics": DECLARED,
        "data": {run.name: {**_columns(rows[run.name]), "errors": _errors(run.path)} for run in runs},
        "summaries": {run.name: summary_of(run, metrics[run.name]) for run in runs},
        "samples": {f"{name} {step}": of for name, steps in samples.items() for step, of in steps.items()},
        "limits": f"This report holds at most {MOST_PROMPTS} prompts of a set at two steps, and {MOST_RESPONSES} "
        f"responses to each.",
        "images": _images(shown),
    }


def _images(shown: Mapping[Path, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Return small versions of the shown responses' images as data URIs by name. shown: responses by run folder.

    A missing or damaged image is left out.
    """
    places = {name: path for path, rows in shown.items() for row in rows for name in row.get("images") or ()}
    images: dict[str, str] = {}
    room = MOST_IMAGE_BYTES
    for name, path in itertools.islice(places.items(), MOST_IMAGES):
        try:
            data = encoded_thumbnail(images_folder(path), name, side=_IMAGE_SIDE)
        except (UserError, RunError):
            continue
        room -= len(data)
        if room < 0:
            break
        images[name] = f"data:{CONTENT_TYPE};base64,{base64.b64encode(data).decode()}"
    return images


def _errors(folder: Path) -> Any:
    path = folder / "errors.jsonl"
    lines = path.read_bytes().splitlines()[-MOST_ERRORS:] if path.exists() else []
    return [_limited(row) for row in intact_rows(lines)]


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the metrics as the page stores them: columns, aligned to the steps and thinned."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        for key, value in row.items():
            if "/" in key and isinstance(value, int | float) and math.isfinite(value):
                places.setdefault(key, []).append(place)
    drawn = {key: {*of[:: -(-len(of) // MOST_POINTS)], of[-1]} for key, of in places.items()}
    shown = sorted({place for of in drawn.values() for place in of})
    columns = {key: [_limited(rows[at][key]) if at in of else None for at in shown] for key, of in drawn.items()}
    times = [_limited(rows[place].get("time_s")) for place in shown]
    return {"steps": [rows[place]["step"] for place in shown], "times": times, "columns": columns}


def _samples(run: RunPlace, rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return the listings of some steps with their responses: prompts that came early and late, of every set."""
    steps, files = run.sample_steps(), SampleFiles()
    evaluated = sorted({row["step"] for row in rows if any(key.startswith("eval/") for key in row)} & set(steps))
    scanned = {*steps[:_SCANNED_STEPS], *steps[-_SCANNED_STEPS:], *evaluated[:1], *evaluated[-1:]}
    indexes = {step: files.index(run.samples(step)) for step in sorted(scanned)}
    chosen = sorted({group for pair in _pairs(indexes) for group in (pair.first, pair.last)})
    listings = {}
    for step in sorted({step for step, _ in chosen}):
        index, groups = indexes[step], [group for of, group in chosen if of == step]
        of_group = [[place for place, row in enumerate(index.rows) if row["group"] == group] for group in groups]
        places = [place for places in of_group for place in places[:MOST_RESPONSES]]
        lines = files.whole(run.samples(step), index.version, places)
        if lines is not None:  # the run has not written the step again
            prompts = {group: asdict(index.prompts[group]) for group in groups}
            whole = list(map(_response, lines.splitlines()))
            listings[step] = _limited({"rows": [index.rows[at] for at in places], "prompts": prompts, "whole": whole})
    return listings


def _response(line: bytes) -> dict[str, Any]:
    """Return a whole row, with the number of tokens left out of the report."""
    row: dict[str, Any] = json.loads(line)
    tokens = row.get("tokens") or {"ids": ()}
    return {**row, "cut": max(len(tokens["ids"]) - MOST_TOKENS, 0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPair:
    """The responses to one prompt at an early and at a late step: each a step and the name of a group."""

    first: tuple[int, str]
    last: tuple[int, str]
    gain: float  # of the mean score


def _pairs(indexes: Mapping[int, SampleIndex]) -> Iterator[GroupPair]:
    """Yield the prompts to show of each set. If no prompt came twice, take prompts of the first and the last step."""
    sets: dict[str, dict[tuple[Any, str], dict[tuple[int, str], list[float]]]] = {}  # the scores of each group
    for step, index in indexes.items():
        for row in index.rows:
            prompt = (row.get("prompt_id"), index.prompts[row["group"]].hash)
            scores = sets.setdefault(row["split"], {}).setdefault(prompt, {}).setdefault((step, row["group"]), [])
            scores += [row["score"]] if "score" in row else []
    for prompts in sets.values():
        pairs = [_pair(groups) for groups in prompts.values()]
        early, late = min(pair.first[0] for pair in pairs), max(pair.last[0] for pair in pairs)
        if again := [pair for pair in pairs if pair.first[0] < pair.last[0]]:
            yield from shown_pairs(again, MOST_PROMPTS)
        else:
            for end in {early, late}:
                yield from [pair for pair in pairs if pair.first[0] == end][: MOST_PROMPTS // 2]


def _pair(groups: Mapping[tuple[int, str], Sequence[float]]) -> GroupPair:
    (first, *_), (*_, last) = groups, groups
    scores = [groups[first], groups[last]]
    gain = fmean(scores[1]) - fmean(scores[0]) if all(scores) else 0.0
    return GroupPair(first=first, last=last, gain=gain)


def shown_pairs(pairs: Sequence[GroupPair], count: int) -> list[GroupPair]:
    """Return some pairs for a reader: improved, then worsened, then unchanged responses."""
    by_gain = sorted(pairs, key=lambda pair: -pair.gain)
    lost = [pair for pair in reversed(by_gain) if pair.gain < 0][: count // 3]
    same = [pair for pair in by_gain if pair.gain == 0][: count // 6]
    chosen = [pair for pair in by_gain if pair.gain > 0][: count - len(lost) - len(same)] + lost + same
    return chosen + [pair for pair in by_gain if pair not in chosen][: count - len(chosen)]


def _limited(value: Any) -> Any:
    """Return a value of JSON with short texts and lists, five digits, and null for numbers that are not finite."""
    if isinstance(value, str):
        return value if len(value) <= MOST_TOKENS else f"{value[:MOST_TOKENS]} ... ({len(value):,} characters)"
    if isinstance(value, list):
        return [_limited(item) for item in value[:MOST_TOKENS]]
    if isinstance(value, dict):
        return {name: _limited(item) for name, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


# ---- the page


def page(answers: Mapping[str, Any]) -> str:
    """Return the page of `rlhf view` as one text, with scripts, styles and the answers of the server inside."""
    allowed: dict[str, list[str]] = {"script": [], "style": []}

    def inline(link: re.Match[str]) -> str:
        name = link[2]
        if name.endswith(".svg"):
            return ""
        kind, start = ("style", "style") if name.endswith(".css") else ("script", "script")
        text = _read(name)
        if name == "app.js":
            start, text = 'script type="module"', _script(name)
        allowed[kind].append(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
        return f"<{start}>{text}</{kind}>"

    data = json.dumps(answers, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    body = f'<body><script id="answers" type="application/json">{data}</script>'
    whole = _LINK.sub(inline, _read("index.html").replace("<body>", body))
    policy = (
        f"default-src 'none'; img-src data:; script-src {' '.join(allowed['script'])}; "
        f"style-src {' '.join(allowed['style'])}"
    )
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    return whole.replace('<meta charset="utf-8">', head, 1)


def _script(name: str) -> str:
    """Return a module and all imported modules as a single script. Each module becomes a function."""
    parts: dict[str, str] = {}

    def add(module: str) -> None:
        if module in parts:
            return
        source = _read(module)
        for _, imported in _IMPORT.findall(source):
            add(imported)
        given = [exported for _, exported in _EXPORT.findall(source)]
        for listed in _EXPORTS.findall(source):
            given += [re.sub(r"(\S+) as (\S+)", r"\2: \1", one) for one in listed.split(",")]
        source = _EXPORTS.sub("", _EXPORT.sub(r"\1", _IMPORT.sub(r'const \1 = modules["\2"];', source)))
        parts[module] = f'modules["{module}"] = (() => {{\n{source}\nreturn {{ {", ".join(given)} }};\n}})();'

    add(name)
    return "\n".join(["const modules = {};", *parts.values()])


def _read(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")
