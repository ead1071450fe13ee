"""Map the settings of TRL, verl and OpenRLHF to the keys of this schema (synonyms.csv).

Error messages suggest these keys. `python -m rlhf.config.mistakes.synonyms` prints the table of docs/coming_from.md.
This module holds names only, no values.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Synonym:
    """One setting in four vocabularies, a row of synonyms.csv.

    Names are separated by spaces, and a name with dots is a path.
    """

    keys: str
    """The keys here; several where algorithms differ. Empty: no key sets this."""
    trl: str
    verl: str
    """`actor.`, `rollout.`, `ref.` and `model.` stand for the sections of `actor_rollout_ref`."""
    openrlhf: str
    """The names of the options, both with dots and, as in older versions, without dots."""
    other: str
    """Words that people write although none of the three frameworks has such a setting."""
    note: str
    """The difference between the settings, as a sentence."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.trl} {self.verl} {self.openrlhf} {self.other}".split())


with Path(__file__).with_name("synonyms.csv").open(encoding="utf-8", newline="") as _file:
    SYNONYMS = tuple(Synonym(**row) for row in csv.DictReader(_file))

# Values of other frameworks for keys with a fixed set of values.
VALUES = {
    "algorithm.name": {
        "gae": "ppo",
        "group_norm": "grpo",
        "bnpo": "grpo",
        "grpo_passk": "pass_at_k",
        "reinforce++": "reinforce_plus_plus",
        "gkd": "on_policy_distillation",
        "ipo": "dpo",
        "bco": "kto",
        "rm": "reward_model",
        "prm": "process_reward_model",
    },
    "aggregation": {
        "seq-mean-token-sum": "sequence_mean_token_sum",
        "seq-mean-token-mean": "sequence_mean_token_mean",
        "seq-mean-token-sum-norm": "token_sum_norm",
    },
    "estimator": {"kl": "k1", "mse": "k2", "low_var_kl": "k3"},
    "lr_schedule": {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd"},
    "optimizer": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adamw_8bit"},
    "dtype": {"bf16": "bfloat16", "fp32": "float32"},
    "device": {"gpu": "cuda"},
    "wandb": {"wandb": "online", "disabled": "off"},
}


def table() -> str:
    lines = ["| here | TRL | verl | OpenRLHF | |", "|---|---|---|---|---|"]
    for synonym in SYNONYMS:
        keys = ", ".join(f"`{key.replace('*', 'NAME')}`" for key in synonym.keys.split()) or "none"
        columns = (synonym.trl, synonym.verl, synonym.openrlhf)
        theirs = (", ".join(f"`{name}`" for name in names.split()) for names in columns)
        lines.append(f"| {keys} | {' | '.join(theirs)} | {synonym.note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
