"""The exit codes of the program, in one place; runs in the API process and in the other commands.

Must not know what leads to them; docs/operating.md says what an operator does about each.
"""

from __future__ import annotations

import signal
from enum import IntEnum

OF_SIGNAL = 128  # a shell's way to write a signal as an exit code


class ExitCode(IntEnum):
    """Scripts, units and manifests rely on these, so that no value changes."""

    OK = 0
    FAILED = 1  # the base cannot be served; an adapter that `inspect` was asked of has problems
    REFUSED = 2  # a setting, a flag or a file stops the start
    HELD = 3  # another service has the registrations; it may be gone at the next try
    HUNG_UP = OF_SIGNAL + signal.SIGHUP
    INTERRUPTED = OF_SIGNAL + signal.SIGINT
    TERMINATED = OF_SIGNAL + signal.SIGTERM
