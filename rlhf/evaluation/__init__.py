"""Turn scored responses into estimates with intervals, votes and tables. Numbers in, numbers out; no torch."""
