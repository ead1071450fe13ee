"""Measure the distance of vLLM's log-probabilities from the trainer's, for each model type.

Engines get their weights by a sync, or are frozen and load the weights of a folder.

vLLM is imported once. Each engine gets a fork of this process, and so leaves nothing behind at any end.
"""

from __future__ import annotations

import json
import os
import tempfile
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.rollout.vllm_engine import RolloutSpec, build_engine, engine_environment, load_weights, sampling_params
from actors.weights import Transport, WeightManifest
from actors.weights.shm import ShmSender
from rlhf.errors import RunError, UserError
from rlhf.types import Sampling
from tests.support_measurements import model_folder, published
from tests.tiny_architectures import ALL, has_setting

Row = tuple[list[int], list[int], list[float]]  # a prompt, and the engine's tokens and log-probabilities after it
TIMEOUT_S = 60.0
REASONS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, OSError),
    *(RunError, RuntimeError, StrictDataclassError, TypeError, UserError, ValueError),
)
SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32},
    "max_position_embeddings": 512,
}
MLA = {
    **{"num_attention_heads": 4, "head_dim": 64, "kv_lora_rank": 512},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
}
GATED_DELTA = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
CHANGES: dict[str, dict[str, Any]] = {  # what else has to fit these sizes
    "bamba": {"mamba_d_head": 32},
    "falcon": {"ffn_hidden_size": 256},  # vLLM computes four times hidden_size
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 32},
    "gemma4_text": {"global_head_dim": 64, "num_experts": None},  # vLLM has experts where there is a number of them
    "glm4_moe": {"head_dim": 32},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "gpt_oss": {"intermediate_size": 64},
    "granitemoehybrid": {"mamba_d_head": 32},
    "llama4_text": {"attention_chunk_size": 32, "num_experts_per_tok": 1},  # whole blocks, and all that vLLM has
    "mamba2": {"num_heads": 16},
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "youtu"), MLA),
    "minicpm3": {
        **{"num_attention_heads": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32},
        "tie_word_embeddings": False,  # tied, each token is followed by itself with a probability of 1
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp"]},  # a CPU runs no other MLPs
    "zamba2": {"head_dim": 64},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), GATED_DELTA),
}
PROMPTS = ([65, 70, 75, 80, 85, 90, 95, 100], [66, 71, 76])


def difference(model_type: str, *, frozen: bool = False, **changes: Any) -> str:
    """The largest difference over sampled tokens, or why there is none. `changes`: of the config."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return measure(model_type, Path(folder), frozen=frozen, **changes)
        except REASONS as error:
            return told(error)


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def sizes_for_engine(model_type: str) -> dict[str, Any]:
    """Return the changes of a tiny config for vLLM's CPU kernels, unless the type has specific changes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = CONFIG_MAPPING[model_type]()
    sizes = {key: value for key, value in SIZES.items() if has_setting(known, key) and key not in ALL[model_type]}
    return sizes | CHANGES.get(model_type, {})


def measure(model_type: str, folder: Path, *, frozen: bool = False, **changes: Any) -> str:
    """Measure in float32. The trainer's model is in this process, since engines change transformers' classes."""
    source = model_folder(folder, model_type, std=0.02, **sizes_for_engine(model_type) | changes)
    (architecture,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    if architecture not in vllm.ModelRegistry.get_supported_archs():
        return "not in vLLM"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(7)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("_bias")]  # of routers
    with torch.no_grad():
        for weight in (*model.parameters(), *biases):
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    sender = ShmSender(rank=0)
    try:
        if frozen:
            model.save_pretrained(folder)
        manifest = None if frozen else sender.publish(published(model), 1)
        assert frozen or manifest is not None
        rows = _in_a_fork(source, manifest)
    finally:
        sender.close()
    if isinstance(rows, str):
        return rows
    differences = [
        own_logprobs(model, [*prompt, *tokens])[-len(tokens) :] - torch.tensor(logprobs)
        for prompt, tokens, logprobs in rows
    ]
    return f"{float(torch.cat(differences).abs().max()):.0e}"  # NaN if there is one


def _in_a_fork(source: str, manifest: WeightManifest | None) -> str | list[Row]:
    """Return the samples of an engine with the published or the folder's weights, or the reason for no samples."""
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(source, manifest, theirs))
    process.start()
    theirs.close()
    try:
        answer: str | list[Row] = ours.recv() if ours.poll(TIMEOUT_S) else f"no answer within {TIMEOUT_S:.0f} s"
    except EOFError:
        answer = "the process died"
    process.kill()
    process.join()
    return answer


def _answer(source: str, manifest: WeightManifest | None, connection: Connection) -> None:
    try:
        transport: Transport | None = None if manifest is None else "shm"
        sizes: Any = {"max_model_len": 128, "max_num_seqs": 8, "kv_cache_gib": 0.05}
        engine = build_engine(RolloutSpec(model=source, dtype="float32", transport=transport, **sizes))
        if manifest is not None:
            load_weights(engine, manifest, keep_cache=False)
        connection.send(sampled(engine))
    except REASONS as error:
        traceback.print_exc()
        connection.send(told(error))


def own_logprobs(model: Any, ids: list[int]) -> Tensor:
    row = torch.tensor(ids)
    with torch.no_grad():
        logprobs = model(row[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, row[1:, None])[:, 0]


def sampled(engine: Any) -> list[Row]:
    """Prompts, and the engine's tokens and log-probabilities after each."""
    sampling = Sampling(max_new_tokens=12)
    for index, prompt in enumerate(PROMPTS):
        params = sampling_params(sampling, index, turn_end=None, added={})
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    found = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                one = output.outputs[0]
                found[int(output.request_id)] = (list(one.token_ids), list(one.logprobs.logprobs))
    return [(list(PROMPTS[i]), *found[i]) for i in sorted(found)]


os.environ.update(engine_environment(RolloutSpec(model="", dtype="float32", max_model_len=128, transport="shm")))
import vllm  # noqa: E402  # after its environment is set, and before the forks

torch.set_num_threads(1)  # a fork must find no other threads
