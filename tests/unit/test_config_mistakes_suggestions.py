"""An unknown key or a wrong value leads to the intended key, also for names of TRL, verl and OpenRLHF."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config.mistakes.schema_keys import all_keys
from rlhf.config.mistakes.synonyms import SYNONYMS, VALUES, Synonym
from rlhf.config.schema.root import Config
from tests.fixtures.configs import file_error

BASE = """\
run: {name: demo}
policy: {model: some/model}
algorithm: {name: grpo}
data: {train: prompts.jsonl}
rewards: {correct: {function: math_answer}}
train: {steps: 10, lr: 1e-6, sequences_per_update: 128}
"""


def error(folder: Path, *overrides: str, text: str = BASE) -> str:
    """Return the message without the places."""
    path = folder / "run.yaml"
    path.write_text(text)
    return "\n".join(line.partition(": ")[2] for line in file_error(path, *overrides).splitlines())


def test_every_synonym_names_keys_that_exist() -> None:
    keys = {".".join(key) for key in all_keys(Config)}
    named = [key for synonym in SYNONYMS for key in synonym.keys.split()]
    assert set(named) <= keys
    assert len(set(named)) == len(named), "one row for each key"
    assert all(synonym.keys or synonym.note for synonym in SYNONYMS)
    assert all(any(f".{key}".endswith(f".{name}") for key in keys) for name in VALUES)


@pytest.mark.parametrize("synonym", SYNONYMS, ids=lambda synonym: synonym.names[0])
def test_every_name_leads_to_its_key(tmp_path: Path, synonym: Synonym) -> None:
    """Names of several settings are skipped, because such a name may lead to another setting."""
    known = {".".join(key) for key in all_keys(Config, values={"algorithm": {"name": "grpo"}})}
    keys = [key.replace("*", "NAME") for key in synonym.keys.split() if key in known]
    for name in synonym.names:
        if sum(name in other.names for other in SYNONYMS) > 1 or name in known or not (keys or not synonym.keys):
            continue
        if name.partition(".")[0] in Config.model_fields and "." in name and not keys:
            continue
        message = error(tmp_path, f"{name}={{}}" if name in ("deepspeed", "fsdp") else f"{name}=1")
        assert any(f"did you mean {key}" in message for key in keys) or synonym.note in message, (name, message)


MEANT = {
    "rollouts.num_generations=4": "rollouts.samples_per_prompt",
    "train.gradient_checkpointing=true": "policy.gradient_checkpointing",
    "policy.rank=8": "policy.lora.rank",
    "eval.steps=3": "eval.every",
    "train.learning_rates=1e-6": "train.lr",
    "algorithm.beta=0.1": "algorithm.kl.coef",
    "algorithm.epsilon=0.1": "algorithm.clip_low",
    "data.train_batch_size=8": "rollouts.prompts_per_step",
    "train.train_batch_size=8": "train.sequences_per_update",
    "algorithm.adv_estimator=grpo": "algorithm.name",
    "actor_rollout_ref.actor.optim.lr=1e-6": "train.lr",
    "reward={function: math_answer}": "rewards.NAME.function",
    "cluster.roles.rollout.vllm_num_engines=2": "cluster.roles.rollout.engines",
    "train.beta=0.1": "algorithm.kl.coef",
}
WORDS = {
    "train.gradient_accumulation_steps=4": "unknown key, and no key sets this here. Micro-batches follow from ",
    "algorithm.name=grop": "algorithm.name: got 'grop'; did you mean `grpo`? Expected `ppo`, `grpo`, ",
    "algorithm.name=gae": "algorithm.name: got 'gae'; did you mean `ppo`? Expected ",
    "algorithm.kl.estimator=low_var_kl": "algorithm.kl.estimator: got 'low_var_kl'; did you mean `k3`? Expected ",
    "policy.dtype=bf16": "policy.dtype: got 'bf16'; did you mean `bfloat16`? Expected `float32` or `bfloat16`",
    "train.lr_schedule=cosin": "train.lr_schedule: got 'cosin'; did you mean `cosine`? Expected ",
    "algorithm.kl=0.01": "got 0.01, expected a mapping, such as `kl: {coef: 0.01}`",
    "policy.lora=true": "takes the default values, and keys change them, such as `lora: {rank: 16}`",
    "policy.lora=false": "got false, expected a mapping or null; leave `lora` out to turn it off",
    "rewards={c: last_number}": "got 'last_number', expected a mapping, such as `c: {function: last_number}`",
    "rewards=last_number": "such as `rewards: {NAME: {function: last_number}}`",
    "rewards=[last_number]": "such as `rewards: {NAME: {function: ...}}`",
    "algorithm=grpo": "algorithm: got 'grpo', expected a mapping, such as `algorithm: {name: grpo}`",
    "data=rows.jsonl": "expected a mapping, such as `data: {train: rows.jsonl}`",
    "train.early_stopping=3": "expected a mapping or null, such as `early_stopping: {patience: 3}`",
    "rollouts.environment=calculator": "such as `environment: {name: calculator}`",
    "critic=true": "expected a mapping or null, such as `critic: {model: ...}`",
    "data.train={a: rows.jsonl}": "expected a mapping, such as `a: {source: rows.jsonl}`",
}


@pytest.mark.parametrize(
    ("override", "text"), [*((key, f"unknown key; did you mean {MEANT[key]}?") for key in MEANT), *WORDS.items()]
)
def test_a_wrong_key_or_value_names_the_nearest(tmp_path: Path, override: str, text: str) -> None:
    message = error(tmp_path, override)
    assert text in message
    assert message.endswith(text) or not text.endswith(("`", "off"))


def test_the_algorithm_decides_which_key_is_meant(tmp_path: Path) -> None:
    dpo = BASE.replace("grpo", "dpo").replace("rewards: {correct: {function: math_answer}}\n", "")
    assert "train.beta: unknown key; did you mean algorithm.beta?" in error(tmp_path, "train.beta=0.1", text=dpo)
    ppo = BASE.replace("grpo", "ppo")
    assert error(tmp_path, "critic.optim.lr=1", text=ppo).endswith("unknown key; did you mean algorithm.critic_lr?")


VERL = """\
actor_rollout_ref:
  actor: {optim: {lr: 1e-6}, use_kl_loss: true, zzz: 3}
  rollout: {n: 5, name: vllm}
"""
FOREIGN = """\
actor_rollout_ref.actor.optim.lr: unknown key; did you mean train.lr?
actor_rollout_ref.actor.use_kl_loss: unknown key; did you mean algorithm.kl.place?
actor_rollout_ref.actor.zzz: unknown key; docs/coming_from.md names no key for it
actor_rollout_ref.rollout.n: unknown key; did you mean rollouts.samples_per_prompt?
actor_rollout_ref.rollout.name: unknown key, and no key sets this here. Rollouts always come from vLLM."""
MISNAMED = """\
policy.path: unknown key; did you mean policy.model?
train.learning_rate: unknown key; did you mean train.lr?"""
REWARDS = "rewards by name belong to `rewards`; `reward` is the reward model. Write `rewards.correct`."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + VERL, FOREIGN),
        (BASE.replace("train: {steps", "trian: {temperature: 1, steps"), "trian: unknown key; did you mean train?"),
        (BASE.replace("lr: 1e-6", "learning_rate: 1e-6").replace("model: some", "path: some"), MISNAMED),
        (BASE.replace("rewards:", "reward:"), f"reward.correct: {REWARDS}"),
        (
            BASE.replace("train: {steps", "tr\u0430in: {steps"),
            "tr\u0430in: unknown key; did you mean train? The key holds CYRILLIC SMALL LETTER A.",
        ),
    ],
    ids=["a line for each setting of verl", "a misspelt section", "a missing key", "rewards by name", "a look-alike"],
)
def test_a_wrong_section_is_explained(tmp_path: Path, text: str, message: str) -> None:
    assert error(tmp_path, text=text) == message


def test_an_unprintable_key_is_quoted(tmp_path: Path) -> None:
    keys = ", ".join(sorted(Config.model_fields))
    assert error(tmp_path, "'a\nb'=1") == f"\"'a\\nb'\": unknown key; the file has {keys}"
