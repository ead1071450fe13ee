"""Train LoRA adapters, and read adapters from folders."""
