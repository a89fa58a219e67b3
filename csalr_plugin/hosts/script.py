"""Running a script in this process as Python would, and restoring the process afterwards."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from csalr_plugin.errors import UserError, first_line, shown


def find_script(path: str | Path) -> Path:
    """Return the absolute path of a script.

    Raises:
        UserError: there is no such file, or it is not a Python script.
    """
    script = Path(os.path.expanduser(path))
    try:
        compile(script.read_bytes(), str(script), "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last three: not a text file
        line = f", line {error.lineno}," if isinstance(error, SyntaxError) and error.lineno else ""
        raise UserError(
            f"script {shown(str(path))}{line} is not Python ({getattr(error, 'msg', None) or first_line(error)}); give "
            "the path of a Python script such as scripts/main.py."
        ) from None
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"script {shown(str(path))} {reason}; give the path of one such as scripts/main.py.") from None
    return script.resolve()


def execute(script: Path, argv: Sequence[str]) -> None:
    """Run `script`.

    Args:
        script: its path.
        argv: ``sys.argv`` of the script: the name by which it was called, then its arguments.
    """
    sys.argv = list(argv)
    # Not runpy: the module __main__ is not replaced, so that workers which are not forked start as they do for the
    # command itself, with the plugin, and do not run the script again.
    names = {"__name__": "__main__", "__file__": str(script), "__builtins__": __builtins__}
    exec(compile(script.read_bytes(), str(script), "exec"), names)


@contextmanager
def interpreter_state(folder: Path, *modules: str) -> Iterator[None]:
    """Put `folder` first on the module path; afterwards restore everything that a script changes.

    Args:
        folder: the script's folder.
        modules: names of modules in `folder`; they are imported anew, even if modules of these names are loaded.
    """
    kept = sys.argv, sys.path[:], sys.stdout
    kept_modules = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.stdout.flush()  # the script's log
        sys.argv, sys.path[:], sys.stdout = kept
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules.update(kept_modules)


def find_host(name: str, script: Path) -> None:
    """Import the host from the repository of `script`, one folder up, before an installed package; print which it is.

    A host that this process has imported already stays.
    """
    checkout = script.parent.parent
    if name not in sys.modules and (checkout / name / "__init__.py").is_file():
        sys.path.insert(0, str(checkout))
        importlib.invalidate_caches()
    spec = importlib.util.find_spec(name)
    if spec is not None and os.environ.get("RANK", "0") == "0":
        folder = Path(spec.origin).parent if spec.origin else checkout / name
        kind = "the script's repository" if checkout in folder.parents else "the installed package"
        print(f"csalr run: {name} is {kind}, {folder}")


def imports(name: str, script: Path) -> bool:
    """Return whether the text of `script` imports the package `name`; nothing is run."""
    text = script.read_text(encoding="utf-8", errors="replace") if script.is_file() else ""
    return re.search(rf"^\s*(from|import) {name}\b", text, re.MULTILINE) is not None


@contextmanager
def replaced(module: ModuleType, functions: Mapping[str, Any]) -> Iterator[None]:
    """Replace functions of `module` by others inside a with statement, by name."""
    kept = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(kept)
