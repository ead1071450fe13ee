"""Serve the Tinker protocol without a network: requests in order, the log, checkpoints, and the meaning of each call.

    body of a request -> bodies, protobuf -> request_line (order, log) -> training | sampling -> Protocols of rlhf.roles

actors.serving.tinker puts HTTP in front and starts the ranks and the engines. This package imports neither.
"""
