"""The whole report: runs of the same stage are overlaid, everything is inlined, one file is written.

The browser runs only the page's two scripts (named by their hashes) and loads nothing else. Text of a model can
therefore neither run as a script nor send a request. A PNG of the main curves is written next to the page.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.reporting.curves import keys_of, main_keys, plot_data
from rlhf.reporting.markup import STATIC, embedded, page_template
from rlhf.reporting.runs import Run, read_runs
from rlhf.reporting.sections import config_differences, environment_differences, run_parts, whole_files
from rlhf.tracking.diagnosis.diagnose import diagnose
from rlhf.tracking.diagnosis.findings import SEVERITIES, Finding
from rlhf.tracking.display.plots import COLORS, plot_curves
from rlhf.tracking.metrics.declarations import is_declared
from rlhf.tracking.run_folder.atomic import write_atomic

_VIEW = Path(__file__).parent.parent / "viewing" / "static"
_UPLOT = _VIEW / "vendor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The paths of a written report, and the findings."""

    html: Path
    pictures: tuple[Path, ...]  # one for each stage with curves
    findings: dict[str, list[Finding]]  # by run


def write_report(folders: Sequence[Path], out: Path | None = None) -> Report:
    """Read the runs, and write the page to `out`.

    out: None: report.html in the folder of the run, or for several runs comparison.html in the first run's folder.
    UserError: a folder holds no run, or the page cannot be written.
    """
    if not folders:
        raise UserError("report needs the folder of a run, such as runs/NAME")
    runs = read_runs(folders)
    html = out or folders[0] / ("report.html" if len(folders) == 1 else "comparison.html")
    findings = {run.name: diagnose(run.rows) for run in runs}
    groups = [[run for run in runs if run.stage == stage] for stage in dict.fromkeys(run.stage for run in runs)]
    page = _page(groups, findings, title=", ".join(folder.resolve().name for folder in folders))
    try:
        write_atomic(html, page)
        pictures = tuple(_pictures(groups, findings, html))
    except OSError as error:
        raise UserError(f"{html}: cannot be written: {error.strerror}. Name another file with --out.") from error
    return Report(html=html, pictures=pictures, findings=findings)


def _pictures(groups: Sequence[Sequence[Run]], findings: dict[str, list[Finding]], html: Path) -> list[Path]:
    """Write report.png, or for a pipeline report.STAGE.png of each stage with curves."""
    written = []
    for runs in groups:
        problems = [finding for run in runs for finding in findings[run.name]]
        keys = [key for key in main_keys(runs, problems) if is_declared(key)]
        if keys:
            end = f".{runs[0].stage}.png" if len(groups) > 1 else ".png"
            written.append(plot_curves({run.name: run.folder for run in runs}, keys, output=html.with_suffix(end)))
    return written


def _page(groups: Sequence[Sequence[Run]], findings: dict[str, list[Finding]], *, title: str) -> str:
    plots = [_plots(group, findings, index) for index, group in enumerate(groups)]
    parts = [_group(group, findings, plots[index]) for index, group in enumerate(groups)]
    runs = [run for group in groups for run in group]
    module = _read(_VIEW / "sessions.js") + _read(STATIC / "report.js")
    scripts = [_read(_UPLOT / "uPlot.iife.min.js"), module]
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    return page_template().render(
        title=title,
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}",
        styles=[_read(_UPLOT / "uPlot.min.css"), _read(STATIC / "report.css")],
        scripts=scripts,
        written=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        summary=_summary(runs, findings),
        groups=parts,
        files=whole_files(runs),
        data=embedded({"groups": [{"runs": group["legend"], "plots": group["plots"]} for group in plots]}),
    )


def _summary(runs: Sequence[Run], findings: dict[str, list[Finding]]) -> str:
    """Return a one-sentence summary."""
    if not any(run.rows for run in runs):
        return "No step is written yet."
    counts = Counter(finding.severity for run in runs for finding in findings[run.name])
    counted = [f"{counts[name]} {name}{'s' if counts[name] > 1 else ''}" for name in SEVERITIES if counts[name]]
    return f"{', '.join(counted)} found." if counted else "Nothing in the metrics looks wrong."


def _group(runs: Sequence[Run], findings: dict[str, list[Finding]], plots: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of overlaid runs: problems, differences, curves, and all details of each run."""
    several = len(runs) > 1
    return {
        "heading": runs[0].stage or ("Comparison" if several else "Run"),
        "several": several,
        "parts": [run_parts(run, findings[run.name]) for run in runs],
        "main": plots["main"],
        "stages": plots["stages"],
        "config": config_differences(runs),
        "environment": environment_differences(runs),
    }


def _plots(runs: Sequence[Run], findings: dict[str, list[Finding]], group: int) -> dict[str, Any]:
    """Return the main curves, and all curves by stage. Each plot has a place in the list of all plots."""
    all_findings = [finding for run in runs for finding in findings[run.name]]
    plots: list[dict[str, Any]] = []

    def placed(keys: Iterable[str]) -> list[dict[str, Any]]:
        start = len(plots)
        plots.extend(plot_data(key, runs, all_findings) for key in keys)
        return [{**plot, "group": group, "index": index} for index, plot in enumerate(plots[start:], start)]

    main = placed(main_keys(runs, all_findings))
    stages = {stage: placed(keys) for stage, keys in groupby(keys_of(runs), key=lambda key: key.split("/")[0])}
    legend = [{"name": run.name, "color": COLORS[index % len(COLORS)]} for index, run in enumerate(runs)]
    return {"main": main, "stages": stages, "legend": legend, "plots": plots}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
