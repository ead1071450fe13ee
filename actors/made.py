"""What the stages of a pipeline make, known before any of them has run: enough to refuse what will not fit."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf.config.model import LoraConfig
from rlhf.data.templates import ChatTemplate


@dataclass(slots=True, kw_only=True)
class Made:
    """Results of earlier stages by their folder, which need not be there yet."""

    finals: dict[str, str] = field(default_factory=dict)  # the model whose tokenizer and shape each will have
    tokenizers: dict[str, str] = field(default_factory=dict)  # where each one's tokenizer comes from, if not from there
    scored: dict[str, str] = field(default_factory=dict)  # of those with a scalar head, the algorithm that trains it
    adapters: dict[str, LoraConfig] = field(default_factory=dict)  # of those that will be an adapter, its shape
    templates: dict[str, ChatTemplate] = field(default_factory=dict)  # what their tokenizers' templates will have
    restacked: set[str] = field(default_factory=set)  # those with another number of layers than that model
