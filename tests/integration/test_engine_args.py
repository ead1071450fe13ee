"""vLLM's own options work in a real engine: a refused value is reported with the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.models.files.tiny import build_tiny_llama
from tests.integration.engine_helpers import engine, spec


@pytest.mark.slow
def test_a_value_that_vllm_refuses_is_reported_with_the_key(tmp_path: Path, ray_local: None) -> None:
    folder = build_tiny_llama(tmp_path / "tiny", seed=0)
    wrong = spec(folder, engine_args={"kv_cache_dtype": "fp7"})
    message = r"cluster\.roles\.rollout\.engine_args\.kv_cache_dtype is fp7, but vLLM refuses"
    with pytest.raises(UserError, match=message), engine(wrong):
        pass
