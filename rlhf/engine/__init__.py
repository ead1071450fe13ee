"""The training engine: one interface, with DeepSpeed as its implementation. It knows no algorithm and no role."""
