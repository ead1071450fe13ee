"""Set the conditions of every test: no hub, no telemetry, checked tensor shapes in the mathematics, and a small Ray."""

from __future__ import annotations

import importlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from jaxtyping import install_import_hook

from tests.parts import PartScheduling

# Before anything else is imported: libraries read these once, and processes started by tests inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_worker_niceness="0",  # nicer workers would get only the CPU time left by other tests
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="agg",
    OMP_NUM_THREADS="1",  # several processes share a few cores
)
os.environ.pop("RAY_ADDRESS", None)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores SIGINT for commands in the background

# Every annotated shape and dtype in the equations is checked at each call, in tests only.
install_import_hook("rlhf.objectives", "beartype.beartype")
importlib.import_module("rlhf")  # before a test imports transformers

hypothesis.settings.register_profile("tests", deadline=None)  # an example may take long on a busy machine
hypothesis.settings.load_profile("tests")

RAY_CPUS = 4  # Ray's CPUs, independent of the machine's: tests place up to four workers
OBJECT_STORE_BYTES = 256 * 2**20


LOGGERS = [logging.getLogger(name) for name in ("rlhf", "actors")]
LOGGING_AT_START = [(logger.handlers[:], logger.level, logger.propagate) for logger in LOGGERS]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> PartScheduling | None:
    """Keep the tests of the shared Ray, and the tests of the shared gangs, in a process each."""
    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # sorts by the number of tests, not by their time
    return PartScheduling(config, log)


@pytest.fixture(autouse=True)
def unchanged_logging() -> Iterator[None]:
    """Undo a test's or fixture's setup of the project's loggers: a later test must not see these lines."""
    _restore_logging()
    yield
    _restore_logging()


def _restore_logging() -> None:
    for logger, (handlers, level, propagate) in zip(LOGGERS, LOGGING_AT_START, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the quickstart's tiny Llama, seed 0, float32. Tests only read this folder."""
    from rlhf.models.files.tiny import build_tiny_llama

    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny_llama", seed=0)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    """The tokenizer of the tiny model. A test may change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """Start a Ray of this test session on this machine. A test ends the actors started by the test."""
    import ray

    ray.init(
        address="local",
        num_cpus=RAY_CPUS,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def kept_engines(ray_local: None) -> Iterator[None]:
    """Keep the engines of a run for the module's next run in this process with the same settings."""
    from actors.run.engine_pool import ENGINE_POOL

    ENGINE_POOL.keeps = True
    yield
    ENGINE_POOL.keeps = False
    ENGINE_POOL.close()
