"""What scored responses say of a model: estimates with intervals, votes, tables. Numbers in, numbers out; no torch."""
