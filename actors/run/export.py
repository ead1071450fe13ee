"""Export a checkpoint of any step as a model folder: the policy's ranks start again, load it, and export."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from actors.cluster.connect import connected
from actors.cluster.placement import reserve
from actors.roles.build import RunContext
from actors.roles.gang import OfflineGang
from actors.roles.group import ending
from actors.roles.ranks import RANKS
from rlhf.algorithms.sft import SFTConfig
from rlhf.config.files.base import read_tree
from rlhf.config.files.load import load
from rlhf.config.pipeline import texts_at
from rlhf.config.schema.root import Config
from rlhf.errors import UserError
from rlhf.models.publish import push_folder, refuse_unpublishable
from rlhf.owned_folders import temporary_folder
from rlhf.preflight.models import with_adapters, with_sources
from rlhf.reporting.model_card import write_model_card
from rlhf.stopping import run_async
from rlhf.tracking import logs
from rlhf.tracking.run_folder.manifest import find_damage

logger = logging.getLogger(__name__)


def export_checkpoint(
    run: Path, *, step: int | None, folder: Path, merged: bool, push_to_hub: str | None, trust_remote_code: bool
) -> None:
    """Write the policy of a checkpoint (default: the latest) as a Hugging Face or adapter folder.

    Args:
        merged: write a whole model, with the adapter added to the weights. UserError if the run trained no adapter.
        push_to_hub: upload the folder to this repository of the hub, OWNER/NAME; None uploads nothing.
        trust_remote_code: run code of the run's model or of its algorithm. The run may come from another person, so its
            configuration alone does not allow this.
    """
    logs.configure()
    if push_to_hub is not None:
        refuse_unpublishable(push_to_hub, key="--push-to-hub")
    resolved, checkpoint = run / "config.resolved.yaml", _checkpoint(run, step)
    if folder.exists():
        raise UserError(f"{folder} exists already; name a folder that does not")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}; name a folder that you can write") from error
    if not trust_remote_code:
        _refuse_code_of_run(resolved)
    config = next(iter(load(resolved).runs.values()))
    if merged and config.policy.lora is None:
        raise UserError(f"--merged: the run {run} has no policy.lora, so its model is whole already. Leave it out.")
    if config.policy.trust_remote_code and not trust_remote_code:
        raise UserError(
            f"{resolved}: policy.trust_remote_code is true, so the export would run code that comes with "
            f"{config.policy.model}. Repeat it with --trust-remote-code if you trust that model."
        )
    saved_step = int(checkpoint.name.removeprefix("step_"))
    damage = find_damage(checkpoint, step=saved_step)
    if damage is not None:
        raise UserError(f"{damage} Restore the file from a copy, or name another step with --step.")
    alone = Config.model_validate(
        {
            "run": config.run,
            "policy": config.policy,
            "algorithm": SFTConfig(name="sft"),  # same model and optimizer as a policy
            "data": config.data,
            "train": config.train,
            "cluster": config.cluster,
        }
    )
    if config.algorithm.has_scalar_head:
        alone = alone.model_copy(update={"algorithm": config.algorithm})
    with temporary_folder() as aside, connected(config.cluster):
        run_async(_export(with_adapters(with_sources(alone, aside), {}), checkpoint, folder, merged))
    write_model_card(folder, config, run=run, step=saved_step, merged=merged)
    logger.info("exported %s to %s", checkpoint.name, folder)
    if push_to_hub is not None:
        push_folder(folder, push_to_hub)


def _checkpoint(run: Path, step: int | None) -> Path:
    """Return the folder of a checkpoint of the run, by default the latest. UserError if there is none."""
    if not (run / "checkpoints").is_dir() or not (run / "config.resolved.yaml").exists():
        raise UserError(
            f"{run} is not a run folder: it has no checkpoints/ or config.resolved.yaml. Name a run's own folder."
        )
    name = "latest" if step is None else f"step_{step:06d}"
    checkpoint = run / "checkpoints" / name
    if not checkpoint.exists():
        names = ", ".join(sorted(p.name for p in (run / "checkpoints").glob("step_*"))) or "none"
        raise UserError(f"{run} has no checkpoint {name}. There are: {names}")
    return checkpoint.resolve()


def _refuse_code_of_run(resolved: Path) -> None:
    """Raise UserError if the configuration of a run, which may come from another person, names a file of code."""
    tree = read_tree(resolved).values
    stages = tree.get("stages")
    for section in (tree, *(stages.values() if isinstance(stages, dict) else ())):
        for key, values in texts_at([("algorithm", "name")], section) if isinstance(section, dict) else ():
            if ":" in values["name"]:
                raise UserError(
                    f"{resolved}: {'.'.join(key)} is {values['name']}, so the export would run the code of this file. "
                    "Repeat it with --trust-remote-code if you trust the file."
                )


async def _export(config: Config, checkpoint: Path, folder: Path, merged: bool) -> None:
    placement = await reserve(config)
    rank = RANKS[config.algorithm.kind]
    context = RunContext(config=config, placement=placement, longest_sequence=None)
    gang = context.gang(OfflineGang, rank, config, optimizer_steps=1)
    async with ending([gang], placement, heartbeat_timeout_s=config.cluster.heartbeat_timeout_s):
        await gang.start(deadline_s=config.cluster.start_timeout_s)
        await gang.load(checkpoint / "policy")
        await gang.export(folder.resolve(), merged=merged)
