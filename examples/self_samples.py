"""Simple self-distillation (SSD, arXiv:2604.01193): a model learns from its own samples, without a score or a teacher.

1. The frozen model samples a response y to each prompt x at a temperature above 1, among few tokens (top_k, top_p).
2. Supervised fine-tuning lowers -log p(y | x) at temperature 1 on all finished responses, right or wrong.
3. The result answers at a temperature of its own; a search over this temperature belongs to the method.

The samples have lost the tail of the distribution, and still differ where several tokens are likely. Learning the
samples removes the tail at places with one right token, and keeps the alternatives elsewhere. Deviation from the code
of the paper: no share of the shortest responses is left out.

    python examples/self_samples.py
    rlhf train recipe:ssd_smollm2
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import rlhf
from rlhf.data.tasks import TaskSource, make_rows
from rlhf.evaluation.decoding import Decoding

WARM = Decoding(temperature=1.5, top_k=20, top_p=0.8, max_new_tokens=96)


def write_self_samples(model: str | Path, prompts: Sequence[str], out: Path, decoding: Decoding = WARM) -> int:
    """Write the model's finished responses as rows of supervised data. Return the number of responses."""
    sampled = rlhf.generate(model, prompts, decoding=decoding)
    rows = [
        {"prompt": prompts[one.prompt_id], "completion": one.response}
        for one in sampled
        if one.finish_reason == "stop" and one.response.strip()
    ]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "models/SmolLM2-135M-Instruct"
    task = TaskSource(task="reasoning_gym/gcd", split="train", size=200, args={"max_value": 20})
    prompts = [row["prompt"] for row in make_rows(task)]
    count = write_self_samples(model, prompts, Path("self_samples.jsonl"))
    sys.stdout.write(f"self_samples.jsonl: {count} of {len(prompts)} responses are finished\n")
