"""The program: settles its process before anything heavy is imported, then runs a command.

Its own process; must not know a command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .process_start import settle_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    settle_program()
    from .commands import run_command  # its imports take long enough for a signal to come

    return run_command(arguments)


if __name__ == "__main__":
    sys.exit(main())
