"""Parse the nodes of a described cluster: `2*cpu=96,gpu=8,type=h100,mem=1000+cpu=16`. Configurations are not used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.errors import UserError

MOST_NODES = 65536
EXAMPLE = "`2*cpu=96,gpu=8,type=h100,mem=1000+1*cpu=16`"
_PART = re.compile(r"(?:(\d{1,9})\*)?((?:\w+=[^,=]+)(?:,\w+=[^,=]+)*)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """Describe a GPU by its data sheet: dense bfloat16 arithmetic, memory and bandwidths."""

    tflops: float
    memory_gib: float
    bandwidth_gb_s: float  # of its memory
    pcie_gb_s: float  # one way: x16 lanes have 32 in generation 4, and 64 in generation 5
    nvlink_gb_s: float  # one way, to all other GPUs of the host together; 0: there is none


ACCELERATORS: Mapping[str, Accelerator] = {
    "a100": Accelerator(tflops=312, memory_gib=80, bandwidth_gb_s=2039, pcie_gb_s=32, nvlink_gb_s=300),
    "a800": Accelerator(tflops=312, memory_gib=80, bandwidth_gb_s=2039, pcie_gb_s=32, nvlink_gb_s=200),
    "h100": Accelerator(tflops=989, memory_gib=80, bandwidth_gb_s=3350, pcie_gb_s=64, nvlink_gb_s=450),
    "h800": Accelerator(tflops=989, memory_gib=80, bandwidth_gb_s=3350, pcie_gb_s=64, nvlink_gb_s=200),
    "h200": Accelerator(tflops=989, memory_gib=141, bandwidth_gb_s=4800, pcie_gb_s=64, nvlink_gb_s=450),
    "b200": Accelerator(tflops=2250, memory_gib=180, bandwidth_gb_s=8000, pcie_gb_s=64, nvlink_gb_s=900),
    "l40s": Accelerator(tflops=362, memory_gib=48, bandwidth_gb_s=864, pcie_gb_s=32, nvlink_gb_s=0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Describe one node. A value of None is unknown and never causes an error."""

    cpus: float
    gpus: float = 0.0
    mem_gib: float | None = None  # host memory
    shm_gib: float | None = None  # size of /dev/shm
    gpumem_gib: float | None = None  # memory of each GPU
    kind: str | None = None  # key of ACCELERATORS
    price: float | None = None  # of the node per hour, in any currency

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus, "GPU": self.gpus}

    @property
    def gpu_memory_gib(self) -> float | None:
        """Return the memory of each GPU as given, or by the GPU's type."""
        if self.gpumem_gib is None and self.kind is not None:
            return ACCELERATORS[self.kind].memory_gib
        return self.gpumem_gib

    @property
    def shared_memory_gib(self) -> float | None:
        """Return the size of /dev/shm as given, or Linux's default, half of the memory."""
        return self.mem_gib / 2 if self.shm_gib is None and self.mem_gib is not None else self.shm_gib


def parse_cluster(text: str) -> list[Node]:
    nodes: list[Node] = []
    total = 0
    for part in text.replace(" ", "").split("+"):
        match = _PART.fullmatch(part)
        if match is None:
            raise UserError(f"--cluster {text!r}: expected nodes such as {EXAMPLE}, got {part!r}")
        count, description = match.groups(default="")
        total += int(count or 1)
        if total > MOST_NODES:
            raise UserError(f"--cluster {text!r}: {total} nodes, expected at most {MOST_NODES}")
        nodes += [_node(description, text)] * int(count or 1)
    return nodes


def _node(description: str, text: str) -> Node:
    gib = {key: f"{key}_gib" for key in ("mem", "shm", "gpumem")}
    fields = {"cpu": "cpus", "gpu": "gpus", **gib, "price": "price"}
    values: dict[str, float] = {}
    kind: str | None = None
    items = dict(item.split("=") for item in description.split(","))
    if len(items) <= description.count(","):
        raise UserError(f"--cluster {text!r}: {description!r} gives a key twice")
    for key, value in items.items():
        if key == "type":
            kind = value.lower()
            if kind not in ACCELERATORS:
                raise UserError(f"--cluster {text!r}: type={value}, expected one of {', '.join(ACCELERATORS)}")
            continue
        if key not in fields:
            raise UserError(f"--cluster {text!r}: {key!r} is unknown, expected {', '.join([*fields, 'type'])}")
        if _NUMBER.fullmatch(value) is None or (key == "gpu" and "." in value):
            raise UserError(f"--cluster {text!r}: '{key}={value}', expected a number, of GPUs a whole one")
        values[fields[key]] = float(value)
    if "cpus" not in values:
        raise UserError(f"--cluster {text!r}: {description!r} has no cpu=, expected nodes such as {EXAMPLE}")
    return Node(**values, kind=kind)
