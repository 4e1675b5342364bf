"""`wukong agent`: lease this node's cores."""

from __future__ import annotations

import os
import sys

import click

from wukong.rdma.agent_main import agent_command, agent_environment


@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def agent(arguments: tuple[str, ...]) -> None:
    """Lease this node's cores to `wukong.rdma.lease` and `LeasedCluster` until SIGTERM."""
    # A new interpreter: a BLAS reads its number of threads once, and this one has it already.
    os.execve(sys.executable, agent_command(arguments), agent_environment())
