"""vLLM's engine without a model answers in the thread of an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class FakeEngine:
    """Gives each request three outputs, one in each step. A request with "bad" in the id is refused."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}  # outputs, by request
        self.added: list[tuple[int, str]] = []  # requests in order, with the number of steps before
        self.steps = 0
        self.version = "1"
        core = SimpleNamespace(batch_queue=None, model_executor=None)
        self.engine_core = SimpleNamespace(engine_core=core, shutdown=lambda: None)
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=1, block_size=16))
        self.get_tokenizer = lambda: SimpleNamespace(get_added_vocab=dict)

    def add_request(self, request_id: str, prompt: Any, params: Any, *, lora_request: Any) -> None:
        if "bad" in request_id:
            raise ValueError(f"{request_id} is refused")
        self.added.append((self.steps, request_id))
        self.left[request_id] = 3

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.left.pop(request_id, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Any]:
        self.steps += 1
        outputs = [SimpleNamespace(request_id=name, finished=left == 1) for name, left in self.left.items()]
        self.left = {name: left - 1 for name, left in self.left.items() if left > 1}
        return outputs

    def set_weight_version(self, version: str) -> None:
        self.version = version

    def get_weight_version(self) -> str:
        return self.version

    def reset_prefix_cache(self, *, reset_running_requests: bool) -> bool:
        return True
