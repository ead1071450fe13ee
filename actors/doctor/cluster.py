"""`rlhf doctor --cluster`: check whether the nodes of a Ray cluster can train together, and give remedies.

An actor without resources checks each node. Every wait has a deadline; a silent node is a finding. The check leaves no
files behind, on the nodes or in the run's folder.
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
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.address import cluster_to_join
from actors.cluster.connect import connected
from actors.doctor.machine import CheckResult
from actors.doctor.node_probe import Link, NodeFacts, NodeProbe, code_hash, size_of, versions
from rlhf.config.files.load import LoadedConfig
from rlhf.config.placement_plan import fit, seat
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.stages import MergeStage, Stage
from rlhf.errors import UserError

ANSWER_WITHIN_S = 60.0  # for a node, whose actor has to start first
QUICK_S = 15.0
MOST_FOR_ALL_PAIRS = 8  # nodes; with more, each node is measured with the next
CLOCKS_WITHIN_S = 1.0
SLOW = 0.5  # of the median bandwidth
SHM_NEEDED_GIB = 2.0
MODELS = ("policy", "critic", "reference", "teacher", "reward", "evaluate")  # sections with models
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class OfNode:
    """A finding, and the address of its node."""

    node: str
    finding: CheckResult


def cluster_doctor(loaded: LoadedConfig | None, address: str | None) -> tuple[OfNode, ...]:
    """Return all findings, and print them as a table.

    loaded: the configuration with paths and placement to check. address: default cluster.address, then RAY_ADDRESS.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stages = [] if loaded is None else [stage for stage in loaded.stages.values() if not isinstance(stage, MergeStage)]
    settings = stages[0].cluster if stages else ClusterConfig()
    if address is not None:
        settings = settings.model_copy(update={"address": address})
    if cluster_to_join(settings.address) is None:
        raise UserError("--cluster: no cluster is named. Give --address HOST:PORT, cluster.address, or RAY_ADDRESS.")
    with connected(settings):
        findings = tuple(examine([] if loaded is None else list(loaded.stages.values())))
        nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    table = Table(title="rlhf doctor --cluster", title_justify="left")
    for heading in ("", "node", "what", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for where, finding in together(findings, nodes):
        style = {"ok": "green", "note": "yellow", "bad": "bold red"}[finding.state]
        table.add_row(Text(finding.state, style), where, finding.what, Text(finding.found), Text(finding.advice))
    console = Console()
    console.print(table)
    bad = sorted({f"{of_node.finding.what} ({of_node.node})" for of_node in findings if of_node.finding.state == "bad"})
    verdict = f"training is not possible yet: see {', '.join(bad)}" if bad else "this cluster can train"
    console.print(verdict, highlight=False)
    return findings


def together(findings: Sequence[OfNode], nodes: set[str]) -> Iterator[tuple[str, CheckResult]]:
    """Yield equal findings once, with their nodes."""
    by_finding: dict[CheckResult, list[str]] = {}
    for of_node in findings:
        by_finding.setdefault(of_node.finding, []).append(of_node.node)
    for finding, where in by_finding.items():
        yield f"all {len(nodes)}" if len(nodes) > 1 and set(where) == nodes else ", ".join(where), finding


def examine(stages: Sequence[Stage]) -> Iterator[OfNode]:
    """Yield all findings, in the order of the table."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    yield OfNode(node="cluster", finding=_nodes(alive))
    yield from (OfNode(node="cluster", finding=one) for one in _room(stages, alive))
    with _probes(alive) as probes, _shared_folder(stages) as shared:
        paths, models = paths_of(stages), hub_models(stages)
        answers = {node: probe.look.remote(node, paths, models, shared) for node, probe in probes.items()}
        facts: dict[str, NodeFacts] = {}
        ends = time.monotonic() + ANSWER_WITHIN_S
        for node, ref in answers.items():
            found = _result(ref, max(1.0, ends - time.monotonic()))
            if isinstance(found, NodeFacts):
                facts[node] = found
                continue
            advice = "is it up, and is the project installed there as it is here?"
            yield OfNode(node=node, finding=CheckResult(what="answer", state="bad", found=str(found), advice=advice))
        here = {path: size_of(path) for path in paths}
        for node, one in facts.items():
            for finding in (*judge(one, here), *_shares(one, shared, node)):
                yield OfNode(node=node, finding=finding)
        for node in facts:
            yield OfNode(node=node, finding=_clock(probes[node]))
        if len(facts) > 1:
            yield from _links({node: probes[node] for node in facts})


def judge(facts: NodeFacts, here: Mapping[str, str]) -> Iterator[CheckResult]:
    """Compare the facts of a node with this machine's. here: the sizes of the paths."""
    installed, remote = versions(), facts.versions
    differ = [name for name in {**installed, **remote} if installed.get(name) != remote.get(name)]
    differences = ", ".join(
        f"{name} {remote.get(name, 'missing')} (here {installed.get(name, 'missing')})" for name in differ
    )
    yield CheckResult(
        what="versions",
        state="bad" if differ else "ok",
        found=differences or ", ".join(f"{name} {version}" for name, version in remote.items()),
        advice="install the same on all nodes, best by one image" if differ else "",
    )
    same = facts.code == code_hash()
    yield CheckResult(
        what="our code",
        state="ok" if same else "bad",
        found=f"hash {facts.code}" + ("" if same else f", here {code_hash()}"),
        advice="" if same else "ship the same code to all nodes: one image, or one installation on a shared disk",
    )
    room = facts.shm_free_gib >= SHM_NEEDED_GIB
    yield CheckResult(
        what="/dev/shm",
        state="ok" if room else "note",
        found=f"{facts.shm_gib:.1f} GiB" + ("" if room else f", {facts.shm_free_gib:.1f} GiB free"),
        advice="" if room else "Ray's objects lie here: docker --shm-size, or an emptyDir with medium Memory",
    )
    many = f"; also up: {', '.join(facts.others)}" if facts.others else ""
    yield CheckResult(
        what="interface",
        state="ok" if facts.interface else "note",
        found=(facts.interface or "none has the address that Ray knows the node by") + many,
        advice="" if facts.interface else "start the node with --node-ip-address=ADDRESS of an interface of its own",
    )
    for path, size in facts.seen.items():
        if size == here[path]:
            yield CheckResult(what=path, state="ok", found=size)
            continue
        found = f"{size or 'not there'}, here {here[path]}"
        whence = "" if Path(path).is_absolute() else f"; it is taken from {facts.folder} there: name it from the root"
        advice = f"put it on a disk that all nodes share, or copy it to every node{whence}"
        yield CheckResult(what=path, state="note" if size else "bad", found=found, advice=advice)
    for model, cached in facts.cached.items():
        if cached:
            yield CheckResult(what=model, state="ok", found="in the hub's cache")
        elif facts.no_hub:
            found = f"not in the hub's cache, and no hub answers ({facts.no_hub})"
            advice = f"`hf download {model}` there, share HF_HOME, or name a folder that all nodes see"
            yield CheckResult(what=model, state="bad", found=found, advice=advice)
        else:
            advice = "each such node downloads it when the run starts: better before, or share HF_HOME"
            yield CheckResult(what=model, state="note", found="not in the hub's cache; the hub answers", advice=advice)


def hub_models(stages: Sequence[Stage]) -> list[str]:
    """Return the hub models of the runs: all names without a path here."""
    named: dict[str, None] = {}
    for stage in stages:
        tree = stage.model_dump(mode="json")
        sections = [tree.get(role) for role in MODELS]
        sections += [section.get("reward") for section in sections if section]
        for section in sections:
            for key in ("model", "against"):
                name = (section or {}).get(key)
                if name is not None and HUB_NAME.fullmatch(name) and not os.path.exists(name):
                    named[name] = None
    return list(named)


def paths_of(stages: Sequence[Stage]) -> list[str]:
    """Return the configured files and folders of this machine read by the run."""
    named: dict[str, None] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Mapping):
            for below in value.values():
                walk(below)
        elif isinstance(value, list | tuple):
            for below in value:
                walk(below)
        elif isinstance(value, str):
            name = value if os.path.exists(value) else value.rpartition(":")[0]  # a reward is FILE.py:NAME
            if ("/" in name or "." in name) and os.path.exists(name):
                named[name] = None

    for stage in stages:
        walk(stage.model_dump(mode="json", exclude={"run"}))
    return list(named)


def _nodes(alive: Sequence[Mapping[str, Any]]) -> CheckResult:
    total = {key: sum(node["Resources"].get(key, 0.0) for node in alive) for key in ("CPU", "GPU")}
    summary = f"{len(alive)}, with {total['CPU']:g} CPU and {total['GPU']:g} GPU"
    return CheckResult(what="nodes", state="ok", found=summary)


def _room(stages: Sequence[Stage], alive: Sequence[Mapping[str, Any]]) -> Iterator[CheckResult]:
    """Check whether each run fits into the empty cluster."""
    for stage in stages:
        if isinstance(stage, MergeStage):
            continue
        seating, nodes = seat(stage), [node["Resources"] for node in alive]
        fits = fit(seating.bundles, nodes) is not None
        yield CheckResult(
            what=f"room for {stage.run.name}",
            state="ok" if fits else "bad",
            found=f"{len(seating.bundles)} bundles, {seating.total('CPU'):g} CPU and {seating.total('GPU'):g} GPU",
            advice="" if fits else "see `rlhf plan`: lower cluster.roles, or add nodes",
        )


@contextmanager
def _probes(alive: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Start an actor on each node, and yield them by the node's address."""
    remote = ray.remote(NodeProbe)
    probes = {
        node["NodeManagerAddress"]: remote.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        ).remote()
        for node in alive
    }
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
        raise UserError(f"run.dir: {at} cannot be written: {error.strerror}. Choose a folder you can write.") from error
    try:
        yield folder / "driver"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shares(facts: NodeFacts, shared: Path | None, node: str) -> Iterator[CheckResult]:
    """Check whether the node's file next to the driver's file is visible here."""
    if shared is None:
        return
    where = str(shared.parents[1])
    written = shared.with_name(node)
    if not facts.shared and written.exists() and written.read_bytes() == shared.read_bytes():
        yield CheckResult(what="run.dir", state="ok", found=f"{where}: shared, and can be written")
        return
    found = f"{where}: {facts.shared or 'what the node writes there is not seen here'}"
    advice = "set run.dir to a folder on a disk that all nodes share and can write"
    yield CheckResult(what="run.dir", state="bad", found=found, advice=advice)


def _clock(probe: Any) -> CheckResult:
    """Compare the node's clock with this one, by the quickest of a few answers."""
    offsets = []
    for _ in range(5):
        began = time.time()
        remote = _result(probe.now.remote(), QUICK_S)
        if not isinstance(remote, float):
            return CheckResult(what="clock", state="note", found=f"not known: {remote}")
        took = time.time() - began
        offsets.append((took, remote - began - took / 2))
    took, offset = min(offsets)
    off = abs(offset) > max(CLOCKS_WITHIN_S, took)
    return CheckResult(
        what="clock",
        state="note" if off else "ok",
        found=f"{offset:+.1f} s from here" if off else f"within {CLOCKS_WITHIN_S:g} s of here",
        advice="run chrony or ntpd: times in logs, checkpoints and W&B are not comparable" if off else "",
    )


def _links(probes: Mapping[str, Any]) -> Iterator[OfNode]:
    """Measure bandwidth and latency, one pair after the other so that pairs do not disturb each other."""
    nodes = list(probes)
    pairs = list(combinations(nodes, 2)) if len(nodes) <= MOST_FOR_ALL_PAIRS else list(pairwise(nodes))
    links: dict[tuple[str, str], Link] = {}
    for source, target in pairs:
        port = _result(probes[target].listen.remote(target), QUICK_S)
        link = _result(probes[source].reach.remote(target, port), QUICK_S) if isinstance(port, int) else port
        if isinstance(link, Link):
            links[source, target] = link
            continue
        advice = "open all TCP ports between the nodes; gloo, nccl and Ray choose theirs"
        yield OfNode(
            node=f"{source} to {target}", finding=CheckResult(what="link", state="bad", found=str(link), advice=advice)
        )
    if not links:
        return
    median = statistics.median(link.gbit_per_s for link in links.values())
    slowest = min(links, key=lambda pair: links[pair].gbit_per_s)
    for (source, target), link in links.items():
        slow = link.gbit_per_s < SLOW * median
        if not slow and (source, target) != slowest:
            continue
        found = f"{link.gbit_per_s:.2f} Gbit/s, {link.latency_ms:.2f} ms" + (
            f"; the median of {len(links)} is {median:.2f} Gbit/s" if slow else f"; the slowest of {len(links)}"
        )
        advice = "look at this pair's network: every step waits for the slowest link" if slow else ""
        finding = CheckResult(what="link", state="note" if slow else "ok", found=found, advice=advice)
        yield OfNode(node=f"{source} to {target}", finding=finding)


def _result(ref: ObjectRef[Any], limit_s: float) -> Any:
    """Return an actor's answer, or the reason in words if it fails."""
    try:
        return ray.get(ref, timeout=limit_s)
    except GetTimeoutError:
        return f"no answer in {limit_s:.0f} s"
    except RayError as error:
        return " ".join((str(error).strip().splitlines() or [type(error).__name__])[-1].split())[:300]
