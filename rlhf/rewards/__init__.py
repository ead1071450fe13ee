"""Load rewards, run them in separate processes, and combine them into a score for each response.

Import the submodules directly. This file imports nothing, since reward processes start through it.
"""
