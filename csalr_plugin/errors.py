"""Errors that the user can solve, and the format of the values in their messages."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable

_LONGEST_VALUE = 80
_LONGEST_MESSAGE = 1000


class UserError(ValueError):
    """The user gave something that cannot be used.

    The message is one line that names the thing, the value that was given, the allowed values and the next
    step. The command prints it without a stack trace and exits with code 2. In a message of more than 1000
    characters, words of more than 80 are cut in the middle.
    """

    def __init__(self, message: str = "") -> None:
        if len(message) > _LONGEST_MESSAGE:
            message = re.sub(rf"\S{{{_LONGEST_VALUE + 1},}}", lambda word: _cut(word[0], _LONGEST_VALUE), message)
            message = _cut(message, 4 * _LONGEST_MESSAGE)
        super().__init__(message)


class SharedError(UserError):
    """An error that every process of a training finds. Only the first process prints it."""


def first_line(error: BaseException | str) -> str:
    """Return the first line of the error's message, or the error's type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: UserError) -> str:
    """Return the message of an error, also when a data loader's worker wrapped it in its stack trace."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1].removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")


def shown(value: object) -> str:
    """Return ``repr(value)`` for a message: one line, cut in the middle to 80 characters."""
    short = reprlib.Repr()
    short.maxlevel = 3
    short.maxstring = short.maxlong = short.maxother = _LONGEST_VALUE
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 20
    try:
        return _cut(" ".join(short.repr(value).split()), _LONGEST_VALUE)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "an integer of thousands of digits"


def suggest(name: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` with the names nearest to `name`, or an empty string."""
    if len(name) > _LONGEST_VALUE:  # difflib's time grows with the square of the length
        return ""
    near = difflib.get_close_matches(name, list(allowed), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(one) for one in near)}?" if near else ""


def _cut(text: str, limit: int) -> str:
    """Leave out the middle of a text that has more than `limit` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[:half]}...{text[-half:]}"
