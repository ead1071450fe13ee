"""The environment of a gang's processes, a failed start, and each rank's columns. Real gangs: tests/integration."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import RayTaskError

from actors.cluster.processes import Processes
from actors.roles import gang as module
from actors.roles.gang import CriticGang, OfflineGang, PolicyGang, free_address
from actors.roles.group import worker_environment
from actors.rollout.vllm_engine import RolloutSpec, engine_environment
from rlhf.engine import distributed
from rlhf.engine.distributed import RankContext, init_distributed
from rlhf.errors import RunError
from rlhf.roles import RemoteColumns
from rlhf.tracking.metrics.reductions import Sum
from rlhf.types import BatchPlan, MinibatchPlan, StepReward, TokenValues
from tests.fakes.calls import method, ref
from tests.fakes.groups import completed_group, group_request

PLACE = RankContext(rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu", threads=1, deadline_s=1.0)
ENGINE = RolloutSpec(name="", model="org/name", dtype="float32", max_model_len=8, max_num_seqs=1, transport="shm")


@pytest.mark.parametrize(
    "environment", [lambda: worker_environment(PLACE), lambda: engine_environment(ENGINE)], ids=["worker", "engine"]
)
def test_all_processes_use_the_hub_as_the_driver_does_and_no_secret_is_logged(
    monkeypatch: pytest.MonkeyPatch, environment: Callable[[], dict[str, str]]
) -> None:
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/shared/hf", "HF_HUB_CACHE": "/shared/hub", "HF_ENDPOINT": "http://hub"}
    for name, value in {**hub, "HF_TOKEN": "not-to-be-seen"}.items():
        monkeypatch.setenv(name, value)
    assert hub.items() <= environment().items()
    assert "not-to-be-seen" not in environment().values()


def answering(result: Any) -> Any:
    """Return a remote method with one result for each call. None: there is no answer."""
    return method(lambda *_: Future() if result is None else result)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (RayTaskError("start", "", OSError("no space left")), "start: policy rank 1 failed: OSError: no space left"),
        (None, r"start: policy rank 1 did not answer within 0 s \(cluster.start_timeout_s\)"),
    ],
    ids=["raises", "hangs"],
)
def test_a_rank_whose_start_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, failure: Exception | None, message: str
) -> None:
    async def wait_until_started(self: Processes, *, deadline_s: float) -> None: ...

    monkeypatch.setattr(Processes, "wait_until_started", wait_until_started)
    first = SimpleNamespace(__ray_call__=answering(("127.0.0.1", 1)), start=answering("fingerprint"))
    second = SimpleNamespace(start=answering(failure))
    gang = OfflineGang(cast("Any", [first, second]), deadline_s=60.0, one_host=True)
    with pytest.raises(RunError, match=message):
        asyncio.run(gang.start(deadline_s=0.2))


@pytest.mark.parametrize(
    ("call", "limit"),
    [
        (lambda gang: gang.take_teacher("head"), "start: .* within 0 s (cluster.call_timeout_s)"),
        (lambda gang: gang.stop(), "stop: .* within 0 s (the limit of an orderly end)"),
    ],
    ids=["call", "stop"],
)
def test_a_late_rank_is_told_of_with_the_limit_that_it_had(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[OfflineGang], Any], limit: str
) -> None:
    monkeypatch.setattr(module, "END_WITHIN_S", 0.05)
    rank = SimpleNamespace(take_teacher=answering(None), stop=answering(None))
    gang = OfflineGang(cast("Any", [rank]), deadline_s=0.05, one_host=True)
    with pytest.raises(RunError, match=limit.replace("(", r"\(").replace(")", r"\)")):
        asyncio.run(call(gang))


def test_the_metrics_of_ranks_that_share_microbatches_count_once() -> None:
    """Ranks 0 and 1 share micro-batches of 3 tokens, ranks 2 and 3 micro-batches of 4."""
    ranks = [SimpleNamespace(update=answering({"update/tokens/total": Sum(total=tokens)})) for tokens in (3, 3, 4, 4)]
    gang = PolicyGang(cast("Any", ranks), deadline_s=5.0, one_host=True, sequence_parallel=2)
    assert asyncio.run(gang.update(0)) == {"update/tokens/total": Sum(total=7)}


class Started:
    """A rank before or after the start. Calls go to a list shared by all ranks."""

    def __init__(self, number: int, notes: list[str], newest: int | None = None, failure: str | None = None) -> None:
        self.number, self.notes, self.newest, self.failure = number, notes, newest, failure
        self.__ray_call__ = method(lambda *_: ("127.0.0.1", 1))

    def __getattr__(self, method: str) -> Any:
        results = {
            "newest_snapshot": self.newest,
            "take_snapshot": self.failure,
            "update_on": {},
            "read_reference": True,
            "start": "fingerprint",
        }

        def call(*arguments: Any) -> Any:
            self.notes.append(f"{method} {self.number} {' '.join(map(str, arguments))}".strip())
            return ref(results.get(method))

        return SimpleNamespace(remote=call)


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of ranks, and their ends."""
    found: list[str] = []

    async def wait_until_started(self: Processes, *, deadline_s: float) -> None: ...

    async def end_one(self: Processes, rank: int) -> None:
        found.append(f"end {cast('Any', self.handles[rank]).number}")

    monkeypatch.setattr(Processes, "wait_until_started", wait_until_started)
    monkeypatch.setattr(Processes, "end_one", end_one)
    return found


class Folders:
    """The folders of a run on the nodes a and b, and the places of copies. Reasons for choosing places are recorded."""

    def __init__(self, notes: list[str]) -> None:
        self.notes, self.of_run = notes, frozenset("ab")

    async def open(self, nodes: Sequence[str]) -> list[Path]:
        return [Path("/dev/shm", node) for node in nodes]

    def copies_of(self, rank: str) -> str:
        return f"copies of {rank}"

    def nodes(self) -> frozenset[str]:
        return self.of_run

    async def places(self, nodes: dict[str, str], failures: dict[str, str]) -> dict[str, str]:
        self.notes.append(f"places {nodes} {failures}")
        return {name: f"place of {name}" for name in nodes}

    async def write(self, nodes: dict[str, str], step: int, checkpoint: Path) -> None:
        self.notes.append(f"write {nodes} {step} {checkpoint}")


def with_folders(gang: Any, notes: list[str]) -> Folders:
    """Give a gang on the nodes a and b folders in their memory."""
    gang.folders, gang.placement = Folders(notes), Placement()
    return cast("Folders", gang.folders)


class Placement:
    def nodes_of(self, role: str) -> list[str]:
        return ["a", "b"]

    async def wait_until_whole(self, *, limit_s: float) -> None: ...


async def test_new_ranks_take_the_places_of_the_old_and_get_what_those_had(notes: list[str]) -> None:
    def spawn_one(rank: int) -> Any:
        notes.append(f"spawn {rank + 2}")
        return Started(rank + 2, notes)

    ranks: Any = [Started(0, notes), Started(1, notes)]
    gang = OfflineGang(ranks, spawn_one, deadline_s=60.0, one_host=True)
    with_folders(gang, notes)
    await gang.start(deadline_s=60.0)
    assert notes[2:] == [
        "open_snapshots 0 /dev/shm/a/policy-0 copies of policy-0",
        "open_snapshots 1 /dev/shm/b/policy-1 copies of policy-1",
    ]
    data: Any = ["rows"]
    await gang.load_data(data)
    head: Any = "head"
    await gang.take_teacher(head)
    assert await gang.read_reference(0, Path("a"))
    await gang.store_reference(1, Path("b"), [])
    notes.clear()
    await gang.restart()
    assert notes == [
        *("end 0", "end 1", "spawn 2", "spawn 3"),
        *("start 2 127.0.0.1 1", "start 3 127.0.0.1 1"),
        *(
            "open_snapshots 2 /dev/shm/a/policy-0 copies of policy-0",
            "open_snapshots 3 /dev/shm/b/policy-1 copies of policy-1",
        ),
        *("take_teacher 2 head", "take_teacher 3 head"),
        *("load_data 2 rows", "load_data 3 rows"),
        *("read_reference 2 0 a", "read_reference 3 0 a"),
        *("read_reference 2 1 b", "read_reference 3 1 b"),
    ]


async def test_a_new_policy_is_connected_to_the_engines(notes: list[str]) -> None:
    ranks: Any = [Started(0, notes)]
    gang = PolicyGang(ranks, lambda rank: cast("Any", Started(1, notes)), deadline_s=60.0, one_host=True)
    await gang.start(deadline_s=60.0)

    async def reconnect() -> None:
        notes.append("reconnect")

    gang.reconnect = reconnect
    await gang.restart()
    assert notes[-2:] == ["start 1 127.0.0.1 1", "reconnect"]


async def test_receivers_of_a_broadcast_are_waited_for_at_most_two_minutes(notes: list[str]) -> None:
    ranks: Any = [Started(0, notes)]
    gang = PolicyGang(ranks, deadline_s=1800.0, one_host=True)
    await gang.start(deadline_s=300.0)
    assert (await gang.meeting(num_receivers=2, timeout_s=1800.0)).timeout_s == 110.0
    assert (await gang.meeting(num_receivers=2, timeout_s=60.0)).timeout_s == 60.0


CHOSEN = ["send_snapshots_to 0 place of policy-0", "send_snapshots_to 1 place of policy-1"]
SNAPSHOTS = ["take_snapshot 0 1", "take_snapshot 1 1"]


async def test_ranks_copy_to_other_nodes_which_are_chosen_again_when_nodes_change_or_a_copy_fails(
    notes: list[str], tmp_path: Path
) -> None:
    nodes = "places {'policy-0': 'a', 'policy-1': 'b'}"
    ranks: Any = [Started(0, notes), Started(1, notes)]
    gang = OfflineGang(ranks, deadline_s=60.0, one_host=False)
    folders = with_folders(gang, notes)
    await gang.start(deadline_s=60.0)
    notes.clear()
    await gang.take_snapshot(1)
    assert notes == [f"{nodes} {{}}", *CHOSEN, *SNAPSHOTS]
    notes.clear()
    await gang.take_snapshot(1)
    assert notes == SNAPSHOTS
    folders.of_run = frozenset("abc")
    notes.clear()
    await gang.take_snapshot(1)
    assert notes == [f"{nodes} {{}}", *CHOSEN, *SNAPSHOTS]
    ranks[1].failure = "no space left"
    notes.clear()
    await gang.take_snapshot(1)
    assert notes == [*SNAPSHOTS, f"{nodes} {{'policy-1': 'no space left'}}", *CHOSEN]
    notes.clear()
    await gang.restore_snapshot(1)
    assert notes == [f"{nodes} {{}}", *CHOSEN, "restore_snapshot 0 1", "restore_snapshot 1 1"]
    notes.clear()
    gang.placement = cast("Any", None)  # it has lost a node
    await gang.save_snapshots(1, tmp_path / "policy")
    assert notes == [f"write {{'policy-0': 'a', 'policy-1': 'b'}} 1 {tmp_path}/policy"]


async def test_ranks_keep_their_state_right_after_the_step_without_another_call(notes: list[str]) -> None:
    ranks: Any = [Started(0, notes), Started(1, notes)]
    gang = OfflineGang(ranks, lambda rank: ranks[rank], deadline_s=60.0, one_host=True)
    plan: Any = "rows"
    await gang.update_on(plan, snapshot=4)
    sent = ["update_on 0 rows", "update_on 1 rows", "take_snapshot 0 4", "take_snapshot 1 4"]
    assert notes == sent
    await gang.take_snapshot(4)
    assert notes == sent
    await gang.take_snapshot(5)
    assert notes == [*sent, "take_snapshot 0 5", "take_snapshot 1 5"]
    await gang.update_on(plan, snapshot=6)
    await gang.start(deadline_s=60.0)
    await gang.restart()
    notes.clear()
    await gang.take_snapshot(6)
    assert notes == ["take_snapshot 0 6", "take_snapshot 1 6"]


@pytest.mark.parametrize(("steps", "common"), [((3, 2), 2), ((3, None), None)])
async def test_the_oldest_of_the_newest_states_is_common_to_all_ranks(
    notes: list[str], steps: tuple[int | None, ...], common: int | None
) -> None:
    ranks: Any = [Started(number, notes, newest) for number, newest in enumerate(steps)]
    gang = CriticGang(ranks, deadline_s=60.0, one_host=True)
    assert await gang.newest_snapshot() == common


class Rank:
    """A rank that records the arguments of calls."""

    def __init__(self, **results: Any) -> None:
        self.calls: dict[str, tuple[Any, ...]] = {}
        for name, result in results.items():
            setattr(self, name, SimpleNamespace(remote=self.noting(name, result), options=self.options(name, result)))

    def noting(self, name: str, result: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls[name] = args
            return ref(result)

        return call

    def options(self, name: str, result: Any) -> Callable[..., Any]:
        """Return a method that returns a column and, awaited, the result."""

        def call(*args: Any) -> Any:
            self.calls[name] = args
            return f"column of {args[-1] if args else None}", ref(result)

        return lambda num_returns: SimpleNamespace(remote=call)


def group(index: int, *sequence_ids: int) -> Any:
    request = group_request(index, samples=len(sequence_ids), first_sequence_id=sequence_ids[0])
    return completed_group(request, f"group {index}")


def plan_of(*minibatches: Sequence[tuple[int, ...]]) -> BatchPlan:
    """Return a plan of minibatches with the given sequences for each rank."""
    ids = [i for shares in minibatches for share in shares for i in share]
    return BatchPlan(
        step=1,
        minibatches=tuple(
            MinibatchPlan(sequences_by_rank=tuple(shares), num_tokens=9, num_sequences=3) for shares in minibatches
        ),
        scores={i: float(i) for i in ids},
        kl_coef=0.0,
        temperatures={0: 0.5},
        steps={5: (StepReward(end=3, value=1.0),)},
    )


def column(name: str, *sequence_ids: int) -> RemoteColumns[TokenValues]:
    ref: Any = name
    return RemoteColumns(ref=ref, sequence_ids=sequence_ids)


GROUPS = [group(0, 0, 1), group(1, 2, 3), group(2, 4, 5)]
PLAN = plan_of([(0, 1), (2,), ()], [(4,), (3, 5), ()])  # the third rank has no sequence, and runs sequence 0


def test_a_rank_is_handed_only_columns_and_scores_of_its_own_sequences() -> None:
    ranks = [Rank(prepare=((), {}), set_advantages=({}, {}), token_signals=size) for size in (4, 0, 7)]
    gang = PolicyGang(cast("Any", ranks), deadline_s=60.0, one_host=True)
    references = [column(f"reference {i}", *one.columns.sequence_ids) for i, one in enumerate(GROUPS)]
    values = [column("values of 5 and 0", 5, 0), column("values of 1 to 4", 1, 2, 3, 4)]

    async def run() -> tuple[Any, Any]:
        await gang.prepare(PLAN, GROUPS, references)
        report = await gang.set_advantages(PLAN, {i: i / 2 for i in range(8)}, values)
        return report, await gang.token_signals((0, 4))

    report, signals = asyncio.run(run())
    plans, parts = zip(*((call[0], call[1:]) for call in (rank.calls["prepare"] for rank in ranks)), strict=True)
    assert parts == (
        ("group 0", "group 2", "reference 0", "reference 2"),
        ("group 1", "group 2", "reference 1", "reference 2"),
        ("group 0", "reference 0"),
    )
    assert [set(plan.scores) for plan in plans] == [{0, 1, 4}, {2, 3, 5}, {0}]
    assert [set(plan.temperatures) for plan in plans] == [{0}, set(), {0}]
    assert [set(plan.steps) for plan in plans] == [set(), {5}, set()]
    assert [plan.minibatches for plan in plans] == [PLAN.minibatches] * 3
    assert [rank.calls["set_advantages"] for rank in ranks] == [
        ({0: 0.0, 1: 0.5, 4: 2.0}, "values of 5 and 0", "values of 1 to 4"),
        ({2: 1.0, 3: 1.5, 5: 2.5}, "values of 5 and 0", "values of 1 to 4"),
        ({0: 0.0}, "values of 5 and 0"),
    ]
    assert [returns.sequence_ids for returns in report.returns] == [(0, 1, 4), (2, 3, 5), ()]
    assert signals == ["column of (0, 4)"] * 2  # the second rank has neither sequence


def test_ranks_that_share_microbatches_are_handed_the_same_columns() -> None:
    ranks = [Rank(prepare=((), {})) for _ in range(4)]
    gang = PolicyGang(cast("Any", ranks), deadline_s=60.0, one_host=True, sequence_parallel=2)
    asyncio.run(gang.prepare(plan_of([(0, 1), (2, 3)]), GROUPS, ()))
    assert [rank.calls["prepare"][1:] for rank in ranks] == [("group 0",)] * 2 + [("group 1",)] * 2


def test_the_critic_is_handed_returns_by_its_own_plan() -> None:
    ranks = [Rank(values=3, prepare=None) for _ in range(2)]
    gang = CriticGang(cast("Any", ranks), deadline_s=60.0, one_host=True)
    plan = plan_of([(0, 1), (2, 3)], [(4,), (5,)])

    async def run() -> Any:
        values = await gang.values(plan, GROUPS)
        await gang.prepare(plan, [column("returns of 0 to 4", 0, 1, 2, 3, 4), column("returns of 5", 5)])
        return values

    values = asyncio.run(run())
    assert [rank.calls["values"][1:] for rank in ranks] == [("group 0", "group 2"), ("group 1", "group 2")]
    assert [one.sequence_ids for one in values] == [(0, 1, 4), (2, 3, 5)]
    assert [rank.calls["prepare"] for rank in ranks] == [
        ("returns of 0 to 4",),
        ("returns of 0 to 4", "returns of 5"),
    ]


def test_ranks_meet_at_a_port_that_is_free_and_that_no_connection_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    host, port = free_address(None, one_host=True)
    assert 20_000 <= port < 32_768
    with socket.create_server((host, port)) as taken:
        monkeypatch.setattr(module, "PORTS", range(port, port + 1))
        with pytest.raises(RunError, match=f"No port from {port} to {port} is free on 127.0.0.1"):
            free_address(None, one_host=True)
        assert taken.getsockname()[1] == port


def test_ranks_can_meet_at_an_address_of_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    families: list[int] = []

    def probe(family: int = socket.AF_INET) -> Any:
        families.append(family)
        return nullcontext(SimpleNamespace(bind=lambda address: None))

    def join(*_: Any, init_method: str, **__: Any) -> None:
        raise ValueError(init_method)

    with monkeypatch.context() as patched:
        patched.setattr("ray.util.get_node_ip_address", lambda: "fd00::1")
        patched.setattr("socket.socket", probe)
        host, port = free_address(None, one_host=False)
    assert (host, families) == ("fd00::1", [socket.AF_INET6])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(distributed, "meet_through", lambda address: None)
    monkeypatch.setattr("torch.distributed.init_process_group", join)
    with pytest.raises(RunError, match=rf"tcp://\[fd00::1\]:{port}$"):
        init_distributed(PLACE, host, port)
