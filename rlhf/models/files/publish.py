"""Upload a finished model folder to the Hugging Face hub. New repositories are private."""

from __future__ import annotations

import logging
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from rlhf.errors import RunError, UserError

_log = logging.getLogger(__name__)

# Files of an earlier upload that would be loaded instead of the new model, or with it. Files in the folder are kept.
_REPLACED = (
    "model.safetensors*",  # with the index of several files
    "model-*.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
)


def refuse_unpublishable(name: str, *, key: str) -> None:
    """Raise UserError if nothing can be uploaded from here, without asking the hub. key: of the setting."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{key}: is {name}, but HF_HUB_OFFLINE is set, so nothing is uploaded. Unset it, or remove {key}."
        )
    if huggingface_hub.get_token() is None:
        raise UserError(
            f"{key}: is {name}, but there is no token of the hub here. Set HF_TOKEN, or log in with `hf auth login`."
        )


def push_folder(folder: Path, name: str) -> None:
    """Upload a model folder to a repository, in place of an existing model. RunError with the command to repeat."""
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        message = "Upload the trained model"
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns=list(_REPLACED))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        deleted = " ".join(f"--delete '{pattern}'" for pattern in _REPLACED)
        raise RunError(
            f"push_to_hub: {folder} is whole, but it was not uploaded to {name} ({reason}). Repeat it with "
            f"`hf upload {name} {folder} {deleted}`."
        ) from error
    _log.info("uploaded %s to %s", folder, name)
