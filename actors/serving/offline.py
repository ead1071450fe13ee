"""A model on disk behind rollout engines, for synchronous code: `rlhf generate`.

The engines are the same as in training, frozen at the weights of the model's folder.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from actors.cluster.connect import connected
from actors.cluster.placement import reserve_roles
from actors.cluster.waiting import wait_one
from actors.roles.group import ending
from actors.rollout.engine_creation import serve_engines
from actors.rollout.engine_group import RolloutEngines
from actors.serving.engine import ServingEngine
from actors.serving.front import FrontSpec
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.controller.rollout_scorer import process_answers, request_for
from rlhf.data.templates import UNCHANGED, ChatTemplate
from rlhf.evaluation.decoding import Decoding, Generation
from rlhf.models.files.loading import load_tokenizer
from rlhf.models.files.template_check import refuse_runaway_template
from rlhf.models.on_disk import ModelOnDisk, refuse_unservable
from rlhf.preflight.models import resolve_model
from rlhf.process.stopping import run_async
from rlhf.roles import CompletedGroup
from rlhf.rollouts.records.texts import response_texts
from rlhf.types import GroupRequest, Prompt, Rollouts, Sampling
from rlhf.vision.reading import ImageFolder


@dataclass(frozen=True, slots=True)
class Served:
    """Started engines with the tokenizer of their model."""

    engines: RolloutEngines
    tokenizer: Any
    runner: asyncio.Runner

    def answer(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Generation]:
        """Return all responses to each prompt, in order."""
        return run_async(self._answer(prompts, decoding), self.runner)

    def open_fronts(self, spec: FrontSpec) -> list[str]:
        """Start the HTTP front of each engine, and return their base URLs."""
        here = str(ray.util.get_node_ip_address())
        opening = self.engines.each(lambda handle: handle.open_front.remote(spec, here), "start")
        return run_async(opening, self.runner)

    async def _answer(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Generation]:
        requests, sampling = requests_of(prompts, decoding)
        groups = await process_answers(self.engines.generate(requests, sampling, version=0), requests, self._read)
        return [generation for group in groups for generation in group]

    async def _read(self, group: CompletedGroup, _: int) -> list[Generation]:
        ref: Any = group.rollouts
        rollouts: Rollouts = await wait_one(
            ref, role="rollout", rank=0, stage="generate", deadline_s=self.engines.deadline_s
        )
        texts = response_texts(rollouts, self.tokenizer, turn_end=group.request.prompt.turn_end)
        return [
            Generation(
                prompt_id=group.request.prompt.prompt_id,
                sample=sample,
                prompt=group.request.prompt.text,
                response=text,
                finish_reason=info.finish_reason,
                prompt_tokens=info.num_prompt_tokens,
                response_tokens=info.num_response_tokens,
            )
            for sample, (text, info) in enumerate(zip(texts, group.infos, strict=True))
        ]


def load_servable(
    name: str, *, trust_remote_code: bool, device: str, template: ChatTemplate = UNCHANGED
) -> tuple[ModelOnDisk, Any]:
    """Find a model by name, and load the tokenizer. UserError: an engine cannot serve the model."""
    model = resolve_model(name, trust_remote_code=trust_remote_code, device=device)
    refuse_unservable(model)
    tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=trust_remote_code)
    template.apply_checked(tokenizer, key="data")
    refuse_runaway_template(tokenizer)
    return model, tokenizer


@contextmanager
def serving(
    model: ModelOnDisk,
    tokenizer: Any,
    cluster: ClusterConfig,
    *,
    max_model_len: int,
    images: ImageFolder | None = None,
) -> Iterator[Served]:
    """Yield engines with the model, for the length of the block. images: of the prompts, for a model that sees."""
    with connected(cluster), asyncio.Runner() as runner, ExitStack() as stack:
        placement = run_async(reserve_roles({RolloutEngines.role}, cluster, with_reward_model=False), runner)
        engines = serve_engines(
            model, cluster, placement, max_model_len=max_model_len, images=images, engine=ServingEngine
        )
        context = ending([engines], placement.release, heartbeat_timeout_s=cluster.heartbeat_timeout_s)
        runner.run(context.__aenter__())
        stack.push(lambda *failure: runner.run(context.__aexit__(*failure)))
        run_async(engines.start(deadline_s=cluster.start_timeout_s), runner)
        yield Served(engines, tokenizer, runner)


def requests_of(prompts: Sequence[Prompt], decoding: Decoding) -> tuple[list[GroupRequest], Sampling]:
    """Return a request for each prompt, and their sampling parameters."""
    requests = [
        request_for(
            prompt,
            group_id=index,
            first_sequence_id=index * decoding.samples,
            samples=decoding.samples,
            run_seed=decoding.seed,
        )
        for index, prompt in enumerate(prompts)
    ]
    shared = Sampling.__dataclass_fields__.keys() & Decoding.__dataclass_fields__.keys()
    sampling = Sampling(**{name: getattr(decoding, name) for name in shared})
    return requests, sampling
