"""The whole report: runs of the same stage are overlaid, everything is inlined, one file is written.

The page allows only its two scripts (by their hashes) and no address. Its content can therefore neither act nor call. A
PNG of the main curves is written next to it.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.reporting import sections
from rlhf.reporting.clock import time_spent
from rlhf.reporting.curves import keys_of, main_keys, plot
from rlhf.reporting.markup import embedded, folded, section, text
from rlhf.reporting.runs import Run, read_pairs, read_runs, read_spans
from rlhf.tracking.diagnosis.diagnose import diagnose
from rlhf.tracking.diagnosis.findings import SEVERITIES, Finding
from rlhf.tracking.display.plots import COLORS, plot_curves
from rlhf.tracking.metrics.declarations import is_declared
from rlhf.tracking.run_folder.atomic import write_atomic

_OWN = Path(__file__).with_name("static")
_UPLOT = Path(__file__).parent.parent / "viewing" / "static" / "vendor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The paths of a written report and its findings."""

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
        keys = [key for key in main_keys(runs, [one for run in runs for one in findings[run.name]]) if is_declared(key)]
        if keys:
            end = f".{runs[0].stage}.png" if len(groups) > 1 else ".png"
            written.append(plot_curves({run.name: run.folder for run in runs}, keys, output=html.with_suffix(end)))
    return written


def _page(groups: Sequence[Sequence[Run]], findings: dict[str, list[Finding]], *, title: str) -> str:
    runs = [run for group in groups for run in group]
    data: dict[str, Any] = {"groups": []}
    content = _summary(runs, findings) + sections.header(runs)
    for group in groups:
        content += _group(group, findings, data)
    content += sections.whole_configs(runs)
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    scripts = [_read(_UPLOT / "uPlot.iife.min.js"), _read(_OWN / "report.js")]
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{text(title)}: report</title>'
        f"<style>{_read(_UPLOT / 'uPlot.min.css')}</style><style>{_read(_OWN / 'report.css')}</style></head><body>"
        f'<h1>{text(title)}</h1><p class="dim">Written {written}.</p>{content}'
        f'<script id="data" type="application/json">{embedded(data)}</script>'
        + "".join(f"<script>{script}</script>" for script in scripts)
        + "</body></html>\n"
    )


def _summary(runs: Sequence[Run], findings: dict[str, list[Finding]]) -> str:
    """Return a one-sentence summary."""
    found = [finding for run in runs for finding in findings[run.name]]
    counts = [(severity, sum(finding.severity == severity for finding in found)) for severity in SEVERITIES]
    counted = ", ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts if count)
    if not any(run.rows for run in runs):
        return "<p>No step is written down yet.</p>"
    return f"<p>{text(counted)} found.</p>" if counted else "<p>Nothing in the metrics looks wrong.</p>"


def _group(runs: Sequence[Run], findings: dict[str, list[Finding]], data: dict[str, Any]) -> str:
    """Return the section of overlaid runs: problems, differences, and then all details of each run."""
    several = len(runs) > 1
    content = ""
    for run in runs:
        diagnosis = sections.diagnosis(run, findings[run.name])
        content += f"<h3>Diagnosis{f' of {text(run.name)}' if several else ''}</h3>{diagnosis}" if diagnosis else ""
    content += sections.config_differences(runs) + _plots(runs, findings, data)
    for run in runs:
        details = "".join(
            (
                sections.numbers(run),
                sections.samples(run, read_pairs(run)),
                time_spent(run, read_spans(run.folder)),
                sections.memory(run),
                sections.errors(run),
            )
        )
        content += (folded(run.name, details) if several else details) if details else ""
    content += sections.environment_differences(runs)
    heading = runs[0].stage or ("Comparison" if several else "Run")
    return f"<h2>{text(heading)}</h2>{content}"


def _plots(runs: Sequence[Run], findings: dict[str, list[Finding]], data: dict[str, Any]) -> str:
    """Return places for the main curves, and folded ones for all others, by stage. Their data goes into `data`."""
    index = len(data["groups"])
    plots: list[dict[str, Any]] = []
    all_findings = [one for run in runs for one in findings[run.name]]
    names = [{"name": run.name, "color": COLORS[at % len(COLORS)]} for at, run in enumerate(runs)]
    data["groups"].append({"runs": names, "plots": plots})

    def places(keys: Sequence[str]) -> str:
        content = ""
        for key in keys:
            one = plot(key, runs, all_findings)
            unit = f' <span class="dim">{text(one["unit"])}</span>' if one["unit"] else ""
            content += (
                f'<div class="plot" title="{text(one["meaning"])}"><h4>{text(key)}{unit}</h4>'
                f'<div class="canvas" data-group="{index}" data-plot="{len(plots)}"></div></div>'
            )
            plots.append(one)
        return f'<div class="plots">{content}</div>'

    main, keys = main_keys(runs, all_findings), keys_of(runs)
    content = places(main) if main else ""
    stages = dict.fromkeys(key.split("/")[0] for key in keys)
    for stage in stages:
        own = [key for key in keys if key.split("/")[0] == stage]
        content += folded(stage, places(own), note=f"{len(own)}", of="group")
    return section("Curves", content)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
