"""The interface to vLLM: the specification of an engine, environment and arguments, and operations on the engine.

The engine loop calls functions of an engine between two steps. Each function imports vLLM inside, so that specification
and environment can be made before the import of vLLM.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from actors.cluster.processes import KEEPS_MEMORY, hub_environment
from actors.vllm_patches.grammar_time import bound_grammars
from actors.vllm_patches.inspection import hide_cuda_builds_from_inspection
from actors.vllm_patches.settings import generation_settings, has_mla, heads_stand_apart, model_settings
from actors.weights import Transport, WeightManifest
from actors.weights.adapter import WEIGHTS, file_checksum
from rlhf.agents.sessions import AgentSpec
from rlhf.errors import RunError, UserError
from rlhf.rollouts.environments.conversations import EnvironmentSpec
from rlhf.types import Sampling
from rlhf.vision.kinds import is_never_computed
from rlhf.vision.reading import ImageFolder

KvAfterUpdate = Literal["recompute", "keep"]  # keys and values computed by the weights before an update
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # supported by vLLM
PREFILL_TOKENS = 8192  # largest number of prompt tokens in an engine step


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSpec:
    """The settings of an engine."""

    model: str  # folder or hub name; the first sync replaces the weights of an unfrozen engine
    dtype: Literal["bfloat16", "float16", "float32"]
    max_model_len: int  # prompt and response, tokens
    transport: Transport | Literal["files"] | None  # how weights come. None: never, the engine is frozen: see is_frozen
    name: str = "rollout engine"  # name in messages, with the engine's number
    max_num_seqs: int = 256  # largest number of samples in an engine step
    tokenizer: str | None = None  # folder or name of another tokenizer; None: the model's own
    adapter: str | None = None  # a LoRA folder for a frozen engine's model
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1  # CPU only
    kv_cache_gib: float | None = 1.0  # None (GPU): the rest of gpu_memory_utilization
    gpu_memory_utilization: float = 0.9
    tensor_parallel: int = 1
    enforce_eager: bool = True
    lora_rank: int | None = None  # with a rank, each sync sends an adapter and not the weights
    max_adapters: int = 1  # that may have running samples at once
    kv_after_update: KvAfterUpdate | None = None  # of running samples; None: weights never change while samples run
    colocated: bool = False  # takes turns with a trainer on the same GPUs
    trust_remote_code: bool = False
    records_experts: bool = False  # whether a finished response has the experts of the routers
    top_logprobs: int = 0  # most likeliest tokens that a request may ask for with each sampled token
    engine_args: Mapping[str, Any] = field(default_factory=dict)  # further arguments of vLLM's EngineArgs
    sender_address: str | None = None  # host that broadcasts the weights; None: everything is on one host
    images: ImageFolder | None = None  # images of the prompts; None: the engine takes only text
    spool: Path | None = None  # finished groups are kept here
    spools_failures: bool = False  # store groups with a failed environment too
    carries_over: bool = False  # store a cancelled group, so that a later request continues its responses
    environment: EnvironmentSpec | AgentSpec | None = None  # for conversations; None: one turn answers a prompt
    start_timeout_s: float = 600.0
    call_timeout_s: float = 1800.0  # limit of a `generate` or an update

    def __post_init__(self) -> None:
        if self.adapter is not None and not (self.is_frozen and self.lora_rank):
            raise ValueError("an engine with an adapter must be frozen, and lora_rank must be the adapter's rank")

    @property
    def is_frozen(self) -> bool:
        """Return whether the engine serves the model folder's weights as version 0, and refuses all other weights."""
        return self.transport is None


def engine_environment(spec: RolloutSpec) -> dict[str, str]:
    """Return the environment variables to set before the import of vLLM."""
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the core runs in the engine loop's thread
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),  # a start has some harmless warnings
        "VLLM_SKIP_MODEL_NAME_VALIDATION": "1",  # agents may name any model
        "TOKENIZERS_PARALLELISM": "false",
        **hub_environment(),
    }
    if Path(spec.model).exists():
        env["HF_HUB_OFFLINE"] = "1"
    if spec.device == "cpu":
        env |= KEEPS_MEMORY
        env["OMP_NUM_THREADS"] = str(spec.threads)
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if spec.enforce_eager:
            env["TORCHDYNAMO_DISABLE"] = "1"  # otherwise vLLM compiles its logprob gathering, 3 to 15 s
    return env


def build_engine(spec: RolloutSpec) -> Any:
    """Build vLLM's engine with the core in the calling thread."""
    from vllm import EngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.v1.engine.llm_engine import LLMEngine

    from rlhf.models.files.loading import load_model_config, split_revision  # transformers: slow for the driver
    from rlhf.models.packed.row_layout import keeps_states

    gc.freeze()  # vLLM collects garbage five times. Visiting the objects of all modules takes half of the build.
    cpu, in_flight = spec.device == "cpu", spec.kv_after_update is not None
    model, revision = split_revision(spec.model)
    config = load_model_config(spec.model, trust_remote_code=spec.trust_remote_code)
    tokenizer, tokenizer_revision = split_revision(spec.tokenizer or spec.model)
    arguments = EngineArgs(
        model=model,
        revision=revision,
        tokenizer=tokenizer,
        tokenizer_revision=tokenizer_revision,
        dtype=spec.dtype,
        max_model_len=spec.max_model_len,
        max_num_seqs=spec.max_num_seqs + in_flight,  # one more for the probe of an update while samples run
        # In flight, an interrupted sample is computed again in one step, together with the running samples.
        max_num_batched_tokens=max(PREFILL_TOKENS, spec.max_model_len + in_flight * spec.max_num_seqs),
        tensor_parallel_size=spec.tensor_parallel,
        # By default vLLM would place additional actors in the run's placement group.
        distributed_executor_backend="uni" if spec.tensor_parallel == 1 else "mp",
        gpu_memory_utilization=spec.gpu_memory_utilization,
        kv_cache_memory_bytes=None if spec.kv_cache_gib is None else int(spec.kv_cache_gib * 2**30),
        enforce_eager=spec.enforce_eager,
        block_size=32 if cpu else None,  # prompts are shared by whole blocks, and the CPU's default is 128 tokens
        enable_chunked_prefill=not cpu,  # on a CPU a seeded sample in a partial prefill ends the engine
        # vLLM's products for MLA on a CPU with AMX work only in bfloat16.
        attention_backend="CPU_MLA" if cpu and spec.dtype != "bfloat16" and has_mla(config) else None,
        # States are cached only at the ends of prefills in parts. None: vLLM decides.
        enable_prefix_caching=False if cpu and keeps_states(config.to_dict()) else None,
        async_scheduling=False if cpu else None,  # None: vLLM decides. It has none on a CPU.
        enable_sleep_mode=spec.colocated and not cpu,
        logprobs_mode="processed_logprobs",  # log-probabilities of the sampling distribution
        max_logprobs=max(EngineArgs.max_logprobs, spec.top_logprobs),
        enable_lora=spec.lora_rank is not None,
        max_lora_rank=next(rank for rank in LORA_RANKS if rank >= (spec.lora_rank or 1)),
        max_loras=spec.max_adapters,
        trust_remote_code=spec.trust_remote_code,
        hf_overrides=model_settings(config),
        override_generation_config=generation_settings(config),
        # vLLM's operation for CPUs turns a query wrongly whose heads stand apart.
        compilation_config={"custom_ops": ["-rotary_embedding"]} if cpu and heads_stand_apart(config) else {},
        enable_return_routed_experts=spec.records_experts and not cpu,
        limit_mm_per_prompt=_limits_of(spec.images),
        mm_processor_cache_gb=0,  # images are kept once, see image_inputs
        skip_mm_profiling=cpu,  # the cache's size is given
        worker_extension_cls="actors.weights.vllm_extension.WorkerExtension",
        weight_transfer_config=None if spec.is_frozen else WeightTransferConfig(backend=f"rlhf_{spec.transport}"),
        disable_log_stats=True,
    )
    try:
        bound_grammars()
        hide_cuda_builds_from_inspection()
        engine = LLMEngine.from_engine_args(replace(arguments, **spec.engine_args))
    except (TypeError, ValueError, NotImplementedError) as error:
        if not spec.engine_args or lacks_cache(error):
            raise
        raise UserError(_refusal(spec.engine_args, error)) from error
    _refuse_lost_weights(engine, spec, config)
    if spec.top_logprobs > (vocabulary := engine.model_config.get_vocab_size()):
        raise UserError(
            f"algorithm.correction.center_top_k or rollouts.top_k asks for {spec.top_logprobs} likeliest tokens, but "
            f"{spec.model} has only {vocabulary}. Set the key to {vocabulary} or less."
        )
    if spec.records_experts and cpu:
        engine.collective_rpc("record_experts")
    return engine


def _limits_of(images: ImageFolder | None) -> dict[str, int]:
    return {} if images is None else {"image": images.limits.max_images, "video": 0, "audio": 0}


def lacks_cache(error: BaseException) -> bool:
    """Return whether vLLM did not start because the cache does not hold one sequence."""
    return isinstance(error, ValueError) and "KV cache" in str(error)


def _refusal(given: Mapping[str, Any], error: Exception) -> str:
    """Return a message about refused arguments. It names the arguments in vLLM's message, or else all arguments."""
    reason = " ".join(str(error).split())
    named = [name for name in given if name in reason] or list(given)
    values = ", ".join(f"cluster.roles.rollout.engine_args.{name} is {given[name]}" for name in named)
    return f"{values}, but vLLM refuses this ({type(error).__name__}: {reason}). Correct or remove it."


def _refuse_lost_weights(engine: Any, spec: RolloutSpec, config: Any) -> None:
    """Raise UserError if vLLM has not read a weight of transformers' model: the engine would be another model."""
    from rlhf.models.files.weights import published_names

    unread = frozenset.intersection(*engine.collective_rpc("unread_weights"))  # a worker reads only its experts
    lost = sorted(unread & published_names(config)) if unread else []
    lost = [name for name in lost if not is_never_computed(config, name)]
    if lost:
        raise UserError(
            f"{spec.name}: vLLM has not loaded {len(lost)} weights of {spec.model}, such as {lost[0]}. It would sample "
            f"from another model, so its models of type {config.model_type} cannot be used here. Use another model."
        )


def add_experts(engine: Any, output: Any) -> None:
    """Add the experts chosen for an output's tokens to a just finished output, unless vLLM adds the experts itself."""
    (sample,) = output.outputs
    num_read = len(output.prompt_token_ids) + len(sample.token_ids) - 1  # the last token was sampled and never read
    if sample.routed_experts is None:
        sample.routed_experts = engine.collective_rpc("experts_of", args=(output.request_id, num_read))[0]
    sample.routed_experts = sample.routed_experts[:num_read]


def added_tokens(engine: Any) -> dict[str, int]:
    """Return the ids of the tokenizer's special and added tokens by their text."""
    return dict(engine.get_tokenizer().get_added_vocab())


def end_tokens(engine: Any) -> frozenset[int]:
    """Return the tokens at which vLLM ends a response, from the tokenizer and the model's folder."""
    given = engine.input_processor.generation_config_fields.get("eos_token_id")
    ends = [given] if isinstance(given, int) else given or ()
    return frozenset(ends) | {engine.renderer.get_eos_token_id()} - {None}


def kv_cache_tokens(engine: Any) -> int:
    cache = engine.vllm_config.cache_config
    return int(cache.num_gpu_blocks * cache.block_size)


def sampling_params(
    sampling: Sampling, seed: int, *, turn_end: int | None, added: Mapping[str, int], **more: Any
) -> Any:
    """Return vLLM's parameters for one sample.

    Args:
        turn_end: a token that ends the sample, besides the model's end token.
        added: the result of `added_tokens`. A stop string equal to an added token ends the sample by its id. Only if an
            added token lies within a longer stop string do added tokens become part of the text searched by vLLM.
        more: further parameters of vLLM.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    ends = {*sampling.stop_token_ids, *(added[text] for text in sampling.stop if text in added), turn_end} - {None}
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0 if sampling.top_k is None else sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_new_tokens,
        seed=seed,
        stop=list(sampling.stop),
        stop_token_ids=list(ends),
        include_stop_str_in_output=True,
        skip_special_tokens=not any(name in text for text in sampling.stop if text not in added for name in added),
        spaces_between_special_tokens=False,
        detokenize=bool(sampling.stop),  # text is only looked at for stop strings
        logprobs=sampling.top_logprobs,  # besides the sampled token's
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **more,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedWeights:
    """The state of an engine after an update, before the next step."""

    checksums: tuple[str, ...]  # checksum of the bytes that each worker has read
    version: int
    reusable_blocks: int  # blocks of keys and values from old weights that a new request would reuse


def serve_own_weights(engine: Any, spec: RolloutSpec) -> Any:
    """Mark a frozen engine's weights as version 0 and load any adapter. Return vLLM's name for the adapter, or None."""
    engine.set_weight_version("0")
    if spec.adapter is None:
        return None
    request = adapter_request("adapter", 1, spec.adapter)
    add_adapter(engine, request)
    return request


def load_weights(engine: Any, manifest: WeightManifest, *, keep_cache: bool) -> LoadedWeights:
    """Load published weights. Forget all old keys and values, or keep the keys and values of running samples."""
    engine.collective_rpc("start_weight_update")
    engine.collective_rpc("update_weights", kwargs={"update_info": {"manifest": manifest}})
    engine.collective_rpc("finish_weight_update")
    return _finish(engine, manifest.version, engine.collective_rpc("received_checksum"), keep_cache=keep_cache)


def load_adapter(engine: Any, manifest: WeightManifest, *, keep_cache: bool) -> LoadedWeights:
    """Load a published LoRA adapter from its folder, over the previous adapter, also for running samples."""
    checksum = file_checksum(Path(manifest.fields["folder"]) / WEIGHTS)
    add_adapter(engine, policy_adapter(manifest, load_inplace=True))
    return _finish(engine, manifest.version, [checksum], keep_cache=keep_cache)


def policy_adapter(manifest: WeightManifest, *, load_inplace: bool = False) -> Any:
    """Return vLLM's name for the policy's adapter.

    load_inplace: load the adapter again. In the requests of samples, vLLM would load the folder in every step.
    """
    return adapter_request("policy", 1, manifest.fields["folder"], load_inplace=load_inplace)


def adapter_request(name: str, number: int, folder: str, *, load_inplace: bool = False) -> Any:
    """Return vLLM's name for an adapter. Cached keys and values belong to name and folder, weights to the number."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, folder, load_inplace=load_inplace)


def add_adapter(engine: Any, request: Any) -> None:
    """Load an adapter from its folder. RunError: vLLM refuses the adapter."""
    try:
        is_loaded = engine.add_lora(request)
    except (ValueError, KeyError, OSError) as error:
        raise RunError(f"vLLM cannot load the adapter in {request.lora_path}: {error}") from error
    if not is_loaded:
        raise RunError(f"vLLM did not load the adapter in {request.lora_path}")


def reset_caches(engine: Any) -> None:
    """Forget every cached prefix. Samples in flight recompute their prefixes with the current weights."""
    if not engine.reset_prefix_cache(reset_running_requests=True):
        raise RunError("the engine did not reset its prefix cache")


def salt_waiting(engine: Any) -> None:
    """Let waiting samples reuse only cache blocks of the engine's present version, as later requests do."""
    for request in _scheduler(engine).waiting:
        request.cache_salt = engine.get_weight_version()
        request.block_hashes.clear()
        request.update_block_hashes()


def has_step_in_flight(engine: Any) -> bool:
    """Return whether a step runs, or has run, with outputs not yet returned by `step`."""
    return bool(engine.engine_core.engine_core.batch_queue)  # None without asynchronous scheduling


@contextmanager
def no_new_steps(engine: Any) -> Iterator[None]:
    """Let the engine begin no step in the block, and only finish steps in flight."""
    from vllm.v1.core.sched.interface import PauseState

    scheduler = _scheduler(engine)
    before = scheduler.pause_state
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    try:
        yield
    finally:
        scheduler.set_pause_state(before)


def has_lost_workers(engine: Any) -> bool:
    """Return whether a worker process of the engine has died. An engine with one worker has no such process."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    executor = engine.engine_core.engine_core.model_executor
    return isinstance(executor, MultiprocExecutor) and executor.is_failed


def put_first(engine: Any) -> None:
    """Move the newest request before all waiting requests, also before samples interrupted by an update."""
    waiting = _scheduler(engine).waiting
    waiting.prepend_request(waiting.pop())


def _scheduler(engine: Any) -> Any:
    return engine.engine_core.engine_core.scheduler


def _finish(engine: Any, version: int, checksums: Sequence[str], *, keep_cache: bool) -> LoadedWeights:
    engine.set_weight_version(str(version))
    if engine.model_config.is_multimodal_model:
        engine.reset_encoder_cache()  # outputs of the tower, by the images' hashes
    scheduler = _scheduler(engine)
    cache = scheduler.kv_cache_manager
    if keep_cache:
        salt_waiting(engine)
        reusable = sum(sum(map(len, cache.get_computed_blocks(request)[0].blocks)) for request in scheduler.waiting)
    else:
        reset_caches(engine)
        reusable = len(cache.block_pool.cached_block_hash_to_block)
    return LoadedWeights(checksums=tuple(checksums), version=int(engine.get_weight_version()), reusable_blocks=reusable)
