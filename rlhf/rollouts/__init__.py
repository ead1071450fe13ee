"""Rollouts: multi-turn environments, and the records a controller keeps of conversations."""
