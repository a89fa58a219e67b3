"""CSALR's formula and its gradient, written out so that little is multiplied and less is kept.

With the projections Q, K (C' channels, n positions), their patch means Q', K' (m landmarks) and values V:

    E = softmax(Q'^T K) V^T     Z = (softmax(Q'^T K') + I)^-1 E     O = (softmax(Q^T K') + P) Z     (Eq. 13-17)

What is done about the cost, each of it exact:

- Of tensors with n positions only x is kept for the backward pass, and Q, K and V where they are dear to compute again
  and cheap to keep. The maps are computed again.
- Batch norm never touches Q and K. It is an affine map a channel, so it moves to the other factor of the dot
  product, which has m columns; and its gradient needs sums over landmarks only.
- Where groups are few, `value` acts on the m rows of S_mn X^T and `fuse` on the m rows of Z, in place of n
  positions. :func:`plan` counts which is less.
- A constant added to a row of logits leaves its softmax as it is, so the bias and the shift of `key` drop out.
- What happens at n positions and m landmarks are the passes of `csalr_plugin.attention.positions`; on a CPU those of
  `csalr_plugin.attention.compiled`, which never write a map of n positions to memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from csalr_plugin.attention.batch_norm import over_processes, sum_over_processes
from csalr_plugin.attention.block import logit_guard
from csalr_plugin.attention.compiled import Output, positions_of
from csalr_plugin.attention.landmarks import LandmarkGrid
from csalr_plugin.attention.positions import Gathered, Plan, Positions, ProjectionGradient, Spread, no_autocast


class LowRankAttention(torch.autograd.Function):
    """Eq. 17 with its gate, and the mean over positions of ``x * O`` for deep supervision.

    Args of ``apply``:
        x: (B, C, H, W).
        W_q, gain_q, shift_q: (C', C), (C',) and (C',): query's weight, and the affine map a channel that follows it;
            with `eps` normalisation stands between the two. Weights may have the (..., 1, 1) of a convolution.
        W_k, gain_k: the same of key, whose shift no softmax sees.
        W_v, gain_v, shift_v: (C, C), (C,) and (C,) of value, whose affine map and normalisation act on E.
        W_f, b_f: (C, C) and (C,) of `fuse`; None with one group.
        alpha: scalar gate; None: O alone is wanted.
        groups, landmarks: as in `CSALR`.
        way: how.
        floor: `CSALR.self_attention_floor`.
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
        way: Plan,
        floor: float,
        eps: float | None,
        everywhere: bool,
        pooled: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, ...]:
        """See the class."""
        weights = W_q, W_k, W_v, W_f
        with no_autocast(x):
            W_q, W_k, W_v, W_f = matrices(weights)
            grid = LandmarkGrid(x.shape[2], x.shape[3], landmarks, x.device)
            positions = positions_of(x, grid, groups, way, dtype)
            projected = positions.project(W_q, W_k, "largest" if eps is None else "moments")
            Q, K = projected.Q, projected.K  # B, C', n
            largest_q, largest_k = (None, None) if projected.largest is None else projected.largest
            moments_q, moments_k = (None, None) if projected.moments is None else projected.moments
            count = len(x) * Q.shape[2]
            normal_q = Normalisation.over(positions, moments_q, count, gain_q, shift_q, eps, everywhere)
            normal_k = Normalisation.over(positions, moments_k, count, gain_k, None, eps, everywhere)
            guard = logit_guard(normal_q.bound(largest_q, gain_q, shift_q), normal_k.bound(largest_k, gain_k, None))
            affine = normal_q.scale, normal_q.offset, normal_k.scale * guard
            marks = positions.landmarks(Q, K, *affine)
            gathered = positions.gather(K, marks.for_keys, W_v)
            E = positions.values(gathered.rows, W_v) if way.at_landmarks else gathered.rows  # B, groups, m, c
            moments_v = None if eps is None else positions.moments(E.mT.flatten(1, 2))
            normal_v = Normalisation.over(positions, moments_v, len(x) * grid.m, gain_v, shift_v, eps, everywhere)
            inverse = positions.inverse(marks.S_mm, floor)  # B, groups, m, m
            Z = positions.solve(inverse, E, normal_v.scale, normal_v.offset)  # B, groups, m, c
            source = fuse_at_landmarks(positions, Z, W_f, b_f)  # B, groups, m, C or c
            W = None if way.at_landmarks else W_f
            out, mean = positions.spread(Spread(Q, marks.for_queries, marks.bias, source, W, b_f, alpha), pooled)
        normals = normal_q, normal_k, normal_v
        ctx.save_for_backward(
            *(x, *weights, b_f, alpha, guard, inverse),
            *(one for normal in normals for one in normal.tensors),
            *((Q, K) if way.keeps_projections else (None, None)),
            *(gathered if way.keeps_gathered else (None, None, None)),
            E if way.keeps_values else None,
            source if way.keeps_fused else None,
        )
        ctx.settings = grid, way, groups, floor, dtype, [(normal.count, everywhere) for normal in normals]
        ctx.output = Output(positions, out)
        statistics = [one for normal in normals for one in (normal.mean, normal.variance)]
        ctx.mark_non_differentiable(*(one for one in statistics if one is not None))
        return out, mean, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_mean: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """From the gradients of the two outputs to those of x and of each parameter."""
        saved = ctx.saved_tensors
        x, *weights, b_f, alpha, guard, inverse = saved[:9]
        *of_normals, Q, K, rows, V, log_sum, E, source = saved[9:]
        grid, way, groups, floor, dtype, counts = ctx.settings
        normal_q, normal_k, normal_v = [
            Normalisation(of_normals[4 * i : 4 * i + 4], None, count, everywhere)
            for i, (count, everywhere) in enumerate(counts)
        ]
        with no_autocast(x):
            W_q, W_k, W_v, W_f = matrices(weights)
            positions = positions_of(x, grid, groups, way, dtype)
            if Q is None:
                projected = positions.project(W_q, W_k)
                Q, K = projected.Q, projected.K
            affine = normal_q.scale, normal_q.offset, normal_k.scale * guard
            marks = positions.landmarks(Q, K, *affine)
            gathered = Gathered(rows, V, log_sum) if way.keeps_gathered else positions.gather(K, marks.for_keys, W_v)
            if E is None:
                E = positions.values(gathered.rows, W_v) if way.at_landmarks else gathered.rows
            Z = positions.solve(inverse, E, normal_v.scale, normal_v.offset)
            if source is None:
                source = fuse_at_landmarks(positions, Z, W_f, b_f)

            # Eq. 17 from the left: residual and gate, the mean, fuse, A_nm.
            W = None if way.at_landmarks else W_f
            out = ctx.output.unchanged()
            given = Spread(Q, marks.for_queries, marks.bias, source, W, b_f, alpha)
            spread = positions.spread_backward(given, out, grad_out, grad_mean)

            # What has m rows: fuse, the inverse of Eq. 16, the normalisation of E, value.
            d_Z, d_W_f, d_b_f = spread.source, spread.W_f, spread.b_f
            if way.at_landmarks and W_f is not None:
                d_Z, d_W_f = positions.fuse_backward(spread.source, Z, W_f)
            d_E, d_scale_v, d_offset_v = positions.solve_backward(inverse, E, d_Z)  # normalised E: B, groups, m, c
            d_gain_v, d_shift_v, slope_v, constant_v = normal_v.backward(positions, d_scale_v, d_offset_v)
            d_rows = positions.normalise_backward(d_E, E, normal_v.scale, slope_v, constant_v)
            d_W_v = None
            if way.at_landmarks:
                d_rows, d_W_v = positions.values_backward(d_rows, gathered.rows, W_v)

            # S_mn of Eq. 13.
            d_K, d_for_keys, d_W = positions.gather_backward(spread.x, K, marks.for_keys, W_v, gathered, d_rows)
            d_W_v = d_W if d_W_v is None else d_W_v

            # Q and K.
            d_marks = positions.landmarks_backward(marks, affine, floor, (Z, d_E), d_for_keys, spread)
            d_gain_q, d_shift_q, slope_q, constant_q = normal_q.backward(positions, d_marks.scale_q, d_marks.offset_q)
            d_gain_k, _no_shift, slope_k, constant_k = normal_k.backward(positions, d_marks.scale_k * guard, None)
            d_W_q, d_W_k = positions.project_backward(
                spread.x,
                ProjectionGradient(W_q, Q, spread.Q, slope_q, constant_q, d_marks.share_q),
                ProjectionGradient(W_k, K, d_K, slope_k, constant_k, d_marks.share_k),
            )
        d_x, d_alpha = spread.x.to(x.dtype).view_as(x), spread.alpha
        of_q, of_k, of_v, of_f = (
            None if d_W is None else d_W.view_as(weight)
            for d_W, weight in zip((d_W_q, d_W_k, d_W_v, d_W_f), weights, strict=True)
        )
        return (
            *(d_x, of_q, d_gain_q, d_shift_q, of_k, d_gain_k, of_v, d_gain_v, d_shift_v, of_f, d_b_f, d_alpha),
            *(None,) * 8,
        )


class Normalisation:
    """Batch norm as the affine map a channel that it is, ``scale * features + offset``.

    Args:
        tensors: (channels,) each: scale; offset, or None where nobody sees it; mean of the features and the inverse of
            their deviation, or None where statistics have no part in it.
        variance: (channels,), biased; None there, too, and in a backward pass.
        count: of values a channel.
        everywhere: whether statistics are of the features of all processes.
    """

    def __init__(self, tensors: Sequence[Any], variance: Tensor | None, count: int, everywhere: bool) -> None:
        self.tensors = tensors  # what a backward pass needs
        self.scale, self.offset, self.mean, self.inverse_deviation = tensors
        self.variance, self.count, self.everywhere = variance, count, everywhere

    @classmethod
    def over(
        cls,
        positions: Positions,
        moments: Tensor | tuple[Tensor, Tensor] | None,
        count: int,
        gain: Tensor,
        shift: Tensor | None,
        eps: float | None,
        everywhere: bool,
    ) -> Normalisation:
        """By the statistics of `count` values a channel, from :meth:`Positions.moments`; gain and shift alone where
        `eps` is None.

        `everywhere`: of the features of all processes.
        """
        if moments is None or eps is None:
            return cls((gain, shift, None, None), None, count, everywhere)
        mean, deviations = moments
        if everywhere:
            mean, deviations, count = over_processes(mean, deviations, count)
        *tensors, variance = positions.affine((mean, deviations), count, gain, shift, eps)
        return cls(tensors, variance, count, everywhere)

    def bound(self, largest: Tensor | None, gain: Tensor, shift: Tensor | None) -> Tensor:
        """A bound on the size of any normalised feature, from that of the raw ones: scalar.

        The latter is not needed where statistics normalise: none is further from the mean of N than sqrt(N) deviations.
        """
        bounds = gain.abs() * (self.count**0.5 if largest is None else largest)
        return (bounds if shift is None else bounds.add_(shift.abs())).amax()

    def backward(
        self, positions: Positions, d_scale: Tensor, d_offset: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of gain and shift, and (slope, constant): what each feature's gradient gets through mean and
        variance is ``slope * feature + constant``. All (channels,); `d_offset` None is 0."""
        if self.inverse_deviation is None or self.mean is None:
            return d_scale, d_offset, None, None
        affine = self.scale, self.mean, self.inverse_deviation
        d_gain, slope, constant = positions.affine_backward(affine, self.count, d_scale, d_offset)
        if self.everywhere:  # mean and variance act on every process's features
            d_scale, *rest = sum_over_processes(*(one for one in (d_scale, d_offset) if one is not None))
            _, slope, constant = positions.affine_backward(affine, self.count, d_scale, rest[0] if rest else None)
        return d_gain, d_offset, slope, constant


def matrices(weights: Sequence[Tensor | None]) -> list[Any]:
    """Of 1x1 convolutions the weights (C_out, C); what is None stays."""
    return [None if weight is None else weight.flatten(1) for weight in weights]


def fuse_at_landmarks(positions: Positions, Z: Tensor, W_f: Tensor | None, b_f: Tensor | None) -> Tensor:
    """What S_nm + P spreads: fused Z, (B, groups, m, C), or Z where `fuse` is not or acts on positions."""
    if not positions.way.at_landmarks or W_f is None or b_f is None:
        return Z.to(positions.dtype)
    return positions.fuse(Z, W_f, b_f)
