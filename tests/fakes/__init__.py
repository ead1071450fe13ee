"""Fakes of the roles of a run: one fake for each Protocol, with a few settings. mypy checks fakes against Protocols.

Each fake appends its calls, in words, to a list that several fakes can share. So a test can compare the order of calls.
"""
