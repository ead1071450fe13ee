"""The whole typed schema: one tree, checked before anything starts."""
