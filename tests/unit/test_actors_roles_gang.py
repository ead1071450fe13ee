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
from tests.fakes.calls import ref
from tests.fakes.groups import completed_group, group_request

PLACE = RankContext(rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu", threads=1, deadline_s=1.0)
ENGINE = RolloutSpec(name="", model="org/name", dtype="float32", max_model_len=8, max_num_seqs=1, transport="shm")


class Rank:
    """A rank that notes calls in a list of all ranks. `results` of its methods are None by default."""

    def __init__(self, number: int = 0, notes: list[str] | None = None, **results: Any) -> None:
        self.number, self.notes, self.calls = number, [] if notes is None else notes, dict[str, tuple[Any, ...]]()
        self.results = {"__ray_call__": ("127.0.0.1", 1), "start": "fingerprint", "update_on": {}, **results}

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any, **_: Any) -> Any:
            self.calls[method] = arguments
            if method != "__ray_call__":
                self.notes.append(f"{method} {self.number} {' '.join(map(str, arguments))}".strip())
            return ref(self.results.get(method))

        def with_column(*arguments: Any) -> Any:
            return f"column of {arguments[-1] if arguments else None}", call(*arguments)

        return SimpleNamespace(remote=call, options=lambda num_returns: SimpleNamespace(remote=with_column))


def gang_of(kind: Any, *ranks: Rank, spawn_one: Any = None, deadline_s: float = 60.0, **options: Any) -> Any:
    return kind(list(ranks), spawn_one, deadline_s=deadline_s, one_host=True, **options)


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


@pytest.mark.parametrize(
    ("results", "call", "message"),
    [
        pytest.param(
            {"start": RayTaskError("start", "", OSError("no space left"))},
            lambda gang: gang.start(deadline_s=0.2),
            "start: policy rank 1 failed: OSError: no space left",
            id="start fails",
        ),
        pytest.param(
            {"start": Future()},
            lambda gang: gang.start(deadline_s=0.2),
            r"start: policy rank 1 did not answer within 0 s \(cluster.start_timeout_s\)",
            id="start hangs",
        ),
        pytest.param(
            {"take_teacher": Future()},
            lambda gang: gang.take_teacher("math", "head"),
            r"start: policy rank 1 .* within 0 s \(cluster.call_timeout_s\)",
            id="call hangs",
        ),
        pytest.param(
            {"stop": Future()},
            lambda gang: gang.stop(),
            r"stop: policy rank 1 .* within 0 s \(the limit of an orderly end\)",
            id="stop hangs",
        ),
    ],
)
def test_a_rank_that_fails_or_is_late_is_named_with_the_limit_that_it_had(
    monkeypatch: pytest.MonkeyPatch, notes: list[str], results: dict[str, Any], call: Callable[[Any], Any], message: str
) -> None:
    monkeypatch.setattr(module, "END_WITHIN_S", 0.05)
    gang = gang_of(OfflineGang, Rank(0), Rank(1, **results), deadline_s=0.05)
    with pytest.raises(RunError, match=message):
        asyncio.run(call(gang))


def test_the_metrics_of_ranks_that_share_microbatches_count_once() -> None:
    """Ranks 0 and 1 share micro-batches of 3 tokens, ranks 2 and 3 micro-batches of 4."""
    ranks = [Rank(forward_backward={"update/tokens/total": Sum(total=tokens)}) for tokens in (3, 3, 4, 4)]
    gang = gang_of(PolicyGang, *ranks, sequence_parallel=2)
    assert asyncio.run(gang.forward_backward(0)) == {"update/tokens/total": Sum(total=7)}


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

    async def whole(*, limit_s: float) -> None: ...

    gang.folders = folders = Folders(notes)
    gang.placement = SimpleNamespace(nodes_of=lambda role: ["a", "b"], wait_until_whole=whole)
    return folders


async def test_new_ranks_take_the_places_of_the_old_and_get_what_those_had(notes: list[str]) -> None:
    def opened(first: int) -> list[str]:
        places = zip((first, first + 1), "ab", (0, 1), strict=True)
        return [f"open_snapshots {i} /dev/shm/{node}/policy-{n} copies of policy-{n}" for i, node, n in places]

    def spawn_one(rank: int) -> Rank:
        notes.append(f"spawn {rank + 2}")
        return Rank(rank + 2, notes, read_reference=True)

    ranks = [Rank(number, notes, read_reference=True) for number in (0, 1)]
    gang = gang_of(OfflineGang, *ranks, spawn_one=spawn_one)
    with_folders(gang, notes)
    await gang.start(deadline_s=60.0)
    assert notes[2:] == opened(0)
    await gang.load_data(["rows"])
    await gang.take_teacher("math", "head")
    assert await gang.read_reference(0, Path("a"))
    await gang.store_reference(1, Path("b"), [])
    notes.clear()
    await gang.restart()
    assert notes == [
        *("end 0", "end 1", "spawn 2", "spawn 3"),
        *("start 2 127.0.0.1 1", "start 3 127.0.0.1 1", *opened(2)),
        *("take_teacher 2 math head", "take_teacher 3 math head"),
        *("load_data 2 rows", "load_data 3 rows"),
        *("read_reference 2 0 a", "read_reference 3 0 a"),
        *("read_reference 2 1 b", "read_reference 3 1 b"),
    ]


async def test_a_new_policy_is_connected_to_the_engines_and_waits_for_receivers_at_most_two_minutes(
    notes: list[str],
) -> None:
    async def reconnect() -> None:
        notes.append("reconnect")

    gang = gang_of(PolicyGang, Rank(0, notes), spawn_one=lambda rank: Rank(1, notes), deadline_s=1800.0)
    await gang.start(deadline_s=60.0)
    gang.reconnect = reconnect
    await gang.restart()
    assert notes[-2:] == ["start 1 127.0.0.1 1", "reconnect"]
    meetings = [await gang.meeting(num_receivers=2, timeout_s=limit_s) for limit_s in (1800.0, 60.0)]
    assert [meeting.timeout_s for meeting in meetings] == [110.0, 60.0]


CHOSEN = ["send_snapshots_to 0 place of policy-0", "send_snapshots_to 1 place of policy-1"]
SNAPSHOTS = ["take_snapshot 0 1", "take_snapshot 1 1"]


async def test_ranks_copy_to_other_nodes_which_are_chosen_again_when_nodes_change_or_a_copy_fails(
    notes: list[str], tmp_path: Path
) -> None:
    nodes = "{'policy-0': 'a', 'policy-1': 'b'}"
    ranks = [Rank(number, notes) for number in (0, 1)]
    gang = gang_of(OfflineGang, *ranks)
    folders = with_folders(gang, notes)

    async def said(call: Any) -> list[str]:
        notes.clear()
        await call
        return list(notes)

    await gang.start(deadline_s=60.0)
    chosen = [f"places {nodes} {{}}", *CHOSEN]
    assert await said(gang.take_snapshot(1)) == [*chosen, *SNAPSHOTS]
    assert await said(gang.take_snapshot(1)) == SNAPSHOTS
    folders.of_run = frozenset("abc")
    assert await said(gang.take_snapshot(1)) == [*chosen, *SNAPSHOTS]
    ranks[1].results["take_snapshot"] = "no space left"
    failed = f"places {nodes} {{'policy-1': 'no space left'}}"
    assert await said(gang.take_snapshot(1)) == [*SNAPSHOTS, failed, *CHOSEN]
    assert await said(gang.restore_snapshot(1)) == [*chosen, "restore_snapshot 0 1", "restore_snapshot 1 1"]
    gang.placement = None  # it has lost a node
    assert await said(gang.save_snapshots(1, tmp_path / "policy")) == [f"write {nodes} 1 {tmp_path}/policy"]


async def test_ranks_keep_their_state_right_after_the_step_without_another_call(notes: list[str]) -> None:
    ranks = [Rank(number, notes) for number in (0, 1)]
    gang = gang_of(OfflineGang, *ranks, spawn_one=lambda rank: ranks[rank])
    await gang.update_on("rows", snapshot=4)
    sent = ["update_on 0 rows", "update_on 1 rows", "take_snapshot 0 4", "take_snapshot 1 4"]
    assert notes == sent
    await gang.take_snapshot(4)
    assert notes == sent
    await gang.take_snapshot(5)
    assert notes == [*sent, "take_snapshot 0 5", "take_snapshot 1 5"]
    await gang.update_on("rows", snapshot=6)
    await gang.start(deadline_s=60.0)
    await gang.restart()
    notes.clear()
    await gang.take_snapshot(6)
    assert notes == ["take_snapshot 0 6", "take_snapshot 1 6"]


@pytest.mark.parametrize(("steps", "common"), [((3, 2), 2), ((3, None), None)])
async def test_the_oldest_of_the_newest_states_is_common_to_all_ranks(
    steps: tuple[int | None, ...], common: int | None
) -> None:
    assert await gang_of(CriticGang, *[Rank(newest_snapshot=step) for step in steps]).newest_snapshot() == common


def plan_of(*minibatches: Sequence[tuple[int, ...]]) -> BatchPlan:
    """Return a plan of minibatches with the given sequences for each rank."""
    plans = [MinibatchPlan(sequences_by_rank=tuple(one), num_tokens=9, num_sequences=3) for one in minibatches]
    return BatchPlan(
        step=1,
        minibatches=tuple(plans),
        scores={i: float(i) for shares in minibatches for share in shares for i in share},
        kl_coef=0.0,
        temperatures={0: 0.5},
        steps={5: (StepReward(end=3, value=1.0),)},
    )


def column(name: str, *sequence_ids: int) -> RemoteColumns[TokenValues]:
    return RemoteColumns(ref=cast("Any", name), sequence_ids=sequence_ids)


GROUPS = [completed_group(group_request(index, samples=2), f"group {index}") for index in range(3)]
PLAN = plan_of([(0, 1), (2,), ()], [(4,), (3, 5), ()])  # the third rank has no sequence, and runs sequence 0


async def test_a_rank_is_handed_only_columns_and_scores_of_its_own_sequences() -> None:
    ranks = [Rank(prepare=((), {}), set_advantages=({}, {}), token_signals=size) for size in (4, 0, 7)]
    gang = gang_of(PolicyGang, *ranks)
    references = [column(f"reference {i}", *group.columns.sequence_ids) for i, group in enumerate(GROUPS)]
    values = [column("values of 5 and 0", 5, 0), column("values of 1 to 4", 1, 2, 3, 4)]
    await gang.prepare(PLAN, GROUPS, references)
    report = await gang.set_advantages(PLAN, {i: i / 2 for i in range(8)}, values)
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
    assert await gang.token_signals((0, 4)) == ["column of (0, 4)"] * 2  # the second rank has neither sequence


async def test_ranks_that_share_microbatches_are_handed_the_same_columns() -> None:
    ranks = [Rank(prepare=((), {})) for _ in range(4)]
    await gang_of(PolicyGang, *ranks, sequence_parallel=2).prepare(plan_of([(0, 1), (2, 3)]), GROUPS, ())
    assert [rank.calls["prepare"][1:] for rank in ranks] == [("group 0",)] * 2 + [("group 1",)] * 2


async def test_the_critic_is_handed_returns_by_its_own_plan() -> None:
    ranks = [Rank(values=3) for _ in range(2)]
    gang, plan = gang_of(CriticGang, *ranks), plan_of([(0, 1), (2, 3)], [(4,), (5,)])
    values = await gang.values(plan, GROUPS)
    await gang.prepare(plan, [column("returns of 0 to 4", 0, 1, 2, 3, 4), column("returns of 5", 5)])
    assert [rank.calls["values"][1:] for rank in ranks] == [("group 0", "group 2"), ("group 1", "group 2")]
    assert [one.sequence_ids for one in values] == [(0, 1, 4), (2, 3, 5)]
    returns = [("returns of 0 to 4",), ("returns of 0 to 4", "returns of 5")]
    assert [rank.calls["prepare"] for rank in ranks] == returns


def test_ranks_meet_at_a_port_that_is_free_and_that_no_connection_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    host, port = free_address(None, one_host=True)
    assert 20_000 <= port < 32_768
    with socket.create_server((host, port)):
        monkeypatch.setattr(module, "PORTS", range(port, port + 1))
        with pytest.raises(RunError, match=f"No port from {port} to {port} is free on 127.0.0.1"):
            free_address(None, one_host=True)


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
