"""The command `csalr`, which is also ``python -m csalr_plugin``."""

import signal
import sys


def main() -> int:
    """Run the command with the arguments of the process; return its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until the command begins, Ctrl-C ends the process without a stack trace.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from csalr_plugin import commands

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return commands.main()


if __name__ == "__main__":
    sys.exit(main())
