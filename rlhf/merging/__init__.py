"""Merge models and adapters as a `merge` section (rlhf.config.schema.merge) describes.

sources -> checks -> folded adapters -> mergekit or peft -> folder. mergekit and peft do the mathematics.
"""
