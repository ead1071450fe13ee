"""Environments of other libraries, each behind the protocol of ours. What they need is imported when one is made."""
