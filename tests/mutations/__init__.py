"""Faults for the tests to notice: each is a wrong line in the product, and at least one test must fail."""
