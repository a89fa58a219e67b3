"""Compiles csrc/ once for this processor, caches the library, and declares the C functions."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

from ...errors import first_line

SOURCES = Path(__file__).with_name("csrc")
NUMBERS = {torch.float32: "float", torch.float64: "double"}

_P, _L, _D = ctypes.c_void_p, ctypes.c_long, ctypes.c_double
PROTOTYPES: dict[str, tuple[type, ...]] = {
    "project": (_P,) * 7,
    "moments": (_P, _L, _L, _P, _P),
    "affine": (_L, _L, _D, *(_P,) * 9),
    "affine_backward": (_L, _L, *(_P,) * 8),
    "gather": (_P,) * 7,
    "gather_backward": (_P,) * 12,
    "spread": (_P,) * 11,
    "spread_backward": (_P,) * 19,
    "project_backward": (_P,) * 17,
    "times_at_landmarks": (_P, _L, _L, *(_P,) * 3),
    "times_at_landmarks_backward": (_P, _L, _L, *(_P,) * 4),
    "inverse": (_P, _D, _P),
    "solve": (_P,) * 5,
    "solve_backward": (_P,) * 6,
    "normalise_backward": (_P,) * 6,
    "landmarks": (_P, _P, _P, _L, *(_P,) * 12),
    "landmarks_backward": (*(_P,) * 9, _D, *(_P,) * 10),
}
"""Arguments of each function of passes.cpp after its `Shape`."""


class Shape(ctypes.Structure):
    """`Shape` of tiles.h."""

    _fields_ = [
        (name, ctypes.c_long) for name in ("B", "C", "D", "d", "step", "n", "m", "groups", "at_landmarks", "workers")
    ]


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled passes for fp32 or fp64; None, with one warning, where they cannot be compiled."""
    try:
        loaded = ctypes.CDLL(str(compile_for(NUMBERS[dtype])))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = first_line(getattr(error, "stderr", None) or error)
        warnings.warn(
            f"The attention blocks run on torch's own operations, which are slower on a CPU: {SOURCES.name}/ cannot be "
            f"compiled ({reason}). Install g++, name a compiler in CXX, or a writable cache folder in XDG_CACHE_HOME. "
            "CSALR_FAST=0 silences this.",
            stacklevel=2,
        )
        return None
    for name, arguments in PROTOTYPES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = [ctypes.POINTER(Shape), *arguments], None
    return loaded


def compile_for(number: str) -> Path:
    """The shared library for `number`, "float" or "double", from the cache of the user or from a compiler.

    Its name depends on the sources, the compiler and the instructions of this processor.

    Raises:
        OSError, RuntimeError: there is no compiler, or no writable folder.
        subprocess.SubprocessError: the compiler failed.
    """
    # CXX may have flags of its own, as in CXX="g++ -g".
    compiler = shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, ("g++", "c++")))[:1]
    if not compiler:
        raise FileNotFoundError("no C++ compiler is installed")
    command = [*compiler, "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", f"-DREAL={number}"]
    target = run([*command, "-dM", "-E", "-x", "c++", os.devnull])  # every macro that the compiler defines
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    digest = hashlib.sha256(sources + target.encode() + shlex.join(compiler).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csalr_plugin"
    library = folder / f"passes-{number}-{digest}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several processes may compile at once
            code, linked = Path(scratch, "code.o"), Path(scratch, "library.so")
            run([*command, "-c", str(SOURCES / "passes.cpp"), "-o", str(code)])
            # Linked without -fopenmp: the symbols resolve to torch's OpenMP, so both share one pool of threads.
            run([*compiler, "-shared", str(code), "-o", str(linked)])
            os.replace(linked, library)
    return library


def run(command: list[str]) -> str:
    """The standard output of a command."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
