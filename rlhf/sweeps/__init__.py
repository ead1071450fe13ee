"""Sweeps without their processes: which trials there are, what is known of each, and what comes of all. No Ray."""
