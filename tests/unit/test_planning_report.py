"""`rlhf plan` reports memory, fit, time and cost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import rlhf
from rlhf.config.files.load import load
from rlhf.config.nodes import parse_cluster
from rlhf.errors import UserError
from rlhf.planning.footprints import Sizes
from rlhf.planning.lengths import Lengths
from rlhf.planning.shapes import find_shape
from rlhf.planning.time import forward_operations, system_of, training_stages
from tests.fixtures.sources import ROOT

LARGE = ROOT / "configs/ppo_70b_multinode.yaml"
SMALL = "models/SmolLM2-135M-Instruct"
NODES = "4*cpu=96,gpu=8,type=h100,mem=1000,price=98"


def shapes(folder: Path) -> Path:
    """Write a folder for --shapes with the model of the small recipes, so that no download is needed."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    values = {"architectures": ["LlamaForCausalLM"], **sizes, **heads}
    (folder / SMALL).mkdir(parents=True)
    (folder / SMALL / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def large() -> str:
    return rlhf.plan(LARGE, cluster=NODES)


def cells(text: str, start: str) -> list[str]:
    """Return the columns of the first line with this beginning."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(start)][:1]
    return line.split()


def test_the_large_recipe_term_by_term(large: str) -> None:
    # 70,553,706,496 parameters and 414,187,520 of the adapter, in bfloat16 over 16 ranks: 8.26 GiB.
    assert "weights             8.26           70.97B * 2 bytes / 16" in large
    assert "80 KiB a token" in large  # 320 KiB over four GPUs
    assert cells(large, "GPU of policy, critic")[-7:] == ["80.00", "fits", "policy", "26.1", "+", "critic", "15.2"]
    assert cells(large, "step  ")[2] == "100%"
    assert "schedules; this run: in turns" in large
    assert all(f"\n  {name} " in large for name in ("pipelined, 2 ahead", "in flight, 2 ahead"))
    assert "streamed" not in large  # ppo whitens over the batch


def test_cost_is_split_by_stage(large: str) -> None:
    table = large.split("time of a step")[1].split("schedules;")[0]
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()[2:] if line.strip()]
    stages, step = rows[: [row[0] for row in rows].index("step")], next(row for row in rows if row[0] == "step")
    for column in (1, 3, 4):  # seconds, GPU hours, price
        total = sum(float(row[column].replace(",", "")) for row in stages)
        assert total == pytest.approx(float(step[column]), rel=0.01)
    assert float(step[4]) == pytest.approx(float(step[1]) / 3600 * 4 * 98, rel=0.01)


def rows_of(text: str) -> dict[str, list[str]]:
    """The rows of the tables of time and schedules, by name; of equal names the first."""
    tables = text.split("time of a step")[1].split("inputs:")[0]
    rows = [re.split(r"\s{2,}", line.strip()) for line in tables.splitlines() if line.startswith("  ")]
    return {row[0]: row[1:] for row in reversed(rows)}


def test_the_whole_run_its_stages_and_trials_cost_what_the_schedule_takes(tmp_path: Path) -> None:
    keys = {"rollouts.max_staleness": 1, "algorithm.correction": {"preset": "token_tis"}}
    grid = {"parameters": {"train.lr": {"values": [1e-6, 1e-5]}}, "method": {"name": "grid"}}
    sweep = {"name": "rates", "config": str(LARGE), "set": keys, **grid, "metric": "rewards/score/mean"}
    run = yaml.safe_load(LARGE.read_text(encoding="utf-8"))
    run["rollouts"]["max_staleness"], run["algorithm"]["correction"] = 1, keys["algorithm.correction"]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"sweep": sweep}), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    pipeline = {"run": run.pop("run"), "stages": {"ppo": run}}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline), encoding="utf-8")
    flight = ["rollouts.max_staleness=2", "rollouts.weight_updates=in_flight"]
    for file, overrides, schedule in (
        ("run", [], "pipelined, 1 ahead"),
        ("run", flight, "in flight, 2 ahead"),
        ("sweep", [], "pipelined, 1 ahead"),
        ("pipeline", [], "pipelined, 1 ahead"),
    ):
        rows = rows_of(rlhf.plan(tmp_path / f"{file}.yaml", overrides, cluster=NODES))
        step, turns = rows[schedule][0], float(rows["in turns"][0])
        assert rows["step"][0] == step, file
        assert float(step) < turns
        assert float(rows["overlap"][0]) == pytest.approx(float(step) - turns, abs=0.2)  # figures of four digits
        hours = 300 * float(step) / 3600
        whole = [float(cell.replace(",", "")) for cell in rows["whole run"][:3]]  # seconds, GPU hours, price
        assert whole == pytest.approx([3600 * hours, 32 * hours, 4 * 98 * hours], rel=1e-3)
        assert rows["whole run"][3].startswith(f"{hours:,.3g} hours")


def test_what_does_not_fit_says_what_would_shrink_it_and_what_is_enough() -> None:
    text = rlhf.plan(LARGE, cluster="4*cpu=96,gpu=8,type=l40s,gpumem=24,mem=160")
    assert "DOES NOT FIT" in text
    gpu = "GPU of policy, critic wants 35.0 GiB in place of 41.3 and still does not fit"
    assert text.count(f"train.max_tokens_per_microbatch=5120: {gpu}") == 1
    assert "cluster.roles.policy.offload=[optimizer]" not in text  # an adapter's optimizer is too small to matter
    offload = next(line for line in text.splitlines() if "critic.offload=[optimizer]: " in line)
    assert offload.endswith("; but host of node 2 then does not")
    assert "together it still does not fit: use larger nodes" in text
    assert "tensor_parallel=8" not in text  # would need 48 of the 32 GPUs
    assert ".workers=32" not in text
    large = NODES.replace("mem=1000", "mem=4000")
    text = rlhf.plan(LARGE, ["policy.lora=null", "algorithm.kl={coef: 0.0}"], cluster=large)
    (line,) = [line for line in text.splitlines() if "cluster.roles.policy.offload=[optimizer]: " in line]
    assert line.endswith(" and fits")
    assert "still does not fit:" not in text


def test_this_machine_is_held_against_a_run_on_cpus() -> None:
    text = rlhf.plan(ROOT / "configs/quickstart.yaml")
    assert "this machine" in text
    assert "grpo" not in text.split()[0]
    assert text.count("memory by place") == 2  # the supervised stage, and the one that starts from its model


def test_a_model_that_is_not_here_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    text = rlhf.plan(LARGE, ["policy.model=some/model"], cluster=NODES)
    assert "responses a step  256 prompts * 4 samples = 1024" in text
    assert "no estimate of memory and time: the sizes of some/model are not known here" in text
    (tmp_path / "some").mkdir()
    (shapes(tmp_path) / SMALL).rename(tmp_path / "some/model")
    text = rlhf.plan(LARGE, ["policy.model=some/model"], cluster=NODES, shapes=tmp_path)
    assert "144.3M * 2 bytes / 16" in text  # 134,515,008 and 9,768,960 of the adapter


def test_training_and_decoding_time_by_hand() -> None:
    config, lengths = next(iter(load(LARGE).runs.values())), Lengths(most=4096, mean=1000.0)
    shape = find_shape(config.policy.model, shapes=None, made={})
    weights = shape.parameters - shape.embedding - shape.hidden  # an embedding is looked up
    # Two passes forward, and one more for the checkpoints, of an adapter: 3 * (2 * weights + 2 * layers * Q * length).
    stages = training_stages(config, Sizes(), parse_cluster(NODES), lengths)
    update = next(stage for stage in stages if stage.name == "update")
    tokens, length = 1024 * 2024, 2024
    assert forward_operations(shape, length) == 2 * weights + 2 * 80 * 8192 * length
    assert update.seconds == pytest.approx(tokens * 3 * forward_operations(shape, length) / (16 * 989e12 * 0.4))
    # A sequence in the middle of its response: all of its keys and values are read, and multiplied with the query.
    context = 1024 + 500
    read = context * 2 * 80 * 1024 * 2 / (4 * 3350e9 * 0.6)
    multiplied = (2 * weights + 4 * 80 * 8192 * context) / (4 * 989e12 * 0.45)
    assert system_of(config, Sizes(), parse_cluster(NODES), lengths).each_s == pytest.approx(read + multiplied)


def test_a_folder_of_shapes_must_exist() -> None:
    with pytest.raises(UserError, match=r"--shapes nowhere: is not a folder"):
        rlhf.plan(LARGE, shapes=Path("nowhere"))


def test_the_disk_that_checkpoints_take() -> None:
    text = rlhf.plan(ROOT / "configs/ppo_7b_8gpu.yaml", cluster="cpu=96,gpu=8,type=h100")
    # 7,615,616,512 weights of the policy, and the critic's without the head: 2 + 4 + 8 bytes each, in GiB.
    assert "policy 99.30 + critic 92.19" in text
    (line,) = [line for line in text.splitlines() if line.startswith("  checkpoints  ") and "being written" in line]
    count = int(line.split()[2])
    assert float(line.split()[1].replace(",", "")) == pytest.approx(count * (99.30 + 92.19), abs=0.1)


@pytest.mark.parametrize(
    ("algorithm", "row", "tokens", "total"),
    [
        ("sft", {"prompt": "p" * 300, "completion": "c" * 100}, "100", "1,000"),  # 4 characters a token, 10 sequences
        # (2 * 400 + 100 + 300) / 2 characters, 10 pairs
        ("dpo", {"prompt": "p" * 400, "chosen": "c" * 100, "rejected": "r" * 300}, "150", "3,000"),
    ],
)
def test_the_time_of_training_on_fixed_data_follows_from_the_rows(
    tmp_path: Path, algorithm: str, row: dict[str, str], tokens: str, total: str
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"run: {{name: short}}\npolicy: {{model: Qwen/Qwen2.5-0.5B-Instruct}}\nalgorithm: {{name: {algorithm}}}\n"
        f"data: {{train: {tmp_path}/rows.jsonl}}\n"
        "train: {steps: 4, lr: 1e-6, sequences_per_update: 10, max_tokens_per_microbatch: 8192}\n"
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    text = rlhf.plan(tmp_path / "run.yaml", cluster="cpu=2")
    assert f"sequences of {tokens} tokens" in text
    assert f"{total} tokens * " in text
    (tmp_path / "rows.jsonl").unlink()
    if algorithm == "sft":
        assert "sequences of 4,096 tokens" in rlhf.plan(tmp_path / "run.yaml", cluster="cpu=2")  # half of the limit
