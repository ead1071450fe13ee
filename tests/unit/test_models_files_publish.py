"""Uploads go to the hub, which is replaced here."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from pydantic import ValidationError

from rlhf.config.schema.run import RunConfig
from rlhf.errors import RunError, UserError
from rlhf.models.files.publish import push_folder, refuse_unpublishable


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Mock:
    hub = Mock()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


def test_a_folder_replaces_the_model_in_a_private_repository(hub: Mock, tmp_path: Path) -> None:
    """transformers would load a single file before several files, and an adapter instead of a model."""
    push_folder(tmp_path, "me/model")
    hub.create_repo.assert_called_once_with("me/model", private=True, exist_ok=True)
    uploaded = hub.upload_folder.call_args.kwargs
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/model", tmp_path)
    model = ["adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json"]
    model += ["model-00001-of-00002.safetensors", "model.safetensors", "model.safetensors.index.json"]
    others = ["LICENSE", "README.md", "checkpoint-9/config.json", "checkpoint-9/model.safetensors"]
    assert list(filter_repo_objects(model + others, allow_patterns=uploaded["delete_patterns"])) == model


def test_a_refused_upload_says_how_to_repeat_it(hub: Mock, tmp_path: Path) -> None:
    hub.upload_folder.side_effect = OSError("no space left\nfor you")
    with pytest.raises(
        RunError, match=rf"not uploaded to me/full \(no space left for you\).*`hf upload me/full {tmp_path} --delete"
    ):
        push_folder(tmp_path, "me/full")


def test_without_a_token_or_a_hub_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for offline, token, message in (
        (False, None, r"run\.push_to_hub: is me/x, but there is no token"),
        (True, "hf_x", "HF_HUB_OFFLINE is set"),
        (False, "hf_x", None),
    ):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda token=token: token)
        with pytest.raises(UserError, match=message) if message else nullcontext():
            refuse_unpublishable("me/x", key="run.push_to_hub")


def test_a_stage_of_a_pipeline_has_a_repository_of_its_own() -> None:
    assert RunConfig(name="one", push_to_hub="me/x").repository == "me/x"
    assert RunConfig(name="two/sft", push_to_hub="me/x").repository == "me/x-sft"
    assert RunConfig(name="two/sft").repository is None
    for name in ("x", "me/x/y", "../x", "me/"):
        with pytest.raises(ValidationError):
            RunConfig(name="one", push_to_hub=name)
