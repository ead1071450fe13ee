"""`rlhf view`: run folders in a browser, while the runs go on.

Reads what a run writes, line by line from where it stopped; holds no run whole, and never writes to a run folder.
"""
