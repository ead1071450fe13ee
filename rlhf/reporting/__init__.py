"""`rlhf report`: run folders as one self-contained HTML file. It reads the files of runs and measures nothing."""
