"""Repair what one build of vLLM does wrong or lacks."""
