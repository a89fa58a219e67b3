"""Files that a run writes: writable folders, and files that are complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from csalr_plugin.errors import UserError, first_line

_UNFINISHED = ".unfinished"


def make_writable_folder(folder: Path, given: str) -> None:
    """Create `folder` if it is missing, and check that files can be written into it.

    Args:
        folder: the folder.
        given: the option and its value as the user gave them, for example "--out 'bench'".

    Raises:
        UserError: the folder cannot be created, or no file can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{given} cannot be written ({reason}): give another folder.") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is either complete or absent."""
    unfinished = path.with_name(f".{path.name}-{os.getpid()}{_UNFINISHED}")
    try:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_space(folder: Path, size: int, purpose: str) -> None:
    """Check that a file of `size` bytes fits on the disk of `folder`.

    Args:
        folder: an existing folder.
        size: in bytes.
        purpose: the file in words, for the message, for example "a checkpoint".

    Raises:
        UserError: less is free.
    """
    usage = shutil.disk_usage(folder)
    if usage.total > 0 and usage.free < size:  # some network file systems report 0 of 0
        raise UserError(
            f"{str(folder)!r}: {purpose} needs {_megabytes(size)}, and {_megabytes(usage.free)} are free on this disk; "
            "free some space, or give another folder."
        )


@contextmanager
def complete_file(path: Path, size: int, advice: str) -> Iterator[Path]:
    """Yield a path to write to, and rename that file to `path` once the with statement ends without an error.

    A process that is killed, or a power cut, leaves the file that was at `path` before.

    Args:
        path: the file; its folder is created if it is missing.
        size: bytes that the file needs, for the error message.
        advice: the next step for the user, the end of the error message.

    Raises:
        UserError: the file cannot be written. The unfinished file is removed.
    """
    unfinished = path.with_name(f".{path.name}{_UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save, which then has the OSError as its context
        _remove(unfinished)
        os_error = error if isinstance(error, OSError) else error.__context__
        reason = getattr(os_error, "strerror", None) or first_line(error)
        raise UserError(
            f"{str(path)!r} cannot be written ({reason}): it needs {_megabytes(size)}, {_free(path.parent)}. {advice}"
        ) from error
    finally:
        _remove(unfinished)


def _remove(file: Path) -> None:
    with suppress(OSError):  # the folder is gone or read-only
        file.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the unfinished files that a killed process left in `folder`; no other process may be writing there."""
    for file in folder.glob(f".*{_UNFINISHED}"):
        file.unlink(missing_ok=True)


def _free(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"{_megabytes(shutil.disk_usage(folder).free)} are free"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
