"""A run's own workers train a policy behind a server of the Tinker protocol, with the losses of plain torch.

The server is a separate process whose model scores a token by the token before (tests.fakes.adapters). The workers are
those of every run: losses, advantages and metrics are computed here. Ranks and vLLM behind the server are in
test_tinker_run.py.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.rollout.engine_actor import RolloutSpec
from actors.rollout.tinker_engine import TinkerRolloutEngine
from actors.weights.saved import SavedSender
from rlhf.adapters import AdapterShape
from rlhf.config.schema.root import Config
from rlhf.engine.distributed import RankContext
from rlhf.engine.tinker_client import TinkerEndpoint
from rlhf.errors import RunError, UserError
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.tracking.metrics.declarations import merge_metrics, results
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.types import BatchPlan, Examples, GroupRequest, MinibatchPlan, Pairs, Prompt, Rollouts, Sampling
from rlhf.workers.offline.pairs import PreferenceWorker
from rlhf.workers.offline.supervised import SupervisedWorker
from rlhf.workers.online.policy import PolicyWorker
from tests.fakes.adapters import VOCABULARY, Adapter, logprobs
from tests.fakes.tinker_server import MODEL
from tests.integration.gang_workers import GROUPS, SAMPLES, worker_config
from tests.integration.test_tinker_client import KEY, Server

PLACE = RankContext(rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu", threads=1, deadline_s=60.0)
LR, RANK, BETA = 0.05, 4, 0.5
WORKERS: list[Any] = []
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.kill()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", seed=3))


def config_of(algorithm: dict[str, Any], model: str, folder: Path, url: str, **sections: Any) -> Config:
    policy = {"tinker": url, "lora": {"rank": RANK}}
    train = {"lr": LR, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "grad_clip": 0.5}
    given: dict[str, Any] = {"policy": policy, "train": train, **sections}
    is_online = algorithm["name"] not in ("sft", "dpo")
    return worker_config(algorithm, model, str(folder), tokens=40, is_online=is_online, **given)


@pytest.fixture(autouse=True)
def sessions() -> Iterator[None]:
    """End the sessions of a test: a server limits the models of a key."""
    yield
    for worker in WORKERS:
        worker.engine.client.close()
    WORKERS.clear()


def worker_of(kind: Any, config: Config, server: Server) -> Any:
    at = TinkerEndpoint(url=server.url, key=KEY, base_model=MODEL)
    worker = kind(config, PLACE, optimizer_steps=2, server=at)
    worker.start("", 0)
    WORKERS.append(worker)
    return worker


class Plain:
    """Training in plain torch of the same adapter."""

    def __init__(self) -> None:
        self.adapter = Adapter(AdapterShape(rank=RANK, seed=0))
        self.optimizer = torch.optim.AdamW(
            [self.adapter.a, self.adapter.b], lr=LR, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1
        )

    @property
    def table(self) -> Tensor:
        return logprobs((self.adapter.a, self.adapter.b))

    def step(self, loss: Tensor) -> float:
        self.optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_([self.adapter.a, self.adapter.b], 0.5))
        self.optimizer.step()
        return norm


def examples_of(rows: list[list[int]], prompt: int) -> Examples:
    ids = torch.tensor([token for row in rows for token in row])
    mask = torch.cat([torch.arange(len(row)) >= prompt for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return Examples(sequence_ids=torch.arange(len(rows)), lengths=lengths, token_ids=ids, loss_mask=mask)


def summed(table: Tensor, row: list[int], prompt: int) -> Tensor:
    return torch.stack([table[row[at - 1], row[at]] for at in range(prompt, len(row))]).sum()


def random_rows(count: int, *, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(5, 9, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCABULARY, (size,), generator=generator).tolist() for size in sizes]


def assert_same_weights(worker: Any, plain: Plain) -> None:
    """Compare the log-probabilities of all pairs of tokens."""
    for x in range(VOCABULARY):
        ids = [token for y in range(VOCABULARY) for token in (x, y)]
        expected = torch.stack([plain.table[before, after] for before, after in pairwise(ids)])
        torch.testing.assert_close(torch.tensor(worker.probe(ids)), expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_supervised_steps_are_those_of_plain_torch(server: Server, model: str, tmp_path: Path, loss: str) -> None:
    worker = worker_of(SupervisedWorker, config_of({"name": "sft", "loss": loss}, model, tmp_path, server.url), server)
    rows, plain = random_rows(8, seed=1), Plain()
    worker.load_data(examples_of(rows, 2))
    for step in range(2):
        own = rows[step * 4 : step * 4 + 4]
        count = sum(len(row) - 2 for row in own)
        plan = MinibatchPlan(
            sequences_by_rank=(tuple(range(step * 4, step * 4 + 4)),), num_tokens=count, num_sequences=4
        )
        computed = worker.gradient_on(plan)
        worker.divisor = divisor = step + 1.0  # as of a batch in portions
        metrics = results(merge_metrics([computed, worker.optim_step()]))
        terms = [plain.table[row[at - 1], row[at]] for row in own for at in range(2, len(row))]
        weights = [float(term.detach().exp()) if loss == "dft" else 1.0 for term in terms]
        expected = -torch.stack([w * term for w, term in zip(weights, terms, strict=True)]).sum() / count
        assert metrics["update/loss/mean"] == pytest.approx(float(expected.detach()), rel=1e-6)
        assert metrics["update/grad_norm"] == pytest.approx(plain.step(expected / divisor), rel=1e-5)
        assert "update/token_accuracy/mean" not in metrics
    assert_same_weights(worker, plain)


def test_pairs_are_compared_as_in_plain_torch(server: Server, model: str, tmp_path: Path) -> None:
    config = config_of({"name": "dpo", "beta": BETA}, model, tmp_path, server.url)
    worker = worker_of(PreferenceWorker, config, server)
    rows, plain = random_rows(8, seed=2), Plain()
    for at in range(0, 8, 2):
        rows[at + 1][:2] = rows[at][:2]
    data = Pairs(
        examples=examples_of(rows, 2),
        prompt_tokens=torch.full((4,), 2),
        margins=torch.zeros(4),
        labels=torch.ones(4) > 0,
    )
    worker.load_data(data)
    count = sum(len(row) - 2 for row in rows[::2])
    plan = MinibatchPlan(sequences_by_rank=((0, 1, 2, 3),), num_tokens=count, num_sequences=4)
    column, _ = worker.reference_logprobs(0, plan)
    worker.store_reference(0, tmp_path / "reference.safetensors", column)
    assert worker.read_reference(0, tmp_path / "reference.safetensors")
    base = logprobs(None)
    for _ in range(2):
        found = results(worker.update_on(plan))["update/loss/mean"]
        gaps = [summed(plain.table, row, 2) - summed(base, row, 2) for row in rows]
        margins = torch.stack([good - bad for good, bad in zip(gaps[::2], gaps[1::2], strict=True)])
        expected = -torch.nn.functional.logsigmoid(BETA * margins).mean()
        assert found == pytest.approx(float(expected.detach()), rel=1e-6)
        plain.step(expected)
    assert_same_weights(worker, plain)


def rollouts_of(table: Tensor, group: int) -> Rollouts:
    rows = random_rows(SAMPLES, seed=10 + group)
    prompt = rows[0][:2]
    rows = [[*prompt, *row[2:]] for row in rows]
    made = examples_of(rows, 2)
    behind = [0.0 if at < 2 else float(table[row[at - 1], row[at]]) for row in rows for at in range(len(row))]
    return Rollouts(
        sequence_ids=torch.arange(group * SAMPLES, (group + 1) * SAMPLES),
        lengths=made.lengths,
        token_ids=made.token_ids,
        response_mask=made.loss_mask,
        rollout_logprobs=torch.tensor(behind),
        versions=torch.where(made.loss_mask, 0, -1),
    )


def test_two_updates_of_a_batch_clip_ratios_and_pay_the_reference(server: Server, model: str, tmp_path: Path) -> None:
    algorithm = {"name": "grpo", "kl": {"coef": 0.1, "estimator": "k3", "place": "loss"}, "clip_low": 0.1}
    worker = worker_of(PolicyWorker, config_of(algorithm, model, tmp_path, server.url), server)
    plain, base = Plain(), logprobs(None)
    groups = [rollouts_of(base, group) for group in range(GROUPS)]
    sizes = {i: int(n) - 2 for one in groups for i, n in zip(one.sequence_ids.tolist(), one.lengths, strict=True)}
    halves = [tuple(range(GROUPS * SAMPLES // 2)), tuple(range(GROUPS * SAMPLES // 2, GROUPS * SAMPLES))]
    minibatches = tuple(
        MinibatchPlan(sequences_by_rank=(half,), num_tokens=sum(sizes[i] for i in half), num_sequences=len(half))
        for half in halves
    )
    advantages = {i: float(i % SAMPLES) - 0.9 for i in sizes}
    plan = BatchPlan(step=1, minibatches=minibatches, scores=advantages, kl_coef=0.1, entropy_coef=0.0)
    worker.prepare(plan, *groups)
    worker.set_advantages(advantages)
    tokens = [
        (sequence, row[at - 1], row[at])
        for one in groups
        for sequence, ids in zip(one.sequence_ids.tolist(), one.token_ids.split(one.lengths.tolist()), strict=True)
        for row in [ids.tolist()]
        for at in range(2, len(row))
    ]
    for minibatch, half in enumerate(halves):
        worker.forward_backward(minibatch)
        metrics = results(worker.optim_step())
        own = [token for token in tokens if token[0] in half]
        now, old = (torch.stack([table[x, y] for _, x, y in own]) for table in (plain.table, base))
        ratio, score = (now - old.detach()).exp(), torch.tensor([advantages[i] for i, _, _ in own])
        surrogate = -torch.minimum(ratio * score, ratio.clamp(0.9, 1.2) * score)
        gap = old.detach() - now
        loss = (surrogate + 0.1 * (gap.exp() - gap - 1.0)).mean()
        assert metrics["update/grad_norm"] == pytest.approx(plain.step(loss), rel=1e-5)
    assert_same_weights(worker, plain)


def test_a_resumed_run_goes_on_exactly_and_old_states_are_deleted(server: Server, model: str, tmp_path: Path) -> None:
    config = config_of({"name": "sft"}, model, tmp_path, server.url, train={"steps": 9, "lr_schedule": "linear"})
    rows, run = random_rows(4, seed=3), RunFolder.open(tmp_path, "run", resume=False)
    plan = MinibatchPlan(sequences_by_rank=((0, 1, 2, 3),), num_tokens=12, num_sequences=4)

    def begun() -> Any:
        worker = worker_of(SupervisedWorker, config, server)
        worker.load_data(examples_of(rows, 2))
        return worker

    def saved(worker: Any, step: int) -> Path:
        aside = run.begin_checkpoint(step)
        worker.save(aside / "policy")
        run.seal(run.checkpoint(step), step=step)
        return run.commit_checkpoint(step) / "policy"

    first = begun()
    first.update_on(plan)
    kept = saved(first, 1)
    expected = [results(first.update_on(plan)) for _ in range(2)]
    last = saved(first, 3)
    again = begun()
    again.load(kept)
    assert [results(again.update_on(plan)) for _ in range(2)] == expected
    path = (last / "tinker.json").read_text()
    replaced = saved(again, 3)
    begun().load(replaced)
    again.update_on(plan)
    saved(again, 4)
    begun().load(kept)
    (replaced / "tinker.json").write_text(path)
    with pytest.raises(RunError, match=r"the state tinker://.* failed: .*there is no checkpoint"):
        begun().load(replaced)
    with pytest.raises(UserError, match="the checkpoint was not made with policy"):
        begun().load(tmp_path / "a" / "b" / "c")
    run.close()


@pytest.mark.slow
def test_a_server_that_dies_is_waited_for(model: str, tmp_path: Path) -> None:
    server = Server(tmp_path / "server")
    worker = worker_of(SupervisedWorker, config_of({"name": "sft"}, model, tmp_path, server.url), server)
    rows, plain = random_rows(4, seed=4), Plain()
    count = sum(len(row) - 2 for row in rows)
    worker.load_data(examples_of(rows, 2))
    plan = MinibatchPlan(sequences_by_rank=((0, 1, 2, 3),), num_tokens=count, num_sequences=4)
    for at in range(3):
        worker.update_on(plan)
        plain.step(-torch.stack([summed(plain.table, row, 2) for row in rows]).sum() / count)
        if at == 1:
            server.kill()
            server.start()
    assert_same_weights(worker, plain)
    server.kill()
    worker.engine.client.limit_s = 0.5
    with pytest.raises(RunError, match=r"has not answered the log-probabilities within 0 s. The run can be resumed"):
        worker.update_on(plan)
    with pytest.raises(UserError, match=f"policy.tinker: nothing answers at {server.url}"):
        TinkerEndpoint(url=server.url, key=KEY, base_model=MODEL).refuse_unfit(longest_sequence=8)
    WORKERS.clear()


def recording(asked: list[int], sample: Callable[..., Any]) -> Callable[..., Any]:
    def recorded(prompt: Any, count: int, params: Any) -> Any:
        asked.append(count)
        return sample(prompt, count, params)

    return recorded


def test_the_servers_engines_answer_groups(
    server: Server, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples are those of the policy's weights, seed by seed, and a sync is proven."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # which an engine changes for its process
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = config_of({"name": "sft"}, model, tmp_path, server.url)
    policy = worker_of(SupervisedWorker, config, server)
    rows = random_rows(4, seed=5)
    policy.load_data(examples_of(rows, 2))
    policy.update_on(MinibatchPlan(sequences_by_rank=((0, 1, 2, 3),), num_tokens=12, num_sequences=4))
    sender = SavedSender(policy.engine.publish)
    at = TinkerEndpoint(url=server.url, key=KEY, base_model=MODEL)
    spec = RolloutSpec(model=model, dtype="float32", max_model_len=32, transport="shm", server=at, spool=tmp_path)
    prompt = Prompt(prompt_id=0, token_ids=(1, 2), text="", columns={})
    request = GroupRequest(group_id=0, prompt=prompt, seeds=(5, 5, 6), first_sequence_id=0)

    async def answered() -> None:
        engine = TinkerRolloutEngine(spec)
        await engine.start()
        manifest = sender.publish(policy.engine.named_adapter_weights(torch.float32), 1)
        receipt = await engine.update_weights(manifest, 1)
        assert (receipt.version, receipt.checksum) == (1, manifest.checksum)
        ids = list(range(1, VOCABULARY))
        assert await engine.probe(ids) == pytest.approx(policy.probe(ids), abs=1e-6)
        asked: list[int] = []  # the numbers of samples of the requests
        sampler = engine.client_loop.sampler
        monkeypatch.setattr(sampler, "sample", recording(asked, sampler.sample))
        await engine.hold()
        drawing = asyncio.ensure_future(engine.generate(request, Sampling(max_new_tokens=6), 1))
        await engine.release(1)
        rollouts, infos = await drawing
        assert rollouts is not None
        assert infos is not None
        assert all((info.min_version, info.max_version) == (1, 1) for info in infos)
        first, second, third = rollouts.token_ids.split(rollouts.lengths.tolist())
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
        assert asked == [1, 2]
        alone, _ = await engine.answer(replace(request, group_id=2, seeds=(6,)), Sampling(max_new_tokens=6), 1)
        assert alone is not None
        assert torch.equal(alone.token_ids, third)
        scored = policy.probe(first.tolist())[1:]
        assert rollouts.rollout_logprobs[2 : len(first)].tolist() == pytest.approx(scored, abs=1e-6)
        other = replace(request, group_id=1)
        engine.client_loop.sampler.holder._sample_backoff_until = 1e18  # the client holds requests back
        waiting = asyncio.ensure_future(engine.generate(other, Sampling(max_new_tokens=6), 1))
        await asyncio.sleep(0.1)
        assert await engine.cancel([1]) == 3
        assert await asyncio.wait_for(waiting, 10) == (None, None)
        await engine.shutdown()

    asyncio.run(answered())


def test_a_start_names_what_does_not_fit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    at = TinkerEndpoint(url=server.url, key=KEY, base_model=MODEL)
    at.refuse_unfit(longest_sequence=64)
    with pytest.raises(UserError, match="takes sequences of at most 64 tokens, and the run's longest has 65"):
        at.refuse_unfit(longest_sequence=65)
    with pytest.raises(UserError, match=f"serves {MODEL}, and policy.model is other/model"):
        replace(at, base_model="other/model").refuse_unfit(longest_sequence=8)
    with pytest.raises(UserError, match="does not say which models it serves"):
        replace(at, key="tml-eve").refuse_unfit(longest_sequence=8)
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    with pytest.raises(UserError, match="TINKER_API_KEY must hold a key that begins with `tml-`"):
        TinkerEndpoint.of(server.url, MODEL)
    assert KEY not in repr(at)
