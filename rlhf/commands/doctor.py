"""`rlhf doctor`: what is installed here, or how the nodes of a cluster fit together, and what to do about it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers


def add(commands: Subparsers) -> None:
    """Its arguments."""
    command = commands.add_parser("doctor", help="what is installed, and what to do about it")
    command.add_argument(
        "--cluster",
        metavar="CONFIG",
        nargs="?",
        const="",
        help="look at every node of a Ray cluster instead; with CONFIG at its paths and placement too",
    )
    command.add_argument(
        "--address", metavar="HOST:PORT", help="of the cluster; cluster.address or RAY_ADDRESS if not given"
    )


def run(args: argparse.Namespace) -> int:
    """Look, and print what was found."""
    if args.cluster is None:
        if args.address is not None:
            raise UserError("--address has no effect without --cluster")
        from actors.doctor import doctor

        return doctor()
    from actors.cluster_doctor import cluster_doctor
    from rlhf.config.load import load

    return cluster_doctor(load(args.cluster) if args.cluster else None, args.address)
