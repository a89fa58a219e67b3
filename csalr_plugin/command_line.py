"""The argument parser of every command, and the types of its arguments."""

from __future__ import annotations

import argparse
from typing import NoReturn

from csalr_plugin.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that reports mistakes as a `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError instead of printing the usage and exiting."""
        raise UserError(f"{message}; see {self.prog} --help.")


def positive(text: str) -> int:
    """Return the positive integer that `text` is."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


positive.__name__ = "positive integer"  # argparse prints it
