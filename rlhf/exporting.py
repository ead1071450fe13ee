"""Export a checkpoint of a run, or a state of a client's model, as a model folder.

This process works alone: no Ray, no ranks, no optimizer.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch

from rlhf.algorithms.sft import SFTConfig
from rlhf.config.files.base_file import read_tree
from rlhf.config.files.load import load
from rlhf.config.pipeline import texts_at
from rlhf.config.schema.root import Config
from rlhf.engine.consolidation import load_trained_weights
from rlhf.engine.gathering import whole_weights
from rlhf.errors import UserError
from rlhf.hosting.checkpoints import ADAPTER as CONTENT
from rlhf.hosting.checkpoints import RECORD, Checkpoint
from rlhf.models.files.loading import load_causal_lm, load_critic
from rlhf.models.files.publish import push_folder, refuse_unpublishable
from rlhf.models.files.weights import adapter_sources, weight_sources
from rlhf.preflight.models import with_adapters, with_sources
from rlhf.process.owned_folders import temporary_folder
from rlhf.tracking import logs
from rlhf.tracking.run_folder.manifest import find_damage
from rlhf.viewing.model_card import write_model_card
from rlhf.workers.model_worker import torch_dtype
from rlhf.workers.trained_model import load_policy_tokenizer, load_trained_model, write_model_folder

logger = logging.getLogger(__name__)
MOST_NAMED = 5  # states in a message


def export_checkpoint(
    run: Path, *, step: int | None, folder: Path, merged: bool, push_to_hub: str | None, trust_remote_code: bool
) -> None:
    """Write the policy of a checkpoint (default: the latest) as a Hugging Face or adapter folder.

    Args:
        run: the folder of a run, or of a state that a client of `rlhf tinker` saved.
        merged: write a whole model, with the adapter added to the weights. UserError if the run trained no adapter.
        push_to_hub: upload the folder to this repository of the hub, OWNER/NAME; None uploads nothing.
        trust_remote_code: run code of the run's model or of its algorithm. The run may come from another person, so the
            run's configuration alone does not allow this.
    """
    logs.configure()
    if push_to_hub is not None:
        refuse_unpublishable(push_to_hub, key="--push-to-hub")
    is_state = (run / RECORD).is_file()
    checkpoint = run if is_state else _checkpoint(run, step)
    _refuse_unwritable(folder)
    if is_state:
        if step is not None:
            raise UserError(f"--step: {run} is the state of a client's model at a single step. Leave the option out.")
        _export_state(run.absolute(), folder, merged=merged, trust_remote_code=trust_remote_code)
    else:
        _export_step(run, checkpoint, folder, merged=merged, trust_remote_code=trust_remote_code)
    logger.info("exported %s to %s", checkpoint.name, folder)
    if push_to_hub is not None:
        push_folder(folder, push_to_hub)


def _refuse_unwritable(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder} exists already; name a folder that does not")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}; name a folder that you can write") from error


def _export_step(run: Path, checkpoint: Path, folder: Path, *, merged: bool, trust_remote_code: bool) -> None:
    resolved = run / "config.resolved.yaml"
    if not trust_remote_code:
        _refuse_code_of_run(resolved)
    config = next(iter(load(resolved).runs.values()))
    if merged and config.policy.lora is None:
        raise UserError(
            f"--merged: the run {run} has no policy.lora, so its model is whole already. Leave the option out."
        )
    if config.policy.trust_remote_code and not trust_remote_code:
        text = f"policy.trust_remote_code is true, so the export would run code that comes with {config.policy.model}"
        raise UserError(f"{resolved}: {text}. Repeat it with --trust-remote-code if you trust that model.")
    saved_step = int(checkpoint.name.removeprefix("step_"))
    damage = find_damage(checkpoint, step=saved_step)
    if damage is not None:
        raise UserError(f"{damage} Restore the file from a copy, or name another step with --step.")
    shared = {name: getattr(config, name) for name in ("run", "policy", "data", "train", "cluster")}
    alone = Config(**shared, algorithm=SFTConfig(name="sft"))  # same model and optimizer as a policy
    if config.algorithm.has_scalar_head:
        alone = alone.model_copy(update={"algorithm": config.algorithm})
    _write(alone, checkpoint / "policy", folder, merged=merged)
    write_model_card(folder, config, run=run, step=saved_step, merged=merged)


def _export_state(state: Path, folder: Path, *, merged: bool, trust_remote_code: bool) -> None:
    """Write a state of save_state: of an adapter, whose weights peft reads, or of all weights, as of a run."""
    if (damage := find_damage(state, step=None)) is not None:
        raise UserError(f"{damage} Restore the file from a copy, or name another state.")
    checkpoint, resolved = Checkpoint.read(state), state.parents[1] / "config.resolved.yaml"
    assert checkpoint is not None, "the record is not damaged"
    content = state / CONTENT
    if checkpoint.kind != "weights":
        raise UserError(f"{state} was not made by save_state. Copy {content}, which is a model folder already.")
    if merged and checkpoint.shape.trains_all:
        raise UserError(f"--merged: {state} has all weights, so its model is whole already. Leave the option out.")
    if not resolved.is_file():
        raise UserError(f"{resolved} is missing, which names the base model. Export a state in the server's folder.")
    adapter = {} if checkpoint.shape.trains_all else {"lora": {}, "adapter": str(content)}
    config = Config.model_validate(
        {
            "run": {"name": "export"},
            "policy": read_tree(resolved).values["policy"] | adapter | {"trust_remote_code": trust_remote_code},
            "algorithm": {"name": "sft"},
            "data": {"train": "none"},
            "train": {"steps": 1, "lr": 1.0, "sequences_per_update": 1},
        }
    )
    _write(config, None if adapter else content, folder, merged=merged)


def _checkpoint(run: Path, step: int | None) -> Path:
    """Return the folder of a checkpoint of the run, by default the latest. UserError if there is none."""
    if states := sorted(file.parent for level in ("", "*/") for file in run.glob(f"{level}weights/*/{RECORD}")):
        named = ", ".join(map(str, states[:MOST_NAMED])) + (", ..." if states[MOST_NAMED:] else "")
        raise UserError(f"{run} has states of clients' models. Name one of them: {named}")
    if not (run / "checkpoints").is_dir() or not (run / "config.resolved.yaml").exists():
        text = f"{run} is not a run folder: it has no checkpoints/ or config.resolved.yaml"
        raise UserError(f"{text}. Name a run's own folder.")
    name = "latest" if step is None else f"step_{step:06d}"
    checkpoint = run / "checkpoints" / name
    if not checkpoint.exists():
        names = ", ".join(sorted(p.name for p in (run / "checkpoints").glob("step_*"))) or "none"
        raise UserError(f"{run} has no checkpoint {name}. There are: {names}")
    return checkpoint.resolve()


def _refuse_code_of_run(resolved: Path) -> None:
    tree = read_tree(resolved).values
    stages = tree.get("stages")
    for section in (tree, *(stages.values() if isinstance(stages, dict) else ())):
        for key, values in texts_at([("algorithm", "name")], section) if isinstance(section, dict) else ():
            if ":" in values["name"]:
                text = f"{resolved}: {'.'.join(key)} is {values['name']}, so the export would run the code of this file"
                raise UserError(f"{text}. Repeat it with --trust-remote-code if you trust the file.")


def _write(config: Config, trained: Path | None, folder: Path, *, merged: bool) -> None:
    """Write the model with the trained weights of a folder. None: all trained weights are in policy.adapter."""
    with temporary_folder() as aside:
        config = with_adapters(with_sources(config, aside), {})
        policy, dtype = config.policy, torch_dtype(config.policy.dtype)
        load_model = load_critic if config.algorithm.has_scalar_head else load_causal_lm
        module = load_trained_model(policy, load_model, _device(config))
        if trained is not None:
            load_trained_weights(module, trained, dtype=dtype)
        adapter_alone = policy.lora is not None and not merged
        sources = adapter_sources(module) if adapter_alone else weight_sources(module)
        weights = whole_weights(sources, dtype, sharded=False)
        tokenizer = load_policy_tokenizer(config)
        write_model_folder(folder.resolve(), weights, module, tokenizer, dtype=dtype, adapter_alone=adapter_alone)


def _device(config: Config) -> torch.device:
    """Return the device of the model: a CPU, or for 4-bit weights the run's kind of device."""
    lora = config.policy.lora
    if lora is None or lora.quantize is None or config.cluster.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        text = "policy.lora.quantize: the run quantized its model on a GPU, and this machine has none"
        raise UserError(f"{text}. Export the checkpoint on a machine with one GPU.")
    return torch.device("cuda", 0)
