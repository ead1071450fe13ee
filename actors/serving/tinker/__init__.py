"""`rlhf tinker`: the protocol of rlhf.hosting over HTTP, in front of the policy's ranks and the engines."""
