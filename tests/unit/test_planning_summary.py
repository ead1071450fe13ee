"""`rlhf plan` prints derived numbers, roles and placement, and reports memory, fit, time and cost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import rlhf
from rlhf.config.files.load import load
from rlhf.config.nodes import Node, parse_cluster
from rlhf.errors import UserError
from rlhf.planning.footprints import Sizes
from rlhf.planning.lengths import Lengths
from rlhf.planning.report import render_plan
from rlhf.planning.shapes import find_shape
from rlhf.planning.time import forward_operations, system_of, training_stages
from tests.fixtures.sources import ROOT
from tests.fixtures.sweeps import write_sweep

BASE = """\
run: {name: demo}
policy: {model: some/model}
algorithm: {name: ppo, critic_warmup_steps: 2}
data: {train: {task: running_totals, size: 9}, eval: {hard: x.jsonl}, max_prompt_tokens: 1000}
rollouts: {prompts_per_step: 64, samples_per_prompt: 4, max_new_tokens: 24}
rewards: {correct: {function: math_answer}}
train:
  {steps: 10, lr: 1e-6, lr_schedule: linear, warmup_steps: 3, min_lr_ratio: 0.1,
   sequences_per_update: 128, epochs_per_batch: 2}
cluster: {roles: {policy: {workers: 2}}}
"""
IN_FLIGHT = ["rollouts.weight_updates=in_flight", "rollouts.max_staleness=2", "algorithm.correction.preset=token_tis"]
ELASTIC = ["cluster.roles.rollout.engines={min: 1, max: 2}", "cluster.roles.reward.colocate_with=policy"]
ON_GPUS = ["cluster.device=cuda", "policy.dtype=bfloat16"]


def plan(tmp_path: Path, *overrides: str, cluster: str | None = None) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return render_plan(load(path, overrides), cluster=cluster)


def fact(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(name + "  ")]
    return line.strip().removeprefix(name).strip()


WARMED = "after a warm-up of 10% of the optimizer steps"
WARM = ("train.warmup_steps=0", "train.warmup_ratio=0.1")
MANY = "64 prompts * 4 samples = 256, the first of 81 prompts to be answered"
ADAPTER, SHM = "only the adapter, as a folder", "shm: policy and engines are on one CPU host"
SEVERAL = "gloo: policy and engines are on several CPU hosts"
SEATS = (*ELASTIC[1:], *IN_FLIGHT, "cluster.roles.rollout.engines={min: 2, max: 8}")
EPOCHS = "train.steps=null"
FACTS: dict[tuple[str, ...], dict[str, str]] = {
    (): {
        "responses a step": "64 prompts * 4 samples = 256",
        "updates a step": "256 / 128 sequences = 2, 2 passes: 4 optimizer steps",
        "longest sequence": "1000 prompt + 24 new = 1024 tokens",
        "micro-batch": "at most 8,192 tokens on 2 ranks; a step at most 262,144",  # 256 * 1024
        "whole run": "10 steps: 32 optimizer steps of the policy, 40 of the critic",  # (10 - 2) * 4
        "learning rate": "1e-06, linear to 1e-07 after 3 optimizer steps of warm-up",
        "training data": "9 rows of running_totals",
        "evaluation": "before training, every 10 steps and at the end: hard (x.jsonl)",
        "weight sync": SHM,
        "rollout": "1 2 0.5 0 auto some/model",
        "policy": "2 0-1 0.333 0 auto some/model",
        "all": "3 0",
    },
    (
        "algorithm={name: grpo, length_penalty: {by: group, weight: 0.2}}",
        "rollouts.top_k=5",
        "policy.support_replay=true",
    ): {
        "algorithm": "{name: grpo, length_penalty: {by: group, weight: 0.2}}",
        "sampler": "top_k, top_p and min_p as in rollouts; the policy's probabilities are among the kept tokens too",
    },
    ("train.lr_schedule=wsd", *WARM): {
        "learning rate": f"1e-06, constant, then linear in the last 10% of the optimizer steps to 1e-07 {WARMED}"
    },
    ("train.lr_schedule=cosine_with_restarts", *WARM): {
        "learning rate": f"1e-06, cosine with restarts, 2 times to 1e-07 {WARMED}"
    },
    # ceil(60 * 9 / 64) steps of prompts, and (9 - 2) * 4 of the policy
    (EPOCHS, "train.epochs=60"): {"whole run": "9 steps: 28 optimizer steps of the policy, 36 of the critic"},
    (EPOCHS, "train.epochs=2", "data.train=absent.jsonl"): {
        "whole run": "2 epochs: how many steps that is follows from data.train, which is not here"
    },
    ("rollouts.oversample=1.26", "rollouts.dynamic_sampling={max_filtered_fraction: 2, max_mean: 1}"): {
        "responses a step": f"{MANY}, in place of at most 128 prompts that are filtered"
    },
    ("rollouts.oversample=1.26", "rollouts.carry_over=true", "algorithm.correction=none"): {
        "responses a step": f"{MANY}, while the others are continued in the next step"
    },
    ("data.train={a: {source: x.jsonl, weight: 3}, b: {source: {task: running_totals, size: 9}}}",): {
        "training data": "75.0% x.jsonl, 25.0% 9 rows of running_totals"
    },
    ("policy.lora={}",): {"weight sync": ADAPTER},
    ("policy.lora.dora=true",): {"weight sync": f"all weights, the adapter merged (vLLM takes no DoRA), by {SHM}"},
    ("policy.lora={}", "policy.adapter=a", "reference=null"): {
        "weight sync": f"{ADAPTER}, unless vLLM does not support this kind of adapter; then merged into the "
        f"weights, by {SHM}",
        "reference": "the policy with policy.adapter as it is now: no second model",
    },
    ("cluster.address=auto",): {"weight sync": f"{SEVERAL}; shm if they are placed on one"},
    (*SEATS, "cluster.address=10.0.0.1:6379"): {"weight sync": SEVERAL, "rollout": "2-8 2-3 1 0 auto some/model"},
    ("cluster.roles.policy.workers=8", "cluster.roles.critic.workers=8"): {
        "0": "1 0 policy, critic, reference",
        "1-7": "1 0 policy, critic",  # equal bundles share a line
    },
}


@pytest.mark.parametrize("overrides", FACTS, ids=" ".join)
def test_the_facts(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    text = plan(tmp_path, *overrides)
    assert re.match(r"demo: \w+ -> runs/demo\n", text)
    facts = {name: " ".join(fact(text, name).split()) for name in FACTS[overrides]}
    assert facts == FACTS[overrides]


def test_what_is_said_beside_the_facts(tmp_path: Path) -> None:
    assert "  reference         some/model in workers of its own\n" in plan(tmp_path)
    text = plan(tmp_path, cluster="1*cpu=2+cpu=8")
    assert [fact(text, bundle).rpartition("  ")[2] for bundle in ("1", "2")] == ["node 0", "node 1"]
    rows = "train.epochs 60 of 9 rows: 9 steps, if no row is left out"
    assert rows in plan(tmp_path, EPOCHS, "train.epochs=60")
    grpo = [*ON_GPUS, "policy.model=Qwen/Qwen2.5-0.5B-Instruct", "algorithm={name: grpo}"]
    total = 494_032_768 * 24 / 2**30  # parameters of 12 bytes, twice
    assert f"snapshots of all ranks: {total:.2f} GiB of /dev/shm" in plan(tmp_path, *grpo)
    assert "snapshots of all ranks" not in plan(tmp_path, *grpo, "cluster.restarts.gang=0")


def test_limits_of_restarts_without_effect_are_named(tmp_path: Path) -> None:
    shared = [*ON_GPUS, "cluster.roles.rollout.colocate_with=policy", "cluster.roles.policy.zero_stage=2"]
    for overrides, named in (
        ([], []),
        (["cluster.roles.rollout.engines=2"], []),
        ([*ELASTIC, *IN_FLIGHT, "cluster.address=auto", "cluster.weight_sync=gloo"], []),
        (["cluster.weight_sync=gloo"], ["engine has no effect: weights go by gloo"]),
        (["cluster.weight_sync=gloo", "cluster.restarts.engine=0"], []),
        ([*ON_GPUS, "policy.lora={rank: 8}"], []),
        (ON_GPUS, ["engine has no effect: weights go by nccl"]),
        (shared, ["engine has no effect: the engines share GPUs", "gang has no effect: ranks that share GPUs"]),
    ):
        lines = [line for line in plan(tmp_path, *overrides).splitlines() if line.startswith("  restarts  ")]
        assert len(lines) == len(named), overrides
        assert all(f"cluster.restarts.{text}" in line for line, text in zip(lines, named, strict=True))


def test_runs_on_fixed_data_with_and_without_a_teacher(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {name: demo}\npolicy: {model: some/model}\nalgorithm: {name: sft}\ndata: {train: x.jsonl}\n"
        "train: {steps: 10, lr: 1e-6, sequences_per_update: 8}\n"
    )
    text = render_plan(load(path, ["data.max_sequence_tokens=4000", "data.too_long=cut"]))
    assert fact(text, "micro-batch") == "at most 8,192 tokens; a sequence of more than 4,000 loses its end"
    taught = ["algorithm.name=distillation", "teacher.model=large/model"]
    alone = [*taught, "cluster.device=cuda", "cluster.roles.teacher={workers: 2, colocate_with: null}"]
    for overrides, teacher, total in (
        (taught, "1 0 0.5 0 auto large/model", "1 0"),
        (alone, "2 1-2 1 1 - large/model", "3 3"),
    ):
        text = render_plan(load(path, overrides))
        assert [fact(text, name).split() for name in ("teacher", "all")] == [teacher.split(), total.split()]


def test_more_than_the_cluster_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^demo does not fit the cluster 'cpu=2,gpu=1'\.") as caught:
        plan(tmp_path, cluster="cpu=2,gpu=1")
    message = str(caught.value)
    assert fact(message, "wanted").split() == ["3", "0"]
    assert fact(message, "available").split() == ["2", "1"]
    assert "Bundles: 3 of 1 CPU." in message


def test_the_description_of_a_cluster() -> None:
    assert parse_cluster("2*cpu=96,gpu=8 + cpu=0.5") == [Node(cpus=96.0, gpus=8.0)] * 2 + [Node(cpus=0.5)]
    (node,) = parse_cluster("cpu=96,gpu=8,type=H200,mem=1000,price=98.5")
    assert (node.gpu_memory_gib, node.mem_gib, node.price) == (141.0, 1000.0, 98.5)
    assert parse_cluster("cpu=1,gpu=1,type=h100,gpumem=94")[0].gpu_memory_gib == 94.0
    for text, error in {
        "2x8": r"--cluster '2x8': expected nodes such as .*, got '2x8'",
        "gpu=8": "'gpu=8' has no cpu=",
        "cpu=8,cpu=16": "'cpu=8,cpu=16' gives a key twice",
        "cpu=8,ram=5": "'ram' is unknown, expected cpu, gpu, mem, shm, gpumem, price, type",
        "cpu=8,gpu=1,type=gtx": "type=gtx, expected one of a100",
        "cpu=8,gpu=0.5": "'gpu=0.5', expected a number, of GPUs a whole one",
        "cpu=8,mem=-1": "'mem=-1', expected a number",
        "8*cpu=1+99999990*cpu=1": "99999998 nodes, expected at most 65536",
    }.items():
        with pytest.raises(UserError, match=error):
            parse_cluster(text)


def test_a_merge_and_an_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "run: {name: demo}\nstages:\n"
        "  soup: {merge: {method: linear, models: {a: {model: x/a, weight: 0.25}, b: {model: x/b}}}}\n"
        "  judge:\n"
        "    evaluate:\n"
        "      {model: stage:soup, against: x/a, data: {hard: x.jsonl, easy: t.jsonl}, temperature: 0.5,\n"
        "       samples_per_prompt: 4, max_new_tokens: 1300, rewards: {correct: {function: f}}}\n"
        "    cluster: {roles: {rollout: {engines: 2}}}\n"
        "  read: {evaluate: {model: stage:soup, data: {task: t, size: 3}}}\n"
    )
    text = render_plan(load(path)).replace("runs/demo/", "runs/D/")
    soup, judge, read = ("demo/" + part for part in text.split("demo/")[1:])
    assert soup.startswith("demo/soup: merge -> runs/D/soup\n")
    assert fact(soup, "method") == "linear"
    assert fact(soup, "model a") == "x/a (weight 0.25)"
    assert "bundle" not in soup
    assert judge.startswith("demo/judge: evaluate -> runs/D/judge\n")
    assert fact(judge, "data") == "hard (x.jsonl), easy (t.jsonl)"
    assert fact(judge, "responses") == "4 to a prompt, at temperature 0.5, of at most 1,300 tokens"
    assert "  rollout  2        0-1      " in judge
    assert "runs/D/soup/final, then x/a" in judge
    assert fact(read, "data") == "heldout (3 rows of t)"
    assert fact(read, "measured").startswith("completions")
    played = load(path, ["stages.judge.evaluate.environment={name: guess_number, max_tokens: 2000}"])
    assert fact(render_plan(played), "responses").endswith("of at most 8 turns of 1,300 tokens with guess_number")
    render_plan(load(path), cluster="cpu=2")
    with pytest.raises(UserError, match="demo/judge does not fit the cluster 'cpu=1'"):
        render_plan(load(path), cluster="cpu=1")


def test_the_plan_of_a_sweep_is_of_the_run_with_the_first_values(tmp_path: Path) -> None:
    parameters = {"train.lr": {"values": [1e-3, 1e-4]}, "train.steps": {"min": 10, "max": 12, "integer": True}}
    file = write_sweep(tmp_path, parameters=parameters, method={"name": "grid"})
    assert "10 steps: 10 optimizer steps" in rlhf.plan(file)
    parameters["train.warmup_steps"] = {"values": [0, 11]}
    with pytest.raises(rlhf.UserError, match=r"a trial with .*train\.warmup_steps=11 is not a valid run"):
        rlhf.plan(write_sweep(tmp_path, parameters=parameters, method={"name": "grid"}))


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


def cells(text: str, start: str) -> list[str]:
    """Return the columns of the first line with this beginning."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(start)][:1]
    return line.split()


def test_the_large_recipe_term_by_term_and_stage_by_stage() -> None:
    large = rlhf.plan(LARGE, cluster=NODES)
    # 70,553,706,496 parameters and 414,187,520 of the adapter, in bfloat16 over 16 ranks: 8.26 GiB.
    assert "weights             8.26           70.97B * 2 bytes / 16" in large
    assert "80 KiB a token" in large  # 320 KiB over four GPUs
    assert cells(large, "GPU of policy, critic")[-7:] == ["80.00", "fits", "policy", "26.1", "+", "critic", "15.2"]
    assert cells(large, "step  ")[2] == "100%"
    assert "schedules; this run: in turns" in large
    assert all(f"\n  {name} " in large for name in ("pipelined, 2 ahead", "in flight, 2 ahead"))
    assert "streamed" not in large  # ppo whitens over the batch
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
    assert text.count("memory by place") == 2  # the supervised stage, and the stage that starts from its model


def test_a_model_that_is_not_here_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    text = rlhf.plan(LARGE, ["policy.model=some/model"], cluster=NODES)
    assert "responses a step  256 prompts * 4 samples = 1024" in text
    assert "no estimate of memory and time: the sizes of some/model are not known here" in text
    (tmp_path / "some").mkdir()
    (shapes(tmp_path) / SMALL).rename(tmp_path / "some/model")
    text = rlhf.plan(LARGE, ["policy.model=some/model"], cluster=NODES, shapes=tmp_path)
    assert "144.3M * 2 bytes / 16" in text  # 134,515,008 and 9,768,960 of the adapter
    with pytest.raises(UserError, match=r"--shapes nowhere: is not a folder"):
        rlhf.plan(LARGE, shapes=Path("nowhere"))


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


def test_the_disk_that_checkpoints_take() -> None:
    text = rlhf.plan(ROOT / "configs/ppo_7b_8gpu.yaml", cluster="cpu=96,gpu=8,type=h100")
    # 7,615,616,512 weights of the policy, and the critic's without the head: 4 + 8 bytes each, in GiB.
    assert "policy 85.11 + critic 79.02" in text
    (line,) = [line for line in text.splitlines() if line.startswith("  checkpoints  ") and "being written" in line]
    count = int(line.split()[2])
    assert float(line.split()[1].replace(",", "")) == pytest.approx(count * (85.11 + 79.02), abs=0.1)


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
