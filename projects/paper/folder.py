"""The folder of a study: the names of its files, its lock, and the progress of its trainings."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from csalr_plugin.errors import UserError
from csalr_plugin.files import write_json
from csalr_plugin.version import __version__

# In the study's folder: its marker, and the results of `csalr bench cost`. In each training's folder: the rest.
STUDY, COST = "study.json", "cost/cost.json"
RUN, RESULT, QUERIES, CONSOLE = "run.json", "result.json", "queries.json", "console.log"


@contextlib.contextmanager
def locked(out: Path, preset: str) -> Iterator[None]:
    """Create or open the folder of a study, and keep other studies out of it inside a with statement.

    Raises:
        UserError: `out` cannot be written, holds something else, is in use, or holds a study of another version or
            with another preset.
    """
    marker = out / STUDY
    try:
        if not marker.exists() and out.exists() and any(path.name != ".lock" for path in out.iterdir()):
            raise UserError(f"--out '{out}' holds files that belong to no study; give a new or an empty folder.")
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"--out '{out}' is in use by another study; wait for it, stop it, or give another folder."
        ) from None
    except OSError as error:
        raise UserError(f"--out '{out}' cannot be written ({error.strerror}); give another folder.") from None
    try:
        if not marker.exists():
            write_json(marker, {"version": __version__, "preset": preset})
        found = check_version(out).get("preset")
        if found != preset:
            raise UserError(f"--out '{out}' is a study with the preset {found}; give another folder for {preset}.")
        yield
    finally:
        lock.release()


def check_version(out: Path) -> dict[str, Any]:
    """Return the marker of the study in `out`: its "version" and "preset".

    Raises:
        UserError: `out` holds no study, or one of another version.
    """
    if not (out / STUDY).exists():
        raise UserError(f"--out '{out}' holds no study; give the folder of one.")
    marker = read_json(out / STUDY)
    if marker.get("version") != __version__:
        raise UserError(
            f"--out '{out}' was made by csalr_plugin {marker.get('version')}, this is {__version__}; give another "
            "folder, or continue with that version."
        )
    return marker


def add_target(out: Path, target: str) -> None:
    """Record in the marker of the study in `out` that `target` was asked for; reports show these targets alone."""
    marker = read_json(out / STUDY)
    targets = marker.get("targets", [])
    if target not in targets:
        write_json(out / STUDY, {**marker, "targets": [*targets, target]})


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint in the folder of a training that has the most epochs, then the most batches."""
    found = []
    for path in (folder / "model").glob("model.pth.tar-*"):
        if match := re.fullmatch(r"model\.pth\.tar-(\d+)(?:-batch(\d+))?", path.name):
            found.append((int(match[1]), int(match[2] or 0), path))
    return max(found)[2] if found else None


def epochs_done(folder: Path) -> int:
    """Return the number of completed epochs of a training, from the name of its newest checkpoint."""
    newest = newest_checkpoint(folder)
    match = re.match(r"model\.pth\.tar-(\d+)", newest.name) if newest else None
    return int(match[1]) if match else 0


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a study.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{path}' cannot be read ({error}); it belongs to a study: restore it, or give another --out."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"'{path}' was not written by a study; restore it, or give another --out.")
    return content
