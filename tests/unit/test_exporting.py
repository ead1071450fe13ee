"""`rlhf export` writes a model, an adapter, or a model with the merged adapter: of a checkpoint or a client's state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlhf
from rlhf.adapters import AdapterShape
from rlhf.config.files.dump import dump_yaml
from rlhf.config.files.load import load
from rlhf.engine.engine_record import EngineRecord
from rlhf.engine.frozen_weights import digest_of_base
from rlhf.engine.rank_files import write_rank
from rlhf.errors import UserError
from rlhf.models.adapters.lora import add_lora
from rlhf.models.files.loading import architecture_fingerprint, load_causal_lm
from rlhf.tracking.run_folder.folder import RunFolder
from tests.fakes.client_states import client_state

RUN = """
run: {{name: demo, dir: {folder}}}
policy: {{model: {model}, dtype: float32{lora}}}
algorithm: {{name: sft}}
data: {{train: {{task: running_totals, split: sft, size: 8}}}}
train: {{steps: 1, lr: 1.0e-3, sequences_per_update: 8}}
"""


def run_with(folder: Path, base: Path, fill: Callable[[Path], object], *, lora: str = "") -> Path:
    """Write a run with a checkpoint. `fill` writes the policy's files."""
    (folder / "run.yaml").write_text(RUN.format(folder=folder, model=base, lora=lora))
    with RunFolder.open(folder, "demo", resume=False) as run:
        run.config.write_text(dump_yaml(load(folder / "run.yaml")))
        files = run.begin_checkpoint(1) / "policy"
        files.mkdir()
        fill(files)
        run.seal(run.checkpoint(1), step=1)
        run.commit_checkpoint(1)
    return folder / "demo"


def checkpointed(folder: Path, base: Path, model: Any, *, lora: str = "") -> Path:
    """Write a run with a checkpoint of a model's trained weights, as a single rank does at ZeRO stage 0."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def fill(files: Path) -> None:
        masters = {f"master {index}": weight for index, weight in enumerate(trained.values())}
        states: dict[str, Any] = {f"state {index}": {} for index in range(len(trained))}
        record = EngineRecord(
            model=architecture_fingerprint(model.config),
            ranks=1,
            zero_stage=0,
            dtype="float32",
            optimizer="adamw",
            groups=[{name: weight.numel() for name, weight in trained.items()}],
            frozen_weights=f"{digest_of_base(model):016x}",
            steps=1,
            updates_per_step=1,
        )
        values = {"states": states, "counters": {}, "random": {}, "period": 0, "record": record.model_dump()}
        write_rank(files, 0, masters, values)

    return run_with(folder, base, fill, lora=lora)


def test_a_merged_export_is_the_base_with_the_adapter(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = add_lora(load_causal_lm(str(tiny_model), dtype=torch.float32), rank=4, alpha=8.0, dropout=0.0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    run = checkpointed(tmp_path, tiny_model, model, lora=", lora: {rank: 4, alpha: 8.0}")
    rlhf.export(run, tmp_path / "adapter")
    rlhf.export(run, tmp_path / "whole", merged=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected, plain = adapted(tokens).logits, AutoModelForCausalLM.from_pretrained(tiny_model)(tokens).logits
        torch.testing.assert_close(whole(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=0.1)
    assert not (tmp_path / "whole" / "adapter_config.json").exists()


def test_an_export_has_the_weights_of_the_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    model = load_causal_lm(str(tiny_model), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    run = checkpointed(tmp_path, tiny_model, model)
    rlhf.export(run, tmp_path / "out")
    written, trained = load_file(tmp_path / "out" / "model.safetensors"), dict(model.named_parameters())
    assert written.keys() == trained.keys()
    assert all(torch.equal(weight, trained[name]) for name, weight in written.items())


def test_a_model_folder_that_has_changed_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = add_lora(load_causal_lm(str(tiny_model), dtype=torch.float32), rank=4, alpha=8.0, dropout=0.0)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1.0
    run = checkpointed(tmp_path, tiny_model, model, lora=", lora: {rank: 4, alpha: 8.0}")
    with pytest.raises(UserError, match="was trained on other frozen weights"):
        rlhf.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_state_of_all_weights_is_a_model(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal_lm(str(tiny_model), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    content = checkpointed(tmp_path, tiny_model, model) / "checkpoints" / "latest" / "policy"
    state = client_state(tmp_path / "server", content, AdapterShape(rank=0), base=str(tiny_model))
    monkeypatch.chdir(state)
    rlhf.export(".", tmp_path / "out")
    written, trained = load_file(tmp_path / "out" / "model.safetensors"), dict(model.named_parameters())
    assert written.keys() == trained.keys()
    assert all(torch.equal(weight, trained[name]) for name, weight in written.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size > 0
    for options, expected in (
        ({"merged": True}, "has all weights, so its model is whole already"),
        ({"step": 1}, "is the state of a client's model at a single step"),
    ):
        with pytest.raises(UserError, match=expected):
            rlhf.export(state, tmp_path / "other", **options)  # type: ignore[arg-type]
    for folder in (tmp_path / "server", state.parents[1]):
        with pytest.raises(UserError, match=f"has states of clients' models. Name one of them: {state}"):
            rlhf.export(folder, tmp_path / "other")
    file = state / "adapter" / "state_00000.safetensors"
    content_of_file = bytearray(file.read_bytes())
    content_of_file[len(content_of_file) // 2] ^= 1
    file.write_bytes(content_of_file)
    with pytest.raises(UserError, match=f"{file} is damaged: its checksum .* Restore the file from a copy"):
        rlhf.export(state, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_state_of_an_adapter_is_an_adapter(tiny_model: Path, tmp_path: Path) -> None:
    """A sampler's folder is a model folder already, and is refused."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "peft")
    shape = AdapterShape(rank=4)
    rlhf.export(client_state(tmp_path / "server", tmp_path / "peft", shape, base=str(tiny_model)), tmp_path / "out")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    options: Any = {"base": str(tiny_model), "kind": "sampler_weights"}
    sampler = client_state(tmp_path / "server", tmp_path / "peft", shape, **options)
    with pytest.raises(UserError, match=r"was not made by save_state. Copy .*/sampler_weights/kept/adapter, which is"):
        rlhf.export(sampler, tmp_path / "other")
