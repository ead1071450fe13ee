"""The two loops, online and offline, written against the Protocols of rlhf.roles."""
