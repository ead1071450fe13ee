"""`rlhf view`: run folders in a browser, while the runs go on.

The server reads files line by line from the last position. The server holds no whole run in memory, and never writes to
a run folder.
"""
