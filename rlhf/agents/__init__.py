"""Agents: the records of sessions, and the training sequences."""
