"""Workers are plain classes. Each holds a model and does the work of one role. No worker imports Ray."""
