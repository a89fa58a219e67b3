"""Parts of every command: the argument parser, the types of arguments, and the report of errors in one line."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from csalr_plugin.errors import SharedError, UserError, one_line, shown
from csalr_plugin.hosts.keys import Check, integer

# Exit codes: a user's mistake; Ctrl-C and a closed pipe as a shell reports them (128 + number of the signal).
MISTAKE, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


class Parser(argparse.ArgumentParser):
    """An argument parser that reports mistakes as a `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError instead of printing the usage and exiting."""
        raise UserError(f"{message}; see {self.prog} --help.")


def argument(check: Check) -> Callable[[str], Any]:
    """Return a type for `add_argument` that accepts the values which `check` allows."""

    def parse(text: str) -> Any:
        try:
            return check.parse(text)
        except (TypeError, ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{shown(text)} must be {check.allowed}") from None

    return parse


positive = argument(integer(1, 1_000_000))
side_argument = argument(integer(16, 4096))
batch_argument = argument(integer(1, 65_536))
seed_argument = argument(integer(0, 2**32 - 1))


def path_argument(text: str) -> Path:
    """Return a path for `add_argument`, with ``~`` and ``~user`` expanded; the path need not exist."""
    found = os.path.expanduser(text)
    try:
        if not found.strip():
            raise argparse.ArgumentTypeError("the path is empty")
        os.lstat(found)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a path") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise argparse.ArgumentTypeError(f"{shown(text)} is too long for a path") from None
    return Path(found)


@contextmanager
def ctrl_c_ends_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process at once inside a with statement that only imports modules.

    An import takes seconds, and a KeyboardInterrupt in it would print a stack trace from inside a library.
    """
    inside_main_thread = threading.current_thread() is threading.main_thread()
    if not inside_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_code(prog: str, command: Callable[[], object]) -> int:
    """Run a command, report its error in one line, and return its exit code.

    Of several processes that torchrun started, the first alone reports an error that all of them share.

    Args:
        prog: the name of the command, for the line.
        command: the function to run.

    Returns:
        0; 2 for a user's mistake; 130 for Ctrl-C; 141 when the reader of the output has ended, as in ``| head``.
    """
    rank = os.environ.get("RANK", "0")
    try:
        try:
            command()
        finally:
            sys.stdout.flush()  # here, where an error of it is handled, and not when Python exits
        return 0
    except UserError as error:
        if rank == "0":
            _report(f"{prog}: error: {one_line(error)}")
        elif isinstance(error, SharedError):
            time.sleep(1)  # torchrun ends the first process when this one ends: let it print the error before
        else:
            _report(f"{prog}: error: in process {rank}: {one_line(error)}")
        return MISTAKE
    except KeyboardInterrupt:
        if rank == "0":
            _report(f"{prog}: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        _report(f"{prog}: stopped, because the reader of its output has ended")
        return BROKEN_PIPE


def _report(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        _discard(sys.stderr)


def _output_is_closed() -> bool:
    """Return whether the reader of the standard output or error has ended; if so, discard all further output."""
    for stream in (sys.stdout, sys.stderr):
        try:
            print(file=stream, flush=True)
        except BrokenPipeError:
            _discard(stream)
            return True
    return False


def _discard(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes the stream once more when it exits
