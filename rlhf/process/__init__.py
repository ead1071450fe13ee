"""Handle events around this process: signals, the parent, files and limits."""
