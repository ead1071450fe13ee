"""Choose the trials of a sweep, record their states and collect their results. This package does not import Ray."""
