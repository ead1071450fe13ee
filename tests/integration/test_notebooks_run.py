"""The notebooks run from the first cell to the last, and runs in a kernel can be interrupted, fail and begin again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import rlhf

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

ONE_RAY = """
import sys
from actors.cluster.connect import connected
from actors.run.engine_pool import ENGINE_POOL
from rlhf.config.schema.cluster import ClusterConfig
sys.ray_of_all_runs = connected(ClusterConfig())  # no variable: each notebook begins without variables
sys.ray_of_all_runs.__enter__()
ENGINE_POOL.keeps = True
"""  # the last test starts a Ray for each run, as a reader does
NEXT_NOTEBOOK = "%reset -f"
WITHOUT_ENGINES = ("4_preferences",)
FREE_ALL_CPUS = '__import__("actors.run.engine_pool").run.engine_pool.ENGINE_POOL.close()'  # of the kept engines
SMALLER = {
    **{'"steps": 400': '"steps": 8', '"steps": 30': '"steps": 3', '"steps": 20': '"steps": 2'},
    **{".loc[30]": ".loc[3]", ".loc[20]": ".loc[2]", "(0, 20)": "(0, 2)", "tokens(20,": "tokens(2,"},
    **{'"every": 5': '"every": 1', '"every": 10': '"every": 1'},
    **{'"warmup_steps": 20': '"warmup_steps": 2', '"warmup_steps": 5': '"warmup_steps": 1'},
    **{'"prompts_per_step": 32': '"prompts_per_step": 8', '"prompts_per_step": 16': '"prompts_per_step": 4'},
    **{'"sequences_per_update": 128': '"sequences_per_update": 32', '"size": 128': '"size": 16'},
    **{'"sequences_per_update": 64': '"sequences_per_update": 16', '"size": 2500': '"size": 320'},
}


def execute(notebook: nbformat.NotebookNode, folder: Path, *, allow_errors: bool = False) -> None:
    """Execute all cells in a new kernel, with the folder as the current one."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"} | {"OMP_NUM_THREADS": "1"}
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place, allow_errors=allow_errors)
    client.execute(env=env | {"PYTHONPATH": str(ROOT)})


def kinds(outputs: Iterable[nbformat.NotebookNode]) -> list[str]:
    """Return the kinds of outputs of a cell, without streams: a warning depends on the machine."""
    return [",".join(sorted(output.data)) for output in outputs if "data" in output]


def code(source: str) -> nbformat.NotebookNode:
    for large, small in SMALLER.items():
        source = source.replace(large, small)
    return nbformat.v4.new_code_cell(source)


def test_each_notebook_runs_in_a_smaller_size_and_shows_what_it_showed(tmp_path: Path) -> None:
    """Execute all notebooks in one kernel and folder: the first one trains the model from which the rest begin."""
    stored = [
        [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"] for path in NOTEBOOKS
    ]
    text = "".join(cell.source for cells in stored for cell in cells)
    assert [large for large in SMALLER if large not in text] == []
    fresh = [[code(cell.source) for cell in cells] for cells in stored]
    cells = [code(ONE_RAY)]
    for path, notebook in zip(NOTEBOOKS, fresh, strict=True):
        start = [FREE_ALL_CPUS] if path.stem in WITHOUT_ENGINES else []
        cells += [*map(code, [NEXT_NOTEBOOK, *start]), *notebook]
    execute(nbformat.v4.new_notebook(cells=cells), tmp_path)
    for before, now in zip(chain(*stored), chain(*fresh), strict=True):
        assert kinds(now.outputs) == kinds(before.outputs), now.source


SETTINGS = """
import os, signal, threading, time
from pathlib import Path
import rlhf

def config(name, **train):
    return {
        "run": {"name": name},
        "policy": {"model": "tiny:llama", "dtype": "float32"},
        "algorithm": {"name": "sft"},
        "data": {"train": {"task": "running_totals", "split": "sft", "size": 200}, "apply_chat_template": False},
        "train": {"steps": 100000, "lr": 1e-3, "sequences_per_update": 16, "max_tokens_per_microbatch": 1024, **train},
    }

def interrupt_when(is_time):
    def wait():
        while not is_time():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)  # as a notebook interrupts its kernel
    threading.Thread(target=wait, daemon=True).start()

def num_rows(name):
    file = Path("runs", name, "metrics.jsonl")
    return len(file.read_bytes().splitlines()) if file.exists() else 0
"""
CELLS = (
    SETTINGS,
    'interrupt_when(lambda: "ray" in __import__("sys").modules)\nrlhf.train(config("early"))',
    'rlhf.train(config("broken", lr=1e30, grad_clip=1e30, steps=50))',
    'interrupt_when(lambda: num_rows("run") >= 3)\nrlhf.train(config("run"))',
    'rlhf.train({**config("run"), "polcy": {}})',
    'rlhf.train(config("run"), resume=True, until=num_rows("run") + 2)',
)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_kernel_trains_again_after_an_interrupt_and_after_failures(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    execute(notebook, tmp_path, allow_errors=True)
    _, early, broken, interrupted, refused, resumed = (cell.outputs for cell in notebook.cells)
    assert errors(early) == ["Interrupted"], early
    assert errors(broken) == ["RunError"], broken
    assert errors(interrupted) == ["Interrupted"], interrupted
    (text,) = (output.traceback for output in interrupted if output.output_type == "error")
    assert len(text) == 1  # and no traceback
    assert "a checkpoint of step" in text[0]
    assert any("Ctrl-C: the run ends after its step" in output.get("text", "") for output in interrupted)
    assert errors(refused) == ["UserError"], refused
    assert "unknown key; did you mean policy?" in refused[-1].traceback[0]
    assert errors(resumed) == [], resumed
    assert "run: stopped, " in resumed[-1].data["text/plain"]
    run = rlhf.Run(tmp_path / "runs" / "run")
    assert run.metrics.index.is_monotonic_increasing
    assert (run.folder / "checkpoints" / f"step_{run.metrics.index[-1]:06d}").is_dir()
    assert "INFO" not in "".join(output.get("text", "") for cell in notebook.cells for output in cell.outputs)
    assert "resumed from the checkpoint" in (run.folder / "log.txt").read_text()


def errors(outputs: Sequence[nbformat.NotebookNode]) -> list[str]:
    return [output.ename for output in outputs if output.output_type == "error"]
