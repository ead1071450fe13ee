"""Measure the memory of SFT data: all rows in memory, or a stream with a window.

    python benchmarks/streaming_memory.py make data.jsonl --gib 2
    python benchmarks/streaming_memory.py stream data.jsonl --tokenizer MODEL --rows 50000 --window 2000
    python benchmarks/streaming_memory.py memory data.jsonl --tokenizer MODEL --rows 20000

`stream` takes so many rows from the stream. `memory` reads all rows of the file, and tokenises so many. Each prints the
peak resident memory of this process (without the libraries before) and rows per second.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["make", "stream", "memory"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--tokenizer")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--window", type=int, default=2_000)
    given = parser.parse_args()
    if given.mode == "make":
        make(given.file, given.gib)
        return
    tokenizer = load_tokenizer(given.tokenizer, trust_remote_code=False)
    load = partial(load_examples, tokenizer=tokenizer, reading=_reading())
    before, started = _peak_gib(), time.monotonic()
    if given.mode == "stream":
        sets = [WindowedSet(name="data.train", shards=open_shards(str(given.file)), load=lambda rows: load(rows))]
        stream = WindowedStream(sets, seed=0, shuffle=True, window=given.window)
        for _ in range(given.rows):
            stream.next(1)
    else:
        rows = read_rows(str(given.file))
        print(f"{len(rows):,} rows read: {_peak_gib() - before:.2f} GiB, {time.monotonic() - started:.0f} s")  # noqa: T201
        before, started = _peak_gib(), time.monotonic()
        load(rows[: given.rows])
    taken = time.monotonic() - started
    print(f"{given.rows:,} rows tokenised: {_peak_gib() - before:.2f} GiB, {given.rows / taken:,.0f} rows/s")  # noqa: T201


def _reading() -> Reading:
    return Reading(system_prompt=None, apply_chat_template=True, max_tokens=4096)


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
