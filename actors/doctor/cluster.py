"""`rlhf doctor --cluster`: check whether the nodes of a Ray cluster can train together, and give remedies.

An actor without resources checks each node. Every wait has a deadline. The check leaves no files behind.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.address import cluster_to_join
from actors.cluster.connect import connected
from actors.cluster.placement import may_grow, missing_resources, nodes_of_bundles
from actors.doctor.check_results import CheckResult, check, show
from actors.doctor.node_probe import SHARE, DriverFacts, Link, NodeProbe, code_hash, size_of, versions
from rlhf.config.files.load import LoadedConfig
from rlhf.config.pipeline import model_places
from rlhf.config.placement_plan import plan_placement
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import MergeStage, Stage
from rlhf.errors import UserError
from rlhf.planning.footprints import Sizes, footprints
from rlhf.planning.memory import snapshot_sizes
from rlhf.planning.shared_memory import SnapshotBytes, snapshots_by_node

ANSWER_WITHIN_S = 60.0  # for a node, whose actor has to start first
QUICK_S = 15.0
MOST_FOR_ALL_PAIRS = 8  # nodes; with more, each node is measured with the next
CLOCKS_WITHIN_S = 1.0
SLOW = 0.5  # of the median bandwidth
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_cluster(loaded: LoadedConfig | None, address: str | None) -> tuple[CheckResult, ...]:
    """Return the results of all checks, and print a table.

    loaded: the configuration with paths and placement to check. address: default cluster.address, then RAY_ADDRESS.
    """
    stages = [] if loaded is None else list(loaded.stages.values())
    settings = next((stage.cluster for stage in stages if not isinstance(stage, MergeStage)), ClusterConfig())
    if address is not None:
        settings = settings.model_copy(update={"address": address})
    if cluster_to_join(settings.address) is None:
        raise UserError("--cluster: no cluster is named. Give --address HOST:PORT, cluster.address, or RAY_ADDRESS.")
    with connected(settings):
        results = tuple(cluster_results(stages))
        nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    show(results, title="rlhf doctor --cluster", passed="this cluster can train", nodes=nodes)
    return results


def cluster_results(stages: Sequence[Stage]) -> Iterator[CheckResult]:
    alive = [node for node in ray.nodes() if node["Alive"]]
    yield from (replace(result, node="cluster") for result in _room(stages, alive))
    snapshots, notes = snapshots_of(stages, alive)
    yield from notes
    with _probes(alive) as probes, _shared_folder(stages) as shared:
        sizes = {path: size_of(path) for path in paths_of(stages)}
        here: dict[str, Any] = {"versions": versions(), "code": code_hash(), "sizes": sizes}
        driver = DriverFacts(**here, models=hub_models(stages), shared=shared, snapshots=snapshots)
        answers = {node: probe.look.remote(node, driver) for node, probe in probes.items()}
        reached: list[str] = []
        ends = time.monotonic() + ANSWER_WITHIN_S
        for node, ref in answers.items():
            answer = _result(ref, max(1.0, ends - time.monotonic()))
            if not isinstance(answer, list):
                advice = "check that the node is up and has the same installation as this machine"
                yield CheckResult("answer", "bad", str(answer), advice, node)
                continue
            reached.append(node)
            if shared is not None and all(result.what != "run.dir" for result in answer):
                answer.append(_shares(shared, node))
            yield from (replace(result, node=node) for result in answer)
        for node in reached:
            yield replace(_clock(probes[node]), node=node)
        if len(reached) > 1:
            yield from _links({node: probes[node] for node in reached})


def snapshots_of(
    stages: Sequence[Stage], alive: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, SnapshotBytes], list[CheckResult]]:
    """Return the size of the largest snapshots of any run for each node of the empty cluster, by the node's address.

    The second result has a note for each run with snapshots of unknown size.
    """
    most: dict[str, SnapshotBytes] = {}
    notes = []
    for stage in stages:
        if not isinstance(stage, Config):
            continue
        plan = plan_placement(stage)
        at = nodes_of_bundles(plan, alive)
        try:
            sizes = snapshot_sizes(footprints(stage, Sizes()))
        except UserError as error:
            advice = "compare /dev/shm with the snapshots in `rlhf plan`, or set cluster.restarts.gang=0"
            notes.append(CheckResult(f"snapshots of {stage.run.name}", "note", str(error), advice, "cluster"))
            continue
        if at is None:  # the row about the room says so
            continue
        ranks = {role: [at[slot.bundle] for slot in plan.slots[role]] for role in sizes}
        for node, snapshots in snapshots_by_node(sizes, ranks, set(at)).items():
            address = alive[node]["NodeManagerAddress"]
            most[address] = max(snapshots, most.get(address, snapshots), key=lambda each: each.total)
    return most, notes


def hub_models(stages: Sequence[Stage]) -> list[str]:
    """Return the models to load from the hub: all model names without a path on this machine."""
    named: dict[str, None] = {}
    for stage in stages:
        for key, section in model_places(stage.model_dump(mode="json")):
            name = section[key[-1]]
            is_loaded = key[0] != "merge" and key[-1] in ("model", "against")
            if is_loaded and HUB_NAME.fullmatch(name) and not os.path.exists(name):
                named[name] = None
    return list(named)


def paths_of(stages: Sequence[Stage]) -> list[str]:
    """Return the files and folders of this machine that the configuration names and the run reads."""
    named: dict[str, None] = {}

    def walk(value: Any) -> None:
        if isinstance(value, str):
            name = value if os.path.exists(value) else value.rpartition(":")[0]  # a reward is FILE.py:NAME
            if ("/" in name or "." in name) and os.path.exists(name):
                named[name] = None
        elif isinstance(value, Mapping | list | tuple):
            for below in value.values() if isinstance(value, Mapping) else value:
                walk(below)

    for stage in stages:
        walk(stage.model_dump(mode="json", exclude={"run"}))
    return list(named)


def _room(stages: Sequence[Stage], alive: Sequence[Mapping[str, Any]]) -> Iterator[CheckResult]:
    """Report the nodes, and check whether each run fits into the empty cluster."""
    nodes = [node["Resources"] for node in alive]
    cpus, gpus = (sum(resources.get(key, 0.0) for resources in nodes) for key in ("CPU", "GPU"))
    yield check("nodes", f"{len(alive)}, with {cpus:g} CPU and {gpus:g} GPU")
    for stage in stages:
        if isinstance(stage, MergeStage):
            continue
        plan = plan_placement(stage)
        missing = missing_resources(plan, alive)
        needed = f"{len(plan.bundles)} bundles, {plan.total('CPU'):g} CPU and {plan.total('GPU'):g} GPU"
        found = needed if missing is None else f"{needed}, more than the cluster has{missing}"
        advice = "see `rlhf plan`: lower cluster.roles, or add nodes"
        grows = missing is not None and may_grow(alive)
        if grows:
            advice += ". The run waits for nodes of an autoscaler (cluster.start_timeout_s)"
        yield check(f"room for {stage.run.name}", found, missing is None, advice, failed="note" if grows else "bad")


@contextmanager
def _probes(alive: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    probes = {}
    for node in alive:
        there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        probe = ray.remote(NodeProbe).options(num_cpus=0, scheduling_strategy=there)
        probes[node["NodeManagerAddress"]] = probe.remote()
    try:
        yield probes
    finally:
        for probe in probes.values():
            ray.kill(probe)


@contextmanager
def _shared_folder(stages: Sequence[Stage]) -> Iterator[Path | None]:
    """Yield a new file in the runs' folder, for all nodes to read. None: there is no configuration."""
    if not stages:
        yield None
        return
    at = stages[0].run.dir.absolute()
    while not at.exists():
        at = at.parent
    folder = at / f".rlhf-doctor-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
        (folder / "driver").write_text(secrets.token_hex(16), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"run.dir: {at} cannot be written: {error.strerror}. Choose a folder that you can write."
        ) from error
    try:
        yield folder / "driver"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shares(shared: Path, node: str) -> CheckResult:
    where, written = shared.parents[1], shared.with_name(node)
    if written.exists() and written.read_bytes() == shared.read_bytes():
        return check("run.dir", f"{where}: shared, and can be written")
    return CheckResult("run.dir", "bad", f"{where}: what the node writes there is not seen here", SHARE)


def _clock(probe: Any) -> CheckResult:
    """Compare the node's clock with this machine's, by the quickest of a few answers."""
    offsets = []
    for _ in range(5):
        began = time.time()
        remote = _result(probe.now.remote(), QUICK_S)
        if not isinstance(remote, float):
            return CheckResult("clock", "note", f"not known: {remote}")
        took = time.time() - began
        offsets.append((took, remote - began - took / 2))
    took, offset = min(offsets)
    agrees = abs(offset) <= max(CLOCKS_WITHIN_S, took)
    found = f"within {CLOCKS_WITHIN_S:g} s of here" if agrees else f"{offset:+.1f} s from here"
    advice = "run chrony or ntpd: times in logs, checkpoints and W&B are not comparable"
    return check("clock", found, agrees, advice)


def _links(probes: Mapping[str, Any]) -> Iterator[CheckResult]:
    """Measure bandwidth and latency of each pair in turn, since simultaneous measurements disturb each other."""
    nodes = list(probes)
    pairs = list(combinations(nodes, 2)) if len(nodes) <= MOST_FOR_ALL_PAIRS else list(pairwise(nodes))
    links: dict[str, Link] = {}
    for source, target in pairs:
        port = _result(probes[target].listen.remote(target), QUICK_S)
        link = _result(probes[source].reach.remote(target, port), QUICK_S) if isinstance(port, int) else port
        if isinstance(link, Link):
            links[f"{source} to {target}"] = link
            continue
        advice = "open all TCP ports between the nodes; gloo, nccl and Ray choose theirs"
        yield CheckResult("link", "bad", str(link), advice, f"{source} to {target}")
    if not links:
        return
    median = statistics.median(link.gbit_per_s for link in links.values())
    slowest = min(links, key=lambda pair: links[pair].gbit_per_s)
    for pair, link in links.items():
        slow = link.gbit_per_s < SLOW * median
        if not slow and pair != slowest:
            continue
        compared = f"the median of {len(links)} is {median:.2f} Gbit/s" if slow else f"the slowest of {len(links)}"
        found = f"{link.gbit_per_s:.2f} Gbit/s, {link.latency_ms:.2f} ms; {compared}"
        advice = "look at this pair's network: every step waits for the slowest link"
        yield replace(check("link", found, not slow, advice), node=pair)


def _result(ref: ObjectRef[Any], limit_s: float) -> Any:
    """Return an actor's answer, or the reason for a failure in words."""
    try:
        return ray.get(ref, timeout=limit_s)
    except GetTimeoutError:
        return f"no answer in {limit_s:.0f} s"
    except RayError as error:
        return " ".join((str(error).strip().splitlines() or [type(error).__name__])[-1].split())[:300]
