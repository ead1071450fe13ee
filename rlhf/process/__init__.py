"""Handle what happens to this process: signals, its parent, its files and its limits."""
