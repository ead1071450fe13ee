"""Measure the memory of SFT data: all rows in memory, or a stream with a window.

    python benchmarks/streaming_memory.py --gib 2 --window 1000 --rows 12000

A file of invented rows is written. Separate processes then take so many rows, and a quarter as many, from a stream, and
read all rows of the file and tokenise so many. Each prints the growth of its peak resident memory, and rows per second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

from rlhf.data.examples import Reading, load_examples
from rlhf.data.sources import open_shards, read_rows
from rlhf.data.windows import WindowedSet, WindowedStream
from rlhf.models.files.loading import load_tokenizer

WORDS = Path(__file__).read_text(encoding="utf-8").split()


def make(path: Path, gib: float) -> None:
    """Write rows of about 2,000 characters until the file has so many GiB."""
    rng, size = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while size < gib * 2**30:
            prompt, answer = (" ".join(rng.choices(WORDS, k=count)) for count in (60, 240))
            size += file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")


def measure(mode: str, file: str, tokenizer_name: str, window: int, num_rows: int) -> None:
    tokenizer = load_tokenizer(tokenizer_name, trust_remote_code=False)
    load = partial(load_examples, tokenizer=tokenizer, reading=_reading())
    before, started = _peak_gib(), time.monotonic()
    if mode == "stream":
        sets = [WindowedSet(name="data.train", shards=open_shards(file), load=lambda rows: load(rows))]
        stream = WindowedStream(sets, seed=0, shuffle=True, window=window)
        for _ in range(num_rows):
            stream.next(1)
    else:
        rows = read_rows(file)
        print(f"memory: {len(rows):,} rows read: {_peak_gib() - before:.2f} GiB", flush=True)  # noqa: T201
        before, started = _peak_gib(), time.monotonic()
        load(rows[:num_rows])
    rate = num_rows / (time.monotonic() - started)
    print(f"{mode}: {num_rows:,} rows tokenised: {_peak_gib() - before:.2f} GiB, {rate:,.0f} rows/s")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=0.25)
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--window", type=int, default=1_000)
    parser.add_argument("--tokenizer", default="models/SmolLM2-135M-Instruct")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        make(file, given.gib)
        for mode, num_rows in (("stream", given.rows // 4), ("stream", given.rows), ("memory", given.rows)):
            arguments = (mode, str(file), given.tokenizer, given.window, num_rows)
            process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
            process.start()
            process.join()


def _reading() -> Reading:
    return Reading(system_prompt=None, apply_chat_template=True, max_tokens=4096)


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
