"""Models and adapters unsuitable for a section are refused before anything starts, with the section's key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rlhf.config.derive import ships_adapter
from rlhf.config.files.load import load
from rlhf.errors import UserError
from rlhf.models.adapters.lora import add_lora
from rlhf.models.files.export import export_adapter
from rlhf.models.files.loading import load_causal_lm, load_tokenizer
from rlhf.models.files.weights import adapter_sources
from rlhf.preflight.inputs import StageInputs, load_inputs
from rlhf.preflight.models import with_adapters
from tests.fakes.runs import PAIRS, loaded, ppo, refusal
from tests.fixtures.models import changed_copy
from tests.merging_models import make_reward_adapter


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: other_words (two tokens are swapped), more_words, no_words (no tokenizer), two_labels, encoder."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("other_words", "no_words", "two_labels"):
        shutil.copytree(tiny_model, folder / name)
    words = json.loads((tiny_model / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "other_words" / "tokenizer.json").write_text(json.dumps(words))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<score>"]})
    shutil.copytree(tiny_model, folder / "more_words")
    tokenizer.save_pretrained(folder / "more_words")
    for path in (folder / "no_words").glob("*token*"):
        path.unlink()
    (folder / "no_words" / "chat_template.jinja").unlink(missing_ok=True)
    shape = json.loads((tiny_model / "config.json").read_text())
    shape |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    (folder / "two_labels" / "config.json").write_text(json.dumps(shape))
    shutil.copytree(tiny_model, folder / "encoder")
    encoder = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    encoder.architectures = ["BertModel"]
    encoder.save_pretrained(folder / "encoder")
    return folder


def test_a_policy_that_the_model_cannot_be_is_refused(tiny_model: Path, models: Path, tmp_path: Path) -> None:
    grpo = {
        "algorithm": {"name": "grpo"},
        "data": {"train": {"task": "running_totals", "size": 8}, "max_prompt_tokens": 64},
        "rollouts": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 8},
        "rewards": {"right": {"function": "exact_match"}},
    }
    encoder, labels = models / "encoder", models / "two_labels"
    of_score = {"algorithm": {"name": "reward_model"}}
    no_causal = f"model: The model {encoder} is a BertModel, not a causal language model"
    two_labels = f"model: {labels} has a head of 2 labels, expected one label, or a language"
    lora = {
        "target_modules: the model has no linear layers named q_prj": {"target_modules": ["q_prj"]},
        "target_modules: the head cannot have LoRA matrices": {"target_modules": ["lm_head"]},
        "modules_to_save: the model has no modules named score": {"modules_to_save": ["score"]},
        "layers: the model has layers 0 to": {"layers": [0, 99]},
        "rank: is 4096, but a": {"rank": 4096, "init": "pissa"},
    }
    for message, policy, sections in (
        *((f"lora.{message}", {"lora": keys}, {}) for message, keys in lora.items()),
        ("router_balance_coef: is 0.01, but", {"router_balance_coef": 0.01}, {}),
        ("router_replay: is true, but", {"router_replay": True}, grpo),
        (no_causal, {"model": str(encoder)}, {}),
        (two_labels, {"model": str(labels)}, of_score),
    ):
        run = loaded(tmp_path, policy={"model": str(tiny_model), "dtype": "float32", **policy}, **sections)
        assert refusal(run).startswith(f"policy.{message}")


def test_an_adapter_that_it_can_have_is_let_through(tiny_model: Path, tmp_path: Path) -> None:
    lora = {"rank": 4, "init": "pissa", "rslora": True, "modules_to_save": ["lm_head"], "layers": [0]}
    assert load_inputs(loaded(tmp_path, policy={"model": str(tiny_model), "dtype": "float32", "lora": lora}))
    reward_model = {"model": str(tiny_model), "dtype": "float32", "lora": {"dora": True}}
    assert load_inputs(loaded(tmp_path, policy=reward_model, algorithm={"name": "reward_model"}))


def test_a_role_must_read_the_policys_tokens(tiny_model: Path, models: Path, tmp_path: Path) -> None:
    message = refusal(ppo(tmp_path, tiny_model, critic={"model": str(models / "other_words")}))
    assert message.startswith(f"critic.model: {models}/other_words has another vocabulary than policy.model")
    for name in ("no_words", "more_words"):  # only weights are read; one token never occurs
        assert load_inputs(ppo(tmp_path, tiny_model, critic={"model": str(models / name)}))


def test_a_teacher_with_other_tokens_is_compared_over_spans(tiny_model: Path, models: Path, tmp_path: Path) -> None:
    data = tmp_path / "sft.jsonl"
    data.write_text("".join(json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) + "\n" for row in PAIRS))

    def run(teacher: str, **keys: Any) -> Any:
        distilled = {"algorithm": {"name": "distillation", **keys}, "data": {"train": str(data)}}
        return loaded(tmp_path, **distilled, policy={"model": str(tiny_model)}, teacher={"model": teacher})

    for name in ("other_words", "more_words"):
        words = f"{models}/{name} has another tokenizer than policy.model {tiny_model}, but algorithm.top_k compares"
        assert refusal(run(str(models / name), top_k=4)).startswith(f"teacher.model: {words}")
        (stage,) = load_inputs(run(str(models / name)))
        assert isinstance(stage, StageInputs)
        assert all(row.translated is not None for row in stage.inputs.rows)  # type: ignore[union-attr]
    assert refusal(run(str(models / "encoder"))).startswith(f"teacher.model: The model {models}/encoder is a BertModel")
    for folder in (models / "no_words", tiny_model):
        assert load_inputs(run(str(folder)))


def test_in_a_pipeline_the_stage_is_named_and_a_result_has_the_vocabulary_of_its_policy(
    tiny_model: Path, models: Path, tmp_path: Path
) -> None:
    def pipeline(first: str, name: str, second: str, *, keys: dict[str, Any] | None = None, **sections: Any) -> Any:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row | {"completion": row["chosen"]}) + "\n" for row in PAIRS))
        shared = {"data": {"train": str(data)}, "train": TRAIN}
        trained = {**shared, "policy": {"model": first}, "algorithm": {"name": "sft"}}
        return two_stages(
            tmp_path,
            trained,
            {**shared, "policy": {"model": second}, "algorithm": {"name": name, **(keys or {})}, **sections},
        )

    words, tiny = str(models / "other_words"), str(tiny_model)
    message = refusal(pipeline(words, "distillation", tiny, keys={"top_k": 4}, teacher={"model": "stage:a"}))
    assert message.startswith("stages.b: teacher.model: ")
    assert "/final has another tokenizer than policy.model" in message
    assert load_inputs(pipeline(words, "distillation", tiny, teacher={"model": "stage:a"}))
    assert refusal(pipeline(tiny, "dpo", str(models / "encoder"))).startswith("stages.b: policy.model: The model ")


EXAMPLES = [{"prompt": f"{n} + {n} =", "completion": f" {n + n}"} for n in range(8)]


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "dora"
    model = load_causal_lm(str(tiny_model), dtype=torch.float32)
    model = add_lora(model, rank=3, alpha=6.0, dropout=0.0, dora=True)
    weights = ((source.name, source.make()) for source in adapter_sources(model))
    export_adapter(folder, weights, model, load_tokenizer(str(tiny_model)))
    return folder


TRAIN = {"steps": 1, "lr": 1e-3, "sequences_per_update": 4, "max_tokens_per_microbatch": 256}


def sft(folder: Path, model: Path, **policy: Any) -> dict[str, Any]:
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    trained = {"model": str(model), "dtype": "float32", **policy}
    return {"policy": trained, "algorithm": {"name": "sft"}, "data": {"train": str(data)}, "train": TRAIN}


def two_stages(folder: Path, first: dict[str, Any], second: dict[str, Any]) -> Any:
    (folder / "run.yaml").write_text(
        json.dumps({"run": {"name": "demo", "dir": str(folder)}, "stages": {"a": first, "b": second}})
    )
    return load(folder / "run.yaml")


def test_the_shape_is_the_folders(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    run = loaded(tmp_path, **sft(tmp_path, tiny_model, lora={"lora_plus_ratio": 4.0}, adapter=str(adapter)))
    (stage,) = load_inputs(run)
    lora = stage.config.policy.lora
    assert (lora.rank, lora.alpha, lora.dora, lora.lora_plus_ratio) == (3, 6.0, True, 4.0)
    assert not ships_adapter(stage.config)
    assert stage.written.policy.lora.rank == 16  # as the user has it
    plain = loaded(tmp_path, **sft(tmp_path, tiny_model, lora={"rank": 5})).stages["demo"]
    assert with_adapters(plain, {}) == plain


def test_of_an_earlier_stage_it_is_that_of_its_config(tiny_model: Path, tmp_path: Path) -> None:
    first = sft(tmp_path, tiny_model, lora={"rank": 4, "init": "pissa", "modules_to_save": ["lm_head"]})
    _, stage = load_inputs(two_stages(tmp_path, first, sft(tmp_path, tiny_model, lora={}, adapter="stage:a")))
    lora = stage.config.policy.lora
    assert (lora.rank, lora.init, lora.modules_to_save) == (8, "default", ("lm_head",))
    assert stage.config.policy.adapter == str(tmp_path / "demo" / "a" / "final")


def online(model: Path, **sections: Any) -> dict[str, Any]:
    return {
        "policy": {"model": str(model), "dtype": "float32"},
        "algorithm": {"name": "grpo"},
        "data": {"train": {"task": "running_totals", "size": 8}, "max_prompt_tokens": 64},
        "rollouts": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4},
        "rewards": {"taste": {"role": "reward"}},
        "train": TRAIN,
        **sections,
    }


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_a_reward_models_adapter_scores(tiny_model: Path, tmp_path: Path, own_tokenizer: bool) -> None:
    adapter = make_reward_adapter(tmp_path / "adapter", tiny_model, seed=1)
    for file in adapter.glob("*token*") if not own_tokenizer else ():
        file.unlink()
    assert load_inputs(loaded(tmp_path, **online(tiny_model, reward={"model": str(adapter)})))


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
@pytest.mark.parametrize("name", ["reward_model", "process_reward_model"])
def test_what_a_stage_trains_to_score_is_a_reward(
    tiny_model: Path, tmp_path: Path, name: str, lora: dict[str, Any] | None
) -> None:
    data = tmp_path / "scored.jsonl"
    rows = [{"prompt": "1 =", "chosen": "1", "rejected": "0", "completions": ["1"], "labels": [True]}] * 4
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = sft(tmp_path, tiny_model, lora=lora) | {"algorithm": {"name": name}, "data": {"train": str(data)}}
    assert len(load_inputs(two_stages(tmp_path, first, online(tiny_model, reward={"model": "stage:a"})))) == 2


def test_an_adapter_in_the_wrong_place_is_refused(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    def of_a_stage(first: dict[str, Any], second: dict[str, Any]) -> Any:
        return two_stages(tmp_path, sft(tmp_path, tiny_model, **first), second)

    def alone(tree: dict[str, Any]) -> Any:
        return loaded(tmp_path, **tree)

    lora: dict[str, Any] = {"lora": {}}
    other = changed_copy(tiny_model, tmp_path / "other", num_hidden_layers=1)
    kl = {"algorithm": {"name": "grpo", "kl": {"coef": 0.1}}, "rewards": {"right": {"function": "exact_match"}}}
    of_stage, judge = {"model": "stage:a"}, {"model": str(adapter)}
    for message, run in {
        r"policy.model: .*/a/final will be an adapter, since its stage": of_a_stage(
            lora, sft(tmp_path, Path("stage:a"))
        ),
        r"policy.adapter: .* will be a whole mod": of_a_stage({}, sft(tmp_path, tiny_model, **lora, adapter="stage:a")),
        r"reference\.model: .* since its stage has lora; merge it into its base in a stage": of_a_stage(
            lora, online(tiny_model, **kl, reference=of_stage)
        ),
        r"reward\.model: .* will be a language model, expected a reward model": of_a_stage(
            lora, online(tiny_model, reward=of_stage)
        ),
        rf"^reward\.model: The reward model {adapter} is a LoRA adapter with task_type": alone(
            online(tiny_model, reward=judge)
        ),
        r"policy\.adapter: .* is not an " r"adapter folder": alone(
            sft(tmp_path, tiny_model, **lora, adapter=str(tiny_model))
        ),
        r"policy\.adapter: the adapter .* of another architecture than": alone(
            sft(tmp_path, other, **lora, adapter=str(adapter))
        ),
    }.items():
        with pytest.raises(UserError, match=message):
            load_inputs(run)
