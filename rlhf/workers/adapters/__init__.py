"""Train many adapters of one base model, for clients with their own loops."""
