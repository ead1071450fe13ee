"""The planned memory equals sums by hand and the modelled code, in shared places too, and states move in time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.files.load import load
from rlhf.config.mistakes.explain import parse
from rlhf.config.nodes import Node, parse_cluster
from rlhf.config.placement_plan import plan_placement
from rlhf.config.schema.root import Config
from rlhf.errors import UserError
from rlhf.planning import memory
from rlhf.planning.fitting import Fit, held_on_gpu, places, remedies
from rlhf.planning.footprints import Sizes, footprints, tokens_of_microbatch, training
from rlhf.planning.known_models import DENSE_MODELS, MIXTURE_MODELS, SEEING_MODELS
from rlhf.planning.lengths import Lengths
from rlhf.planning.memory import GIB, Assumed, Footprint, activation_bytes, head_bytes, kv_bytes_per_token
from rlhf.planning.rates import Stage
from rlhf.planning.shapes import TINY, Shape, find_shape, shape_of
from rlhf.planning.time import system_of, training_stages
from rlhf.planning.transfers import snapshots, staging
from tests.fixtures.sources import ROOT

# As the models' pages on the hub count them, in the order of the table.
PUBLISHED = (
    *(134_515_008, 361_821_120, 1_711_376_384, 494_032_768, 1_543_714_304, 3_085_938_688),
    *(7_615_616_512, 14_770_033_664, 32_763_876_352, 72_706_203_648, 596_049_920, 1_720_574_976),
    *(4_022_468_096, 4_022_468_096, 8_190_735_360, 14_768_307_200, 32_762_123_264, 1_777_088_000),
    *(7_615_616_512, 6_738_415_616, 13_015_864_320, 68_976_648_192, 8_030_261_248, 70_553_706_496),
    *(1_235_814_400, 3_212_749_824, 70_553_706_496, 7_248_023_552, 12_247_782_400, 23_572_403_200),
)
# The same of models that see. The numbers with a fraction are rounded on the models' pages.
PUBLISHED_SEEING: tuple[float, ...] = (
    *(2_208_985_600, 8_291_375_616, 73_405_560_320),  # Qwen2-VL
    *(3_754_622_976, 8_292_166_656, 33_452_718_336, 73_410_777_344),  # Qwen2.5-VL
    *(2_127_532_032, 4_437_815_808, 8_767_123_696, 33_357_390_064),  # Qwen3-VL
    *(4_300_079_472, 12_187_325_040, 27_432_406_640),  # Gemma 3
    *(8.46e9, 0.256e9, 0.507e9, 2.25e9, 2_246_784_880),  # Idefics3, SmolVLM
    *(0.894e9, 8.03e9, 0.938e9, 2.09e9, 7.94e9, 15.1e9),  # LLaVA-OneVision, InternVL3
    *(12.7e9, 24_011_361_280, 24_011_361_280, 7_063_427_072),  # Pixtral, Mistral Small, LLaVA
)
# All parameters, and those that a token passes in billions, as the models' pages state them. GLM's totals are rounded.
PUBLISHED_MIXTURES: tuple[tuple[float, float], ...] = (
    *((30_532_122_624, 3.3),) * 3,  # Qwen3-30B-A3B
    *((235_093_634_560, 22),) * 2,  # Qwen3-235B-A22B
    *((480_154_875_392, 35), (46_702_792_704, 12.9), (140_630_071_296, 39)),  # Qwen3-Coder, Mixtral
    *((106e9, 12), (355e9, 32), (355e9, 32)),  # GLM
    *((20_914_757_184, 3.6), (116_829_156_672, 5.1)),  # gpt-oss
)

COUNT = 7_615_616_512  # of Qwen2.5-7B
# Rank 8 on each block of Qwen2.5-7B (H 3584, F 18944, queries 3584, keys 512), in + out of each layer:
# q 7168, k and v 4096 each, o 7168, gate, up, down 22528 each: 90,112; * 8 * 28 blocks.
ADAPTER = 20_185_088
BLOCKS = COUNT - 2 * 152_064 * 3584 - 3584  # without embedding, head and last norm


def shape(model: str = "meta-llama/Llama-3.3-70B-Instruct") -> Shape:
    return find_shape(model, shapes=None, made={})


def run(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {name: demo}\npolicy: {model: Qwen/Qwen2.5-7B-Instruct}\nalgorithm: {name: sft}\n"
        "data: {train: x.jsonl}\n"
        "train: {steps: 10, lr: 1e-6, sequences_per_update: 64, max_tokens_per_microbatch: 4096}\n"
    )
    return next(iter(load(path, overrides).runs.values()))


def policy(tmp_path: Path, *overrides: str) -> Footprint:
    return footprints(run(tmp_path, *overrides), Sizes())[0]


def term(footprint: Footprint, name: str) -> float:
    return sum(t.nbytes for t in footprint.terms if t.name == name)


def test_the_tables_have_the_published_sizes() -> None:
    assert {model: shape(model).parameters for model in DENSE_MODELS} == dict(zip(DENSE_MODELS, PUBLISHED, strict=True))
    for model, total in zip(SEEING_MODELS, PUBLISHED_SEEING, strict=True):
        assert shape(model).parameters == pytest.approx(total, rel=0.01 if isinstance(total, float) else 0, abs=0), (
            model
        )
    for model, (total, active) in zip(MIXTURE_MODELS, PUBLISHED_MIXTURES, strict=True):
        rounding = 0.01 if isinstance(total, float) else 0.0
        assert shape(model).parameters == pytest.approx(total, rel=rounding, abs=0), model
        assert shape(model).active_parameters / 1e9 == pytest.approx(active, rel=0.09), model  # counts one embedding


def test_sizes_that_config_json_leaves_out_are_those_of_transformers() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 896}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}
    config = {"model_type": "gemma3", "mm_tokens_per_image": 256, "text_config": text, "vision_config": vision}
    assert shape_of(config, shape("google/gemma-3-4b-it").source) == shape("google/gemma-3-4b-it")


def test_the_tiny_model_is_the_one_that_is_made(tmp_path: Path) -> None:
    from rlhf.models.files.tiny import build_tiny_llama

    config = json.loads((build_tiny_llama(tmp_path / "tiny", seed=0) / "config.json").read_text())
    assert shape_of(config, TINY.source) == TINY


def test_parameters_are_those_of_the_model_that_transformers_builds() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    for kind in ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "mixtral", "qwen3_moe", "glm4_moe", "gpt_oss"):
        values = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        if kind == "glm4_moe":
            values |= {"n_routed_experts": 8, "n_shared_experts": 2, "attention_bias": True, "use_qk_norm": True}
        config = AutoConfig.for_model(
            kind, **values, num_key_value_heads=2, head_dim=16, vocab_size=100, pad_token_id=0, num_labels=1
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            scorer = None if kind == "glm4_moe" else AutoModelForSequenceClassification.from_config(config)
        config.architectures = [type(model).__name__]
        ours = shape_of(config.to_dict(), "test")
        assert ours.parameters == sum(p.numel() for p in model.parameters()), kind
        assert scorer is None or ours.scalar_parameters == sum(p.numel() for p in scorer.parameters()), kind


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_the_packed_forward_pass_saves(tmp_path: Path, dtype: str) -> None:
    import torch

    from rlhf.models.files.loading import load_causal_lm
    from rlhf.models.files.tiny import build_tiny_llama
    from rlhf.models.packed.forward import hidden_states

    tokens, kind = 256, getattr(torch, dtype)
    model = load_causal_lm(str(build_tiny_llama(tmp_path / "tiny", seed=0)), dtype=kind)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = hidden_states(model, torch.arange(tokens) % 200, torch.tensor([64] * 4))
    assert found.requires_grad
    measured = sum(size for where, size in saved.items() if where not in own)
    ours = tokens * activation_bytes(TINY, itemsize=kind.itemsize, checkpointing=False, lora_rank=None)
    assert ours == pytest.approx(measured, rel=0.06)  # rotary tables and the last norm are not counted


def test_constants_of_the_code_that_is_modelled() -> None:
    from actors.rollout import vllm_engine
    from rlhf.engine import deepspeed

    assert memory.BUCKET_ELEMENTS == deepspeed.BUCKET_ELEMENTS
    assert memory.PREFILL_TOKENS == vllm_engine.PREFILL_TOKENS


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize(
    ("optimizer", "name"), [("adamw", "Adam moments"), ("adafactor", "Adafactor states"), ("muon", "Muon momentum")]
)
def test_states_are_as_large_as_the_optimizer_makes_them(
    tmp_path: Path, optimizer: Any, name: str, rank: int | None
) -> None:
    import torch

    from rlhf.engine.optimizers import make_optimizer
    from rlhf.engine.parameter_groups import parameter_groups
    from rlhf.engine.training_engine import OptimizerSettings
    from rlhf.models.adapters.lora import add_lora
    from rlhf.models.files.loading import load_causal_lm
    from rlhf.models.files.tiny import build_tiny_llama

    model = load_causal_lm(str(build_tiny_llama(tmp_path / "tiny", seed=0)), dtype=torch.float32)
    if rank is not None:
        model = add_lora(model, rank=rank, alpha=8.0, dropout=0.0)
    groups = parameter_groups(model, OptimizerSettings(name=optimizer, lr=1.0))
    made = make_optimizer(groups, OptimizerSettings(name=optimizer, lr=1e-3))
    for parameter in (p for group in groups for p in group.parameters):
        parameter.grad = torch.ones_like(parameter)
    made.step()
    states = [value for state in made.state.values() for value in state.values() if torch.is_tensor(value)]
    measured = sum(value.numel() * value.element_size() for value in states)
    lora = "null" if rank is None else f"{{rank: {rank}}}"
    overrides = ["policy.model=tiny:llama", "policy.dtype=float32", f"policy.lora={lora}"]
    planned = policy(tmp_path, *overrides, f"train.optimizer={optimizer}", "cluster.roles.policy.zero_stage=0")
    assert term(planned, name) == pytest.approx(measured, rel=0.02)  # norms and counts of steps are not counted


@pytest.mark.parametrize(
    ("overrides", "terms"),
    [
        # Two bytes of each weight, and two float32 scales for each 256 weights, over 4 ranks.
        (
            ["train.optimizer=adamw_8bit", "cluster.roles.policy.workers=4"],
            {"8-bit moments": COUNT * (2 + 8 / 256) / 4},
        ),
        # Below stage 3, bfloat16 weights are whole, and master weights (4 bytes) and moments (8) are shared out. The
        # snapshots are twice the float32 weights and the moments.
        (
            ["cluster.roles.policy.workers=4"],
            {
                **{"weights": COUNT * 2, "master weights": COUNT, "Adam moments": COUNT * 2},
                **{"summed gradients": COUNT, "snapshots": 2 * COUNT * 12 / 4},
            },
        ),
        (
            ["cluster.roles.policy={workers: 4, zero_stage: 3}"],
            {"weights": COUNT * 2 / 4, "weights gathered": 10**9 * 2, "gradient bucket": 5 * 10**7 * 2},
        ),
        (  # DeepSpeed also copies float32 weights, in float32
            ["cluster.roles.policy={workers: 1, zero_stage: 3}", "policy.dtype=float32"],
            {"master weights": COUNT * 4, "weights gathered": 0, "gradients as a block": COUNT * 4},
        ),
        (
            ["cluster.roles.policy={workers: 4, zero_stage: 0}", "policy.dtype=float32"],
            {"master weights": 0, "Adam moments": COUNT * 8, "snapshots": 2 * COUNT * 12},
        ),
        (["policy.lora={rank: 8}"], {"Adam moments": ADAPTER * 8, "weights": (COUNT + ADAPTER) * 2}),
        # Half a byte, and a scale of four bytes for 64.
        (["policy.lora={rank: 8, quantize: nf4}"], {"weights": BLOCKS * 0.5625 + (COUNT - BLOCKS + ADAPTER) * 2}),
    ],
    ids=["8 bit", "stage 1", "stage 3", "stage 3 alone", "stage 0", "adapter", "base in 4 bits"],
)
def test_terms_of_one_rank_by_hand(tmp_path: Path, overrides: list[str], terms: dict[str, float]) -> None:
    planned = policy(tmp_path, *overrides)
    assert {name: term(planned, name) for name in terms} == terms


def test_the_cache_of_a_token_and_the_head_by_hand() -> None:
    assert kv_bytes_per_token(shape(), itemsize=2) == 2 * 80 * 8 * 128 * 2 == 320 * 1024
    # Llama-3.3: V 128,256, H 8192. 3 * 256 rows of float32 logits, 1024 rows of bfloat16 gradients, and the weight's
    # gradient as a product in bfloat16 and a sum in float32.
    wanted = 3 * 256 * 128_256 * 4 + 1024 * 128_256 * 2 + 128_256 * 8192 * 6
    assert head_bytes(shape(), rows=4096, itemsize=2, trains_head=True, widens=False) == wanted


def test_offload_moves_the_optimizer_to_the_host(tmp_path: Path) -> None:
    roles = ("{workers: 4, zero_stage: 3, offload: [optimizer]}", "{workers: 4, zero_stage: 3}")
    one, there = (policy(tmp_path, "cluster.device=cuda", f"cluster.roles.policy={role}") for role in roles)
    moved = COUNT * (4 + 8) / 4  # and the summed gradients, 4 bytes each
    assert there.of("device") - one.of("device") == moved + COUNT
    assert one.rss - there.rss == moved + 2 * COUNT  # and the block of the gradients


def test_whole_modules_beside_an_adapter_are_trained_weights(tmp_path: Path) -> None:
    def trained(lora: str) -> int:
        config = run(tmp_path, f"policy.lora={lora}")
        return training("policy", config.policy, config, Sizes()).trained

    assert trained("{modules_to_save: [embed_tokens, lm_head]}") - trained("{}") == 2 * 152_064 * 3_584


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [
        ([], (4096, True)),
        (["train.sequences_per_update=2", "data.max_sequence_tokens=100"], (200, False)),
        (["algorithm={name: dpo}", "train.sequences_per_update=2", "data.max_sequence_tokens=100"], (400, False)),
    ],
    ids=["full", "a small batch", "pairs"],
)
def test_the_tokens_of_a_microbatch(tmp_path: Path, overrides: list[str], tokens: tuple[int, bool]) -> None:
    config = run(tmp_path, *overrides)
    assert tokens_of_microbatch(config, config.cluster.roles.policy) == tokens


def test_a_model_of_unknown_size_is_named(tmp_path: Path) -> None:
    for values, problem in (
        (None, r"the sizes of some/model are not known here: there is no some/model/config.json"),
        ({"architectures": ["GPT2LMHeadModel"]}, "is of GPT2LMHeadModel, whose memory is not modelled"),
        (
            {"architectures": ["LlamaForCausalLM"], "hidden_size": "8"},
            "`hidden_size` is '8', expected a positive integer",
        ),
    ):
        if values is not None:
            (tmp_path / "some--model.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=problem):
            find_shape("some/model", shapes=tmp_path, made={})


def test_the_hub_cache_and_earlier_stages_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = tmp_path / "models--some--model" / "snapshots" / "abc"
    at.mkdir(parents=True)
    values = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (at / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 9, **values}))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert find_shape("runs/x/final", shapes=None, made={"runs/x/final": "some/model"}).vocab == 9


def test_the_engine_s_cache_is_what_the_gpu_has_left(tmp_path: Path) -> None:
    config = next(iter(load(ROOT / "configs/ppo_70b_multinode.yaml").runs.values()))
    engine = footprints(config, Sizes(gpu_memory_gib=80.0))[1]
    assert engine.of("device") - engine.stays == pytest.approx(0.9 * 80 * GIB)
    assert term(engine, "weights") == 70_553_706_496 * 2 / 4


RUN: dict[str, Any] = {
    "run": {"name": "shared"},
    "policy": {"model": "Qwen/Qwen2.5-7B-Instruct", "gradient_checkpointing": True},
    "algorithm": {"name": "grpo", "kl": {"coef": 0.01}},
    "data": {"train": "x.jsonl"},
    "rollouts": {"prompts_per_step": 64, "samples_per_prompt": 8, "max_new_tokens": 4096},
    "train": {"steps": 10, "lr": 1e-6, "sequences_per_update": 128, "max_tokens_per_microbatch": 16384},
}
FUNCTION = {"rewards": {"exact": {"function": "exact_match"}}}
MODEL = {"rewards": {"score": {"role": "reward"}}, "reward": {"model": "Qwen/Qwen2.5-7B-Instruct"}}


def config_of(rewards: dict[str, Any], **rollout: Any) -> Config:
    roles = {"policy": {"workers": 8, "zero_stage": 3}, "rollout": {"engines": 8, "colocate_with": "policy", **rollout}}
    return parse({**RUN, **rewards, "cluster": {"device": "cuda", "roles": roles}})


def fits(config: Config, node: Node, count: int = 1) -> list[Fit]:
    return places(config, plan_placement(config), footprints(config, Sizes(gpu_memory_gib=80.0)), [node] * count)


def fullest_gpu(config: Config) -> Fit:
    node = Node(cpus=96.0, gpus=8.0, mem_gib=2000.0, gpumem_gib=80.0)
    return max((fit for fit in fits(config, node) if fit.where.startswith("GPU")), key=lambda fit: fit.wanted)


def test_a_reference_leaves_the_gpu_of_a_generating_engine_and_a_reward_model_stays() -> None:
    fit = fullest_gpu(config_of(FUNCTION))
    # The engine's 0.85 * 80 GiB, contexts of engine and reference, and context and NCCL of the policy's rank.
    assert fit.wanted == pytest.approx(0.85 * 80 * GIB + 3 * Assumed.CUDA_BYTES + Assumed.NCCL_BYTES)
    assert fit.parts.startswith("generate: ")
    assert fit.fits
    fit = fullest_gpu(config_of(MODEL))
    assert fit.wanted > (0.85 * 80 + 14.2) * GIB  # 7.6 billion weights of 2 bytes
    assert fit.fits is False
    assert fullest_gpu(config_of(MODEL, gpu_memory_utilization=0.6)).fits


def test_each_member_of_an_ensemble_of_reward_models_has_its_weights() -> None:
    """The members score in turns, so only the weights are added: 7,070,622,720 parameters with a head, in bfloat16."""
    members = {name: {"model": "Qwen/Qwen2.5-7B-Instruct"} for name in "bc"}
    whole = config_of({**MODEL, "reward": {**MODEL["reward"], "members": members}})
    nbytes = []
    for config in (config_of(MODEL), whole):
        (reward,) = (process for process in footprints(config, Sizes()) if process.role == "reward")
        nbytes.append(reward.of("device"))
    assert nbytes[1] - nbytes[0] == 2 * 2 * 7_070_622_720


@pytest.mark.parametrize(
    ("algorithm", "named", "heads"),
    [
        # vocabulary times hidden size, in two bytes: 151,936 * 896 and 152,064 * 3584
        ({"divergence": "reverse_kl"}, True, {"head of small": 2 * 136_134_656, "head of large": 2 * 544_997_376}),
        ({"divergence": "reverse_kl"}, False, {"teacher's head": 2 * 136_134_656}),
        ({"divergence": "reverse_kl", "top_k": 64}, True, {}),
        ({"divergence": "sampled_reverse_kl"}, True, {}),
    ],
)
def test_a_student_keeps_the_heads_of_all_teachers(
    algorithm: dict[str, Any], named: bool, heads: dict[str, int]
) -> None:
    small, large = {"model": "Qwen/Qwen2.5-0.5B-Instruct"}, {"model": "Qwen/Qwen2.5-7B-Instruct"}
    by = {"teacher_column": "who"} if named else {}
    changes = {
        "algorithm": {"name": "on_policy_distillation", **algorithm, **by},
        "teacher": {"small": small, "large": large} if named else small,
        "cluster": {"device": "cuda"},
    }
    (policy,) = (one for one in footprints(parse({**RUN, **changes}), Sizes()) if one.role == "policy")
    found = {term.name: term.nbytes for term in policy.terms if "head of" in term.name or "teacher's" in term.name}
    assert found == heads
    assert all(term.place == "device" and term.stays for term in policy.terms if term.name in heads)


def test_the_largest_of_several_teachers_is_on_the_gpu_and_all_are_on_the_host() -> None:
    teachers = {"small": {"model": "Qwen/Qwen2.5-0.5B-Instruct"}, "large": {"model": "Qwen/Qwen2.5-7B-Instruct"}}
    algorithm = {"name": "on_policy_distillation", "teacher_column": "who"}
    run = {**RUN, "algorithm": algorithm, "teacher": teachers, "cluster": {"device": "cuda"}}
    (teacher,) = (one for one in footprints(parse(run), Sizes()) if one.role == "teacher")
    found = {(term.name, term.place): term.nbytes for term in teacher.terms if "weights" in term.name}
    assert found == {
        ("weights", "device"): 2 * COUNT,
        ("weights of small", "host"): 2 * 494_032_768,
        ("weights of large", "host"): 2 * COUNT,
    }


def test_a_weight_transfer_holds_the_policy_its_copy_and_the_weights_of_the_engine() -> None:
    config = config_of(FUNCTION)
    by_role = {one.role: one for one in footprints(config, Sizes(gpu_memory_gib=80.0))}
    weights = 7_615_616_512
    # Of 8 ranks: bfloat16 weights, master weights, two moments and the block of gradients; a billion gathered weights
    # and the bucket. The copy for the engine is whole.
    states = weights * (2 + 4 + 8 + 4) / 8 + 2 * 10**9 + 2 * 5 * 10**7
    policy = held_on_gpu(by_role["policy"], "weight sync")
    assert policy == pytest.approx(states + 2 * weights + by_role["policy"].stays)
    assert held_on_gpu(by_role["rollout"], "weight sync") == pytest.approx(2 * weights + Assumed.CUDA_BYTES)
    assert held_on_gpu(by_role["reference"], "weight sync") == Assumed.CUDA_BYTES


def test_each_node_holds_the_copies_of_as_many_ranks_of_others() -> None:
    # Three ranks on each of two nodes, and the engines on a third. Each node holds the copies of two ranks: of
    # 7,615,616,512 parameters, 12 bytes twice, over 6 ranks.
    roles = {"policy": {"workers": 6}, "rollout": {"engines": 3}, "reward": {"colocate_with": "policy"}}
    tree = {**RUN, **FUNCTION, "cluster": {"device": "cuda", "address": "auto", "roles": roles}}
    config = parse({**tree, "algorithm": {"name": "grpo"}})
    (host,) = [
        fit for fit in fits(config, Node(cpus=96.0, gpus=3.0, mem_gib=2000.0), 3) if fit.where.startswith("host")
    ]
    assert f"copies of snapshots {2 * 7_615_616_512 * 24 / 6 / GIB:,.1f}" in host.parts
    (host,) = [fit for fit in fits(config, Node(cpus=96.0, gpus=9.0, mem_gib=2000.0)) if fit.where.startswith("host")]
    assert "copies of snapshots" not in host.parts


def shared_memory(config: Config, **node: float) -> Fit:
    (fit,) = [fit for fit in fits(config, Node(cpus=96.0, gpus=9.0, **node)) if fit.where == "/dev/shm of node 0"]
    return fit


def test_the_snapshots_and_the_objects_of_ray_must_fit_into_shared_memory() -> None:
    # 7,615,616,512 parameters of 12 bytes, twice: 170.2 GiB. `ray start` takes 30 % of the memory for its objects.
    roles = {"policy": {"workers": 6, "zero_stage": 2}, "rollout": {"engines": 3}}
    tree = {**RUN, **FUNCTION, "algorithm": {"name": "grpo"}}
    joined = parse({**tree, "cluster": {"device": "cuda", "address": "auto", "roles": roles}})
    local = parse({**tree, "cluster": {"device": "cuda", "object_store_gib": 4.0, "roles": roles}})
    snapshots = 7_615_616_512 * 24
    fit = shared_memory(joined, mem_gib=400.0)  # of which Linux gives half to /dev/shm
    assert fit.room == 200.0 * GIB
    assert fit.wanted == pytest.approx(snapshots + 0.3 * 400.0 * GIB)
    assert fit.fits is False
    assert "docker run --shm-size=291g" in fit.fix
    assert "cluster.restarts.gang=0" in fit.fix
    assert shared_memory(joined, mem_gib=400.0, shm_gib=300.0).fits is True
    assert shared_memory(local, mem_gib=400.0).wanted == pytest.approx(snapshots + 4.0 * GIB)
    assert shared_memory(local, mem_gib=400.0, shm_gib=0.0625).wanted == pytest.approx(snapshots)  # Ray uses the disk
    assert shared_memory(joined).fits is None


def test_a_change_that_fills_another_node_most_is_compared_with_the_fullest_node_before() -> None:
    # Four ranks share node 0. With eight ranks, two nodes have four each, and node 1 holds the larger copies.
    recipe = Path(__file__).parents[2] / "configs" / "grpo_qwen3_30b_a3b_8gpu.yaml"
    (config,) = load(recipe, ["cluster.roles.policy.workers=4"]).stages.values()
    nodes = [Node(cpus=64.0, gpus=4.0, mem_gib=300.0, kind="h100")] * 16
    changes = remedies(config, Sizes(gpu_memory_gib=80.0), nodes, ["policy"])
    (doubled,) = [line for line in changes if line.startswith("cluster.roles.policy.workers=8: ")]
    assert "is not needed" not in doubled
    assert re.search(r"/dev/shm of node 1 wants [\d.]+ GiB in place of [\d.]+ and still does not fit", doubled)
    (without,) = [line for line in changes if line.startswith("cluster.restarts.gang=0: ")]
    assert "/dev/shm of node 0 is not needed" in without


CONFIGS = ROOT / "configs"
NODE = "8*cpu=96,gpu=8,type=h100"
PARAMETERS = 30_532_122_624  # of Qwen3-30B-A3B
# 512 sequences of 1,024 + 2,048 tokens on 4 ranks, in micro-batches of 16,384 tokens: 24 of them on each rank.
LENGTHS = Lengths(most=4096, mean=2048.0)
NVLINK, NETWORK, PCIE, HOST, UNPINNED = 0.75 * 450e9, 8 * 20e9, 0.75 * 64e9, 150e9, 3.5e9
SHARED = "cluster.roles.rollout={engines: 4, tensor_parallel: 1, colocate_with: policy}"
MOVES = {"gathers", "gradients to host", "optimizer on host", "snapshots", "staging"}


def recipe(*keys: str, tokens: int = 16384) -> Config:
    """The recipe for the 30B model with a budget of tokens for a micro-batch."""
    path, budget = CONFIGS / "grpo_qwen3_30b_a3b_8gpu.yaml", f"train.max_tokens_per_microbatch={tokens}"
    return next(iter(load(path, [budget, *keys]).runs.values()))


def stages(config: Config, cluster: str = NODE) -> dict[str, Stage]:
    return {stage.name: stage for stage in training_stages(config, Sizes(), parse_cluster(cluster), LENGTHS)}


def test_weights_are_gathered_twice_and_gradients_reduced_once_for_each_microbatch() -> None:
    gathered = (24 * 2 + 24) * 2 * PARAMETERS * 3 / 4  # bfloat16; a rank has a quarter already
    assert stages(recipe())["gathers"].seconds == pytest.approx(gathered / NVLINK)
    assert "(48 * 56.9 GiB + 24 * 56.9 GiB of gradients) * 3 / 4" in stages(recipe())["gathers"].how
    larger = stages(recipe(tokens=65536))["gathers"]
    assert larger.seconds == pytest.approx(gathered / NVLINK / 4)
    # 16 ranks on two nodes, with 6 micro-batches each
    wide = stages(recipe("cluster.roles.policy.workers=16"))["gathers"]
    assert wide.seconds == pytest.approx((6 * 2 + 6) * 2 * PARAMETERS * 15 / 16 / NETWORK)


def test_passes_without_a_gradient_gather_once_and_offloaded_weights_come_from_the_host() -> None:
    keys = ["cluster.roles.policy.offload=[optimizer, parameters]", "train.sequences_per_update=256"]
    found = stages(recipe(*keys, "train.streamed=false", "rollouts.max_staleness=0"))
    assert "old logprobs" in found  # of two updates on a batch
    count = 24 + 24 * 2
    collectives = (count * 2 + 24 * 2) * PARAMETERS * 3 / 4 / NVLINK
    assert found["gathers"].seconds == pytest.approx(collectives + count * 2 * PARAMETERS / 4 / PCIE)
    assert found["optimizer on host"].seconds == pytest.approx(2 * adam_s())


def adam_s() -> float:
    # Each of 4 ranks has 7.6 billion parameters; they share the memory of their host. The weights return in bfloat16.
    return 46 * PARAMETERS / HOST + 2 * PARAMETERS / 4 / PCIE


def test_an_offloaded_optimizer_costs_copies_and_adam_on_the_host() -> None:
    found = stages(recipe())
    # Float32 gradients go to the GPU and back for each micro-batch, and once more for the step.
    assert found["gradients to host"].seconds == pytest.approx((2 * 24 + 1) * 4 * PARAMETERS / 4 / PCIE)
    assert found["optimizer on host"].seconds == pytest.approx(adam_s())
    assert not {"gradients to host", "optimizer on host"} & stages(recipe("cluster.roles.policy.offload=[]")).keys()


def test_a_snapshot_counts_where_the_next_passes_are_shorter() -> None:
    config, nodes = recipe(), parse_cluster(NODE)
    whole_s = 12 * PARAMETERS / 4 / UNPINNED  # float32 weights and two moments
    waits = snapshots(config, Sizes(), nodes, meanwhile_s=6.0)
    assert waits.seconds == pytest.approx(whole_s - 6.0)
    assert snapshots(config, Sizes(), nodes, meanwhile_s=whole_s + 0.1) is None
    assert "snapshots" not in stages(config)  # 68 s of passes
    assert snapshots(recipe("cluster.restarts.gang=0"), Sizes(), nodes, meanwhile_s=0.0) is None


def test_roles_that_share_gpus_with_engines_leave_them_and_return() -> None:
    states = 12 * PARAMETERS / 4
    for stage, expected in {
        2: 2 * (2 * PARAMETERS + states) / PCIE,  # whole weights in bfloat16, all by pinned memory
        # shares of weights and gradients, and a bucket of 50 million; masters and moments are not pinned
        3: 2 * ((2 + 4) * PARAMETERS / 4 + 2 * 50e6) / PCIE + 2 * states / UNPINNED,
    }.items():
        config = recipe(SHARED, f"cluster.roles.policy={{workers: 4, zero_stage: {stage}}}", "train.streamed=false")
        assert staging(config, Sizes(), None).seconds == pytest.approx(expected)
        assert "snapshots" not in stages(config)
    # A separate reference only returns.
    own = ["cluster.roles.reference={workers: 4, colocate_with: policy}", "algorithm.kl={coef: 0.01}"]
    runs = [recipe(SHARED, *keys, "train.streamed=false") for keys in (own, [])]
    seconds = [staging(config, Sizes(), None).seconds for config in runs]
    assert seconds[0] - seconds[1] == pytest.approx(2 * PARAMETERS / UNPINNED)


def test_a_run_without_moves_has_no_line_of_them() -> None:
    small = next(iter(load(CONFIGS / "grpo_smollm2.yaml").runs.values()))
    sizes = Sizes(made={small.policy.model: "Qwen/Qwen2.5-0.5B-Instruct"})
    assert not MOVES & {stage.name for stage in training_stages(small, sizes, None, LENGTHS)}


def test_streamed_gradients_overlap_with_rollouts_and_the_optimizer_step_does_not() -> None:
    config = recipe()
    found, system = stages(config), system_of(config, Sizes(), parse_cluster(NODE), LENGTHS)
    total = sum(stage.seconds for stage in found.values())
    assert system.streamed_share == pytest.approx(1.0 - found["optimizer on host"].seconds / total)
    tokens = 512 * 3072
    assert system.train_tokens_per_s == pytest.approx(tokens / total)
