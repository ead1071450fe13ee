"""Rewards: loading them, running them in processes of their own, and combining them into one score a response.

Import the submodules directly. This file imports nothing: reward processes start through it.
"""
