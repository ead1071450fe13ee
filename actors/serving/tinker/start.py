"""Start the ranks and the engines of a server for clients' loops, and serve until a signal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from actors.cluster.connect import connected
from actors.cluster.placement import reserve_roles
from actors.roles.adapters import AdapterRanks, AdaptersGang, create_adapters_gang
from actors.roles.group import ending
from actors.rollout.adapter_engines import AdapterEngines
from actors.rollout.whole_engines import BASE, WholeEngines
from actors.serving.tinker.http import TinkerServer
from rlhf.config.adapter_ranks import ranks_config
from rlhf.config.schema.model import LoraConfig, PolicyConfig
from rlhf.config.schema.run import RunConfig
from rlhf.config.schema.service import TinkerConfig
from rlhf.controller.supervisor import Supervisor
from rlhf.errors import RESUMES, RunError, known_error
from rlhf.hosting import protobuf
from rlhf.hosting.counters import Gauges
from rlhf.hosting.images import ClientImages
from rlhf.hosting.service import TinkerService, locked_server
from rlhf.hosting.shared import ServiceSettings
from rlhf.models.files.loading import load_tokenizer
from rlhf.models.on_disk import ModelOnDisk
from rlhf.preflight.served_base import find_base, server_folder
from rlhf.process.disk_full import PAUSE
from rlhf.roles import PolicyProbe
from rlhf.serving import serve_until_interrupted
from rlhf.tracking.run_folder.folder import images_folder
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.tracking.sinks.tracker import Tracker
from rlhf.vision.keys import decoded
from rlhf.vision.processor import ImageProcessing
from rlhf.vision.sight import exchanged_images, image_effect, refuse_blindness, small_image

GIB = 1 << 30
PROBE_TEXT = "The quick brown fox jumps over the lazy dog, and 7 times 8 is 56."
PROBE_TOKENS = 32
CONTINUES = "Start the server again with the same configuration: all models continue."


class ServerRecord:
    """The losses of a server: errors.jsonl and timeline.json in a folder."""

    step = 0  # a server has none

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.tracker, self.timeline = Tracker(folder), Timeline(folder / "timeline.json")


def serve_clients(
    config: TinkerConfig, *, host: str, port: int, keys: Sequence[str], ready: Callable[[str], None]
) -> None:
    """Serve until interrupted. `ready` is called with the address, the base URL for clients.

    keys: the keys of the clients; empty: any key, from this machine alone.
    """
    protobuf.messages()  # fails before anything starts
    limited = PAUSE.limited(config.cluster.room_timeout_s)
    with locked_server(server_folder(config)), limited, continuing_by_a_start():
        _serve(config, host=host, port=port, keys=keys, ready=ready)


@contextmanager
def continuing_by_a_start() -> Iterator[None]:
    """Replace the advice to resume a run in a RunError: a server continues without an option."""
    try:
        yield
    except Exception as error:
        if not isinstance(known := known_error(error), RunError):
            raise
        raise RunError(str(known).replace(RESUMES, CONTINUES)) from error


def _serve(config: TinkerConfig, *, host: str, port: int, keys: Sequence[str], ready: Callable[[str], None]) -> None:
    model = find_base(config)
    tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=config.policy.trust_remote_code)
    limits = config.service
    images = ClientImages(images_folder(server_folder(config) / "service"), ImageProcessing.of_model(model.base))
    probe_ids = tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"][:PROBE_TOKENS]
    settings = ServiceSettings(
        model=limits.model_name or model.base,
        base=model.base,
        tokenizer=limits.model_name or model.tokenizer,
        max_length=limits.max_length,
        max_adapters=1 if config.policy.lora is None else limits.max_adapters,
        trains_all=config.policy.lora is None,
        max_models=limits.max_models,
        checkpoint_bytes=int(limits.checkpoint_gib * GIB),
        idle_s=limits.idle_s,
        dtype=config.policy.dtype,
        seed=config.run.seed,
        probe_ids=_probe_ids(probe_ids, images, most=limits.max_length - 1),
    )

    def decode(tokens: Sequence[int]) -> str:
        return decoded(tokens, tokenizer)

    opened = _service(config, model, settings, images, decode)
    server = TinkerServer(opened, keys)
    with connected(config.cluster):
        serve_until_interrupted(
            server.application(),
            host=host,
            port=port,
            ready=ready,
            decompresses=False,  # the routes do, because aiohttp needs another package for zstd
            failure=lambda: server.service.lost.result() if server.service.lost.done() else None,
        )


def _probe_ids(text: list[int], images: ClientImages, *, most: int) -> list[int]:
    """Return the token ids of every proof: a text, for a model that sees with an image behind the first token."""
    if images.processing is None:
        return text[:most]
    image = images.token_ids(images.keep(small_image()), "png", None, place="the probe")
    return [*text[:1], *image, *text[1:]] if len(image) + len(text) <= most else text[:most]


@asynccontextmanager
async def _service(
    config: TinkerConfig,
    model: ModelOnDisk,
    settings: ServiceSettings,
    images: ClientImages,
    decode: Callable[[Sequence[int]], str],
) -> AsyncIterator[TinkerService]:
    """Start the ranks and the engines, and yield the service in front of both."""
    cluster, limits, trained = config.cluster, config.service, config.policy
    largest = trained.lora
    policy = PolicyConfig(
        model=model.base,
        dtype=trained.dtype,
        trust_remote_code=trained.trust_remote_code,
        lora=None if largest is None else LoraConfig(rank=largest.rank),
        gradient_checkpointing=trained.gradient_checkpointing,
    )
    longest = limits.max_length + 1  # a row and its last target
    run = RunConfig(name=config.run.name, dir=config.run.dir, seed=config.run.seed)
    of_ranks = ranks_config(policy, run, cluster, max_tokens_per_microbatch=max(longest, limits.packed_tokens))
    placement = replace(await reserve_roles(config.needs, cluster, with_reward_model=False), at_once=True)
    gang = create_adapters_gang(
        of_ranks,
        placement,
        longest_sequence=longest,
        packed_tokens=limits.packed_tokens,
        images=None if images.place is None else images.place.folder,
    )
    engines = (WholeEngines if largest is None else AdapterEngines).create(
        model.base,
        cluster,
        placement,
        dtype=trained.dtype,
        max_length=limits.max_length,
        rank=None if largest is None else largest.rank,
        max_adapters=settings.max_adapters,
        tokenizer=model.tokenizer,
        trust_remote_code=trained.trust_remote_code,
        images=images.place,
    )
    record = ServerRecord(server_folder(config) / "service")
    supervisor = Supervisor(cluster.restarts, record, config.needs, finds_causes=True)
    gang.supervisor = engines.supervisor = supervisor
    async with AsyncExitStack() as ends:
        ends.callback(record.timeline.close)
        ending_roles = ending([gang, engines], placement.release, heartbeat_timeout_s=cluster.heartbeat_timeout_s)
        await ends.enter_async_context(ending_roles)
        await asyncio.gather(
            gang.start(deadline_s=cluster.start_timeout_s), engines.start(deadline_s=cluster.start_timeout_s)
        )
        await _prove_sight(gang, settings.probe_ids, images)
        if largest is None:
            await _load_base(gang, engines, server_folder(config) / "service" / "base", settings)
        recoveries = partial(_recoveries, supervisor)
        service = TinkerService(
            server_folder(config), settings, gang, engines, images=images, decode=decode, recoveries=recoveries
        )
        ends.push_async_callback(engines.give_up_rebuilds)
        ends.push_async_callback(service.close)
        yield service


def _recoveries(supervisor: Supervisor) -> Gauges:
    return {
        ("recoveries_total", "ranks"): float(supervisor.recovered[AdapterRanks.role]),
        ("recoveries_total", "engines"): float(supervisor.recovered[AdapterEngines.role]),
        ("recovery_seconds_total", ""): supervisor.recovery_s,
    }


async def _prove_sight(gang: AdaptersGang, probe_ids: Sequence[int], images: ClientImages) -> None:
    """Raise RunError if the ranks cannot see the image of the probe. Each proof of an adapter covers the engines."""
    if min(probe_ids) < 0:
        other = exchanged_images(probe_ids, images.store)
        effect = image_effect(await gang.probe(None, probe_ids), await gang.probe(None, other), probe_ids)
        refuse_blindness(probe_ids, policy=effect, engine=None)


async def _load_base(gang: AdaptersGang, engines: AdapterEngines, folder: Path, settings: ServiceSettings) -> None:
    """Give the engines the snapshot without any training, which comes back after other snapshots."""
    checksum = await gang.export(None, folder)
    logprobs = tuple(await gang.probe(None, settings.probe_ids))
    probe = PolicyProbe(version=0, token_ids=tuple(settings.probe_ids), logprobs=logprobs, dtype=settings.dtype)
    await engines.load(BASE, folder, checksum=checksum, probe=probe)
