"""The training engine: one interface, and DeepSpeed behind it. Imported by workers; knows no algorithm and no role."""
