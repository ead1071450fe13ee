"""Read and write model folders, and reach the Hugging Face hub."""
