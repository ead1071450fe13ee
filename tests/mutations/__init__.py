"""Faults that the tests must notice: each is one wrong line in the product, and at least one test must fail for it."""
