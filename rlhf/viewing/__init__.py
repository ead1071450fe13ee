"""Run folders as a page: in a browser while the runs train (`rlhf view`), or as a single file (`rlhf report`).

Both show the same page. The server reads files from the last position, keeps no whole run in memory, and never writes
to a run folder.
"""
