"""Convert a configuration of TRL, verl or OpenRLHF: read the file, convert the settings, fit the result to the schema.

The tables of settings are in rlhf/config/mistakes/settings. No module here reads data or a model.
"""
