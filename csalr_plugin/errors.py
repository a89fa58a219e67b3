"""A user's mistake, told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the thing, the value that was given, what is allowed and the next
    step. The command prints it without a stack trace and exits with code 2.
    """


class SharedError(UserError):
    """One that every process of a training finds: the first alone tells it."""


def first_line(error: BaseException | str) -> str:
    """What `error` says, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def suggest(name: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` with the names nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(allowed), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(one) for one in near)}?" if near else ""
