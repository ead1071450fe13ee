"""The W&B workspace of a project: rlhf/tracking/metrics/panels.py as line plots, then histograms and tables.

Made by wandb-workspaces; only saving speaks to W&B. The module reads no run.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import RunError, UserError
from rlhf.tracking.logs import redact
from rlhf.tracking.metrics.declarations import METRICS
from rlhf.tracking.metrics.panels import SECTIONS, Panel
from rlhf.tracking.metrics.reductions import Histogram

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "How a run goes"
ANSWER_WITHIN_S = 30


def make_workspace(*, entity: str, project: str) -> Workspace:
    """Return the workspace, without saving."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name=section.title, panels=[_plot(wr, panel) for panel in section.panels], is_open=True)
        for section in SECTIONS
    ]
    histograms = [metric.name for metric in METRICS.values() if metric.reduction is Histogram]
    media = [wr.MediaBrowser(title=name, media_keys=[name]) for name in histograms]
    samples = [wr.WeavePanelSummaryTable(table_name="samples/train")]
    sections += [ws.Section(name="Distributions", panels=media), ws.Section(name="Samples", panels=samples)]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="step", smoothing_type="none"),
        auto_generate_panels=False,
    )


def publish(*, project: str, entity: str | None, out: Path | None) -> str:
    """Save the workspace to W&B, or as JSON to a file without asking any server. Returns the address, or the file.

    UserError: no credentials, or no package. RunError: W&B refused the workspace.
    """
    if find_spec("wandb_workspaces") is None:
        raise UserError(
            "rlhf dashboard needs the package wandb-workspaces, which is not installed: "
            "`pip install 'ray-rlhf[dashboard]'`."
        )
    if out is not None:
        if not out.parent.is_dir():
            raise UserError(f"--out: the folder of {out} does not exist. Name a file in an existing folder.")
        workspace: Any = make_workspace(entity=entity or "", project=project)
        spec = workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
        out.write_text(json.dumps(spec, indent=1) + "\n", encoding="utf-8")
        return str(out)
    import wandb

    if not wandb.login(prompt=False):
        raise UserError(
            "rlhf dashboard saves to W&B, but there are no credentials: set WANDB_API_KEY, run `wandb login`, or write "
            "the workspace to a file with --out."
        )
    try:
        owner = entity or str(wandb.Api(timeout=ANSWER_WITHIN_S).default_entity)
        return str(make_workspace(entity=owner, project=project).save().url)
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise RunError(f"dashboard: W&B refused the workspace: {redact(str(error))}") from error


def _plot(reports: Any, panel: Panel) -> Any:
    """Return a line plot of the panel's metrics over our step. A pattern selects metrics with placeholders."""
    settings: dict[str, Any] = {"title": panel.title, "x": "step", "log_y": panel.log or None}
    if any("<" in name for name in panel.metrics):
        patterns = [f"^{METRICS[name].pattern}$" for name in panel.metrics]
        return reports.LinePlot(**settings, metric_regex="|".join(patterns))
    return reports.LinePlot(**settings, y=list(panel.metrics))
