"""`rlhf report`: run folders as one HTML file that explains itself. Reads what runs wrote; measures nothing."""
