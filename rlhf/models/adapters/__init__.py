"""Train LoRA adapters, and read them from folders."""
