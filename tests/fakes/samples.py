"""Responses in the form of samples/, with values for the fields that a test leaves out."""

from __future__ import annotations

from typing import Any

from rlhf.tracking.run_folder.samples import SampleRecord, SampleTokens


def sample_record(response: str = "4", *, score: float = 1.0, **fields: Any) -> SampleRecord:
    """Return the record of a response."""
    base: dict[str, Any] = {
        **{"split": "train", "group_id": 3, "prompt_id": 7, "sample": 0, "prompt": "2+2=", "response": response},
        **{"score": score, "scores": {"correct": score}, "truncated": False},
        **{"response_tokens": 3, "min_version": 0, "max_version": 0, "mean_rollout_logprob": -0.1},
    }
    return SampleRecord(**base | fields)


def sample_tokens(*texts: str, **fields: Any) -> SampleTokens:
    """Return the sampled tokens of a response."""
    base: dict[str, Any] = {
        **{"texts": texts, "ids": tuple(range(len(texts))), "sampled": (True,) * len(texts)},
        **{"rollout_logprobs": (-0.1,) * len(texts), "old_logprobs": None, "ref_logprobs": None},
        **{"teacher_logprobs": None, "advantages": None},
    }
    return SampleTokens(**base | fields)
