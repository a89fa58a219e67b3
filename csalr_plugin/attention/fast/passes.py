"""Forward and backward passes of CSALR and CSA on a CPU: the gradient written out, and the tensors kept for it.

With the projections Q, K (C' channels, n positions), their patch means Q', K' (m landmarks) and values V:

    E = softmax(Q'^T K) V^T     Z = (softmax(Q'^T K') + I)^-1 E     O = (softmax(Q^T K') + P) Z     (Eq. 13-17)

Every rewrite is exact:

- Of the tensors with n positions only x is kept for the backward pass, and Q, K and V where they are expensive to
  recompute per element. The maps are recomputed.
- Batch norm is an affine map a channel, so it is applied to the other factor of the dot product, which has m columns.
  Its gradient needs sums over landmarks only.
- Where groups are few, `value` acts on the m rows of S_mn X^T and `fuse` on the m rows of Z, in place of n positions.
- A constant added to a row of logits does not change its softmax, so the bias and the shift of `key` have no effect.

Tensors are contiguous, and every function of csrc/passes.cpp works on tiles of positions that stay in the cache.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..batch_norm import over_processes, sum_over_processes, world_size
from ..landmarks import LandmarkGrid
from .build import Shape, library


class Plan(NamedTuple):
    """Where `value` and `fuse` act, and which tensors are kept. Every plan gives the same numbers."""

    at_landmarks: bool  # `value` and `fuse` act on landmarks, not on positions
    keeps_projections: bool  # Q and K
    keeps_gathered: bool  # S_mn X^T; where `value` acts on positions, S_mn V^T and V
    keeps_values: bool  # E
    keeps_fused: bool  # Z after `fuse`


def plan(channels: int, n: int, m: int, groups: int, differentiable: bool) -> Plan:
    """The plan for maps of `channels` by n positions with m landmarks.

    Keep V and the tensors that are expensive to recompute per element; recompute the cheap ones in backward.
    """
    landmark_cost = groups * n * m * channels + m * channels**2
    position_cost = n * channels**2 + n * m * channels
    # In training V would also be written, kept and read.
    at_landmarks = landmark_cost <= (1.12 if differentiable else 1) * position_cost
    worth = 200 if at_landmarks and groups > 1 else 512  # kept memory is lowest with one group, and where V is kept
    return Plan(
        at_landmarks=at_landmarks,
        keeps_projections=channels >= worth,
        keeps_gathered=not at_landmarks or n >= worth or groups == 2,
        keeps_values=not at_landmarks or channels > worth,
        # Fused rows grow with the groups. With two only the third stage keeps them, since all gathered rows are kept.
        keeps_fused=at_landmarks and groups > 1 and channels > (512 if groups == 2 else 256),
    )


class Inputs(NamedTuple):
    """The tensors that CSALR is differentiated by. A weight is that of a 1x1 convolution, without (1, 1)."""

    x: Tensor  # B, C, H, W
    W_q: Tensor  # C', C
    gain_q: Tensor  # C'; gain and shift of the affine map after the weight, after normalisation if `eps` is given
    shift_q: Tensor
    W_k: Tensor  # C', C
    gain_k: Tensor  # C'; no softmax depends on the shift of keys
    W_v: Tensor  # C, C
    gain_v: Tensor  # C
    shift_v: Tensor
    W_f: Tensor | None  # C, C of `fuse`; None with one group
    b_f: Tensor | None  # C
    alpha: Tensor | None  # scalar gate; None: O alone is returned


class Settings(NamedTuple):
    """The numbers that CSALR depends on."""

    groups: int
    landmarks: tuple[int, int]
    floor: float  # `CSALR.self_attention_floor`
    eps: float | None  # of batch norm with the statistics of the batch; None: no normalisation
    everywhere: bool  # whether these are the statistics of all processes
    pooled: bool  # whether the mean over positions of x * O is returned
    differentiable: bool  # whether tensors are kept for a backward pass


class Affine(NamedTuple):
    """Batch norm as an affine map ``scale * features + offset``; (channels,) each."""

    scale: Tensor
    offset: Tensor | None  # None for keys
    mean: Tensor | None = None  # of the features; None without statistics
    inverse_deviation: Tensor | None = None
    variance: Tensor | None = None  # biased


class Landmarks(NamedTuple):
    """Tensors that follow from the patch means of Q and K; (B, groups, C'/groups, m) unless another shape is given."""

    pooled_q: Tensor  # of raw Q
    pooled_k: Tensor
    Q: Tensor  # Q', normalised
    K: Tensor  # K', normalised but for the shift
    for_keys: Tensor  # times raw K: the logits of S_mn
    for_queries: Tensor  # times raw Q, plus `bias`: the logits of S_nm
    bias: Tensor  # B, groups, 1, m
    S_mm: Tensor  # B, groups, m, m


class Gathered(NamedTuple):
    """The rows of S_mn X^T or S_mn V^T."""

    rows: Tensor  # B, C, groups, m at landmarks, else B, groups, c, m
    log_sum: Tensor  # B, groups, m: of each row of the softmax S_mn
    V: Tensor | None = None  # B, C, n, where `value` acts on positions


class Spread(NamedTuple):
    """Inputs of the pass that evaluates ``(S_nm + P) source``, `fuse` and the gate."""

    Q: Tensor  # raw, B, C', n
    for_queries: Tensor  # B, groups, C'/groups, m
    bias: Tensor  # B, groups, 1, m
    source: Tensor  # B, C, groups, m at landmarks, else B, groups, c, m
    W_f: Tensor | None  # of `fuse`, where it acts on positions
    b_f: Tensor | None  # C; at landmarks it is part of `source`, and given for its gradient
    alpha: Tensor | None


class SpreadGradients(NamedTuple):
    """The gradients of :class:`Spread` and of x."""

    x: Tensor  # B, C, n
    Q: Tensor
    source: Tensor
    for_queries: Tensor  # B, groups, m, C'/groups
    bias: Tensor
    alpha: Tensor | None
    W_f: Tensor | None
    b_f: Tensor | None


class Passes:
    """Calls the functions of passes.cpp for one batch.

    Args:
        x: (B, C, H, W), contiguous.
        grid: CSALR's landmarks, where a group has its own share of the C' channels of Q and K. None: CSA's bases, of
            which every group sees all C', and no P.
        m: landmarks or bases.
        groups: heads.
        at_landmarks: see `Plan`.
    """

    def __init__(self, x: Tensor, grid: LandmarkGrid | None, m: int, groups: int, at_landmarks: bool) -> None:
        self.x, self.m, self.groups, self.at_landmarks = x, m, groups, at_landmarks
        self.B, self.C, self.n = len(x), x.shape[1], x.shape[2] * x.shape[3]
        self.grid = grid
        self.landmark_of: Tensor | None = None
        self.sizes: Tensor | None = None
        if grid is not None:
            self.landmark_of, self.sizes = _members(grid.height, grid.width, grid.rows, grid.columns)

    def project(self, W_q: Tensor, W_k: Tensor, wanted: str = "") -> tuple[Tensor, Tensor, Tensor | None]:
        """Raw Q and K, (B, C', n), and of both the "largest" size of an entry, (2,), or their "moments", (2, 2, C')."""
        Q, K = (self._new(len(W), self.n) for W in (W_q, W_k))
        largest = self.x.new_empty(2) if wanted == "largest" else None
        moments = self.x.new_empty(2, 2, len(W_q)) if wanted == "moments" else None
        self._call("project", len(W_q), self.x, W_q, W_k, Q, K, largest, moments)
        return Q, K, moments if largest is None else largest

    def moments(self, features: Tensor) -> Tensor:
        """Mean of each channel and sum of squares about it: (B, channels, any) -> (2, channels)."""
        _, channels, n = features.shape
        moments = features.new_empty(2, channels)
        self._call("moments", 0, features, channels, n, moments[0], moments[1])
        return moments

    def affine(self, moments: Tensor, count: int, gain: Tensor, shift: Tensor | None, eps: float) -> Affine:
        """Batch norm from :meth:`moments` of `count` values a channel, with its gain and shift, (channels,)."""
        scale, mean, inverse_deviation = (torch.empty_like(gain) for _ in range(3))
        offset, variance = None if shift is None else torch.empty_like(gain), torch.empty_like(gain)
        results = variance, scale, mean, inverse_deviation, offset
        self._call("affine", 0, len(gain), count, eps, moments[0], moments[1], gain, shift, *results)
        return Affine(scale, offset, mean, inverse_deviation, variance)

    def affine_backward(
        self, affine: Affine, count: int, d_scale: Tensor, d_offset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of gain, and (slope, constant), (channels,).

        The gradient of each feature gains ``slope * feature + constant`` through mean and variance.
        """
        results = [torch.empty_like(d_scale) for _ in range(3)]
        given = affine.scale, affine.mean, affine.inverse_deviation, d_scale, d_offset
        self._call("affine_backward", 0, len(d_scale), count, *given, *results)
        d_gain, slope, constant = results
        return d_gain, slope, constant

    def landmarks(self, Q: Tensor, K: Tensor, scale_q: Tensor, offset_q: Tensor, scale_k: Tensor) -> Landmarks:
        """From raw Q and K, (B, C', n), and the affine maps a channel, (C',), that follow them."""
        assert self.grid is not None
        D, m, groups = Q.shape[1], self.m, self.groups
        shapes = [(D // groups, m)] * 6 + [(1, m), (m, m)]
        marks = Landmarks(*(self._new(groups, *shape) for shape in shapes))
        members = self.landmark_of, self.grid.width, self.sizes
        self._call("landmarks", D, Q, K, *members, scale_q, offset_q, scale_k, *marks)
        return marks

    def landmarks_backward(
        self,
        marks: Landmarks,
        affine: tuple[Tensor, Tensor, Tensor],
        floor: float,
        solved: tuple[Tensor, Tensor],
        d_for_keys: Tensor,
        spread: SpreadGradients,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients of the inputs of :meth:`landmarks`.

        Those of Q and K, (B, C', m), are the gradient of each position of a patch.
        `solved` is Z and the gradient of normalised E, through which the gradient of S_mm comes; `affine` is (scale_q,
        offset_q, scale_k).
        """
        D = self.groups * marks.Q.shape[2]
        shares = [self._new(D, self.m) for _ in range(2)]
        vectors = [self.x.new_empty(D) for _ in range(3)]
        inputs = (marks.pooled_q, marks.pooled_k, marks.Q, marks.K, marks.S_mm, *affine, self.sizes, floor)
        gradients = (*solved, d_for_keys, spread.for_queries, spread.bias)
        self._call("landmarks_backward", D, *inputs, *gradients, *shares, *vectors)
        return (*shares, *vectors)  # type: ignore[return-value]

    def gather(self, K: Tensor, for_keys: Tensor, W_v: Tensor, keeps_V: bool) -> Gathered:
        """S_mn of Eq. 13 times x, or times the values; from raw K, (B, C', n), and for_keys, (B, groups, d, m)."""
        log_sum = self._new(self.groups, self.m)
        rows = self.wide() if self.at_landmarks else self.narrow()
        V = self._new(self.C, self.n) if keeps_V and not self.at_landmarks else None
        self._call("gather", K.shape[1], self.x, K, for_keys, W_v, V, rows, log_sum)
        return Gathered(rows, log_sum, V)

    def gather_backward(
        self, d_x: Tensor, K: Tensor, for_keys: Tensor, W_v: Tensor, gathered: Gathered, d_rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradients of K, for_keys as (B, groups, m, C'/groups), and W_v if V is used; adds that of x to d_x."""
        d_K, d_for_keys = torch.empty_like(K), self._new(self.groups, self.m, for_keys.shape[2])
        d_W_v = None if self.at_landmarks else torch.empty_like(W_v)
        features = self.x if gathered.V is None else gathered.V
        inputs = (self.x, features, K, for_keys, gathered.log_sum, W_v, gathered.rows, d_rows)
        self._call("gather_backward", K.shape[1], *inputs, d_x, d_K, d_for_keys, d_W_v)
        return d_K, d_for_keys, d_W_v

    def inverse(self, S_mm: Tensor, floor: float) -> Tensor:
        """The inverse of A_mm = S_mm + I of Eq. 16, with S_ii raised to `floor`: (B, groups, m, m)."""
        inverses = torch.empty_like(S_mm)
        self._call("inverse", 0, S_mm, floor, inverses)
        return inverses

    def solve(self, inverse: Tensor, E: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """``Z = A_mm^-1 (scale E + offset)``, of (B, groups, m, m), (B, groups, c, m) and (C,)."""
        Z = self.narrow()
        self._call("solve", 0, inverse, E, scale, offset, Z)
        return Z

    def solve_backward(self, inverse: Tensor, E: Tensor, d_Z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of scale E + offset, (B, groups, c, m), of scale and of offset, (C,)."""
        d_E, d_scale, d_offset = self.narrow(), *(self.x.new_empty(self.C) for _ in range(2))
        self._call("solve_backward", 0, inverse, E, d_Z, d_E, d_scale, d_offset)
        return d_E, d_scale, d_offset

    def normalise_backward(
        self, d: Tensor, E: Tensor, scale: Tensor, slope: Tensor | None, constant: Tensor | None
    ) -> Tensor:
        """The gradient of E from that of scale E + offset, (B, groups, c, m): ``scale d + slope E + constant``."""
        d_E = self.narrow()
        self._call("normalise_backward", 0, d, E, scale, slope, constant, d_E)
        return d_E

    def spread(self, given: Spread, pooled: bool) -> tuple[Tensor, Tensor | None]:
        """``x + alpha O`` of Eq. 17, or O with `alpha` None, (B, C, H, W); if `pooled`, the mean of x * O, (B, C)."""
        out, mean = torch.empty_like(self.x), self.x.new_empty(self.B, self.C) if pooled else None
        self._call("spread", given.Q.shape[1], *self._spread_inputs(given), out, mean)
        return out, mean

    def spread_backward(self, given: Spread, grad_out: Tensor, grad_mean: Tensor | None) -> SpreadGradients:
        """From the gradients of the outputs of :meth:`spread` to those of its inputs."""
        d_x, d_Q = self._new(self.C, self.n), torch.empty_like(given.Q)
        d_source, d_alpha = torch.empty_like(given.source), self.x.new_empty(())
        d_for_queries, d_bias = self._new(self.groups, self.m, given.for_queries.shape[2]), torch.empty_like(given.bias)
        d_W_f, d_b_f = (None if one is None else torch.empty_like(one) for one in (given.W_f, given.b_f))
        outputs = (d_x, d_Q, d_source, d_for_queries, d_bias, d_alpha, d_W_f, d_b_f)
        self._call("spread_backward", given.Q.shape[1], *self._spread_inputs(given), grad_out, grad_mean, *outputs)
        return SpreadGradients(
            d_x, d_Q, d_source, d_for_queries, d_bias, None if given.alpha is None else d_alpha, d_W_f, d_b_f
        )

    def project_backward(
        self,
        d_x: Tensor,
        weights: tuple[Tensor, Tensor],
        features: tuple[Tensor, Tensor],
        d_features: tuple[Tensor, Tensor],
        slopes: tuple[Tensor | None, Tensor | None],
        constants: tuple[Tensor | None, Tensor | None],
        shares: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the weights, (C', C); adds that of x to d_x. Each pair is of query and key.

        The gradient of a raw feature is the sum of `d_features`, (B, C', n), through the maps; ``slope * feature +
        constant``, (C',), through the statistics; and `shares`, (B, C', m), through its landmark.
        """
        D = len(weights[0])
        d_W_q, d_W_k = (torch.empty_like(one) for one in weights)
        pairs = (*d_features, *slopes, *constants, *shares)
        self._call("project_backward", D, self.x, *weights, *features, self.landmark_of, *pairs, d_x, d_W_q, d_W_k)
        return d_W_q, d_W_k

    def values(self, rows: Tensor, W_v: Tensor) -> Tensor:
        """`value` at landmarks, without bias: S_mn X^T, (B, C, groups, m), to E, (B, groups, c, m)."""
        E = self.narrow()
        self._call("times_at_landmarks", 0, W_v, True, True, rows, None, E)
        return E

    def values_backward(self, d_E: Tensor, rows: Tensor, W_v: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of `rows` and W_v of :meth:`values`."""
        d_rows, d_W = self.wide(), torch.empty_like(W_v)
        self._call("times_at_landmarks_backward", 0, W_v, True, False, d_E, rows, d_rows, d_W)
        return d_rows, d_W

    def fuse(self, Z: Tensor, W_f: Tensor, bias: Tensor) -> Tensor:
        """`fuse` at landmarks, the share of each group: (B, groups, c, m) to (B, C, groups, m); `bias` is added."""
        fused = self.wide()
        self._call("times_at_landmarks", 0, W_f, False, False, Z, bias, fused)
        return fused

    def fuse_backward(self, d_fused: Tensor, Z: Tensor, W_f: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of Z and W_f of :meth:`fuse`."""
        d_Z, d_W = self.narrow(), torch.empty_like(W_f)
        self._call("times_at_landmarks_backward", 0, W_f, False, True, d_fused, Z, d_Z, d_W)
        return d_Z, d_W

    def wide(self) -> Tensor:
        """Memory for m rows of C a group: (B, C, groups, m)."""
        return self._new(self.C, self.groups, self.m)

    def narrow(self) -> Tensor:
        """Memory for m rows of c a group: (B, groups, c, m)."""
        return self._new(self.groups, self.C // self.groups, self.m)

    def _spread_inputs(self, given: Spread) -> tuple[Tensor | None, ...]:
        logits = (self.x, given.Q, given.for_queries, given.bias, self.landmark_of)
        return (*logits, given.source, given.W_f, given.b_f, given.alpha)

    def _new(self, *shape: int) -> Tensor:
        """Memory for (B, *shape)."""
        return self.x.new_empty(self.B, *shape)

    def _call(self, name: str, D: int, *arguments: Tensor | float | None) -> None:
        """Call function `name` of passes.cpp with C' = `D`. Tensors are contiguous and of the type of x."""
        step = d = D // self.groups
        if self.grid is None:
            step, d = 0, D
        threads = torch.get_num_threads()
        shape = Shape(self.B, self.C, D, d, step, self.n, self.m, self.groups, self.at_landmarks, threads)
        pointers = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
        getattr(library(self.x.dtype), name)(ctypes.byref(shape), *pointers)


@functools.lru_cache(maxsize=64)
def _members(height: int, width: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """`landmark_of` and `sizes` of a grid, kept since computing them takes as long as a small pass."""
    grid = LandmarkGrid(height, width, (rows, columns), torch.device("cpu"))
    return grid.landmark_of, grid.sizes


class Normalisation:
    """Batch norm of one projection: its affine map, and whose values its statistics are taken over.

    Args:
        affine: the map.
        count: values a channel.
        everywhere: whether the statistics are of all processes.
    """

    def __init__(self, affine: Affine, count: int, everywhere: bool) -> None:
        self.affine, self.count, self.everywhere = affine, count, everywhere

    @classmethod
    def over(
        cls, passes: Passes, moments: Tensor | None, count: int, gain: Tensor, shift: Tensor | None, settings: Settings
    ) -> Normalisation:
        """From :meth:`Passes.moments` of `count` values a channel; gain and shift alone where there are none."""
        if moments is None or settings.eps is None:
            return cls(Affine(gain, shift), count, settings.everywhere)
        if settings.everywhere:
            mean, deviations, count = over_processes(moments[0], moments[1], count)
            moments = torch.stack([mean, deviations])
        return cls(passes.affine(moments, count, gain, shift, settings.eps), count, settings.everywhere)

    def bound(self, largest: Tensor | None, gain: Tensor, shift: Tensor | None) -> Tensor:
        """A bound on the size of any normalised feature, a scalar, from that of the raw features.

        With statistics no bound on the features is needed: none is further from the mean of N than sqrt(N) deviations.
        """
        bounds = gain.abs() * (self.count**0.5 if largest is None else largest)
        return (bounds if shift is None else bounds.add_(shift.abs())).amax()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance for the running statistics, (channels,); copies, as an operator must return."""
        assert self.affine.mean is not None and self.affine.variance is not None
        return self.affine.mean.clone(), self.affine.variance * (self.count / max(self.count - 1, 1))

    def backward(
        self, passes: Passes, d_scale: Tensor, d_offset: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradient of gain, and (slope, constant) of :meth:`Passes.affine_backward`."""
        if self.affine.mean is None:
            return d_scale, None, None
        d_gain, slope, constant = passes.affine_backward(self.affine, self.count, d_scale, d_offset)
        if self.everywhere:  # mean and variance act on the features of every process
            vectors = sum_over_processes(*(one for one in (d_scale, d_offset) if one is not None))
            d_scale, d_offset = vectors[0], vectors[1] if len(vectors) > 1 else None
            _, slope, constant = passes.affine_backward(self.affine, self.count, d_scale, d_offset)
        return d_gain, slope, constant


def kept_shapes(given: Inputs, settings: Settings) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that :func:`csalr_forward` keeps, in order."""
    if not settings.differentiable:
        return {}
    B, C, height, width = given.x.shape
    D, n, groups = len(given.W_q), height * width, settings.groups
    m = min(settings.landmarks[0], height) * min(settings.landmarks[1], width)
    way = plan(C, n, m, groups, True)
    wide, narrow = (B, C, groups, m), (B, groups, C // groups, m)
    shapes: dict[str, tuple[int, ...]] = {"guard": (), "inverse": (B, groups, m, m)}
    if settings.eps is not None:
        for name, channels in (("q", D), ("k", D), ("v", C)):
            parts = ("scale", "offset", "mean", "inverse_deviation")
            shapes |= {f"{part}_{name}": (channels,) for part in parts if (part, name) != ("offset", "k")}
    if way.keeps_projections:
        shapes |= {"Q": (B, D, n), "K": (B, D, n)}
    if way.keeps_gathered:
        shapes |= {"rows": wide if way.at_landmarks else narrow, "log_sum": (B, groups, m)}
        shapes |= {} if way.at_landmarks else {"V": (B, C, n)}
    if way.keeps_values and way.at_landmarks:
        shapes["E"] = narrow
    if way.keeps_fused and given.W_f is not None:
        shapes["source"] = wide
    return shapes


def csalr_forward(given: Inputs, settings: Settings) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor]]:
    """Eq. 17 with its gate.

    Returns:
        ``x + alpha O``, or O with alpha None, (B, C, H, W); the mean over positions of x * O, (B, C), or None; mean and
        unbiased variance of the batch of Q, K, (C',), and E, (C,), if `eps` is given; the tensors of `kept_shapes`.
    """
    _, W_q, gain_q, shift_q, W_k, gain_k, W_v, gain_v, shift_v, W_f, b_f, alpha = given
    passes, way = _passes_of(given, settings)
    normalises = settings.eps is not None
    Q, K, found = passes.project(W_q, W_k, "moments" if normalises else "largest")
    assert found is not None
    largest_q, largest_k = (None, None) if normalises else found.unbind()
    moments_q, moments_k = found.unbind() if normalises else (None, None)
    count = passes.B * passes.n
    normal_q = Normalisation.over(passes, moments_q, count, gain_q, shift_q, settings)
    normal_k = Normalisation.over(passes, moments_k, count, gain_k, None, settings)
    guard = _logit_guard(normal_q.bound(largest_q, gain_q, shift_q), normal_k.bound(largest_k, gain_k, None))
    marks = passes.landmarks(Q, K, *_affine_of_logits(normal_q.affine, normal_k.affine, guard))
    gathered = passes.gather(K, marks.for_keys, W_v, settings.differentiable)
    E = passes.values(gathered.rows, W_v) if way.at_landmarks else gathered.rows  # B, groups, c, m
    moments_v = passes.moments(E.flatten(1, 2)) if normalises else None
    normal_v = Normalisation.over(passes, moments_v, passes.B * passes.m, gain_v, shift_v, settings)
    inverse = passes.inverse(marks.S_mm, settings.floor)  # B, groups, m, m
    assert normal_v.affine.offset is not None
    Z = passes.solve(inverse, E, normal_v.affine.scale, normal_v.affine.offset)  # B, groups, c, m
    source = _fuse_at_landmarks(passes, Z, W_f, b_f)
    W = None if way.at_landmarks else W_f
    out, mean = passes.spread(Spread(Q, marks.for_queries, marks.bias, source, W, b_f, alpha), settings.pooled)
    normals = {"q": normal_q, "k": normal_k, "v": normal_v}
    statistics = [one for normal in normals.values() for one in normal.statistics()] if normalises else []
    found_tensors: dict[str, Any] = {
        **{"guard": guard, "inverse": inverse, "Q": Q, "K": K, "E": E, "source": source},
        **gathered._asdict(),
        **{f"{part}_{name}": one for name, normal in normals.items() for part, one in normal.affine._asdict().items()},
    }
    return out, mean, statistics, [found_tensors[name] for name in kept_shapes(given, settings)]


def csalr_backward(
    grad_out: Tensor, grad_mean: Tensor | None, given: Inputs, settings: Settings, kept: Sequence[Tensor]
) -> Inputs:
    """The gradients of the inputs, from those of the output and of the mean."""
    x, W_q, gain_q, shift_q, W_k, gain_k, W_v, gain_v, shift_v, W_f, b_f, alpha = given
    passes, way = _passes_of(given, settings)
    saved: dict[str, Any] = dict(zip(kept_shapes(given, settings), kept, strict=True))
    normal_q, normal_k, normal_v = (
        _kept_normalisation(saved, name, gain, shift, count, settings)
        for name, gain, shift, count in (
            ("q", gain_q, shift_q, passes.B * passes.n),
            ("k", gain_k, None, passes.B * passes.n),
            ("v", gain_v, shift_v, passes.B * passes.m),
        )
    )
    guard, inverse = saved["guard"], saved["inverse"]
    Q, K = (saved["Q"], saved["K"]) if way.keeps_projections else passes.project(W_q, W_k)[:2]
    affine = _affine_of_logits(normal_q.affine, normal_k.affine, guard)
    marks = passes.landmarks(Q, K, *affine)
    if way.keeps_gathered:
        gathered = Gathered(saved["rows"], saved["log_sum"], saved.get("V"))
    else:
        gathered = passes.gather(K, marks.for_keys, W_v, True)
    E = saved.get("E")
    if E is None:
        E = passes.values(gathered.rows, W_v) if way.at_landmarks else gathered.rows
    assert normal_v.affine.offset is not None
    Z = passes.solve(inverse, E, normal_v.affine.scale, normal_v.affine.offset)
    source = saved.get("source")
    if source is None:
        source = _fuse_at_landmarks(passes, Z, W_f, b_f)

    # Eq. 17 from the left: residual and gate, the mean, fuse, A_nm.
    W = None if way.at_landmarks else W_f
    spread = passes.spread_backward(
        Spread(Q, marks.for_queries, marks.bias, source, W, b_f, alpha), grad_out, grad_mean
    )

    # Tensors with m rows: fuse, the inverse of Eq. 16, the normalisation of E, value.
    d_Z, d_W_f = spread.source, spread.W_f
    if way.at_landmarks and W_f is not None:
        d_Z, d_W_f = passes.fuse_backward(spread.source, Z, W_f)
    d_E, d_scale_v, d_shift_v = passes.solve_backward(inverse, E, d_Z)  # of normalised E: B, groups, c, m
    d_gain_v, slope_v, constant_v = normal_v.backward(passes, d_scale_v, d_shift_v)
    d_rows = passes.normalise_backward(d_E, E, normal_v.affine.scale, slope_v, constant_v)
    d_W_v = None
    if way.at_landmarks:
        d_rows, d_W_v = passes.values_backward(d_rows, gathered.rows, W_v)

    # S_mn of Eq. 13.
    d_K, d_for_keys, d_W = passes.gather_backward(spread.x, K, marks.for_keys, W_v, gathered, d_rows)

    # Q and K.
    share_q, share_k, d_scale_q, d_shift_q, d_scale_k = passes.landmarks_backward(
        marks, affine, settings.floor, (Z, d_E), d_for_keys, spread
    )
    d_gain_q, slope_q, constant_q = normal_q.backward(passes, d_scale_q, d_shift_q)
    d_gain_k, slope_k, constant_k = normal_k.backward(passes, d_scale_k * guard, None)
    d_W_q, d_W_k = passes.project_backward(
        spread.x, (W_q, W_k), (Q, K), (spread.Q, d_K), (slope_q, slope_k), (constant_q, constant_k), (share_q, share_k)
    )
    return Inputs(
        *(spread.x.view_as(x), d_W_q, d_gain_q, d_shift_q, d_W_k, d_gain_k),
        *(d_W if d_W_v is None else d_W_v, d_gain_v, d_shift_v, d_W_f, spread.b_f, spread.alpha),  # type: ignore[arg-type]
    )


def _passes_of(given: Inputs, settings: Settings) -> tuple[Passes, Plan]:
    x = given.x
    grid = LandmarkGrid(x.shape[2], x.shape[3], settings.landmarks, x.device)
    way = plan(x.shape[1], x.shape[2] * x.shape[3], grid.m, settings.groups, settings.differentiable)
    return Passes(x, grid, grid.m, settings.groups, way.at_landmarks), way


def _kept_normalisation(
    saved: dict[str, Any], name: str, gain: Tensor, shift: Tensor | None, count: int, settings: Settings
) -> Normalisation:
    if settings.eps is None:
        return Normalisation(Affine(gain, shift), count, settings.everywhere)
    scale, *others = (saved.get(f"{part}_{name}") for part in ("scale", "offset", "mean", "inverse_deviation"))
    return Normalisation(
        Affine(cast(Tensor, scale), *others), count * (world_size() if settings.everywhere else 1), settings.everywhere
    )


def _affine_of_logits(affine_q: Affine, affine_k: Affine, guard: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and offset of Q, and scale of K, which takes the guard."""
    assert affine_q.offset is not None
    return affine_q.scale, affine_q.offset, affine_k.scale * guard


def _logit_guard(largest_query: Tensor, largest_key: Tensor) -> Tensor:
    """As `numerics.limit_logits`, one factor for the batch, from bounds on both sides; all scalars."""
    limit = 1e17
    return (limit / largest_query.clamp(min=limit)) * (limit / largest_key.clamp(min=limit))


def _fuse_at_landmarks(passes: Passes, Z: Tensor, W_f: Tensor | None, b_f: Tensor | None) -> Tensor:
    """Fused Z, (B, C, groups, m), or Z, (B, groups, c, m), where `fuse` acts on positions or does not exist."""
    if not passes.at_landmarks or W_f is None or b_f is None:
        return Z if not passes.at_landmarks else Z.flatten(1, 2)[:, :, None]
    return passes.fuse(Z, W_f, b_f / (2 * passes.groups))  # rows of S_nm + P sum to 2, in each group
