"""Define the typed schema of a run and check every configuration before anything starts."""
