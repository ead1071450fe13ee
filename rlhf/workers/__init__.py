"""Plain classes that hold a model and do one role's work. No Ray here."""
