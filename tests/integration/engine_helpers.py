"""A rollout engine in a separate process beside a trainer's model, for the tests of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from actors.rollout.engine_actor import RolloutSpec, RolloutWorker, engine_environment
from actors.rollout.vllm_engine import has_step_in_flight
from actors.weights import WeightManifest
from rlhf.types import GroupRequest, Prompt, Rollouts, Sampling

DEADLINE_S = 240.0  # limit of a start or an answer, on a slow and busy machine
SAMPLING = Sampling(max_new_tokens=24)


class BreakableEngine(RolloutWorker):
    """An engine with a replaceable function for tests."""

    async def replace(self, module: str, name: str, by: Callable[..., Any] | None) -> None:
        """Replace module.name, or an attribute of a class, by `by`. None restores the original."""
        import pkgutil

        target = pkgutil.resolve_name(module)
        originals: dict[tuple[str, str], Any] = self.__dict__.setdefault("originals", {})
        original = originals.setdefault((module, name), getattr(target, name))
        setattr(target, name, original if by is None else by)

    async def interrupt(self, group_ids: Sequence[int], tokens: int) -> None:
        """Cancel groups once a response in the engine has `tokens` tokens."""
        await self.until_tokens(tokens)
        await self.cancel(group_ids)

    async def until_tokens(self, tokens: int) -> None:
        """Wait until a response in the engine has `tokens` tokens."""

        def longest(engine: Any) -> int:
            states = engine.output_processor.request_states.values()
            return max((state.detokenizer.num_output_tokens() for state in states), default=0)

        while await self.calls.run(longest, "a response") < tokens:
            pass

    async def steps_seen(self, count: int) -> list[bool]:
        """Return whether the engine had a step in flight before some calls."""
        found: list[bool] = []
        finish = self.loop._finish_steps

        def look() -> None:
            found.append(has_step_in_flight(self.loop._engine))
            finish()

        self.loop._finish_steps = look  # type: ignore[method-assign]
        for _ in range(count):
            await self.calls.run(lambda engine: None, "a step")
        self.loop._finish_steps = finish  # type: ignore[method-assign]
        return found


class AsyncEngine(BreakableEngine):
    """An engine that schedules the next step during a step, as on GPUs. On a CPU, vLLM disables such scheduling."""

    def __init__(self, values: RolloutSpec) -> None:
        from vllm.platforms.cpu import CpuPlatform

        check = CpuPlatform.check_and_update_config

        def turn_on(config: Any) -> None:
            check(config)
            config.scheduler_config.async_scheduling = True

        CpuPlatform.check_and_update_config = staticmethod(turn_on)
        # A step on a CPU is over when it returns, so there is no stream to wait for.
        torch.cuda.Stream = torch.cuda.Event = MagicMock  # type: ignore[misc, assignment]
        torch.cuda.stream = torch.cuda.current_stream = MagicMock  # type: ignore[assignment]
        super().__init__(values)


def spec(model: Path, **changes: Any) -> RolloutSpec:
    """Return a small float32 engine on one thread."""
    values: dict[str, Any] = {
        "name": "rollout engine 0",
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 64,
        "transport": "shm",
        "kv_cache_gib": 0.25,
        "start_timeout_s": DEADLINE_S,
        "call_timeout_s": 60.0,
    }
    return RolloutSpec(**(values | changes))


@contextmanager
def engine(
    values: RolloutSpec, *, num_gpus: float = 0.0, worker: type[RolloutWorker] = BreakableEngine
) -> Iterator[Any]:
    """Yield a started engine's actor handle. The engine must never share a process with a trainer."""
    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    remote = ray.remote(worker)
    handle = remote.options(
        num_cpus=1, num_gpus=num_gpus, max_concurrency=1000, runtime_env={"env_vars": engine_environment(values)}
    ).remote(values)
    call(handle.start.remote())
    yield handle
    call(handle.shutdown.remote())
    ray.kill(handle)


def call(*refs: Any) -> Any:
    """Return the results; a single result is returned without a list."""
    results = ray.get(list(refs), timeout=DEADLINE_S)
    return results[0] if len(refs) == 1 else results


def model_like(folder: Path, *, seed: int, std: float = 0.3) -> PreTrainedModel:
    """Return the model after a large step in a random direction, so that no sync hides in rounding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


def request(group_id: int, *, samples: int = 4, prompt_tokens: int = 8) -> GroupRequest:
    """Return a prompt of letters, different for every group."""
    token_ids = tuple(65 + (7 * group_id + 3 * i) % 57 for i in range(prompt_tokens))
    return GroupRequest(
        group_id=group_id,
        prompt=Prompt(prompt_id=group_id, token_ids=token_ids, text="", columns={}),
        seeds=tuple(1000 * group_id + sample for sample in range(samples)),
        first_sequence_id=group_id * samples,
    )


def logprobs_of(model: PreTrainedModel, token_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the trainer's log-probabilities of a sequence's tokens; 0 for the first."""
    with torch.no_grad():
        logits = model(token_ids[None]).logits[0, :-1].float() / temperature
    chosen = logits.log_softmax(-1).gather(1, token_ids[1:, None])[:, 0]
    return torch.cat([torch.zeros(1), chosen])


def sequences(rollouts: Rollouts) -> Iterator[dict[str, Tensor]]:
    """Return the columns of each sequence."""
    names = ("token_ids", "response_mask", "rollout_logprobs", "versions")
    columns = [getattr(rollouts, name).split(rollouts.lengths.tolist()) for name in names]
    for parts in zip(*columns, strict=True):
        yield dict(zip(names, parts, strict=True))


def worst_difference(model: PreTrainedModel, rollouts: Rollouts) -> float:
    """Return the largest |trainer - engine| over the sampled tokens, in nats."""
    return max(
        float((logprobs_of(model, s["token_ids"]) - s["rollout_logprobs"])[s["response_mask"]].abs().max())
        for s in sequences(rollouts)
    )


def sync(handle: Any, manifest: WeightManifest | None) -> Any:
    """Return the engine's receipt of a sync."""
    assert manifest is not None
    return call(handle.update_weights.remote(manifest, manifest.version))


def spanning(drawn: Rollouts, old: Any, new: Any, *, kept: bool, version: int = 2) -> int:
    """Check each token by the weights of its version. Return the number of responses with tokens of both versions.

    version: the version of the new weights.
    """
    changed = 0
    for sequence in sequences(drawn):
        tokens, told = sequence["token_ids"], sequence["rollout_logprobs"]
        begin = int(sequence["response_mask"].nonzero()[0].item())
        is_new = sequence["versions"] == version
        first = int(is_new.int().argmax()) if is_new.any() else len(tokens)
        assert (continued(old, old, tokens[:first], begin) - told[begin:first]).abs().max() < 1e-3
        if first < len(tokens):
            changed += 1
            before = old if kept else new  # if keys and values are recomputed, all come from the new weights
            assert (continued(before, new, tokens, first) - told[first:]).abs().max() < 1e-3
    return changed


def continued(old: Any, new: Any, token_ids: Tensor, first: int) -> Tensor:
    """The log-probabilities of the tokens from `first` on by new weights, over keys and values of old weights."""
    cache = DynamicCache()
    with torch.no_grad():
        old(token_ids[None, : first - 1], past_key_values=cache)
        logits = new(token_ids[None, first - 1 :], past_key_values=cache).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, token_ids[first:, None])[:, 0]
