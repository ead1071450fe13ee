"""Uploads go to the hub, which is replaced here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from pydantic import ValidationError

from rlhf.config.schema.run import RunConfig
from rlhf.errors import RunError, UserError
from rlhf.models.files.publish import push_folder, refuse_unpublishable


class Hub:
    """A hub that records requests, and refuses uploads to "me/full"."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create", {"repo_id": repo_id, **options}))

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))
        if options["repo_id"] == "me/full":
            raise OSError("no space left\nfor you")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


def test_a_folder_is_uploaded_to_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    push_folder(tmp_path, "me/model")
    (create, created), (upload, uploaded) = hub.calls
    assert (create, upload) == ("create", "upload")
    assert created == {"repo_id": "me/model", "private": True, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/model", tmp_path)


def test_an_upload_replaces_the_model_in_the_repository(hub: Hub, tmp_path: Path) -> None:
    """transformers would load a single file before several files, and an adapter instead of a model."""
    push_folder(tmp_path, "me/model")
    model = ["adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json"]
    model += ["model-00001-of-00002.safetensors", "model.safetensors", "model.safetensors.index.json"]
    others = ["LICENSE", "README.md", "checkpoint-9/config.json", "checkpoint-9/model.safetensors"]
    deleted = filter_repo_objects(model + others, allow_patterns=hub.calls[1][1]["delete_patterns"])
    assert list(deleted) == model


def test_a_refused_upload_says_how_to_repeat_it(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=rf"not uploaded to me/full \(no space left for you\).*`hf upload me/full {tmp_path} --delete"
    ):
        push_folder(tmp_path, "me/full")


def test_without_a_token_or_a_hub_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"run\.push_to_hub: is me/x, but there is no token"):
        refuse_unpublishable("me/x", key="run.push_to_hub")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    refuse_unpublishable("me/x", key="run.push_to_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        refuse_unpublishable("me/x", key="run.push_to_hub")


def test_a_stage_of_a_pipeline_has_a_repository_of_its_own() -> None:
    assert RunConfig(name="one", push_to_hub="me/x").repository == "me/x"
    assert RunConfig(name="two/sft", push_to_hub="me/x").repository == "me/x-sft"
    assert RunConfig(name="two/sft").repository is None
    for name in ("x", "me/x/y", "../x", "me/"):
        with pytest.raises(ValidationError):
            RunConfig(name="one", push_to_hub=name)
