"""Agents: the records of their sessions, and the sequences that are trained."""
