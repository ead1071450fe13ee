"""Every role reads hub models by revision, and a tokenizer in place of the policy's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

import actors.rollout.engine_creation
from actors.rollout.engine_creation import start_engines
from rlhf.config.derive import critic_model, reference_model
from rlhf.errors import UserError
from rlhf.models.files.loading import split_revision
from rlhf.preflight.inputs import StageInputs, load_inputs
from rlhf.preflight.models import with_sources
from tests.fakes.runs import loaded, ppo, refusal
from tests.fixtures.models import change_json


def local(run: Any, folder: Path) -> Any:
    (config,) = run.runs.values()
    return with_sources(config, folder)


def policy_with_tokenizer(model: Path, folder: Path, *, template: str | None = None, added: int = 0) -> dict[str, str]:
    """Write a changed tokenizer of a model. Return the section of a policy with this tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.add_tokens([f"<new{i}>" for i in range(added)])
    tokenizer.save_pretrained(folder)
    return {"model": str(model), "dtype": "float32", "tokenizer": str(folder)}


def test_a_name_may_have_a_revision_and_a_folder_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name@x").mkdir()
    assert split_revision("owner/other@v2") == ("owner/other", "v2")
    assert split_revision("owner/other@refs/pr/1") == ("owner/other", "refs/pr/1")
    assert split_revision("owner/other") == ("owner/other", None)
    assert split_revision("owner/name@x") == ("owner/name@x", None)
    assert split_revision(f"{tmp_path}/a@b") == (f"{tmp_path}/a@b", None)


def test_every_model_is_loaded_at_its_revision(tmp_path: Path) -> None:
    sections = {
        "policy": {"model": "org/policy", "revision": "v1"},
        "critic": {"model": "org/critic", "revision": "v2"},
        "reward": {"model": "org/reward", "revision": "v3"},
        "rewards": {"taste": {"role": "reward"}},
    }
    config = local(ppo(tmp_path, tmp_path, **sections), tmp_path)
    models = [config.policy.model, config.policy.tokenizer_source, config.critic.model, config.reward.model]
    assert models == ["org/policy@v1", "org/policy@v1", "org/critic@v2", "org/reward@v3"]
    run = ppo(tmp_path, tmp_path, policy={"model": "org/policy", "revision": "v1"})
    for config in (*run.runs.values(), local(run, tmp_path)):
        assert reference_model(config).source == critic_model(config).source == "org/policy@v1"


@pytest.mark.parametrize("model", ["./folder", "/folder", "tiny:llama"])
def test_a_folder_has_no_revision(tmp_path: Path, model: str) -> None:
    with pytest.raises(UserError, match=r"policy\.revision: is v1, but policy\.model is .* not a model of the hub"):
        loaded(tmp_path, policy={"model": model, "revision": "v1"})


def test_a_revision_is_what_the_hubs_cache_holds_of_it(tiny_model: Path, tmp_path: Path) -> None:
    """The cache has two revisions, and the process starts offline with this cache."""
    repository = tmp_path / "models--org--name"
    for sha, name, length in (("a" * 40, "main", 64), ("b" * 40, "v2", 128)):
        folder = repository / "snapshots" / sha
        shutil.copytree(tiny_model, folder)
        change_json(folder / "config.json", max_position_embeddings=length)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(sha)
    code = (
        "import torch; from rlhf.models.files.loading import load_causal_lm, load_tokenizer\n"
        "for name in ('org/name', 'org/name@v2'):\n"
        "    load_tokenizer(name)\n"
        "    config = load_causal_lm(name, dtype=torch.float32).config\n"
        "    print(config.max_position_embeddings, config.name_or_path)\n"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == ["64", "org/name", "128", "org/name@v2"], done.stderr


def test_data_are_read_with_the_tokenizer_that_replaces_the_policys(tiny_model: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}<|user|>#{{ m.content }}<|eos|>{% endfor %}<|assistant|>"
    policy = policy_with_tokenizer(tiny_model, tmp_path / "tokenizer", template=template)
    data = {"train": {"task": "running_totals", "size": 8}, "max_prompt_tokens": 64, "apply_chat_template": True}
    (stage,) = load_inputs(ppo(tmp_path, tiny_model, policy=policy, data=data))
    assert isinstance(stage, StageInputs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy["tokenizer"])
    prompt = stage.inputs.prompts[0]  # type: ignore[union-attr]
    assert tokenizer.decode(prompt.token_ids).startswith("<|user|>#")


def test_engines_get_the_tokenizer(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = []
    module = actors.rollout.engine_creation
    monkeypatch.setattr(module, "spawn_engines", lambda spec, *_: specs.append(spec) or ([], None))
    policy = {"model": "org/name", "revision": "v2", "tokenizer": "org/words@v3"}
    config = local(ppo(tmp_path, tiny_model, policy=policy), tmp_path)
    place: Any = SimpleNamespace(on_one_host=lambda: True)
    start_engines(config, place, max_model_len=8, spool=tmp_path, environment=None)
    assert (specs[0].model, specs[0].tokenizer) == ("org/name@v2", "org/words@v3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"added": 8}, r"policy\.tokenizer: .*has token ids up to 327, but the embedding of"),
        ({"template": "{{ 'a' * 10**11 }}"}, "does not render a message of a few words"),
    ],
    ids=["more tokens than the model has rows", "a chat template that uses up memory"],
)
def test_an_unsuitable_tokenizer_is_refused(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    policy = policy_with_tokenizer(tiny_model, tmp_path / "tokenizer", **changes)
    assert re.search(message, refusal(ppo(tmp_path, tiny_model, policy=policy)))
