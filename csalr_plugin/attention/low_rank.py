"""CSALR's formula and its gradient, written out so that little is multiplied and less is kept.

With the projections Q, K (C' channels, n positions), their patch means Q', K' (m landmarks) and values V:

    E = softmax(Q'^T K) V^T     Z = (softmax(Q'^T K') + I)^-1 E     O = (softmax(Q^T K') + P) Z     (Eq. 13-17)

What is done about the cost, each of it exact:

- Of tensors with n positions only x is kept for the backward pass, and Q and K where they are dear to compute again
  and cheap to keep. The maps are computed again.
- Batch norm never touches Q and K. It is an affine map a channel, so it moves to the other factor of the dot
  product, which has m columns; and its gradient needs sums over landmarks only.
- Where groups are few, `value` acts on the m rows of S_mn X^T and `fuse` on the m rows of Z, in place of n
  positions. :func:`plan` counts which is less.
- A constant added to a row of logits leaves its softmax as it is, so the bias and the shift of `key` drop out.
- On a CPU a few images are computed at a time, so that a step finds in the cache what the one before it wrote; on
  a GPU all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from csalr_plugin.attention.landmarks import LandmarkGrid


class Plan(NamedTuple):
    """How to evaluate the formula for one shape. Every plan gives the same numbers."""

    at_landmarks: bool  # `value` and `fuse` act on landmarks, not on positions
    keeps_projections: bool  # Q and K are kept for the backward pass
    keeps_gathered: bool  # so is S_mn X^T
    keeps_values: bool
    images: int  # computed at a time


def plan(batch: int, channels: int, n: int, m: int, groups: int, device: torch.device) -> Plan:
    """The plan for `batch` maps of `channels` by n positions with m landmarks, from the shapes alone.

    What takes more than 512 multiplications a number is kept, what takes fewer is computed again.
    """
    landmark_cost = groups * n * m * channels + m * channels**2
    position_cost = n * channels**2 + n * m * channels
    at_landmarks = landmark_cost <= position_cost
    return Plan(
        at_landmarks=at_landmarks,
        keeps_projections=channels >= 512,
        keeps_gathered=at_landmarks and n > 512,
        keeps_values=not at_landmarks or channels > 512,
        # 8 MiB of x in fp32, and a power of two, which threads share out evenly.
        images=2 ** max(0, (2**21 // (channels * n)).bit_length() - 1) if device.type == "cpu" else batch,
    )


class LowRankAttention(torch.autograd.Function):
    """Eq. 17 with its gate, and the mean over positions of ``x * O`` for deep supervision.

    Args of ``apply``:
        x: (B, C, H, W).
        W_q, W_k: (C', C), the weights of query and key.
        gain, shift: (2C',), the affine map of Q and K, in this order; after normalisation where `eps` is given.
        W_v: (C, C), the weight of value.
        gain_v, shift_v: (C,), the affine map of E, likewise.
        W_f, b_f: (C, C) and (C,) of `fuse`; None with one group.
        alpha: scalar gate; None: O alone is wanted.
        groups, landmarks, floor: as in `CSALR`, whose `self_attention_floor` the last is.
        eps: of batch norm by the statistics of the batch; None: no normalisation.
        pooled: whether the mean is wanted.
        dtype: of products over n positions; what has m rows is in fp32 at least.

    Returns:
        ``x + alpha O``, or O, (B, C, H, W); the mean over positions of x * O, (B, C), or None; mean and biased variance
        over the batch of Q and K, (2C',), and of E, (C,), or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_q: Tensor,
        W_k: Tensor,
        gain: Tensor,
        shift: Tensor,
        W_v: Tensor,
        gain_v: Tensor,
        shift_v: Tensor,
        W_f: Tensor | None,
        b_f: Tensor | None,
        alpha: Tensor | None,
        groups: int,
        landmarks: tuple[int, int],
        floor: float,
        eps: float | None,
        pooled: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, ...]:
        """See the class."""
        with no_autocast(x):
            X = x.flatten(2)  # B, C, n
            B, C, n = X.shape
            grid = LandmarkGrid(x.shape[2], x.shape[3], landmarks, x.device)
            way = plan(B, C, n, grid.m, groups, x.device)
            QK = project(X, W_q, W_k, dtype, way)  # B, 2C', n
            normal = Normalisation.over(QK.split(way.images), gain, shift, eps)
            marks = Landmarks.of(QK, normal, grid, groups)
            gathered = gather(X, QK, marks, W_v, way)  # B, groups, m, C or c
            E = values(gathered, W_v, way)  # B, groups, m, c
            normal_v = Normalisation.over([E.mT.flatten(1, 2)], gain_v, shift_v, eps)
            inverse = inverse_of_dominant(raise_diagonal(marks.S_mm, floor))  # B, groups, m, m
            Z = inverse @ normal_v.apply(E)  # B, groups, m, c
            source = spread_source(Z, W_f, b_f, dtype, way)  # B, groups, m, C or c
            at_once = alpha is not None and not pooled and way.at_landmarks and x.dtype == dtype  # with the gate
            if at_once and alpha is not None:
                source = source * alpha.to(dtype)
            out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, dtype))
            mean = X.new_empty((B, C), dtype=E.dtype) if pooled else None
            for part in parts(B, way):
                A = positions_to_landmarks(QK[part], marks, part)
                add_membership(A, grid)
                if at_once:
                    rows, target = source[part].flatten(1, 2), out[part].flatten(2)
                    torch.baddbmm(X[part].to(dtype), rows.mT, A.flatten(1, 2), out=target)
                    continue
                attended = spread(A, source[part], W_f, b_f, way)[0]  # b, C, n
                if mean is not None:
                    mean[part] = torch.linalg.vecdot(X[part].to(dtype), attended) / n
                if alpha is None:
                    out[part].flatten(2).copy_(attended)
                else:
                    torch.addcmul(X[part], attended, alpha, out=out[part].flatten(2))
        statistics = normal.mean, normal.variance, normal_v.mean, normal_v.variance
        ctx.save_for_backward(
            *(x, W_q, W_k, gain, shift, W_v, gain_v, shift_v, W_f, b_f, alpha, *statistics, inverse),
            QK if way.keeps_projections else None,
            gathered if way.keeps_gathered else None,
            E if way.keeps_values else None,
        )
        ctx.settings = grid, way, groups, floor, eps, dtype
        ctx.mark_non_differentiable(*(one for one in statistics if one is not None))
        return out, mean, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_mean: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """From the gradients of the two outputs to those of x and of each parameter."""
        x, W_q, W_k, gain, shift, W_v, gain_v, shift_v, W_f, b_f, alpha, *others = ctx.saved_tensors
        mean_qk, var_qk, mean_e, var_e, inverse, QK, gathered, E = others
        grid, way, groups, floor, eps, dtype = ctx.settings
        with no_autocast(x):
            X = x.flatten(2)  # B, C, n
            B, _, n = X.shape
            if QK is None:
                QK = project(X, W_q, W_k, dtype, way)
            normal = Normalisation(gain, shift, mean_qk, var_qk, eps, B * n)
            normal_v = Normalisation(gain_v, shift_v, mean_e, var_e, eps, B * grid.m)
            marks = Landmarks.of(QK, normal, grid, groups)
            if gathered is None and way.at_landmarks:
                gathered = gather(X, QK, marks, W_v, way)
            if E is None:
                E = values(gathered, W_v, way)
            E_normal = normal_v.apply(E)
            Z = inverse @ E_normal
            source = spread_source(Z, W_f, b_f, dtype, way)

            # Eq. 17 from the left: gate, mean and residual, fuse, A_nm.
            d_x = torch.empty_like(X, dtype=dtype)
            d_O = torch.empty_like(X[: way.images], dtype=dtype)
            d_QK = torch.empty_like(QK)
            d_source = torch.empty_like(source, dtype=Z.dtype)
            d_for_queries, d_bias = torch.empty_like(marks.for_queries), torch.empty_like(marks.bias)
            d_alpha, d_W_f, d_b_f = (None if one is None else torch.zeros_like(one) for one in (alpha, W_f, b_f))
            for part in parts(B, way):
                G = grad_out[part].flatten(2).to(dtype)  # b, C, n
                A = positions_to_landmarks(QK[part], marks, part)
                S_own = add_membership(A, grid)
                attended, U = spread(A, source[part], W_f, b_f, way)
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
                if U is not None and W_f is not None and d_W_f is not None and d_b_f is not None:
                    accumulate(d_W_f, d_O, U)
                    d_b_f += d_O.sum((0, 2))
                    d_U = split(times(W_f.to(dtype).mT, d_O), groups)  # b, groups, c, n
                    d_A = source[part] @ d_U  # b, groups, m, n
                    d_source[part] = A @ d_U.mT  # b, groups, m, c
                else:
                    d_A = (source[part].flatten(1, 2) @ d_O).view_as(A)  # b, groups, m, n
                    d_source[part] = split(A.flatten(1, 2) @ d_O.mT, groups)  # b, groups, m, C
                remove_membership(A, S_own, grid)
                d_logits = softmax_backward(d_A, A, 2)  # b, groups, m, n
                Q, _K = halves(QK[part], groups)
                d_Q, _d_K = halves(d_QK[part], groups)
                d_Q.copy_(marks.for_queries[part].to(dtype) @ d_logits)
                d_for_queries[part] = Q @ d_logits.mT
                d_bias[part] = d_logits.sum(3)[:, :, None]

            # What has m rows: fuse, the inverse of Eq. 16, the normalisation of E, value.
            if way.at_landmarks and W_f is not None:
                d_Z, d_W_f, d_b_f = fuse_backward(d_source, Z, W_f, dtype)
            else:
                d_Z = d_source
            d_E = inverse.mT @ d_Z  # B, groups, m, c
            d_S_mm = raise_diagonal_backward(-d_E @ Z.mT, marks.S_mm, floor)
            d_E, d_gain_v, d_shift_v = normal_v.backward(d_E, E)
            if way.at_landmarks:
                d_gathered, d_W_v = values_backward(d_E, gathered, W_v, dtype)
            else:
                d_gathered, d_W_v = d_E, torch.zeros_like(W_v)

            # S_mn of Eq. 13.
            d_gathered = d_gathered.to(dtype)
            d_for_keys = torch.empty_like(marks.for_keys)
            for part in parts(B, way):
                S_mn = landmarks_to_positions(QK[part], marks, part)
                if way.at_landmarks:
                    rows = d_gathered[part].flatten(1, 2)  # b, groups m, C
                    d_S_mn = (rows @ X[part].to(dtype)).view_as(S_mn)
                    d_x[part].baddbmm_(rows.mT, S_mn.flatten(1, 2))
                else:
                    V = split(times(W_v.to(dtype), X[part].to(dtype)), groups)  # b, groups, c, n
                    d_S_mn = d_gathered[part] @ V
                    d_V = (d_gathered[part].mT @ S_mn).flatten(1, 2)  # b, C, n
                    accumulate(d_W_v, d_V, X[part].to(dtype))
                    d_x[part].baddbmm_(expand(W_v.to(dtype).mT, d_V), d_V)
                d_logits = softmax_backward(d_S_mn, S_mn, 3)  # b, groups, m, n
                _Q, K = halves(QK[part], groups)
                _d_Q, d_K = halves(d_QK[part], groups)
                d_K.copy_(marks.for_keys[part].to(dtype) @ d_logits)
                d_for_keys[part] = K @ d_logits.mT

            # Q and K.
            d_pooled, d_scale, d_offset = marks.backward(normal, d_for_keys, d_for_queries, d_bias, d_S_mm)
            d_gain, d_shift, slope, constant = normal.backward_parameters(d_scale, d_offset)
            W_qk = torch.cat([W_q, W_k])
            d_W_qk = torch.zeros_like(W_qk)
            for part in parts(B, way):
                d_QK[part] += grid.pool_backward(d_pooled[part]).to(dtype)
                if slope is not None and constant is not None:
                    d_QK[part].addcmul_(QK[part], slope.to(dtype)[:, None]).add_(constant.to(dtype)[:, None])
                accumulate(d_W_qk, d_QK[part], X[part].to(dtype))
                d_x[part].baddbmm_(expand(W_qk.to(dtype).mT, d_x[part]), d_QK[part])
            d_W_q, d_W_k = d_W_qk.split(len(W_q))
        d_x = d_x.to(x.dtype).view_as(x)
        return (
            *(d_x, d_W_q, d_W_k, d_gain, d_shift, d_W_v, d_gain_v, d_shift_v, d_W_f, d_b_f, d_alpha),
            *(None,) * 6,
        )


class Normalisation:
    """Batch norm as the affine map a channel that it is, ``scale * features + offset``.

    Attributes:
        scale, offset: (channels,); with `eps` None they are `gain` and `shift` themselves.
        mean, variance: (channels,) of the batch, biased; None with `eps` None.
    """

    def __init__(
        self, gain: Tensor, shift: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float | None, count: int
    ) -> None:
        self.gain, self.shift, self.count = gain, shift, count
        self.mean, self.variance = mean, variance
        self.scale, self.offset = gain, shift
        self.inverse_deviation: Tensor | None = None
        if mean is not None and variance is not None and eps is not None:
            self.inverse_deviation = (variance + eps).rsqrt()
            self.scale = gain * self.inverse_deviation
            self.offset = shift - self.scale * mean

    @classmethod
    def over(cls, chunks: Sequence[Tensor], gain: Tensor, shift: Tensor, eps: float | None) -> Normalisation:
        """By the statistics of `chunks`, each (b, channels, positions); without any where `eps` is None."""
        positions = chunks[0].shape[2]
        count = sum(map(len, chunks)) * positions
        if eps is None:
            return cls(gain, shift, None, None, None, count)
        # Each image's own mean first (Chan et al., 1979): the difference of two large sums would lose digits.
        means, squares = [], []
        for chunk in chunks:
            mean = chunk.mean(2, dtype=gain.dtype)  # b, channels
            means.append(mean)
            squares.append(torch.linalg.vector_norm(chunk - mean[:, :, None], dim=2).square())
        each = torch.cat(means)  # B, channels
        mean = each.mean(0)
        variance = (torch.cat(squares) + positions * (each - mean).square()).sum(0) / count
        return cls(gain, shift, mean, variance, eps, count)

    def apply(self, E: Tensor) -> Tensor:
        """(B, groups, m, c), whose channels are groups x c -> the same shape."""
        scale, offset = (one.view(E.shape[1], 1, -1) for one in (self.scale, self.offset))  # groups, 1, c
        return E * scale + offset

    def backward(self, d_E: Tensor, E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the gradient of `apply`, (B, groups, m, c), to those of E, gain and shift."""
        per_channel = (E.shape[1], 1, E.shape[3])
        d_scale, d_offset = (d_E * E).sum((0, 2)).flatten(), d_E.sum((0, 2)).flatten()
        d_gain, d_shift, slope, constant = self.backward_parameters(d_scale, d_offset)
        d_E = d_E * self.scale.view(per_channel)
        if slope is not None and constant is not None:
            d_E = torch.addcmul(d_E, E, slope.view(per_channel)) + constant.view(per_channel)
        return d_E, d_gain, d_shift

    def backward_parameters(
        self, d_scale: Tensor, d_offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Gradients of gain and shift, and (slope, constant): ``slope * features + constant`` is what the features'
        gradient gets through mean and variance. All (channels,)."""
        if self.inverse_deviation is None or self.mean is None:
            return d_scale, d_offset, None, None
        d_scale = d_scale - d_offset * self.mean  # offset = shift - scale * mean
        d_variance = -0.5 * d_scale * self.scale * self.inverse_deviation.square()
        d_mean = -d_offset * self.scale
        slope = 2 * d_variance / self.count
        return d_scale * self.inverse_deviation, d_offset, slope, d_mean / self.count - slope * self.mean


class Landmarks(NamedTuple):
    """What is computed from the patch means of Q and K; in fp32 at least."""

    pooled: Tensor  # of raw Q and K, (B, 2C', m)
    Q: Tensor  # Q', normalised, (B, groups, C'/groups, m)
    K: Tensor  # K', normalised but for the shift, which no softmax sees
    for_keys: Tensor  # times raw K: the logits of S_mn; (B, groups, C'/groups, m)
    for_queries: Tensor  # times raw Q, plus `bias`: the logits of S_nm
    bias: Tensor  # (B, groups, 1, m)
    S_mm: Tensor  # (B, groups, m, m)
    guard: Tensor  # scalar, see `logit_guard`

    @classmethod
    def of(cls, QK: Tensor, normal: Normalisation, grid: LandmarkGrid, groups: int) -> Landmarks:
        """From raw Q and K, (B, 2C', n)."""
        pooled = grid.pool(QK).to(normal.scale.dtype)  # B, 2C', m
        Q, K = halves(pooled, groups)
        q_scale, k_scale = halves(normal.scale[None, :, None], groups)  # 1, groups, C'/groups, 1
        q_offset, _ = halves(normal.offset[None, :, None], groups)
        guard = logit_guard(QK, normal)
        Q = Q * q_scale + q_offset
        K = K * k_scale * guard
        return cls(
            *(pooled, Q, K, Q * k_scale * guard, K * q_scale, (K * q_offset).sum(2, keepdim=True)),
            (Q.mT @ K).softmax(-1),
            guard,
        )

    def backward(
        self, normal: Normalisation, d_for_keys: Tensor, d_for_queries: Tensor, d_bias: Tensor, d_S_mm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `pooled`, (B, 2C', m), and of the scale and the offset of Q and K, (2C',)."""
        groups = self.Q.shape[1]
        q_scale, k_scale = halves(normal.scale[None, :, None], groups)  # 1, groups, C'/groups, 1
        q_offset, _ = halves(normal.offset[None, :, None], groups)
        q_pooled, k_pooled = halves(self.pooled, groups)
        d_logits = softmax_backward(d_S_mm, self.S_mm, 3)
        d_Q = self.K @ d_logits.mT + d_for_keys * k_scale * self.guard
        d_K = self.Q @ d_logits + d_for_queries * q_scale + d_bias * q_offset
        d_K = d_K * self.guard
        over = (0, 3)
        d_scale = torch.stack(
            [
                (d_for_queries * self.K + d_Q * q_pooled).sum(over),
                (d_for_keys * self.Q * self.guard + d_K * k_pooled).sum(over),
            ]
        ).flatten()
        d_offset = ((d_bias * self.K) + d_Q).sum(over).flatten()
        d_pooled = torch.cat([(d_Q * q_scale).flatten(1, 2), (d_K * k_scale).flatten(1, 2)], dim=1)
        return d_pooled, d_scale, torch.cat([d_offset, torch.zeros_like(d_offset)])


def logit_guard(QK: Tensor, normal: Normalisation) -> Tensor:
    """A factor for one side of each dot product so that no logit overflows fp32; exactly 1 in any sane network.

    It is below 1 only beyond 1e17, where a softmax is a hard maximum in any precision.
    """
    limit = 1e17
    if normal.inverse_deviation is None:
        low, high = torch.aminmax(QK)
        largest = torch.maximum(-low, high).to(normal.scale.dtype) * normal.scale.abs() + normal.offset.abs()
    else:  # no value is further from the mean of N than sqrt(N) standard deviations
        largest = normal.count**0.5 * normal.gain.abs() + normal.shift.abs()
    q, k = largest.view(2, -1).amax(1).clamp(min=limit)
    return (limit / q) * (limit / k)


# n positions


def project(X: Tensor, W_q: Tensor, W_k: Tensor, dtype: torch.dtype, way: Plan) -> Tensor:
    """Q and K before bias and normalisation: (B, C, n) -> (B, 2C', n)."""
    W_qk = torch.cat([W_q, W_k]).to(dtype)
    QK = X.new_empty(len(X), len(W_qk), X.shape[2], dtype=dtype)
    for part in parts(len(X), way):
        torch.bmm(expand(W_qk, X[part]), X[part].to(dtype), out=QK[part])
    return QK


def positions_to_landmarks(QK: Tensor, marks: Landmarks, part: slice) -> Tensor:
    """Eq. 15 without P, transposed: (b, groups, m, n), whose columns sum to 1."""
    Q, _ = halves(QK, marks.Q.shape[1])
    bias, for_queries = (one[part].to(QK.dtype).flatten(0, 1) for one in (marks.bias, marks.for_queries))
    logits = torch.baddbmm(bias.mT, for_queries.mT, Q.flatten(0, 1))  # b groups, m, n
    return logits.softmax(1).view(*Q.shape[:2], -1, Q.shape[3])


def landmarks_to_positions(QK: Tensor, marks: Landmarks, part: slice) -> Tensor:
    """Eq. 13: (b, groups, m, n), whose rows sum to 1."""
    _, K = halves(QK, marks.Q.shape[1])
    return (marks.for_keys[part].to(QK.dtype).mT @ K).softmax(3)


def add_membership(S_nm: Tensor, grid: LandmarkGrid) -> Tensor:
    """Add P of Eq. 15 in place; return the entries as they were, for :func:`remove_membership`."""
    index = grid.landmark_of().expand(*S_nm.shape[:2], 1, -1)
    own = S_nm.gather(2, index)
    S_nm.scatter_(2, index, own + 1)
    return own


def remove_membership(A_nm: Tensor, own: Tensor, grid: LandmarkGrid) -> None:
    """Take P away again; a subtraction would lose the digits of small entries."""
    A_nm.scatter_(2, grid.landmark_of().expand(*A_nm.shape[:2], 1, -1), own)


def gather(X: Tensor, QK: Tensor, marks: Landmarks, W_v: Tensor, way: Plan) -> Tensor:
    """S_mn X^T, (B, groups, m, C), or, where `value` acts on positions, E of it, (B, groups, m, c)."""
    groups, dtype, collected = marks.Q.shape[1], QK.dtype, []
    for part in parts(len(X), way):
        S_mn = landmarks_to_positions(QK[part], marks, part)
        if way.at_landmarks:
            rows = S_mn.flatten(1, 2) @ X[part].to(dtype).mT  # b, groups m, C
            collected.append(rows.unflatten(1, (groups, -1)))
        else:
            V = split(times(W_v.to(dtype), X[part].to(dtype)), groups)  # b, groups, c, n
            collected.append((S_mn @ V.mT).to(marks.Q.dtype))  # b, groups, m, c
    return torch.cat(collected)


def spread(
    A_nm: Tensor, source: Tensor, W_f: Tensor | None, b_f: Tensor | None, way: Plan
) -> tuple[Tensor, Tensor | None]:
    """O of Eq. 17, (b, C, n), from A_nm and `spread_source`; and before `fuse`, where that acts on positions."""
    if way.at_landmarks:
        return source.flatten(1, 2).mT @ A_nm.flatten(1, 2), None
    U = (source.mT @ A_nm).flatten(1, 2)  # b, C, n
    if W_f is None or b_f is None:
        return U, None
    return torch.baddbmm(b_f.to(U.dtype)[:, None], expand(W_f.to(U.dtype), U), U), U


# m landmarks


def values(gathered: Tensor, W_v: Tensor, way: Plan) -> Tensor:
    """E before normalisation and bias, (B, groups, m, c) in fp32 at least, from what `gather` returned."""
    if not way.at_landmarks:
        return gathered
    dtype = torch.promote_types(gathered.dtype, torch.float32)
    heads = W_v.to(gathered.dtype).chunk(gathered.shape[1])  # c, C each
    return torch.stack([(rows @ head.mT).to(dtype) for rows, head in zip(gathered.unbind(1), heads, strict=True)], 1)


def values_backward(d_E: Tensor, gathered: Tensor, W_v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of `gathered` and W_v."""
    heads = W_v.to(dtype).chunk(d_E.shape[1])  # c, C each
    d_heads = d_E.to(dtype).unbind(1)  # B, m, c each
    d_gathered = torch.stack([d_head @ head for d_head, head in zip(d_heads, heads, strict=True)], 1)
    d_W_v = [d.flatten(0, 1).mT @ rows.flatten(0, 1) for d, rows in zip(d_heads, gathered.unbind(1), strict=True)]
    return d_gathered, torch.cat(d_W_v).to(W_v.dtype)


def spread_source(Z: Tensor, W_f: Tensor | None, b_f: Tensor | None, dtype: torch.dtype, way: Plan) -> Tensor:
    """What A_nm spreads: Z, (B, groups, m, c), or Z fused a group, (B, groups, m, C)."""
    if not way.at_landmarks or W_f is None or b_f is None:
        return Z.to(dtype)
    groups = Z.shape[1]
    heads = W_f.to(dtype).chunk(groups, dim=1)  # C, c each
    fused = torch.stack([rows @ head.mT for rows, head in zip(Z.to(dtype).unbind(1), heads, strict=True)], 1)
    return fused + b_f.to(dtype) / (2 * groups)  # each group's rows of S_nm + P sum to 2


def fuse_backward(d_source: Tensor, Z: Tensor, W_f: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Z, W_f and b_f from that of `spread_source`."""
    groups = Z.shape[1]
    heads = W_f.to(dtype).chunk(groups, dim=1)  # C, c each
    rows = d_source.to(dtype).unbind(1)  # B, m, C each
    d_Z = torch.stack([d_row @ head for d_row, head in zip(rows, heads, strict=True)], 1).to(Z.dtype)
    d_W_f = [d.flatten(0, 1).mT @ z.flatten(0, 1) for d, z in zip(rows, Z.to(dtype).unbind(1), strict=True)]
    return d_Z, torch.cat(d_W_f, 1).to(W_f.dtype), d_source.sum((0, 1, 2)) / (2 * groups)


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


# Small tools


def parts(batch: int, way: Plan) -> Iterator[slice]:
    """Slices of the batch that are computed together."""
    for start in range(0, batch, way.images):
        yield slice(start, start + way.images)


def halves(QK: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Q's and K's share of (b, 2C', any), in groups: two of (b, groups, C'/groups, any)."""
    Q, K = QK.chunk(2, dim=1)
    return split(Q, groups), split(K, groups)


def split(features: Tensor, groups: int) -> Tensor:
    """(b, C, any) -> (b, groups, C/groups, any)."""
    return features.unflatten(1, (groups, -1))  # type: ignore[no-untyped-call]


def expand(weight: Tensor, like: Tensor) -> Tensor:
    """A weight for every image of `like`, without a copy: (C_out, C) -> (b, C_out, C)."""
    return weight.expand(len(like), -1, -1)


def times(weight: Tensor, features: Tensor) -> Tensor:
    """A 1x1 convolution: (C_out, C), (b, C, n) -> (b, C_out, n)."""
    return torch.bmm(expand(weight, features), features)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left right^T`` of each image to `total`: (r, s), (b, r, n), (b, s, n)."""
    for one, other in zip(left, right, strict=True):
        if total.dtype == one.dtype:
            total.addmm_(one, other.mT)
        else:
            total += one @ other.mT


def softmax_backward(gradient: Tensor, probabilities: Tensor, dim: int) -> Tensor:
    """The gradient of the logits of a softmax over dimension `dim`."""
    return torch._softmax_backward_data(gradient, probabilities, dim, probabilities.dtype)


def no_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Types are chosen by hand inside. On "meta", where costs are counted, there is no autocast to switch off."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)
