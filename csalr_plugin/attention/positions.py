"""What CSALR does at n positions and m landmarks, in tensor operations: for every device and type of number.

`csalr_plugin.attention.compiled` does the same in C++ for fp32 and fp64 on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from csalr_plugin.attention.block import softmax_backward, split
from csalr_plugin.attention.landmarks import LandmarkGrid


class Plan(NamedTuple):
    """How to evaluate the formula for one shape. Every plan gives the same numbers."""

    at_landmarks: bool  # `value` and `fuse` act on landmarks, not on positions
    keeps_projections: bool  # Q and K are kept for the backward pass
    keeps_gathered: bool  # so is what is gathered, S_mn X^T; where `value` acts on positions, S_mn V^T and V always are
    keeps_values: bool  # and E
    keeps_fused: bool  # and what `fuse` made of Z
    differentiable: bool  # whether a backward pass may follow
    images: int  # computed at a time, in tensor operations


def plan(batch: int, channels: int, n: int, m: int, groups: int, device: torch.device, differentiable: bool) -> Plan:
    """The plan for `batch` maps of `channels` by n positions with m landmarks, from the shapes alone.

    Kept is, with V, what costs many multiplications a number to compute again: the fewer, the less else is kept.
    """
    landmark_cost = groups * n * m * channels + m * channels**2
    position_cost = n * channels**2 + n * m * channels
    # In training V has to be written, kept and read, too.
    at_landmarks = landmark_cost <= (1.12 if differentiable else 1) * position_cost
    worth = 200 if at_landmarks and groups > 1 else 512  # one group, and V, leave the least room
    return Plan(
        at_landmarks=at_landmarks,
        keeps_projections=channels >= worth,
        keeps_gathered=not at_landmarks or n >= worth or groups == 2,
        keeps_values=not at_landmarks or channels > worth,
        # What is fused grows with the groups; two keep the third stage's alone, as all that is gathered is kept then.
        keeps_fused=at_landmarks and groups > 1 and channels > (512 if groups == 2 else 256),
        differentiable=differentiable,
        # 8 MiB of x in fp32, and a power of two, which threads share out evenly.
        images=2 ** max(0, (2**21 // (channels * n)).bit_length() - 1) if device.type == "cpu" else batch,
    )


class Projections(NamedTuple):
    """Q and K before bias and normalisation."""

    Q: Tensor  # (B, C', n)
    K: Tensor
    largest: Tensor | None  # size of a number in each of them, (2,), if wanted
    moments: Tensor | Sequence[Any] | None  # :meth:`Positions.moments` of each, if wanted


Wanted = Literal["largest", "moments"]  # of Q and K, which are seen anyhow while they are computed


class Affine(NamedTuple):
    """Batch norm as the affine map a channel that it is; (channels,) each."""

    scale: Tensor
    offset: Tensor | None  # None where nobody sees it
    mean: Tensor  # of the features
    inverse_deviation: Tensor
    variance: Tensor  # biased


class Gathered(NamedTuple):
    """What S_mn brings together from the positions."""

    rows: Tensor  # S_mn X^T, (B, groups, m, C); or E = S_mn V^T, (B, groups, m, c)
    V: Tensor | None  # (B, C, n), of the latter, for the backward pass
    log_sum: Tensor | None  # (B, groups, m), of each row in the softmax of S_mn, where it saves computing that again


class Landmarks(NamedTuple):
    """What follows from the patch means of Q and K; (B, groups, C'/groups, m) and in fp32 at least."""

    pooled_q: Tensor  # of raw Q
    pooled_k: Tensor
    Q: Tensor  # Q', normalised
    K: Tensor  # K', normalised but for the shift, which no softmax sees
    for_keys: Tensor  # times raw K: the logits of S_mn
    for_queries: Tensor  # times raw Q, plus `bias`: the logits of S_nm
    bias: Tensor  # (B, groups, 1, m)
    S_mm: Tensor  # (B, groups, m, m)


class LandmarkGradients(NamedTuple):
    """The gradients of what :meth:`Positions.landmarks` is given."""

    share_q: Tensor  # (B, C', m): of raw Q at each position of a landmark
    share_k: Tensor
    scale_q: Tensor  # (C',)
    offset_q: Tensor
    scale_k: Tensor


class Spread(NamedTuple):
    """What :meth:`Positions.spread` spreads over the positions, and how."""

    Q: Tensor  # raw, (B, C', n)
    for_queries: Tensor  # (B, groups, C'/groups, m): times raw Q and plus `bias`, the logits of S_nm
    bias: Tensor  # (B, groups, 1, m)
    source: Tensor  # (B, groups, m, C or c), what the rows of S_nm + P weigh
    W_f: Tensor | None  # of `fuse`, (C, C), where it acts on positions
    b_f: Tensor | None  # (C,); with W_f None it is in `source`, and here for its gradient
    alpha: Tensor | None  # scalar; None: O alone is wanted


class SpreadGradients(NamedTuple):
    """The gradients of what :meth:`Positions.spread` is given."""

    x: Tensor  # (B, C, n)
    Q: Tensor  # (B, C', n)
    source: Tensor  # (B, groups, m, C or c)
    for_queries: Tensor  # (B, groups, C'/groups, m)
    bias: Tensor  # (B, groups, 1, m)
    alpha: Tensor | None
    W_f: Tensor | None  # (C, C)
    b_f: Tensor | None  # (C,)


class Positions:
    """The passes over the positions of one batch, forward and backward.

    Args:
        x: (B, C, H, W).
        grid: CSALR's landmarks, where a group has its own share of the C' channels of Q and K. None: CSA's bases, of
            which every group sees all C', and no P.
        groups: heads.
        way: how.
        dtype: of products over n positions; what has m rows is in fp32 at least.
    """

    def __init__(self, x: Tensor, grid: LandmarkGrid | None, groups: int, way: Plan, dtype: torch.dtype) -> None:
        self.like, self.X = x, x.flatten(2)  # B, C, n
        self.grid, self.groups, self.way, self.dtype = grid, groups, way, dtype
        self.landmark_of: Tensor | None = None
        self.sizes: Tensor | None = None
        if grid is not None:
            self.landmark_of, self.sizes = self.members(grid)

    @staticmethod
    def members(grid: LandmarkGrid) -> tuple[Tensor, Tensor]:
        """The landmark of each position, (n,), and the positions of each landmark, (m,)."""
        return grid.landmark_of, grid.sizes

    def parts(self) -> Iterator[slice]:
        """Slices of the batch that are computed together."""
        for start in range(0, len(self.X), self.way.images):
            yield slice(start, start + self.way.images)

    def project(self, W_q: Tensor, W_k: Tensor, wanted: Wanted | None = None) -> Projections:
        """From the weights, (C', C) each; and what is `wanted` of Q and K."""
        Q, K = self._times(W_q), self._times(W_k)
        largest = moments = None
        if wanted == "largest":
            largest = torch.stack([torch.linalg.vector_norm(one, float("inf")) for one in (Q, K)])
        elif wanted == "moments":
            moments = [self.moments(one) for one in (Q, K)]
        return Projections(Q, K, largest, moments)

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of each channel, and the sum of squares about it: (B, channels, any) -> (channels,) each.

        Both in fp32 at least. Each image's own mean first (Chan et al., 1979): the difference of two large sums would
        lose digits.
        """
        dtype = torch.promote_types(features.dtype, torch.float32)
        means, squares = [], []
        for part in self.parts():
            chunk = features[part]
            mean = chunk.mean(2, dtype=dtype)  # b, channels
            means.append(mean)
            squares.append(torch.linalg.vector_norm(chunk - mean[:, :, None], dim=2).square())
        each = torch.cat(means)
        mean = each.mean(0)
        return mean, (torch.cat(squares) + features.shape[2] * (each - mean).square()).sum(0)

    def affine(
        self, moments: tuple[Tensor, Tensor], count: int, gain: Tensor, shift: Tensor | None, eps: float
    ) -> Affine:
        """Batch norm by :meth:`moments` of `count` values a channel, with its gain and shift, (channels,)."""
        mean, deviations = moments
        variance = deviations / count
        inverse_deviation = (variance + eps).rsqrt_()
        scale = gain * inverse_deviation
        offset = None if shift is None else torch.addcmul(shift, scale, mean, value=-1)
        return Affine(scale, offset, mean, inverse_deviation, variance)

    def affine_backward(
        self, affine: tuple[Tensor, Tensor, Tensor], count: int, d_scale: Tensor, d_offset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of gain, and (slope, constant): what each feature's gradient gets through mean and variance is
        ``slope * feature + constant``. All (channels,), `affine` scale, mean and inverse_deviation; `d_offset` None
        is 0."""
        scale, mean, inverse_deviation = affine
        if d_offset is not None:
            d_scale = torch.addcmul(d_scale, d_offset, mean, value=-1)  # offset = shift - scale * mean
        # From the gradients of the variance, -1/2 d_scale scale / (variance + eps), and of the mean, -d_offset scale.
        per_value = scale / -count
        slope = per_value * d_scale * inverse_deviation.square()
        constant = -slope * mean
        if d_offset is not None:
            constant.addcmul_(per_value, d_offset)
        return d_scale * inverse_deviation, slope, constant

    def landmarks(self, Q: Tensor, K: Tensor, scale_q: Tensor, offset_q: Tensor, scale_k: Tensor) -> Landmarks:
        """From raw Q and K, (B, C', n), and the affine maps a channel, (C',), that follow them."""
        assert self.grid is not None
        pooled_q, pooled_k = (split(self.grid.pool(one).to(scale_q.dtype), self.groups) for one in (Q, K))
        scale_q, offset_q, scale_k = self._per_group(scale_q, offset_q, scale_k)
        Q = pooled_q * scale_q + offset_q
        K = pooled_k * scale_k
        bias = (K * offset_q).sum(2, keepdim=True)
        S_mm = (Q.mT @ K).softmax(3)
        return Landmarks(pooled_q, pooled_k, Q, K, Q * scale_k, K * scale_q, bias, S_mm)

    def landmarks_backward(
        self,
        marks: Landmarks,
        affine: tuple[Tensor, Tensor, Tensor],
        floor: float,
        solved: tuple[Tensor, Tensor],
        d_for_keys: Tensor,
        spread: SpreadGradients,
    ) -> LandmarkGradients:
        """From the gradients of `marks` to those of Q, K and `affine`: (scale_q, offset_q, scale_k).

        Those of `for_queries` and `bias` are in `spread`; that of S_mm comes through `solved`: Z = A_mm^-1 E of
        :meth:`solve` and the gradient of that E, both (B, groups, m, c).
        """
        assert self.sizes is not None
        Z, d_E = solved
        scale_q, offset_q, scale_k = self._per_group(*affine)
        d_S_mm = raise_diagonal_backward(-(d_E @ Z.mT), marks.S_mm, floor)
        d_logits = softmax_backward(d_S_mm, marks.S_mm, 3)
        d_Q = marks.K @ d_logits.mT + d_for_keys * scale_k
        d_K = marks.Q @ d_logits + spread.for_queries * scale_q + spread.bias * offset_q
        return LandmarkGradients(
            (d_Q * scale_q).flatten(1, 2) / self.sizes,
            (d_K * scale_k).flatten(1, 2) / self.sizes,
            (spread.for_queries * marks.K + d_Q * marks.pooled_q).sum((0, 3)).flatten(),
            (spread.bias * marks.K + d_Q).sum((0, 3)).flatten(),
            (d_for_keys * marks.Q + d_K * marks.pooled_k).sum((0, 3)).flatten(),
        )

    def gather(self, K: Tensor, for_keys: Tensor, W_v: Tensor) -> Gathered:
        """Eq. 13's S_mn times x, or times the values, by raw K, (B, C', n), and for_keys, (B, groups, C'/groups, m)."""
        V = None if self.way.at_landmarks else self._times(W_v)
        features = self.X if V is None else V
        (B, groups, _, m), columns = for_keys.shape, features.shape[1]
        if self.way.at_landmarks:
            rows = features.new_empty(B, groups, m, columns, dtype=self.dtype)
        else:
            rows = features.new_empty(B, groups, m, columns // groups, dtype=for_keys.dtype)
        for part in self.parts():
            S_mn = self._landmarks_to_positions(K, for_keys, part)
            if self.way.at_landmarks:
                torch.bmm(S_mn.flatten(1, 2), features[part].to(self.dtype).mT, out=rows[part].flatten(1, 2))
            else:
                rows[part] = S_mn @ split(features[part], groups).mT
        return Gathered(rows, V, None)

    def gather_backward(
        self, d_x: Tensor, K: Tensor, for_keys: Tensor, W_v: Tensor, gathered: Gathered, d_rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """From the gradient of `gathered.rows` to those of K, for_keys and W_v, if V is used; that of x is added."""
        X, V, dtype = self.X, gathered.V, self.dtype
        d_rows = d_rows.to(dtype)
        d_K, d_for_keys = torch.empty_like(K), torch.empty_like(for_keys)
        d_W_v = None if V is None else torch.zeros_like(W_v)
        for part in self.parts():
            S_mn = self._landmarks_to_positions(K, for_keys, part)
            if V is None or d_W_v is None:
                rows = d_rows[part].flatten(1, 2)  # b, groups m, C
                d_S_mn = (rows @ X[part].to(dtype)).view_as(S_mn)
                d_x[part].baddbmm_(rows.mT, S_mn.flatten(1, 2))
            else:
                d_S_mn = d_rows[part] @ split(V[part], self.groups)
                d_V = (d_rows[part].mT @ S_mn).flatten(1, 2)  # b, C, n
                accumulate(d_W_v, d_V, X[part].to(dtype))
                d_x[part].baddbmm_(expand(W_v.to(dtype).mT, d_V), d_V)
            d_logits = softmax_backward(d_S_mn, S_mn, 3)  # b, groups, m, n
            self._logits_backward(for_keys, K, d_logits, part, d_for_keys, d_K)
        return d_K, d_for_keys, d_W_v

    def inverse(self, S_mm: Tensor, floor: float) -> Tensor:
        """Of A_mm = S_mm + I of Eq. 16, (B, groups, m, m), where a landmark attends to itself with `floor` at least."""
        return inverse_of_dominant(raise_diagonal(S_mm, floor))

    def solve(self, inverse: Tensor, E: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """``Z = A_mm^-1 (scale E + offset)``, of (B, groups, m, m), (B, groups, m, c) and (C,)."""
        scale, offset = (one.view(E.shape[1], 1, -1) for one in (scale, offset))  # groups, 1, c
        return inverse @ (E * scale).add_(offset)

    def solve_backward(self, inverse: Tensor, E: Tensor, d_Z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of scale E + offset, (B, groups, m, c), of scale and of offset, (C,)."""
        d_E = inverse.mT @ d_Z
        d_scale, d_offset = (one.sum(2).sum(0).flatten() for one in (d_E * E, d_E))
        return d_E, d_scale, d_offset

    def normalise_backward(
        self, d: Tensor, E: Tensor, scale: Tensor, slope: Tensor | None, constant: Tensor | None
    ) -> Tensor:
        """The gradient of E from that of scale E + offset, (B, groups, m, c): ``scale d + slope E + constant``.

        The latter, (C,) each, is what comes through statistics; None: nothing does.
        """
        per_channel = (E.shape[1], 1, E.shape[3])
        d_E = d * scale.view(per_channel)
        if slope is not None and constant is not None:
            d_E.addcmul_(E, slope.view(per_channel)).add_(constant.view(per_channel))
        return d_E

    def values(self, rows: Tensor, W_v: Tensor) -> Tensor:
        """E before normalisation and bias, (B, groups, m, c) in fp32 at least, from S_mn X^T."""
        return times_heads(rows, value_heads(W_v, self.groups)).to(torch.promote_types(rows.dtype, torch.float32))

    def values_backward(self, d_E: Tensor, rows: Tensor, W_v: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of `rows` and W_v."""
        d_E = d_E.to(self.dtype)
        d_rows = times_heads(d_E, value_heads(W_v, self.groups).mT)
        return d_rows, heads_backward(d_E, rows).flatten(0, 1).to(W_v.dtype)

    def fuse(self, Z: Tensor, W_f: Tensor, b_f: Tensor) -> Tensor:
        """W_f Z + b_f, a group's share of it each, (B, groups, m, C)."""
        fused = times_heads(Z.to(self.dtype), fuse_heads(W_f, self.groups))
        return fused + b_f.to(self.dtype) / (2 * self.groups)  # each group's rows of S_nm + P have the sum 2

    def fuse_backward(self, d_source: Tensor, Z: Tensor, W_f: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of Z and W_f; that of b_f is in :class:`SpreadGradients`."""
        d_fused = d_source.to(self.dtype)
        d_Z = times_heads(d_fused, fuse_heads(W_f, self.groups).mT).to(Z.dtype)
        d_W_f = heads_backward(d_fused, Z.to(self.dtype)).transpose(0, 1).flatten(1)  # C, C
        return d_Z, d_W_f.to(W_f.dtype)

    def spread(self, given: Spread, pooled: bool) -> tuple[Tensor, Tensor | None]:
        """``x + alpha O`` of Eq. 17, or O with `alpha` None, (B, C, H, W); if `pooled`, the mean of x * O, (B, C)."""
        Q, for_queries, bias, source, W_f, b_f, alpha = given
        X, dtype = self.X, self.dtype
        out = torch.empty_like(self.like, dtype=torch.promote_types(X.dtype, dtype))
        mean = X.new_empty(X.shape[:2], dtype=for_queries.dtype) if pooled else None
        gated = alpha is not None and not pooled and self.way.at_landmarks and X.dtype == dtype
        scaled = source * alpha.to(dtype) if alpha is not None and gated else source
        for part in self.parts():
            A = self._positions_to_landmarks(Q, for_queries, bias, part)
            self._add_membership(A)
            if gated:  # product, gate and residual in one
                target = out[part].flatten(2)
                torch.baddbmm(X[part], scaled[part].flatten(1, 2).mT, A.flatten(1, 2), out=target)
                continue
            attended, _ = self._attend(A, source[part], W_f, b_f)  # b, C, n
            if mean is not None:
                mean[part] = torch.linalg.vecdot(X[part].to(dtype), attended) / X.shape[2]
            if alpha is None:
                out[part].flatten(2).copy_(attended)
            else:
                torch.addcmul(X[part], attended, alpha, out=out[part].flatten(2))
        return out, mean

    def spread_backward(
        self, given: Spread, out: Tensor | None, grad_out: Tensor, grad_mean: Tensor | None
    ) -> SpreadGradients:
        """From the gradients of what :meth:`spread` returns to those of what it is given.

        `out`: what it returned, where that is still there and may save computing O again.
        """
        Q, for_queries, bias, source, W_f, b_f, alpha = given
        X, way, dtype, n = self.X, self.way, self.dtype, self.X.shape[2]
        d_x, d_Q = torch.empty_like(X, dtype=dtype), torch.empty_like(Q)
        d_O = torch.empty_like(X[: way.images], dtype=dtype)
        d_source = torch.empty_like(source, dtype=for_queries.dtype)
        d_for_queries, d_bias = torch.empty_like(for_queries), torch.empty_like(bias)
        d_alpha, d_W_f, d_b_f = (None if one is None else torch.zeros_like(one) for one in (alpha, W_f, b_f))
        for part in self.parts():
            G = grad_out[part].flatten(2).to(dtype)  # b, C, n
            A = self._positions_to_landmarks(Q, for_queries, bias, part)
            S_own = self._add_membership(A)
            attended, U = self._attend(A, source[part], W_f, b_f)
            d_O = d_O[: len(G)]
            if alpha is None or d_alpha is None:
                d_O.copy_(G)
                d_x[part] = 0
            else:
                d_alpha += torch.dot(G.flatten(), attended.flatten())
                torch.mul(G, alpha.to(dtype), out=d_O)
            if grad_mean is not None:
                share = (grad_mean[part] / n).to(dtype)[:, :, None]  # b, C, 1
                d_O.addcmul_(X[part].to(dtype), share)
                torch.addcmul(G, attended, share, out=d_x[part])
            elif alpha is not None:
                d_x[part] = G
            if d_b_f is not None:
                d_b_f += d_O.sum((0, 2))
            if U is not None and W_f is not None and d_W_f is not None:
                accumulate(d_W_f, d_O, U)
                d_U = split(times(W_f.to(dtype).mT, d_O), self.groups)  # b, groups, c, n
            else:
                d_U = d_O if way.at_landmarks else split(d_O, self.groups)
            rows = source[part].flatten(1, 2) if way.at_landmarks else source[part]  # b, (groups) m, C or c
            A_rows = A.flatten(1, 2) if way.at_landmarks else A
            d_A = (rows @ d_U).view_as(A)
            d_source[part] = (A_rows @ d_U.mT).view_as(source[part])
            self._remove_membership(A, S_own)
            d_logits = softmax_backward(d_A, A, 2)  # b, groups, m, n
            self._logits_backward(for_queries, Q, d_logits, part, d_for_queries, d_Q)
            d_bias[part] = d_logits.sum(3)[:, :, None]
        return SpreadGradients(d_x, d_Q, d_source, d_for_queries, d_bias, d_alpha, d_W_f, d_b_f)

    def project_backward(
        self, d_x: Tensor, query: ProjectionGradient, key: ProjectionGradient
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the weights of query and key, (C', C) each; that of x is added to d_x."""
        assert self.landmark_of is not None
        d_W_q, d_W_k = torch.zeros_like(query.W), torch.zeros_like(key.W)
        for part in self.parts():
            for side, d_W in ((query, d_W_q), (key, d_W_k)):
                d_features = side.d_features[part] + side.share[part].to(self.dtype).index_select(2, self.landmark_of)
                if side.slope is not None and side.constant is not None:
                    slope, constant = (one.to(self.dtype)[:, None] for one in (side.slope, side.constant))
                    d_features.addcmul_(side.features[part], slope).add_(constant)
                accumulate(d_W, d_features, self.X[part].to(self.dtype))
                d_x[part].baddbmm_(expand(side.W.to(self.dtype).mT, d_features), d_features)
        return d_W_q, d_W_k

    def _per_group(self, *vectors: Tensor) -> Iterator[Tensor]:
        """(C',) each -> (groups, C'/groups, 1) each."""
        return (vector.view(self.groups, -1, 1) for vector in vectors)

    def _times(self, W: Tensor) -> Tensor:
        """A projection before bias and normalisation: (C_out, C) -> (B, C_out, n)."""
        projected = self.X.new_empty(len(self.X), len(W), self.X.shape[2], dtype=self.dtype)
        W = W.to(self.dtype)
        for part in self.parts():
            torch.bmm(expand(W, self.X[part]), self.X[part].to(self.dtype), out=projected[part])
        return projected

    def _logits(self, factor: Tensor, features: Tensor, part: slice) -> Tensor:
        """Dot products of m factors with the features at n positions: (b, groups, m, n)."""
        factor, features = factor[part].to(features.dtype).mT, features[part]  # b, groups, m, d and b, C', n
        if self.grid is not None:
            return factor @ split(features, self.groups)
        return split(factor.flatten(1, 2) @ features, self.groups)

    def _logits_backward(
        self, factor: Tensor, features: Tensor, d_logits: Tensor, part: slice, d_factor: Tensor, d_features: Tensor
    ) -> None:
        """Write the gradients of both."""
        factor, features = factor[part].to(features.dtype), features[part]
        if self.grid is not None:
            times_into(d_features[part], factor, d_logits)
            d_factor[part] = split(features, self.groups) @ d_logits.mT
        else:
            joint = d_logits.flatten(1, 2)  # b, groups m, n
            torch.bmm(factor.mT.flatten(1, 2).mT, joint, out=d_features[part])
            d_factor[part] = split(joint @ features.mT, self.groups).mT

    def _positions_to_landmarks(self, Q: Tensor, for_queries: Tensor, bias: Tensor, part: slice) -> Tensor:
        """S_nm of Eq. 15, transposed: (b, groups, m, n), whose columns sum to 1."""
        if self.grid is None:  # CSA's logits have no bias
            return self._logits(for_queries, Q, part).softmax(2)
        offset, factor = (one[part].to(Q.dtype).flatten(0, 1).mT for one in (bias, for_queries))
        logits = torch.baddbmm(offset, factor, split(Q[part], self.groups).flatten(0, 1))  # b groups, m, n
        return logits.softmax(1).view(-1, self.groups, *logits.shape[1:])

    def _landmarks_to_positions(self, K: Tensor, for_keys: Tensor, part: slice) -> Tensor:
        """S_mn of Eq. 13: (b, groups, m, n), whose rows sum to 1."""
        return self._logits(for_keys, K, part).softmax(3)

    def _add_membership(self, S_nm: Tensor) -> Tensor | None:
        """Add P of Eq. 15 in place; return the entries as they were, for :meth:`_remove_membership`."""
        if self.landmark_of is None:
            return None
        index = self.landmark_of.expand(*S_nm.shape[:2], 1, -1)
        own = S_nm.gather(2, index)
        S_nm.scatter_(2, index, own + 1)
        return own

    def _remove_membership(self, A_nm: Tensor, own: Tensor | None) -> None:
        """Take P away again; a subtraction would lose the digits of small entries."""
        if self.landmark_of is not None and own is not None:
            A_nm.scatter_(2, self.landmark_of.expand(*A_nm.shape[:2], 1, -1), own)

    def _attend(
        self, A_nm: Tensor, source: Tensor, W_f: Tensor | None, b_f: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """O of Eq. 17, (b, C, n), from A_nm and `source`; and before `fuse`, where that acts on positions."""
        if self.way.at_landmarks:
            return source.flatten(1, 2).mT @ A_nm.flatten(1, 2), None
        U = (source.mT @ A_nm).flatten(1, 2)  # b, C, n
        if W_f is None or b_f is None:
            return U, None
        return torch.baddbmm(b_f.to(U.dtype)[:, None], expand(W_f.to(U.dtype), U), U), U


class ProjectionGradient(NamedTuple):
    """What the gradient of a projection is made of, for :meth:`Positions.project_backward`."""

    W: Tensor  # (C', C)
    features: Tensor  # raw Q or K, (B, C', n)
    d_features: Tensor  # (B, C', n), through the maps
    slope: Tensor | None  # (C',): through the statistics each feature gets this times itself
    constant: Tensor | None  # (C',): and this
    share: Tensor  # (B, C', m): through the landmarks each position gets that of its landmark


# Small tools


def value_heads(W_v: Tensor, groups: int) -> Tensor:
    """The share of each group in `value`: (C, C) -> (groups, c, C)."""
    return W_v.unflatten(0, (groups, -1))  # type: ignore[no-untyped-call]


def fuse_heads(W_f: Tensor, groups: int) -> Tensor:
    """The share of each group in `fuse`: (C, C) -> (groups, C, c)."""
    return W_f.unflatten(1, (groups, -1)).transpose(0, 1)  # type: ignore[no-untyped-call]


def times_heads(rows: Tensor, heads: Tensor) -> Tensor:
    """Each group's rows by its own weight: (B, groups, m, r), (groups, s, r) -> (B, groups, m, s), typed as `rows`."""
    pairs = zip(rows.unbind(1), heads.to(rows.dtype), strict=True)
    return torch.stack([row @ head.mT for row, head in pairs], 1)


def heads_backward(d_out: Tensor, rows: Tensor) -> Tensor:
    """The gradient of the weights of :func:`times_heads`: (B, groups, m, s), (B, groups, m, r) -> (groups, s, r)."""
    pairs = zip(d_out.unbind(1), rows.unbind(1), strict=True)
    return torch.stack([d.flatten(0, 1).mT @ row.flatten(0, 1) for d, row in pairs])


def raise_diagonal(S_mm: Tensor, floor: float) -> Tensor:
    """A_mm of Eq. 16, S_mm + I, with S_ii raised to `floor`; its rows still sum to 2."""
    own = S_mm.diagonal(dim1=-2, dim2=-1)[..., None]  # B, groups, m, 1
    raised = (floor - own).clamp(min=0) / (1 - own.clamp(max=floor))  # share given to the landmark itself
    return S_mm * (1 - raised) + torch.diag_embed((1 + raised).squeeze(-1))


def raise_diagonal_backward(gradient: Tensor, S_mm: Tensor, floor: float) -> Tensor:
    """The gradient of S_mm from that of :func:`raise_diagonal`."""
    own = S_mm.diagonal(dim1=-2, dim2=-1)[..., None]  # B, groups, m, 1
    low = own.clamp(max=floor)
    raised = (floor - own).clamp(min=0) / (1 - low)
    d_raised = gradient.diagonal(dim1=-2, dim2=-1)[..., None] - (gradient * S_mm).sum(-1, keepdim=True)
    # raised = (floor - own) / (1 - own) below the floor.
    d_own = d_raised * torch.where(own < floor, (floor - 1) / (1 - low).square(), 0.0)
    return gradient * (1 - raised) + torch.diag_embed(d_own.squeeze(-1))


def inverse_of_dominant(system: Tensor) -> Tensor:
    """The inverse of diagonally dominant systems (..., m, m), by halves down to 32 rows.

    The Schur complement of a dominant system is dominant, so halves need no pivoting across them. Three times as
    fast as a library's inverse of many 96 x 96 systems on a CPU; and torch's batched LU there is wrong beyond 150
    rows after torch.set_num_threads(2) (pytorch #142815).
    """
    m = system.shape[-1]
    if m <= 32:
        return torch.linalg.inv_ex(system)[0]  # _ex: a check for singularity would wait for the GPU
    half = m // 2
    B, C = system[..., :half, half:], system[..., half:, :half]
    A_inverse = inverse_of_dominant(system[..., :half, :half])
    A_B, C_A = A_inverse @ B, C @ A_inverse
    S_inverse = inverse_of_dominant(system[..., half:, half:] - C @ A_B)
    lower = S_inverse @ C_A
    return torch.cat(
        [
            torch.cat([A_inverse + A_B @ lower, -A_B @ S_inverse], -1),
            torch.cat([-lower, S_inverse], -1),
        ],
        -2,
    )


def expand(weight: Tensor, like: Tensor) -> Tensor:
    """A weight for every image of `like`, without a copy: (C_out, C) -> (b, C_out, C)."""
    return weight.expand(len(like), -1, -1)


def times(weight: Tensor, features: Tensor) -> Tensor:
    """A 1x1 convolution: (C_out, C), (b, C, n) -> (b, C_out, n)."""
    return torch.bmm(expand(weight, features), features)


def times_into(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Write ``left right`` a group to (b, C', n): (b, groups, C'/groups, m), (b, groups, m, n)."""
    torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=target.view(-1, left.shape[2], right.shape[3]))


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left right^T`` of each image to `total`: (r, s), (b, r, n), (b, s, n)."""
    for one, other in zip(left, right, strict=True):
        if total.dtype == one.dtype:
            total.addmm_(one, other.mT)
        else:
            total += one @ other.mT


def no_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Types are chosen by hand inside. On "meta", where costs are counted, there is no autocast to switch off."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)
