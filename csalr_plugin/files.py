"""Files that a run leaves behind: where they may go, and that none is there by half."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from csalr_plugin.errors import UserError


def make_writable_folder(folder: Path, given: str) -> None:
    """Make `folder`, which the user gave as `given`, for example "--out 'bench'", unless it is there.

    Raises:
        UserError: it cannot be made, or nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{given} cannot be written ({error.strerror}): give another folder.") from error


def write_json(path: Path, content: Any) -> None:
    """Write a file in one step: it is there in full or not at all."""
    unfinished = path.with_name(f".{path.name}-{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
