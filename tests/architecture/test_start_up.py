"""A command imports heavy modules only when needed: not for help, a refused configuration or a plan.

The checks of a plan's inputs need a tokenizer, but no torch for the tiny model. A run's driver needs torch, and leaves
peft, DeepSpeed and vLLM to the workers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {
    *("accelerate", "bitsandbytes", "datasets", "deepspeed", "jaxtyping", "matplotlib", "pandas", "peft", "pyarrow"),
    *("ray", "scipy", "sympy", "tokenizers", "torch", "transformers", "vllm", "wandb"),
}
RECIPE = str(ROOT / "configs" / "grpo_smollm2.yaml")
REFUSED = {
    "a misspelt key": ["train", RECIPE, "train.stesp=3"],
    "a wrong value": ["train", RECIPE, "train.lr=fast"],
    "a relation between sections": ["train", RECIPE, "rollouts.samples_per_prompt=1"],
    "a wrong value of a plan": ["plan", RECIPE, "train.lr=fast"],
}
ACCEPTED = {
    "help": ["--help"],
    "help of a command": ["eval", "--help"],
    "a plan without its inputs": ["plan", str(ROOT / "configs" / "ppo_70b_multinode.yaml")],
    "a plan for other machines": ["plan", str(ROOT / "configs" / "quickstart.yaml"), "--cluster", "cpu=2"],
    "a plan of a sweep": ["plan", str(ROOT / "configs" / "sweep_tiny.yaml"), "--cluster", "cpu=2"],
    "a plan with its inputs": ["plan", str(ROOT / "configs" / "quickstart.yaml")],  # last, as this one imports more
}
NEEDED = {"a plan with its inputs": {"tokenizers", "transformers"}}
# Run each command in turn, and print its exit code and the modules that it imported.
CODE = """
import json, sys
import rlhf
own = [name for name in sys.modules if name.startswith("rlhf") and not name.startswith("rlhf.commands")]
import rlhf.cli, rlhf.commands.supervision
results = {"import rlhf.cli": (0, list(sys.modules))}
for name, words in json.loads(sys.argv[1]).items():
    before = set(sys.modules)
    try:
        code = rlhf.cli.main(words)
    except SystemExit as end:
        code = end.code
    results[name] = code, sorted(set(sys.modules) - before)
print("\\n" + json.dumps({"own": own, "commands": results}))
"""


def test_nothing_heavy_is_imported_for_help_a_refusal_or_a_plan() -> None:
    command = [sys.executable, "-c", CODE, json.dumps(REFUSED | ACCEPTED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    light = {
        "rlhf",
        "rlhf.cuda_builds",
        "rlhf.errors",
        "rlhf.extensions",
        "rlhf.passed_objects",
        "rlhf.process",
        "rlhf.process.early_end",
        "rlhf.tracking",
        "rlhf.tracking.callbacks",
        "rlhf.tracking.logs",
    }
    assert set(results["own"]) <= light
    for name, (code, imported) in results["commands"].items():
        assert code == (2 if name in REFUSED else 0), name
        assert HEAVY & set(imported) == NEEDED.get(name, set()), name


def test_the_driver_of_a_run_leaves_the_workers_libraries_alone() -> None:
    code = "import json, sys; import actors.run.train; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert not {"bitsandbytes", "deepspeed", "mergekit", "peft", "vllm"} & set(json.loads(done.stdout.splitlines()[-1]))
