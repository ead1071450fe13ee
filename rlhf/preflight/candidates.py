"""Read the held-out sets of an evaluation in the tokens of each measured model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf.agents.runners import KEY as AGENT_KEY
from rlhf.agents.sessions import AgentSpec
from rlhf.config.derive import source_of
from rlhf.config.schema.evaluate import EvaluateConfig
from rlhf.data.examples import Example, Reading, load_examples
from rlhf.data.sources import Source, read_rows
from rlhf.data.templates import ChatTemplate
from rlhf.errors import UserError, prefix_errors
from rlhf.evaluation.decoding import Decoding
from rlhf.evaluation.sources import source_names
from rlhf.models.files.loading import load_tokenizer
from rlhf.models.files.template_check import refuse_runaway_template
from rlhf.models.on_disk import ModelOnDisk, refuse_unservable
from rlhf.preflight.environments import KEY as ENVIRONMENT_KEY
from rlhf.preflight.environments import check_lengths
from rlhf.preflight.exchanged import with_exchanged
from rlhf.preflight.models import ANY_LENGTH, refuse_too_long
from rlhf.preflight.prompts import Player, load_player, read_prompts
from rlhf.preflight.sources import REWARD_KEY, refuse_absent_tokens, refuse_image_keys, row_images
from rlhf.rewards.scoring import RewardSpec
from rlhf.rollouts.environments.conversations import EnvironmentSpec
from rlhf.suites.spec import SuiteSpec
from rlhf.types import Prompt
from rlhf.vision.reading import ImageFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model with the sets in the model's tokens: prompts to be scored by rewards, or examples to be measured."""

    model: ModelOnDisk
    prompts: Mapping[str, tuple[Prompt, ...]] = field(default_factory=dict)
    examples: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    sources: Mapping[str, Mapping[int, str]] = field(default_factory=dict)  # of split sets: prompt id to source
    environment: EnvironmentSpec | AgentSpec | None = None  # None: single turns
    images: ImageFolder | None = None  # None: the model reads only text
    suites: SuiteSpec | None = None  # None: no suites
    suite_tokens: int = 0  # of the longest prompt of a suite with its response

    @property
    def longest_prompt(self) -> int:  # in tokens; 0 without prompts
        return max((len(prompt.token_ids) for prompts in self.prompts.values() for prompt in prompts), default=0)

    def longest_sequence(self, max_new_tokens: int) -> int:
        """Return the most tokens of a prompt with its response, or of a conversation."""
        if not self.prompts:
            return self.suite_tokens
        longest = self.longest_prompt + max_new_tokens if self.environment is None else self.environment.max_tokens
        return max(longest, self.suite_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Names of an evaluation's settings in messages: by default the names of a stage."""

    model: str = "evaluate.model"
    against: str = "evaluate.against"
    sets: str = "evaluate.data.{}"
    rewards: str = f"evaluate.{REWARD_KEY}"
    reward_model: str = "evaluate.reward.model"
    by: str = "evaluate.by"
    exchange: str = "evaluate.exchange_images"
    template: str = "evaluate"
    environment: str = "evaluate.environment"
    agent: str = "evaluate.agent"


IN_RUN = Names(
    model="policy.model",
    against="--against",
    sets="data.eval.{}",
    rewards=REWARD_KEY,
    reward_model="reward.model",
    by="eval.by",
    exchange="eval.exchange_images",
    template="data",
    environment=ENVIRONMENT_KEY,
    agent=AGENT_KEY,
)
_OPTIONS = {"model": "MODEL", "sets": "--data {}", "rewards": "--reward {}", "reward_model": "--reward-model"}
IN_OPTIONS = replace(IN_RUN, **_OPTIONS, by="--by", exchange="--exchange-images")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReader:
    """Reads the sets of an evaluation for several models in turn. UserErrors name the set and the invalid row."""

    section: EvaluateConfig
    names: Names
    decoding: Decoding
    reading: Reading
    rewards: Sequence[RewardSpec]
    beside: Path  # the folder searched for code before the current one
    images: Path  # the folder that gets the images of the sets

    def candidate(self, model: ModelOnDisk, made: ChatTemplate) -> Candidate:
        """Return the sets in a model's tokens. `made` holds template changes of an earlier stage that has not run."""
        tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code, template=made)
        self.decoding.template.apply_checked(tokenizer, key=self.names.template)
        refuse_runaway_template(tokenizer)
        refuse_absent_tokens(self.decoding.stop_token_ids, tokenizer, key="stop_token_ids")
        sources = {name: source_of(data) for name, data in self.section.sets.items()}
        images = row_images(model.base, self.images, self.section)
        refuse_image_keys(self.section, images, section=self.names.template, model=model.name)
        reading = replace(self.reading, images=images)
        if not self.rewards:
            examples = {n: self._examples(n, source, tokenizer, model, reading) for n, source in sources.items()}
            if self.section.exchange_images:
                examples = with_exchanged(examples, reading.images, key=self.names.exchange)
            return Candidate(model=model, examples=examples)
        refuse_unservable(model)
        player = load_player(
            self.section.environment,
            self.section.agent,
            model=model.base,
            beside=self.beside,
            tokenizer=model.tokenizer,
            trust_remote_code=model.trust_remote_code,
            template=self.decoding.template,
            keys=(self.names.environment, self.names.agent),
        )
        prompts = {n: self._prompts(n, source, tokenizer, model, reading, player) for n, source in sources.items()}
        if self.section.exchange_images:
            prompts = with_exchanged(prompts, reading.images, key=self.names.exchange)
        split: dict[str, Mapping[int, str]] = {}
        for name, group in prompts.items() if self.section.by is not None else ():
            key = self.names.sets.format(name)
            split[name] = source_names(group, str(self.section.by), key=self.names.by, data=key)
        spec = None if player is None else player.spec
        folder = None if images is None else images.reader.place
        return Candidate(model=model, prompts=prompts, sources=split, environment=spec, images=folder)

    def _prompts(
        self,
        name: str,
        source: Source,
        tokenizer: Any,
        model: ModelOnDisk,
        reading: Reading,
        player: Player | None,
    ) -> tuple[Prompt, ...]:
        """Return a set's prompts. Raise UserError if the model has no room for a prompt with its response."""
        key, most = self.names.sets.format(name), self.decoding.max_new_tokens
        reading = replace(reading, max_new_tokens=most)
        loaded, rows = read_prompts(
            source,
            key,
            tokenizer,
            replace(reading, max_tokens=ANY_LENGTH) if reading.too_long == "error" else reading,
            columns=self.section.columns,
            rewards=self.rewards,
            reward_key=self.names.rewards,
            environment=player,
        )
        with prefix_errors(key):
            if player is None:
                refuse_too_long(loaded.items, rows, model, max_new_tokens=most)
            else:
                check_lengths(player.spec, loaded.items, rows, model, max_new_tokens=most)
        return loaded.items

    def _examples(
        self, name: str, source: Source, tokenizer: Any, model: ModelOnDisk, reading: Reading
    ) -> tuple[Example, ...]:
        """Return a set's examples. Raise UserError if an example is too long for the model."""
        key = self.names.sets.format(name)
        with prefix_errors(key):
            rows = read_rows(source, columns=self.section.columns, images=reading.images)
        with prefix_errors(f"{key} (without rewards its completions are measured)"):
            loaded = load_examples(rows, tokenizer, reading)
            if loaded.unusable:
                text = "%s: %d of %d rows cannot be used and are left out"
                logger.warning(text, key, len(loaded.unusable), len(rows))
            left_out = {unusable.place for unusable in loaded.unusable}
            used = [row for row in rows if row.place not in left_out]
            for example, row in zip(loaded.items, used, strict=True):
                if model.max_length is not None and example.longest > model.max_length:
                    raise UserError(
                        f"{row.place}: the example has {example.longest} tokens, more than the {model.max_length} "
                        f"that {model.name} takes. Shorten the example."
                    )
        return loaded.items
