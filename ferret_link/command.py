"""The console script `ferret`: imports here what it needs, so that Ctrl-C is quiet while torch is loaded."""

from __future__ import annotations

import sys

INTERRUPTED = 130  # as ferret_ext.federated.explain has it, which would bring torch


def main() -> int:
    """Runs the command; returns its exit status."""
    try:
        from ferret_ext.federated.cli import main as run
    except KeyboardInterrupt:
        print("ferret: interrupted", file=sys.stderr)
        return INTERRUPTED
    return run()
