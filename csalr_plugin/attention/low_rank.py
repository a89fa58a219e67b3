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

from csalr_plugin.attention.batch_norm import over_processes, sum_over_processes, world_size
from csalr_plugin.attention.block import softmax_backward, split
from csalr_plugin.attention.landmarks import LandmarkGrid


class Plan(NamedTuple):
    """How to evaluate the formula for one shape. Every plan gives the same numbers."""

    at_landmarks: bool  # `value` and `fuse` act on landmarks, not on positions
    keeps_projections: bool  # Q and K are kept for the backward pass
    keeps_gathered: bool  # so is S_mn X^T, or V
    keeps_values: bool  # and E
    keeps_fused: bool  # and what `fuse` made of Z
    images: int  # computed at a time


def plan(batch: int, channels: int, n: int, m: int, groups: int, device: torch.device) -> Plan:
    """The plan for `batch` maps of `channels` by n positions with m landmarks, from the shapes alone.

    What takes some 512 multiplications a number and more is kept, what takes fewer is computed again; V is kept, as
    it takes the most.
    """
    landmark_cost = groups * n * m * channels + m * channels**2
    position_cost = n * channels**2 + n * m * channels
    # Products over all groups at once are some 15 % faster than those a group on a CPU.
    at_landmarks = landmark_cost <= 1.15 * position_cost
    return Plan(
        at_landmarks=at_landmarks,
        keeps_projections=channels >= 512,
        keeps_gathered=not at_landmarks or n > 512,
        keeps_values=not at_landmarks or channels > 512,
        keeps_fused=at_landmarks and groups > 1 and channels // groups >= 512,
        # 8 MiB of x in fp32, and a power of two, which threads share out evenly.
        images=2 ** max(0, (2**21 // (channels * n)).bit_length() - 1) if device.type == "cpu" else batch,
    )


class LowRankAttention(torch.autograd.Function):
    """Eq. 17 with its gate, and the mean over positions of ``x * O`` for deep supervision.

    Args of ``apply``:
        x: (B, C, H, W).
        W_q, gain_q, shift_q: (C', C), (C',) and (C',): query's weight, and the affine map a channel that follows it;
            with `eps` normalisation stands between the two.
        W_k, gain_k: the same of key, whose shift no softmax sees.
        W_v, gain_v, shift_v: (C, C), (C,) and (C,) of value, whose affine map and normalisation act on E.
        W_f, b_f: (C, C) and (C,) of `fuse`; None with one group.
        alpha: scalar gate; None: O alone is wanted.
        groups, landmarks, floor: as in `CSALR`, whose `self_attention_floor` the last is.
        eps: of batch norm by the statistics of the batch; None: no normalisation.
        everywhere: whether these are of the batches of all processes.
        pooled: whether the mean is wanted.
        dtype: of products over n positions; what has m rows is in fp32 at least.

    Returns:
        ``x + alpha O``, or O, (B, C, H, W); the mean over positions of x * O, (B, C), or None; and a mean and a biased
        variance over the batch for Q, K, (C',), and E, (C,), or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_q: Tensor,
        gain_q: Tensor,
        shift_q: Tensor,
        W_k: Tensor,
        gain_k: Tensor,
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
        everywhere: bool,
        pooled: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, ...]:
        """See the class."""
        with no_autocast(x):
            X = x.flatten(2)  # B, C, n
            B, C, n = X.shape
            grid = LandmarkGrid(x.shape[2], x.shape[3], landmarks, x.device)
            way = plan(B, C, n, grid.m, groups, x.device)
            Q, K = (project(X, W, dtype, way) for W in (W_q, W_k))  # B, C', n
            normal_q = Normalisation.over([Q[part] for part in parts(B, way)], gain_q, shift_q, eps, everywhere)
            normal_k = Normalisation.over(
                [K[part] for part in parts(B, way)], gain_k, torch.zeros_like(gain_k), eps, everywhere
            )
            marks = Landmarks.of(Q, K, normal_q, normal_k, grid, groups)
            V = None if way.at_landmarks else project(X, W_v, dtype, way)  # B, C, n
            gathered = gather(X if V is None else V, K, marks, way)  # B, groups, m, C or c
            E = values(gathered, W_v, way)  # B, groups, m, c
            normal_v = Normalisation.over([E.mT.flatten(1, 2)], gain_v, shift_v, eps, everywhere)
            inverse = inverse_of_dominant(raise_diagonal(marks.S_mm, floor))  # B, groups, m, m
            Z = inverse @ normal_v.apply(E)  # B, groups, m, c
            source = spread_source(Z, W_f, b_f, dtype, way)  # B, groups, m, C or c
            out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, dtype))
            mean = X.new_empty((B, C), dtype=E.dtype) if pooled else None
            gated = alpha is not None and not pooled and way.at_landmarks and x.dtype == dtype
            scaled = source * alpha.to(dtype) if alpha is not None and gated else source
            for part in parts(B, way):
                A = positions_to_landmarks(Q, marks, part)
                add_membership(A, grid)
                if gated:  # product, gate and residual in one
                    target = out[part].flatten(2)
                    torch.baddbmm(X[part], scaled[part].flatten(1, 2).mT, A.flatten(1, 2), out=target)
                    continue
                attended, _ = spread(A, source[part], W_f, b_f, way)  # b, C, n
                if mean is not None:
                    mean[part] = torch.linalg.vecdot(X[part].to(dtype), attended) / n
                if alpha is None:
                    out[part].flatten(2).copy_(attended)
                else:
                    torch.addcmul(X[part], attended, alpha, out=out[part].flatten(2))
        statistics = [one for normal in (normal_q, normal_k, normal_v) for one in (normal.mean, normal.variance)]
        kept_gathered = (gathered if V is None else V) if way.keeps_gathered else None
        ctx.save_for_backward(
            *(x, W_q, gain_q, shift_q, W_k, gain_k, W_v, gain_v, shift_v, W_f, b_f, alpha, *statistics, inverse),
            *((Q, K) if way.keeps_projections else (None, None)),
            kept_gathered,
            E if way.keeps_values else None,
            source if way.keeps_fused else None,
        )
        ctx.settings = grid, way, groups, floor, eps, everywhere, dtype
        ctx.mark_non_differentiable(*(one for one in statistics if one is not None))
        return out, mean, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_mean: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """From the gradients of the two outputs to those of x and of each parameter."""
        x, W_q, gain_q, shift_q, W_k, gain_k, W_v, gain_v, shift_v, W_f, b_f, alpha, *others = ctx.saved_tensors
        mean_q, variance_q, mean_k, variance_k, mean_e, variance_e, inverse, Q, K, gathered, E, source = others
        grid, way, groups, floor, eps, everywhere, dtype = ctx.settings
        with no_autocast(x):
            X = x.flatten(2)  # B, C, n
            B, _, n = X.shape
            if Q is None:
                Q, K = (project(X, W, dtype, way) for W in (W_q, W_k))
            images = B * (world_size() if everywhere else 1)
            normal_q = Normalisation(gain_q, shift_q, mean_q, variance_q, eps, images * n, everywhere)
            normal_k = Normalisation(gain_k, torch.zeros_like(gain_k), mean_k, variance_k, eps, images * n, everywhere)
            normal_v = Normalisation(gain_v, shift_v, mean_e, variance_e, eps, images * grid.m, everywhere)
            marks = Landmarks.of(Q, K, normal_q, normal_k, grid, groups)
            V = None
            if not way.at_landmarks:
                V = project(X, W_v, dtype, way) if gathered is None else gathered  # see Plan.keeps_gathered
            elif gathered is None:
                gathered = gather(X, K, marks, way)
            if E is None:
                E = values(gathered, W_v, way) if V is None else gather(V, K, marks, way)
            Z = inverse @ normal_v.apply(E)
            if source is None:
                source = spread_source(Z, W_f, b_f, dtype, way)

            # Eq. 17 from the left: residual and gate, the mean, fuse, A_nm.
            d_x, d_Q, d_K = (torch.empty_like(one, dtype=dtype) for one in (X, Q, K))
            d_O = torch.empty_like(X[: way.images], dtype=dtype)
            d_source = torch.empty_like(source, dtype=Z.dtype)
            d_for_queries, d_bias = torch.empty_like(marks.for_queries), torch.empty_like(marks.bias)
            d_alpha, d_W_f, d_b_f = (None if one is None else torch.zeros_like(one) for one in (alpha, W_f, b_f))
            for part in parts(B, way):
                G = grad_out[part].flatten(2).to(dtype)  # b, C, n
                A = positions_to_landmarks(Q, marks, part)
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
                else:
                    d_U = d_O if way.at_landmarks else split(d_O, groups)
                rows = source[part].flatten(1, 2) if way.at_landmarks else source[part]  # b, (groups) m, C or c
                A_rows = A.flatten(1, 2) if way.at_landmarks else A
                d_A = (rows @ d_U).view_as(A)
                d_source[part] = (A_rows @ d_U.mT).view_as(source[part])
                remove_membership(A, S_own, grid)
                d_logits = softmax_backward(d_A, A, 2)  # b, groups, m, n
                times_into(d_Q[part], marks.for_queries[part].to(dtype), d_logits)
                d_for_queries[part] = split(Q[part], groups) @ d_logits.mT
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
                d_gathered, d_W_v = d_E.to(dtype), torch.zeros_like(W_v)

            # S_mn of Eq. 13.
            d_for_keys = torch.empty_like(marks.for_keys)
            for part in parts(B, way):
                S_mn = landmarks_to_positions(K, marks, part)
                if V is None:
                    rows = d_gathered[part].flatten(1, 2)  # b, groups m, C
                    d_S_mn = (rows @ X[part].to(dtype)).view_as(S_mn)
                    d_x[part].baddbmm_(rows.mT, S_mn.flatten(1, 2))
                else:
                    d_S_mn = d_gathered[part] @ split(V[part], groups)
                    d_V = (d_gathered[part].mT @ S_mn).flatten(1, 2)  # b, C, n
                    accumulate(d_W_v, d_V, X[part].to(dtype))
                    d_x[part].baddbmm_(expand(W_v.to(dtype).mT, d_V), d_V)
                d_logits = softmax_backward(d_S_mn, S_mn, 3)  # b, groups, m, n
                times_into(d_K[part], marks.for_keys[part].to(dtype), d_logits)
                d_for_keys[part] = split(K[part], groups) @ d_logits.mT

            # Q and K.
            d_pooled_q, d_pooled_k, d_scale_q, d_offset_q, d_scale_k = marks.backward(
                normal_q, normal_k, d_for_keys, d_for_queries, d_bias, d_S_mm
            )
            d_gain_q, d_shift_q, slope_q, constant_q = normal_q.backward_parameters(d_scale_q, d_offset_q)
            d_gain_k, _no_shift, slope_k, constant_k = normal_k.backward_parameters(
                d_scale_k, torch.zeros_like(d_scale_k)
            )
            d_W_q, d_W_k = torch.zeros_like(W_q), torch.zeros_like(W_k)
            sides = (
                (W_q, d_W_q, Q, d_Q, d_pooled_q, slope_q, constant_q),
                (W_k, d_W_k, K, d_K, d_pooled_k, slope_k, constant_k),
            )
            sizes = grid.sizes().flatten()  # m
            for part in parts(B, way):
                for W, d_W, features, d_features, d_pooled, slope, constant in sides:
                    d_part, d_means = d_features[part], d_pooled[part]
                    if slope is not None and constant is not None:
                        d_part.addcmul_(features[part], slope.to(dtype)[:, None])
                        d_means = d_means + sizes * constant[:, None]
                    d_part += grid.pool_backward(d_means).to(dtype)
                    accumulate(d_W, d_part, X[part].to(dtype))
                    d_x[part].baddbmm_(expand(W.to(dtype).mT, d_part), d_part)
        d_x = d_x.to(x.dtype).view_as(x)
        return (
            *(d_x, d_W_q, d_gain_q, d_shift_q, d_W_k, d_gain_k, d_W_v, d_gain_v, d_shift_v, d_W_f, d_b_f, d_alpha),
            *(None,) * 7,
        )


class Normalisation:
    """Batch norm as the affine map a channel that it is, ``scale * features + offset``.

    Attributes:
        scale, offset: (channels,); with `eps` None they are `gain` and `shift` themselves.
        mean, variance: (channels,) of the batch, biased; None with `eps` None.
    """

    def __init__(
        self,
        gain: Tensor,
        shift: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        eps: float | None,
        count: int,
        everywhere: bool,
    ) -> None:
        self.gain, self.shift, self.count, self.everywhere = gain, shift, count, everywhere
        self.mean, self.variance = mean, variance
        self.scale, self.offset = gain, shift
        self.inverse_deviation: Tensor | None = None
        if mean is not None and variance is not None and eps is not None:
            self.inverse_deviation = (variance + eps).rsqrt()
            self.scale = gain * self.inverse_deviation
            self.offset = shift - self.scale * mean

    @classmethod
    def over(
        cls, chunks: Sequence[Tensor], gain: Tensor, shift: Tensor, eps: float | None, everywhere: bool
    ) -> Normalisation:
        """By the statistics of `chunks`, each (b, channels, positions); without any where `eps` is None.

        `everywhere`: of the chunks of all processes.
        """
        positions = chunks[0].shape[2]
        count = sum(map(len, chunks)) * positions
        if eps is None:
            return cls(gain, shift, None, None, None, count, everywhere)
        # Each image's own mean first (Chan et al., 1979): the difference of two large sums would lose digits.
        means, squares = [], []
        for chunk in chunks:
            mean = chunk.mean(2, dtype=gain.dtype)  # b, channels
            means.append(mean)
            squares.append(torch.linalg.vector_norm(chunk - mean[:, :, None], dim=2).square())
        each = torch.cat(means)  # B, channels
        mean = each.mean(0)
        deviations = (torch.cat(squares) + positions * (each - mean).square()).sum(0)
        if everywhere:
            mean, deviations, count = over_processes(mean, deviations, count)
        return cls(gain, shift, mean, deviations / count, eps, count, everywhere)

    def largest(self, features: Tensor) -> Tensor:
        """A bound on the size of any normalised feature, from the raw ones, of any shape: scalar."""
        if self.inverse_deviation is not None:  # none is further from the mean of N than sqrt(N) deviations
            return (self.count**0.5 * self.gain.abs() + self.shift.abs()).amax()
        low, high = torch.aminmax(features)
        return (torch.maximum(-low, high).to(self.scale.dtype) * self.scale.abs() + self.offset.abs()).amax()

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
        """Gradients of gain and shift, and (slope, constant): what each feature's gradient gets through mean and
        variance is ``slope * feature + constant``. All (channels,)."""
        if self.inverse_deviation is None or self.mean is None:
            return d_scale, d_offset, None, None
        d_scale = d_scale - d_offset * self.mean  # offset = shift - scale * mean
        d_gain, d_shift = d_scale * self.inverse_deviation, d_offset
        if self.everywhere:  # mean and variance act on every process's features
            d_scale, d_offset = sum_over_processes(d_scale, d_offset)
        d_variance = -0.5 * d_scale * self.scale * self.inverse_deviation.square()
        d_mean = -d_offset * self.scale
        slope = 2 * d_variance / self.count
        return d_gain, d_shift, slope, d_mean / self.count - slope * self.mean


class Landmarks(NamedTuple):
    """What is computed from the patch means of Q and K; (B, groups, C'/groups, m) and in fp32 at least."""

    pooled_q: Tensor  # of raw Q
    pooled_k: Tensor
    Q: Tensor  # Q', normalised
    K: Tensor  # K', normalised but for the shift, which no softmax sees
    for_keys: Tensor  # times raw K: the logits of S_mn
    for_queries: Tensor  # times raw Q, plus `bias`: the logits of S_nm
    bias: Tensor  # (B, groups, 1, m)
    S_mm: Tensor  # (B, groups, m, m)
    guard: Tensor  # scalar, 1 in any sane network: keeps logits within fp32

    @classmethod
    def of(
        cls, Q: Tensor, K: Tensor, normal_q: Normalisation, normal_k: Normalisation, grid: LandmarkGrid, groups: int
    ) -> Landmarks:
        """From raw Q and K, (B, C', n).

        The guard is below 1 only beyond 1e17, where a softmax is a hard maximum in any precision.
        """
        limit = 1e17
        guard = (limit / normal_q.largest(Q).clamp(min=limit)) * (limit / normal_k.largest(K).clamp(min=limit))
        pooled_q, pooled_k = (split(grid.pool(one).to(guard.dtype), groups) for one in (Q, K))
        scale_q, offset_q, scale_k = per_group(groups, normal_q.scale, normal_q.offset, normal_k.scale)
        Q = pooled_q * scale_q + offset_q
        K = pooled_k * scale_k * guard
        bias = (K * offset_q).sum(2, keepdim=True)
        S_mm = (Q.mT @ K).softmax(3)
        return cls(pooled_q, pooled_k, Q, K, Q * scale_k * guard, K * scale_q, bias, S_mm, guard)

    def backward(
        self,
        normal_q: Normalisation,
        normal_k: Normalisation,
        d_for_keys: Tensor,
        d_for_queries: Tensor,
        d_bias: Tensor,
        d_S_mm: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of pooled Q and K, (B, C', m), and of Q's scale and offset and K's scale, (C',)."""
        scale_q, offset_q, scale_k = per_group(self.Q.shape[1], normal_q.scale, normal_q.offset, normal_k.scale)
        d_logits = softmax_backward(d_S_mm, self.S_mm, 3)
        d_Q = self.K @ d_logits.mT + d_for_keys * scale_k * self.guard
        d_K = (self.Q @ d_logits + d_for_queries * scale_q + d_bias * offset_q) * self.guard
        d_scale_q = (d_for_queries * self.K + d_Q * self.pooled_q).sum((0, 3)).flatten()
        d_scale_k = (d_for_keys * self.Q * self.guard + d_K * self.pooled_k).sum((0, 3)).flatten()
        d_offset_q = (d_bias * self.K + d_Q).sum((0, 3)).flatten()
        return (d_Q * scale_q).flatten(1, 2), (d_K * scale_k).flatten(1, 2), d_scale_q, d_offset_q, d_scale_k


# n positions


def project(X: Tensor, W: Tensor, dtype: torch.dtype, way: Plan) -> Tensor:
    """A projection before bias and normalisation: (B, C, n) -> (B, C_out, n)."""
    projected = X.new_empty(len(X), len(W), X.shape[2], dtype=dtype)
    W = W.to(dtype)
    for part in parts(len(X), way):
        torch.bmm(expand(W, X[part]), X[part].to(dtype), out=projected[part])
    return projected


def positions_to_landmarks(Q: Tensor, marks: Landmarks, part: slice) -> Tensor:
    """S_nm of Eq. 15, transposed: (b, groups, m, n), whose columns sum to 1."""
    bias, factor = (one[part].to(Q.dtype).flatten(0, 1).mT for one in (marks.bias, marks.for_queries))
    groups = marks.Q.shape[1]
    logits = torch.baddbmm(bias, factor, split(Q[part], groups).flatten(0, 1))  # b groups, m, n
    return logits.softmax(1).view(-1, groups, *logits.shape[1:])


def landmarks_to_positions(K: Tensor, marks: Landmarks, part: slice) -> Tensor:
    """S_mn of Eq. 13: (b, groups, m, n), whose rows sum to 1."""
    return (marks.for_keys[part].to(K.dtype).mT @ split(K[part], marks.Q.shape[1])).softmax(3)


def add_membership(S_nm: Tensor, grid: LandmarkGrid) -> Tensor:
    """Add P of Eq. 15 in place; return the entries as they were, for :func:`remove_membership`."""
    index = grid.landmark_of().expand(*S_nm.shape[:2], 1, -1)
    own = S_nm.gather(2, index)
    S_nm.scatter_(2, index, own + 1)
    return own


def remove_membership(A_nm: Tensor, own: Tensor, grid: LandmarkGrid) -> None:
    """Take P away again; a subtraction would lose the digits of small entries."""
    A_nm.scatter_(2, grid.landmark_of().expand(*A_nm.shape[:2], 1, -1), own)


def gather(features: Tensor, K: Tensor, marks: Landmarks, way: Plan) -> Tensor:
    """S_mn X^T, (B, groups, m, C), from X; or, where `value` acts on positions, E, (B, groups, m, c), from V."""
    (B, groups, _, m), rows = marks.Q.shape, features.shape[1]
    if way.at_landmarks:
        gathered = features.new_empty(B, groups, m, rows, dtype=K.dtype)
    else:
        gathered = features.new_empty(B, groups, m, rows // groups, dtype=marks.Q.dtype)
    for part in parts(B, way):
        S_mn = landmarks_to_positions(K, marks, part)
        if way.at_landmarks:
            X = features[part].to(K.dtype)
            torch.bmm(S_mn.flatten(1, 2), X.mT, out=gathered[part].flatten(1, 2))
        else:
            gathered[part] = S_mn @ split(features[part], groups).mT
    return gathered


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


def spread_source(
    Z: Tensor, W_f: Tensor | None, b_f: Tensor | None, dtype: torch.dtype, way: Plan, total: int = 2
) -> Tensor:
    """What A_nm spreads: Z, (B, groups, m, c), or Z fused a group, (B, groups, m, C).

    Each group's rows of A_nm = S_nm + P have the sum `total`.
    """
    if not way.at_landmarks or W_f is None or b_f is None:
        return Z.to(dtype)
    groups = Z.shape[1]
    heads = W_f.to(dtype).chunk(groups, dim=1)  # C, c each
    fused = torch.stack([rows @ head.mT for rows, head in zip(Z.to(dtype).unbind(1), heads, strict=True)], 1)
    return fused + b_f.to(dtype) / (total * groups)


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


def per_group(groups: int, *vectors: Tensor) -> Iterator[Tensor]:
    """(C',) each -> (groups, C'/groups, 1) each."""
    return (vector.view(groups, -1, 1) for vector in vectors)


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
