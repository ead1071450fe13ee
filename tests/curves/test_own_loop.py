"""A loop of the user gives the numbers of `rlhf train`, and calls in the wrong order are refused.

The workers, the loop and the roles' methods are a run's own, without Ray; tests/integration has a run with Ray.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from examples.loops.curriculum import curriculum, shares
from examples.loops.grpo import grpo
from rlhf.algorithms.microbatch import PolicyMicrobatch
from rlhf.config.files.load import LoadedConfig, load
from rlhf.controller.own_loop import OwnLoop
from rlhf.errors import RunError, UserError
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.tracking.sinks.tracker import read_metrics
from rlhf.viewing.runs import RunPlaces
from tests.curves.in_process import looped, run
from tests.integration.recipes import merge, without_clocks

LOOPS = Path(__file__).parents[2] / "examples" / "loops"
SMALL = {
    "data": {"train": str(LOOPS / "letters.jsonl")},
    "rewards": {"share": {"function": f"{LOOPS}/rewards.py:share"}},
    "rollouts": {"prompts_per_step": 3, "samples_per_prompt": 4, "max_new_tokens": 6},
    "train": {"steps": 3, "sequences_per_update": 6, "epochs_per_batch": 2},
}


def loaded(folder: Path, name: str, changes: Any = None) -> LoadedConfig:
    """Return the examples' configuration with small batches."""
    model = folder / "model"
    if not model.exists():
        build_tiny_llama(model, seed=0)
    tree = yaml.safe_load((LOOPS / "letters.yaml").read_text(encoding="utf-8"))
    own = {"run": {"name": name, "dir": str(folder), "seed": 0}, "policy": {"model": str(model)}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(merge(merge(merge(tree, SMALL), own), changes or {}), sort_keys=False), "utf-8")
    return load(path, [])


def rows(folder: Path) -> list[dict[str, Any]]:
    return without_clocks(list(read_metrics(folder)))


async def test_forty_lines_of_grpo_give_the_numbers_of_a_run_bit_for_bit(alone: None, tmp_path: Path) -> None:
    trained = await run(loaded(tmp_path, "run"))
    async with looped(loaded(tmp_path, "own")) as loop:
        await grpo(loop)
        final = await loop.export()
    source = (LOOPS / "grpo.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in source[source.index("async def grpo(loop: OwnLoop) -> None:") - 13 :] if line]) <= 40
    assert len(rows(trained)) == 3
    assert rows(loop.folder) == rows(trained)
    assert any(row["update/clip_fraction/mean"] > 0.0 for row in rows(trained))
    assert all(row["experience/kl_ref/mean"] >= 0.0 for row in rows(trained))
    weights = [load_file(path) for path in (final / "model.safetensors", *trained.rglob("*final*/model.safetensors"))]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    for step in (1, 3):
        own, theirs = (
            [json.loads(line) for line in (folder / "samples" / f"step_{step:06d}.jsonl").open()]
            for folder in (loop.folder, trained)
        )
        assert own == theirs
    assert RunPlaces([loop.folder]).by_name()[loop.folder.name].word() == "finished"


def own_clip(batch: PolicyMicrobatch) -> Any:
    """Return the plain policy gradient with an importance ratio."""
    ratio = torch.where(batch.response_mask, batch.logprobs - batch.old_logprobs, 0.0).exp()
    return -ratio * batch.advantages * batch.response_mask


def detached(batch: PolicyMicrobatch) -> Any:
    return batch.logprobs.detach()


def too_short(batch: PolicyMicrobatch) -> Any:
    return batch.logprobs[1:]


def dividing(batch: PolicyMicrobatch) -> Any:
    return batch.logprobs / (1 // 0)


@pytest.fixture
async def loop(alone: None, tmp_path: Path) -> AsyncIterator[OwnLoop]:
    async with looped(loaded(tmp_path, "loop")) as loop:
        yield loop


async def prepared(loop: OwnLoop) -> None:
    await loop.experience(await loop.sample(), [[1.0, -1.0, 0.5, -0.5]] * 3)


async def update(loop: OwnLoop, *, loss: Any = None, syncs: bool = True) -> dict[str, float]:
    """Make a step with a single update. Return the metrics."""
    async with loop.next_step():
        await prepared(loop)
        metrics = await loop.forward_backward(loss=loss)
        metrics |= await loop.optim_step()
        if syncs:
            await loop.sync()
    return metrics


async def test_calls_in_the_wrong_order_are_refused_and_change_nothing(loop: OwnLoop) -> None:
    async def refused(call: Any, text: str) -> None:
        with pytest.raises(UserError, match=text):
            await call

    await refused(loop.sample(), "sample: belongs in a step")
    await refused(loop.save(), "save: no step has ended yet")
    with pytest.raises(UserError, match=r"record: belongs in a step"):
        loop.record(kind=1.0)
    async with loop.next_step() as step:
        assert step == 1
        await refused(loop.save(), "save: belongs after a step's block")
        await refused(loop.next_step().__aenter__(), "next_step: the previous step has not ended")
        await refused(loop.optim_step(), "optim_step: there is no gradient. Call forward_backward first")
        await refused(loop.forward_backward(), "no batch is loaded; call experience first")
        groups = await loop.sample()
        await refused(loop.sample(), "sample: this step has already sampled")
        for call in (loop.experience, loop.learn, lambda groups: loop.texts(groups)):
            waiting = loop.sample([])
            await refused(call(waiting), r"got a coroutine, expected a .*of `await loop.sample\(\)`")
            waiting.close()
        await refused(
            loop.sample(loop.prompt("1 x:", wanted="x", kind="x")), "got a Prompt, expected a list of prompts"
        )
        await refused(loop.sample(["1 x:"]), "sample: got a str, expected a list of prompts, of `loop.prompt")
        with pytest.raises(UserError, match=r"got a list, expected the batch of `await loop.experience"):
            loop.visits(groups)
        await refused(loop.experience(groups, [1.0] * 3), "advantages is no list of lists. Give each group a list")
        await refused(loop.experience([]), "experience: `groups` is empty")
        await refused(loop.experience([groups[0], groups[0]]), "experience: `groups` has a group twice")
        await refused(loop.experience(groups, [[1.0]] * 3), r"groups of \[1, 1, 1\] numbers, expected \[4, 4, 4\]")
        await refused(loop.experience(groups, [[float("nan")] * 4] * 3), "an advantage is nan")
        batch = await loop.experience(groups, [[1.0, -1.0, 0.5, -0.5]] * 3)
        assert [value for _, value in sorted(batch.advantages.items())] == [1.0, -1.0, 0.5, -0.5] * 3
        await refused(loop.forward_backward(batch), "got a Experience, expected a minibatch of `loop.visits")  # type: ignore[arg-type]
        await refused(loop.forward_backward(2), "the minibatch is 2, and the batch has 2 minibatches")
        await refused(loop.forward_backward(loss="kl_cov"), "kl_cov is no loss of single micro-batches")
        await refused(loop.forward_backward(loss="sft"), "sft is no loss of single micro-batches. Name another")
        await refused(loop.forward_backward(loss=torch.zeros(4)), "loss: is a Tensor, expected an algorithm's name")
        await refused(loop.forward_backward(loss="gpro"), "loss: algorithm.name: got .gpro.; did you mean .grpo.")
        await refused(loop.forward_backward(loss={"name": "cispo", "max_ratio": 0.5}), "loss: algorithm.max_ratio")
        await loop.forward_backward()
        await refused(loop.forward_backward(1), "there is a gradient already")
        await refused(loop.sync(), "sync: a gradient waits for optim_step")
        await loop.optim_step()
        await refused(loop.sample(loop.prompts(1)), "the engines still have older weights. Call sync first")
        await refused(loop.evaluate(), "evaluate: call evaluate in a step after `sync`")
        with pytest.raises(UserError, match=r"record: .kind. is nan, expected a name of letters, digits"):
            loop.record(kind=float("nan"))
        with pytest.raises(UserError, match=r"record: .kind. is None, expected a name of letters, digits"):
            loop.record(kind=None)  # type: ignore[arg-type]
        await loop.sync()
        await refused(loop.sync(), "step 1 has synced its weights already. Begin the next step")
        await loop.forward_backward()
        await refused(loop.optim_step(), "step 1 has synced its weights. Begin the next step")
        loop._gradient = None
    loop.end()
    await refused(loop.sample(), "sample: the block of rlhf.start has ended. Make the call within the block")
    with pytest.raises(UserError, match=r"prompts: the block of rlhf.start has ended"):
        loop.prompts(1)


async def test_a_step_that_ends_without_a_sync_is_refused(loop: OwnLoop) -> None:
    await update(loop)
    with pytest.raises(UserError, match=r"step 2 ends without sync. Call sync in the block"):
        await update(loop, syncs=False)
    with pytest.raises(UserError, match=r"next_step: step 2 failed .UserError: next_step: step 2 ends without"):
        await update(loop)
    assert [row["step"] for row in rows(loop.folder)] == [1]


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (detached, "loss: the result of `.*detached.*` has no gradient. Compute the loss from batch.logprobs"),
        (too_short, r"loss: `.*` returned \(\d+,\), expected a tensor with the loss of each token, of shape"),
        (dividing, "loss: `.*` raised ZeroDivisionError.*test_own_loop.py:.* in dividing"),
    ],
)
async def test_a_wrong_loss_names_the_function_and_ends_the_work(loop: OwnLoop, loss: Any, text: str) -> None:
    """A part of the gradient may exist, so no later call works."""
    with pytest.raises(UserError, match=text):
        await update(loop, loss=loss)
    with pytest.raises(UserError, match=r"next_step: forward_backward failed"):
        await update(loop)
    assert not rows(loop.folder)


@pytest.mark.parametrize("marks", [True, False])
async def test_gradients_add_up_before_an_optimizer_step(alone: None, tmp_path: Path, marks: bool) -> None:
    """The last call marks the end of the gradient, or else the optimizer step does."""
    norms = []
    for name, times in (("once", 1), ("twice", 2)):
        async with looped(loaded(tmp_path, name)) as loop, loop.next_step():
            await prepared(loop)
            for number in range(1, times + 1):
                await loop.forward_backward(accumulate=number < times or not marks)
            norms.append((await loop.optim_step())["update/grad_norm"])
            await loop.sync()
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)


async def test_a_loss_may_be_named_or_a_function(alone: None, tmp_path: Path) -> None:
    """While every ratio is 1, all three losses have the same gradient, and the loss of CISPO has a different value."""
    found = []
    for number, loss in enumerate((None, own_clip, {"name": "cispo", "max_ratio": 4.0})):
        async with looped(loaded(tmp_path, f"loss{number}")) as loop:
            found.append(await update(loop, loss=loss))
    values, norms = ([one[name] for one in found] for name in ("update/policy_loss/mean", "update/grad_norm"))
    assert values[1] == pytest.approx(values[0], rel=1e-5, abs=1e-7)
    assert abs(values[2] - values[0]) > 1e-3
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


async def test_prompts_of_ones_own_are_sampled_anew_each_time(loop: OwnLoop) -> None:
    async with loop.next_step():
        prompt = loop.prompt("3 digits:", wanted="0123456789", kind="digits")
        first, second = await loop.sample([prompt, prompt])
        texts = [await loop.texts(group) for group in (first, second)]
        assert texts[0] != texts[1]
        wanted = [sum(c in "0123456789" for c in text) / max(len(text), 1) for text in texts[0]]
        assert first.scores.scores == pytest.approx(wanted)
        (reference,) = await loop.reference_logprobs([first])
        rollouts = await loop.rollouts(first)
        sampled = rollouts.response_mask
        torch.testing.assert_close(reference.values[sampled], rollouts.rollout_logprobs[sampled], rtol=0, atol=1e-4)
        with pytest.raises(UserError, match=r"longer than the longest prompt of data.train, which has \d+ tokens"):
            loop.prompt("3 digits::::", wanted="x", kind="x")
        with pytest.raises(UserError, match=r"prompt: rlhf.start:1: the prompt has 20 tokens, more than data"):
            loop.prompt("a much longer prompt", wanted="x", kind="x")
        with pytest.raises(UserError, match=r"needs the column `wanted`, and prompt has none"):
            loop.prompt("3 x:")
    assert rows(loop.folder)[0]["rollouts/response_tokens/max"] <= 6
    assert "update/loss/mean" not in rows(loop.folder)[0]


@pytest.mark.slow
async def test_a_checkpoint_can_be_loaded_and_continued(alone: None, tmp_path: Path) -> None:
    unbroken = await run(loaded(tmp_path, "run"))
    config = loaded(tmp_path, "own")
    async with looped(config) as loop:
        folder = await one_step(loop)
        assert folder == loop.folder / "checkpoints" / "step_000001"
        again = [await one_step(loop, save=False)]
        await loop.load(str(folder))
        with pytest.raises(UserError, match=r"load: .* is no checkpoint. Give the folder that `save` returned"):
            await loop.load(tmp_path)
    async with looped(config, resume=True) as loop:
        assert loop.step == 1
        while loop.step < loop.num_steps:
            await one_step(loop, save=False)
    assert rows(loop.folder) == rows(unbroken)
    assert again == [None]


async def one_step(loop: OwnLoop, *, save: bool = True) -> Path | None:
    async with loop.next_step():
        await loop.learn(await loop.sample())
        await loop.sync()
    return await loop.save() if save else None


async def test_the_curriculum_gives_prompts_to_large_gradients(alone: None, tmp_path: Path) -> None:
    assert shares({"digits": 1.0, "vowels": 1.0, "x": 1.0}) == {"digits": 4, "vowels": 4, "x": 4}
    assert shares({"digits": 0.0, "vowels": 0.0, "x": 3.0}) == {"digits": 1, "vowels": 1, "x": 10}
    changes = {"train": {"sequences_per_update": 12, "epochs_per_batch": 1, "steps": 2}}
    async with looped(loaded(tmp_path, "own", changes)) as loop:
        history = await curriculum(loop)
    assert history[0] == {"digits": 4, "vowels": 4, "x": 4}
    assert [sum(counts.values()) for counts in history] == [12, 12]
    assert [row["own/prompts_x"] for row in rows(loop.folder)] == [counts["x"] for counts in history]


async def test_a_lost_rank_ends_the_loop(loop: OwnLoop) -> None:
    async def lost() -> Any:
        raise RunError("update: policy rank 0 died")

    loop.roles.policy.optim_step = lost  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"policy rank 0 died"):
        await update(loop)
    with pytest.raises(UserError, match=r"save: optim_step failed .RunError: update: policy rank 0 died"):
        await loop.save()
