"""What `positions` does, in C++ for fp32 and fp64 on a CPU: `positions.cpp`, compiled when first needed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from csalr_plugin.attention.landmarks import LandmarkGrid
from csalr_plugin.attention.positions import (
    Affine,
    Gathered,
    LandmarkGradients,
    Landmarks,
    Plan,
    Positions,
    ProjectionGradient,
    Projections,
    Spread,
    SpreadGradients,
    Wanted,
)
from csalr_plugin.errors import UserError, first_line

SOURCE = Path(__file__).with_name("positions.cpp")
NUMBERS = {torch.float32: "float", torch.float64: "double"}
SHAPE = ("B", "C", "D", "d", "step", "n", "m", "groups", "at_landmarks", "workers")


class Shape(ctypes.Structure):
    """`Shape` of positions.cpp."""

    _fields_ = [(name, ctypes.c_long) for name in SHAPE]


class CompiledPositions(Positions):
    """:class:`Positions` whose passes read a tile of the batch once and keep it in the cache until all is done."""

    @staticmethod
    def can(x: Tensor, dtype: torch.dtype) -> bool:
        """Whether there are such passes for x: real numbers on a CPU, and nothing that watches single operations."""
        return (
            x.device.type == "cpu"
            and x.numel() > 0
            and x.dtype is dtype
            and type(x) is Tensor
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            and _get_current_dispatch_mode() is None
            and library(dtype) is not None
        )

    @staticmethod
    def members(grid: LandmarkGrid) -> tuple[Tensor, Tensor]:
        """See :class:`Positions`; made once a shape, as some ten tensor operations take as long as a small pass."""
        return members_of(grid.height, grid.width, (grid.rows, grid.columns))

    def project(self, W_q: Tensor, W_k: Tensor, wanted: Wanted | None = None) -> Projections:
        """See :class:`Positions`."""
        Q, K = (self._new(len(W), self._n) for W in (W_q, W_k))
        largest = self.X.new_empty(2) if wanted == "largest" else None
        moments = self.X.new_empty(2, 2, len(W_q)) if wanted == "moments" else None
        self._call("project", len(W_q), 0, self.X, W_q, W_k, Q, K, largest, moments)
        return Projections(Q, K, largest, moments)

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Positions`."""
        if features.dtype is not self.X.dtype:
            return super().moments(features)
        _, channels, n = features.shape
        means, deviations = features.new_empty(2, channels)
        self._call("moments", 0, 0, features, channels, n, means, deviations)
        return means, deviations

    def affine(
        self, moments: tuple[Tensor, Tensor], count: int, gain: Tensor, shift: Tensor | None, eps: float
    ) -> Affine:
        """See :class:`Positions`."""
        scale, mean, inverse_deviation = gain.new_empty(3, len(gain))
        offset, variance = None if shift is None else torch.empty_like(gain), torch.empty_like(gain)
        results = variance, scale, mean, inverse_deviation, offset
        self._call("affine", 0, 0, len(gain), count, eps, *moments, gain, shift, *results)
        return Affine(scale, offset, mean, inverse_deviation, variance)

    def affine_backward(
        self, affine: tuple[Tensor, Tensor, Tensor], count: int, d_scale: Tensor, d_offset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Positions`."""
        d_gain, slope, constant = vectors = d_scale.new_empty(3, len(d_scale))
        self._call("affine_backward", 0, 0, len(d_scale), count, *affine, d_scale, d_offset, *vectors)
        return d_gain, slope, constant

    def landmarks(self, Q: Tensor, K: Tensor, scale_q: Tensor, offset_q: Tensor, scale_k: Tensor) -> Landmarks:
        """See :class:`Positions`."""
        assert self.grid is not None
        D, m, groups = Q.shape[1], self.grid.m, self.groups
        shapes = [(D // groups, m)] * 6 + [(1, m), (m, m)]
        marks = Landmarks(*(self._new(groups, *shape) for shape in shapes))
        members = self.landmark_of, self.grid.width, self.sizes
        self._call("landmarks", D, m, Q, K, *members, scale_q, offset_q, scale_k, *marks)
        return marks

    def landmarks_backward(
        self,
        marks: Landmarks,
        affine: tuple[Tensor, Tensor, Tensor],
        floor: float,
        solved: tuple[Tensor, Tensor],
        d_for_keys: Tensor,
        spread: SpreadGradients,
    ) -> LandmarkGradients:
        """See :class:`Positions`."""
        _, groups, d, m = marks.Q.shape
        D = groups * d
        shares = [self._new(D, m) for _ in range(2)]
        vectors = [marks.Q.new_empty(D) for _ in range(3)]
        inputs = (marks.pooled_q, marks.pooled_k, marks.Q, marks.K, marks.S_mm, *affine, self.sizes, floor)
        narrow = (of_channels(one, False) for one in solved)
        gradients = (*narrow, d_for_keys.mT, spread.for_queries.mT, spread.bias)
        self._call("landmarks_backward", D, m, *inputs, *gradients, *shares, *vectors)
        return LandmarkGradients(*shares, *vectors)

    def gather(self, K: Tensor, for_keys: Tensor, W_v: Tensor) -> Gathered:
        """See :class:`Positions`."""
        groups, m, C = self.groups, for_keys.shape[3], self.X.shape[1]
        log_sum = self._new(groups, m)
        rows = self._wide(m) if self.way.at_landmarks else self._narrow(m)
        V = None if self.way.at_landmarks or not self.way.differentiable else self._new(C, self._n)
        self._call("gather", K.shape[1], m, self.X, K, for_keys, W_v, V, rows, log_sum)
        return Gathered(of_landmarks(rows, self.way.at_landmarks), V, log_sum)

    def inverse(self, S_mm: Tensor, floor: float) -> Tensor:
        """See :class:`Positions`."""
        inverses = torch.empty_like(S_mm)
        self._call("inverse", 0, S_mm.shape[3], S_mm, floor, inverses)
        return inverses

    def solve(self, inverse: Tensor, E: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """See :class:`Positions`."""
        Z = self._narrow(E.shape[2])
        self._call("solve", 0, E.shape[2], inverse, of_channels(E, False), scale, offset, Z)
        return of_landmarks(Z, False)

    def solve_backward(self, inverse: Tensor, E: Tensor, d_Z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Positions`."""
        d_E, d_scale, d_offset = self._narrow(E.shape[2]), *(self.X.new_empty(self.X.shape[1]) for _ in range(2))
        given = (inverse, of_channels(E, False), of_channels(d_Z, False))
        self._call("solve_backward", 0, E.shape[2], *given, d_E, d_scale, d_offset)
        return of_landmarks(d_E, False), d_scale, d_offset

    def normalise_backward(
        self, d: Tensor, E: Tensor, scale: Tensor, slope: Tensor | None, constant: Tensor | None
    ) -> Tensor:
        """See :class:`Positions`."""
        d_E = self._narrow(E.shape[2])
        given = (of_channels(d, False), of_channels(E, False), scale, slope, constant)
        self._call("normalise_backward", 0, E.shape[2], *given, d_E)
        return of_landmarks(d_E, False)

    def values(self, rows: Tensor, W_v: Tensor) -> Tensor:
        """See :class:`Positions`."""
        return self._at_landmarks(W_v, rows, of_rows=True, narrows=True)

    def values_backward(self, d_E: Tensor, rows: Tensor, W_v: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Positions`."""
        return self._at_landmarks_backward(W_v, d_E, rows, of_rows=True, narrows=False)

    def fuse(self, Z: Tensor, W_f: Tensor, b_f: Tensor) -> Tensor:
        """See :class:`Positions`."""
        return self._at_landmarks(W_f, Z, of_rows=False, narrows=False, bias=b_f / (2 * self.groups))

    def fuse_backward(self, d_source: Tensor, Z: Tensor, W_f: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Positions`."""
        return self._at_landmarks_backward(W_f, d_source, Z, of_rows=False, narrows=True)

    def gather_backward(
        self, d_x: Tensor, K: Tensor, for_keys: Tensor, W_v: Tensor, gathered: Gathered, d_rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`Positions`."""
        rows, V, log_sum = gathered
        d_K, d_for_keys = torch.empty_like(K), self._new(self.groups, for_keys.shape[3], for_keys.shape[2])
        d_W_v = None if V is None else torch.empty_like(W_v)
        features = self.X if V is None else V
        inputs = (self.X, features, K, for_keys, log_sum, W_v)
        both = (of_channels(one, V is None) for one in (rows, d_rows))
        self._call("gather_backward", K.shape[1], for_keys.shape[3], *inputs, *both, d_x, d_K, d_for_keys, d_W_v)
        return d_K, d_for_keys.mT, d_W_v

    def spread(self, given: Spread, pooled: bool) -> tuple[Tensor, Tensor | None]:
        """See :class:`Positions`."""
        out, mean = self._new(*self.like.shape[1:]), self._new(self.X.shape[1]) if pooled else None
        self._call("spread", given.Q.shape[1], given.bias.shape[3], *self._spread_inputs(given), out, mean)
        return out, mean

    def spread_backward(
        self, given: Spread, out: Tensor | None, grad_out: Tensor, grad_mean: Tensor | None
    ) -> SpreadGradients:
        """See :class:`Positions`."""
        (_, groups, d, m), C = given.for_queries.shape, self.X.shape[1]
        d_x, d_Q = self._new(C, self._n), torch.empty_like(given.Q)
        at_landmarks = self.way.at_landmarks
        d_source = self._wide(m) if at_landmarks else self._narrow(m)
        d_for_queries, d_bias, d_alpha = self._new(groups, m, d), torch.empty_like(given.bias), self.X.new_empty(())
        d_W_f, d_b_f = (None if one is None else torch.empty_like(one) for one in (given.W_f, given.b_f))
        inputs = (*self._spread_inputs(given), out, grad_out, grad_mean)
        outputs = (d_x, d_Q, d_source, d_for_queries, d_bias, d_alpha, d_W_f, d_b_f)
        self._call("spread_backward", given.Q.shape[1], m, *inputs, *outputs)
        return SpreadGradients(
            d_x,
            d_Q,
            of_landmarks(d_source, at_landmarks),
            d_for_queries.mT,
            d_bias,
            None if given.alpha is None else d_alpha,
            d_W_f,
            d_b_f,
        )

    def _spread_inputs(self, given: Spread) -> tuple[Tensor | None, ...]:
        rows = of_channels(given.source, self.way.at_landmarks)
        logits = (self.X, given.Q, given.for_queries, given.bias, self.landmark_of)
        return (*logits, rows, given.W_f, given.b_f, given.alpha)

    def project_backward(
        self, d_x: Tensor, query: ProjectionGradient, key: ProjectionGradient
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Positions`."""
        D = len(query.W)
        d_W = self.X.new_empty(2, D, self.X.shape[1])
        weights, features, *others = zip(query, key, strict=True)
        inputs = (*weights, *features, self.landmark_of, *(one for pair in others for one in pair))
        self._call("project_backward", D, query.share.shape[2], self.X, *inputs, d_x, d_W)
        d_W_q, d_W_k = d_W
        return d_W_q, d_W_k

    def _at_landmarks(
        self, W: Tensor, rows: Tensor, *, of_rows: bool, narrows: bool, bias: Tensor | None = None
    ) -> Tensor:
        """`times_at_landmarks` of positions.cpp: (B, groups, m, C) -> (B, groups, m, c) or, unless `narrows`, back."""
        result = self._narrow(rows.shape[2]) if narrows else self._wide(rows.shape[2])
        self._call(
            "times_at_landmarks", 0, rows.shape[2], W, of_rows, narrows, of_channels(rows, narrows), bias, result
        )
        return of_landmarks(result, not narrows)

    def _at_landmarks_backward(
        self, W: Tensor, gradient: Tensor, other: Tensor, *, of_rows: bool, narrows: bool
    ) -> tuple[Tensor, Tensor]:
        """`times_at_landmarks_backward` of positions.cpp: the gradients of `other`, typed and shaped so, and of W."""
        m = other.shape[2]
        result, d_W = self._narrow(m) if narrows else self._wide(m), torch.empty_like(W)
        given = of_channels(gradient, narrows), of_channels(other, not narrows)
        self._call("times_at_landmarks_backward", 0, m, W, of_rows, narrows, *given, result, d_W)
        return of_landmarks(result, not narrows), d_W

    def _wide(self, m: int) -> Tensor:
        """Memory for m rows of C a group: (B, C, groups, m)."""
        return self._new(self.X.shape[1], self.groups, m)

    def _narrow(self, m: int) -> Tensor:
        """Memory for m rows of c a group: (B, groups, c, m)."""
        return self._new(self.groups, self.X.shape[1] // self.groups, m)

    @property
    def _n(self) -> int:
        return self.X.shape[2]

    def _new(self, *shape: int) -> Tensor:
        """Memory for (B, *shape)."""
        return self.X.new_empty(self.X.shape[0], *shape)

    def _call(self, name: str, D: int, m: int, *arguments: Tensor | float | None) -> None:
        """Call function `name` of positions.cpp; C' is `D`. What it writes is among `arguments` and contiguous.

        Raises:
            UserError: a tensor is on another device than x, or of another type.
        """
        X, dtype = self.X, self.X.dtype
        passed: list[Any] = []
        copies = []  # they must live until the function returns
        for one in arguments:
            if not isinstance(one, Tensor):
                passed.append(one)
                continue
            if not one.is_cpu or (one.dtype is not dtype and one.dtype is not torch.int64):
                raise UserError(
                    f"x is {dtype} on {X.device}, and a tensor of the attention block {one.dtype} on {one.device}: "
                    "they must be the same; move one of them by .to()."
                )
            if not one.is_contiguous():
                one = one.contiguous()
                copies.append(one)
            passed.append(one.data_ptr())
        B, C, n = X.shape
        d, step = (D, 0) if self.grid is None else (D // self.groups, D // self.groups)
        shape = Shape(B, C, D, d, step, n, m, self.groups, self.way.at_landmarks, torch.get_num_threads())
        function = getattr(library(dtype), name)
        if function.argtypes is None:  # said once; it would take as long as some of the functions
            kinds = {int: ctypes.c_long, bool: ctypes.c_long, float: ctypes.c_double}
            function.argtypes = [ctypes.c_void_p, *(kinds.get(type(one), ctypes.c_void_p) for one in arguments)]
        function(ctypes.byref(shape), *passed)


@functools.lru_cache(maxsize=64)
def members_of(height: int, width: int, landmarks: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """:meth:`Positions.members` of such a grid, on a CPU."""
    grid = LandmarkGrid(height, width, landmarks, torch.device("cpu"))
    return grid.landmark_of, grid.sizes


def positions_of(x: Tensor, grid: LandmarkGrid | None, groups: int, way: Plan, dtype: torch.dtype) -> Positions:
    """The passes over the positions of x; its arguments are those of :class:`Positions`."""
    kind = CompiledPositions if CompiledPositions.can(x, dtype) else Positions
    return kind(x, grid, groups, way, dtype)


class Output:
    """What a forward pass returned, for its backward pass. The next layer keeps it in any case, so it costs nothing.

    Nothing is held where only other passes run, and in inference mode.
    """

    def __init__(self, positions: Positions, out: Tensor) -> None:
        self.out: Tensor | None = None
        if isinstance(positions, CompiledPositions) and not torch.is_inference_mode_enabled():
            self.out, self.version = out.detach(), out._version

    def unchanged(self) -> Tensor | None:
        """The tensor, unless someone has written into it."""
        return self.out if self.out is not None and self.out._version == self.version else None


def of_channels(rows: Tensor, wide: bool) -> Tensor:
    """(B, groups, m, C) -> (B, C, groups, m) if `wide`; else (B, groups, m, c) -> (B, groups, c, m)."""
    return rows.permute(0, 3, 1, 2) if wide else rows.mT


def of_landmarks(channels: Tensor, wide: bool) -> Tensor:
    """The other way round."""
    return channels.permute(0, 2, 3, 1) if wide else channels.mT


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """positions.cpp for one type of number, compiled for this processor; None, with a warning, where that fails."""
    if dtype not in NUMBERS:
        return None
    try:
        return ctypes.CDLL(str(compile_for(NUMBERS[dtype])))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = first_line(getattr(error, "stderr", None) or error)
        warnings.warn(
            f"CSALR runs on torch's own operations, which are slower on a CPU: {SOURCE.name} cannot be compiled "
            f"({reason}). Install g++, name a compiler in CXX, or a writable cache folder in XDG_CACHE_HOME.",
            stacklevel=2,
        )
        return None


def compile_for(number: str) -> Path:
    """The shared library for `number`, "float" or "double", from the user's cache or a compiler.

    Its name holds all it depends on: the source, the compiler and this processor's instructions.

    Raises:
        OSError, RuntimeError: there is no compiler, or no folder to write into.
        subprocess.SubprocessError: it failed.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++")), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler is there")
    command = [compiler, "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", f"-DREAL={number}"]
    target = run([*command, "-dM", "-E", "-x", "c++", os.devnull])  # every macro the compiler defines
    digest = hashlib.sha256(SOURCE.read_bytes() + target.encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csalr_plugin"
    library = folder / f"positions-{number}-{digest}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several processes may do this at once
            code, linked = Path(scratch, "code.o"), Path(scratch, "library.so")
            run([*command, "-c", str(SOURCE), "-o", str(code)])
            # Without -fopenmp: its functions are found in torch, so both share one set of threads.
            run([compiler, "-shared", str(code), "-o", str(linked)])
            os.replace(linked, library)
    return library


def run(command: list[str]) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
