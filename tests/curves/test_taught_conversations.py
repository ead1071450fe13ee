"""A student learns from its teacher at the tokens that it sampled in conversations and in agents' sessions.

The expected loss and gradient are those of a plain loop over the calls of the model, each a context and the sampled
tokens. The loop knows neither rollouts nor masks. Tokens of environments and of tools are in contexts alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from rlhf.agents.calls import AgentRun, Call
from rlhf.agents.trees import assemble_sessions
from rlhf.config.files.load import load
from rlhf.controller.learning import OnlineRoles
from rlhf.models.files.loading import load_tokenizer
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.objectives.distillation import Divergence, forward_kl, generalized_jsd
from rlhf.roles import CompletedGroup
from rlhf.rollouts.records.spans import Sampled
from rlhf.tracking.sinks.tracker import read_metrics
from rlhf.types import GroupRequest, Sampling
from tests.curves.in_process import Engine, run

TEMPERATURE = 0.8
TOOL_CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
GAME = {"environment": {"name": "guess_number", "args": {"low": 1, "high": 7}, "max_turns": 3, "max_tokens": 100}}
AGENT = {"agent": {"function": "examples/agents/search.py:solve", "columns": ["secret"], "max_tokens": 200}}
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "jsd": lambda p, q: generalized_jsd(p, q, beta=0.5),
}
Calls = list[tuple[tuple[int, ...], tuple[int, ...]]]  # contexts with the sampled tokens


class Acting(Engine):
    """The rollout role of an agent that calls a tool, answers from the result, and asks a sub-agent."""

    async def generate(
        self, requests: Sequence[GroupRequest], sampling: Sampling, *, version: int
    ) -> AsyncIterator[CompletedGroup]:
        for request in requests:
            sessions = [self._session(request, seed, sampling) for seed in request.seeds]
            rollouts, infos = assemble_sessions(request, sessions)
            yield CompletedGroup(request=request, rollouts=rollouts, infos=infos)

    def _session(self, request: GroupRequest, seed: int, sampling: Sampling) -> AgentRun:
        tokenizer = load_tokenizer(str(self.policy.config.policy.model), trust_remote_code=False)

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False).input_ids)

        tool_call = (*ids(TOOL_CALL), tokenizer.eos_token_id)
        prompt = request.prompt.token_ids
        after_tool = (*prompt, *tool_call, *ids("<|user|>5"), tokenizer.eos_token_id, *ids("<|assistant|>"))
        calls = [self._call(prompt, self._forced(prompt, tool_call))]
        for context in (after_tool, ids("<|user|>check 5<|assistant|>")):
            (turn,) = self.sample([(context, seed, sampling)])
            calls.append(self._call(context, turn))
        return AgentRun(calls=calls, result="5")

    def _forced(self, context: tuple[int, ...], tokens: tuple[int, ...]) -> Sampled:
        """Return given tokens as samples: an untrained model would never call a tool."""
        logprobs = distributions(self.model, context, tokens).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        self.seen.append((context, tokens))
        return Sampled(
            token_ids=tokens,
            logprobs=tuple(logprobs.tolist()),
            versions=(self.version,) * len(tokens),
            finish_reason="stop",
        )

    def _call(self, context: tuple[int, ...], turn: Sampled) -> Call:
        return Call(
            prompt_ids=np.array(context, np.int32),
            response_ids=np.array(turn.token_ids, np.int32),
            logprobs=np.array(turn.logprobs, np.float32),
            versions=np.array(turn.versions, np.int32),
            free=np.ones(len(turn.token_ids), np.bool_),
            restriction=None,
            finish_reason=turn.finish_reason,
            ended_s=1.0,
            broke=None,
        )

    seen: Calls


def distributions(model: Any, context: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities of all tokens before each of `tokens`, at the temperature of the samples."""
    logits = model(torch.tensor([[*context, *tokens]])).logits[0]
    result: torch.Tensor = (logits[len(context) - 1 : -1] / TEMPERATURE).log_softmax(-1)
    return result


def watching(calls: Calls, *, has_agent: bool) -> Any:
    """Return a function that replaces the engine of an agent, and writes down the calls of any engine."""

    def watch(roles: OnlineRoles) -> OnlineRoles:
        engine: Any = roles.rollout
        if has_agent:
            policy: Any = roles.policy
            engine = Acting(policy.worker.config.policy.model, policy.worker)
        engine.seen, sample = calls, engine.sample

        def seen(asked: Any) -> Any:
            turns = sample(asked)
            calls.extend((tuple(context), turn.token_ids) for (context, *_), turn in zip(asked, turns, strict=True))
            return turns

        engine.sample = seen
        return replace(roles, rollout=engine)

    return watch


def by_hand(
    calls: Calls,
    student: Any,
    teacher: Any,
    *,
    divergence: str,
    top_k: int | None,
    share: float = 1.0,
    told: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda context: context,
) -> tuple[float, float]:
    """Return `share` times the mean loss of the sampled tokens, and the norm of the gradients added so far. `told`
    turns a context into the teacher's context."""
    count, loss = sum(len(tokens) for _, tokens in calls) / share, 0.0
    for context, tokens in calls:
        ours = distributions(student, context, tokens)
        with torch.no_grad():
            theirs = distributions(teacher, told(context), tokens)
        if divergence == "sampled_reverse_kl":
            own, other = (x.gather(-1, torch.tensor(tokens)[:, None])[:, 0] for x in (ours, theirs))
            surrogate = -(other - own.detach()) * (own - own.detach()).exp()
        else:
            if top_k is not None:
                kept = theirs.topk(top_k).indices
                pair = [x.exp().gather(-1, kept) for x in (ours, theirs)]
                ours, theirs = (torch.cat([x, 1.0 - x.sum(-1, keepdim=True)], -1).log() for x in pair)
            surrogate = DIVERGENCES[divergence](ours, theirs)
        (surrogate.sum() / count).backward()
        loss += float(surrogate.detach().sum()) / count
    squares = [float(p.grad.double().square().sum()) for p in student.parameters() if p.grad is not None]
    return loss, math.sqrt(sum(squares))


async def taught(
    tmp_path: Path, player: dict[str, Any], algorithm: dict[str, Any], train: Any = None
) -> tuple[dict[str, Any], Calls, list[Any]]:
    """Run a step. Return the metrics, the calls of the model, and the student before the step with its teacher."""
    models = {name: build_tiny_llama(tmp_path / name, seed=seed) for seed, name in enumerate(("student", "teacher"))}
    config = {
        "run": {"name": "taught", "dir": str(tmp_path), "seed": 0},
        "policy": {"model": str(models["student"]), "dtype": "float32"},
        "algorithm": {"name": "on_policy_distillation", **algorithm},
        "data": {"train": train or {"task": "guessing_game", "split": "train", "size": 8}, "max_prompt_tokens": 16},
        "rollouts": {
            "prompts_per_step": 2,
            "samples_per_prompt": 2,
            "max_new_tokens": 4,
            "temperature": TEMPERATURE,
            **player,
        },
        "train": {"steps": 1, "lr": 1e-4, "sequences_per_update": 4, "max_tokens_per_microbatch": 900},
    }
    if "privileged" not in algorithm:
        config["teacher"] = {"model": str(models["teacher"]), "dtype": "float32"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    calls: Calls = []
    folder = await run(load(tmp_path / "run.yaml", []), watch=watching(calls, has_agent=player is AGENT))
    row: Any = list(read_metrics(folder))[-1]
    return row, calls, [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in models.values()]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("player", "divergence", "top_k"),
    [
        pytest.param(GAME, "jsd", 8, id="environment-jsd-8"),
        pytest.param(AGENT, "forward_kl", None, id="agent-forward_kl"),
        pytest.param(GAME, "sampled_reverse_kl", None, id="environment-sampled", marks=SLOW),
        pytest.param(AGENT, "sampled_reverse_kl", None, id="agent-sampled", marks=SLOW),
        pytest.param(AGENT, "jsd", 8, id="agent-jsd-8", marks=SLOW),
    ],
)
async def test_each_sampled_token_and_no_other_is_taught(
    tmp_path: Path, alone: None, player: dict[str, Any], divergence: str, top_k: int | None
) -> None:
    algorithm = {"divergence": divergence} | ({} if top_k is None else {"top_k": top_k})
    row, calls, models = await taught(tmp_path, player, algorithm)
    loss, norm = by_hand(calls, *models, divergence=divergence, top_k=top_k)
    assert row["update/loss/mean"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert row["update/grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert len(calls) == (12 if player is AGENT else row["rollouts/turns/mean"] * 4)
    observed = [len(context) for context, _ in calls]
    assert max(observed) > min(observed) + 10  # results and observations are in the contexts


async def test_a_policy_teaches_itself_in_conversations(tmp_path: Path, alone: None) -> None:
    rows = [{"prompt": "guess", "secret": 2}, {"prompt": "choose", "secret": 5}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    template = {"template": "{prompt} It is {secret}."}
    algorithm = {"name": "opsd", "divergence": "jsd", "beta": 0.5, "privileged": template}
    row, calls, (student, _) = await taught(tmp_path, GAME, algorithm, str(tmp_path / "rows.jsonl"))
    tokenizer = load_tokenizer(str(tmp_path / "student"), trust_remote_code=False)

    def begun(prompt: str) -> tuple[int, ...]:
        message = [{"role": "user", "content": prompt}]
        return tuple(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))

    prompts = {begun(one["prompt"]): begun(f"{one['prompt']} It is {one['secret']}.") for one in rows}

    def told(context: tuple[int, ...]) -> tuple[int, ...]:
        (plain,) = [prompt for prompt in prompts if context[: len(prompt)] == prompt]
        return prompts[plain] + context[len(plain) :]

    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    loss, norm = by_hand(calls, student, teacher, divergence="jsd", top_k=None, told=told)
    assert row["rollouts/turns/mean"] > 1.0
    assert row["update/loss/mean"] == pytest.approx(loss, rel=1e-4)
    assert row["update/grad_norm"] == pytest.approx(norm, rel=1e-6)


async def test_given_responses_are_taught_beside_the_samples(tmp_path: Path, alone: None) -> None:
    prompts, answers = ("1+1=", "2+2=", "3+3="), ("two", "four, I think", "six")
    rows = [{"prompt": p, "completion": answer} for p, answer in zip(prompts, answers, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    algorithm = {"divergence": "jsd", "on_policy_share": 0.25}
    row, calls, models = await taught(tmp_path, {}, algorithm, str(tmp_path / "rows.jsonl"))
    tokenizer = load_tokenizer(str(tmp_path / "student"), trust_remote_code=False)

    def written(prompt: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        whole = tuple(tokenizer.apply_chat_template(turns, return_dict=False))
        start = tuple(tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False))
        assert whole[: len(start)] == start
        return start, whole[len(start) :]

    of_prompts = dict(map(written, prompts, answers))
    given = [(prompt, of_prompts[prompt]) for prompt in dict.fromkeys(prompt for prompt, _ in calls)]
    assert (len(calls), len(given)) == (4, 2)
    options: dict[str, Any] = {"divergence": "jsd", "top_k": None}
    sampled, _ = by_hand(calls, *models, share=0.25, **options)
    loss, norm = by_hand(given, *models, share=0.75, **options)
    assert row["update/loss/mean"] == pytest.approx(sampled + loss, rel=1e-4)
    assert row["update/grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert row["update/given_share"] == 0.75
