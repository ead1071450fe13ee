"""`rlhf report`: run folders as one self-contained HTML file.

The report reads the files of runs and measures nothing.
"""
