"""The training engine: one interface, implemented on DeepSpeed. An engine knows no algorithm and no role."""
