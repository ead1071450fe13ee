"""Measure the memory of a data set with images: rows with files, with bytes in Parquet, and with base64 in JSON lines.

    python benchmarks/image_memory.py --rows 1000

Images of one megapixel are drawn. For each form, and for a quarter of the rows, a separate process reads the rows,
checks and stores the images, and tokenises the prompts: the work of a driver before the start. The process prints the
growth of its peak resident memory, the decoded images, and images per second.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy
from PIL import Image

from rlhf.data.examples import Reading
from rlhf.data.images import RowImages
from rlhf.data.prompts import load_prompts
from rlhf.data.sources import read_rows
from rlhf.models.files.loading import load_tokenizer
from rlhf.models.files.tiny_vision import build_tiny_vision
from rlhf.vision import reading as image_reading
from rlhf.vision.processor import ImageProcessing
from rlhf.vision.reading import ImageCollector, ImageLimits
from rlhf.vision.store import ImageStore

SIDE = 1000  # pixels
FORMS = ("rows.jsonl", "rows.parquet", "base64.jsonl")


def make(folder: Path, num_rows: int) -> int:
    """Draw images, and write the rows in each form. Return the bytes of all images."""
    import datasets

    noise, names = numpy.random.default_rng(0), []
    for number in range(num_rows):
        coarse = noise.integers(0, 256, (50, 50, 3), dtype=numpy.uint8)
        names.append(folder / f"{number}.jpg")
        Image.fromarray(coarse).resize((SIDE, SIDE)).save(names[-1], quality=90)
    with (folder / FORMS[0]).open("w") as files, (folder / FORMS[2]).open("w") as texts:
        for name in names:
            files.write(json.dumps({"prompt": "What?", "image": name.name}) + "\n")
            uri = "data:image/jpeg;base64," + base64.b64encode(name.read_bytes()).decode()
            texts.write(json.dumps({"prompt": "What?", "image": uri}) + "\n")
    columns = {"prompt": ["What?"] * num_rows, "image": [{"bytes": name.read_bytes(), "path": None} for name in names]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    table.to_parquet(str(folder / FORMS[1]))
    return sum(name.stat().st_size for name in names)


def measure(file: str, model: str, num_rows: int) -> None:
    tokenizer, processing = load_tokenizer(model, trust_remote_code=False), ImageProcessing.of_model(model)
    assert processing is not None
    processing.expansion(SIDE, SIDE)  # imports transformers' processors
    decode, decoded = image_reading.decode, [0]

    def counting(data: bytes, **limits: int) -> Image.Image:
        decoded[0] += 1
        return decode(data, **limits)

    image_reading.decode = counting
    counting(_one_image())
    decoded[0] = 0
    with tempfile.TemporaryDirectory() as folder:
        images = RowImages(processing, ImageCollector(ImageStore(Path(folder, "images")), ImageLimits()))
        reading = Reading(system_prompt=None, apply_chat_template=True, max_tokens=4096, images=images)
        before, started = _peak_mib(), time.monotonic()
        rows = read_rows(file, images=images)
        prompts = load_prompts(rows, tokenizer, reading).items
        rate = num_rows / (time.monotonic() - started)
    assert len(prompts) == num_rows
    grown = _peak_mib() - before
    print(f"{Path(file).name}: {num_rows:,} rows: {grown:.0f} MiB, {decoded[0]:,} decoded, {rate:.0f} rows/s")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        model = str(build_tiny_vision(folder / "model", "qwen2_5_vl", seed=0))
        for num_rows in (given.rows // 4, given.rows):
            size = make(folder, num_rows)
            print(f"{num_rows:,} images of {SIDE} x {SIDE}: {size / 2**20:.0f} MiB encoded")  # noqa: T201
            for form in FORMS:
                arguments = (str(folder / form), model, num_rows)
                process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
                process.start()
                process.join()


def _one_image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(buffer, "JPEG")
    return buffer.getvalue()


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
