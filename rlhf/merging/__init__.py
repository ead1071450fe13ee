"""Merging of models and adapters: what a `merge` section (rlhf.config.schema.merge) says, done.

sources -> checks -> adapters folded -> mergekit, or peft -> folder. The mathematics is mergekit's and peft's.
"""
