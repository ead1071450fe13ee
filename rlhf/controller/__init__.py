"""Provide the two training loops, online and offline, written against the Protocols of rlhf.roles."""
