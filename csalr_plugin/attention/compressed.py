"""CSA: compressed self-attention with learned bases (Chen et al., AAAI 2020)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from csalr_plugin.attention.block import EvaluatedBlock, observing, split, working_type
from csalr_plugin.attention.compiled import Output, positions_of
from csalr_plugin.attention.positions import (
    Gathered,
    Plan,
    Spread,
    fuse_heads,
    no_autocast,
    plan,
    times_heads,
    value_heads,
)


class CompressedSelfAttention(EvaluatedBlock):
    """``O = W (B V)`` a group, with m learned base vectors in place of landmarks.

    With unit-length queries Q_i and bases w_k and the scale s = 14:
    B_kj = softmax over positions j of s w_k.Q_j and W_ik = softmax over bases k of s w_k.Q_i.
    Every group's bases see all C' query channels; the values are split into groups.

    The maps are computed a tile at a time, and again in the backward pass, as CSALR's are.

    Args:
        channels: C, channels of the feature map.
        groups: heads; each has bases of its own.
        landmarks: (H', W'); m = H' W' bases a group, as many as CSALR has landmarks.
        key_ratio: C'/C, the width of queries and bases.
    """

    scale = 14.0

    def __init__(
        self, channels: int, *, groups: int = 2, landmarks: tuple[int, int] = (12, 8), key_ratio: float = 0.25
    ) -> None:
        super().__init__(channels, groups, key_ratio)
        self.bases = nn.Parameter(torch.empty(groups * landmarks[0] * landmarks[1], self.key_channels))
        for group in self.bases.chunk(groups):
            nn.init.orthogonal_(group)

    def _evaluate(self, x: Tensor, alpha: Tensor | None, pooled: bool) -> tuple[Tensor, Tensor]:
        """As in CSALR, `value` and `fuse` act on m rows in place of n positions where that is less work."""
        self._check(x)
        dtype, groups, fuse = working_type(x), self.groups, getattr(self, "fuse", None)
        wide = torch.promote_types(dtype, torch.float32)
        m, differentiable = len(self.bases) // groups, torch.is_grad_enabled()
        way = plan(len(x), self.channels, x[0, 0].numel(), m, groups, x.device, differentiable)
        Q = F.normalize(self._project("query", x).to(wide), dim=1).to(dtype)  # B, C', n
        keys = self._bases().to(wide).mT.expand(len(x), -1, -1, -1)  # B, groups, C', m
        W_v = self.value.weight.flatten(1)
        rows = Gather.apply(x, Q, keys, W_v, groups, way, dtype)  # B, groups, m, C or c
        with no_autocast(x):
            if way.at_landmarks:
                rows = times_heads(rows, value_heads(W_v, groups))
            # Rows of B sum to 1, so an affine map of E is the same map of V.
            E = rows.to(wide) + cast(Tensor, self.value.bias).view(groups, 1, -1)  # B, groups, m, c
            E = split(self._normalise("value", E.mT.flatten(1, 2)), groups).mT.to(dtype)
            W_f, b_f = (None, None) if fuse is None else (fuse.weight.flatten(1), fuse.bias)
            if way.at_landmarks and W_f is not None and b_f is not None:
                fused = times_heads(E, fuse_heads(W_f, groups))  # B, groups, m, C
                E, W_f, b_f = fused + b_f.to(dtype) / groups, None, None
        out, mean = SpreadOut.apply(x, Q, keys, E, W_f, b_f, alpha, groups, way, pooled, dtype)
        return out, mean

    def diagnose(self, x: Tensor) -> dict[str, float]:
        """The largest scaled cosine of a query and a base over x, (B, C, H, W); at most 14."""
        with observing(self):
            Q = F.normalize(self._project("query", x), dim=1)
            return {"largest_logit": (self._bases().flatten(0, 1) @ Q).abs().max().item()}

    def _bases(self) -> Tensor:
        """s w_k with unit vectors, (groups, m, C')."""
        return (self.scale * F.normalize(self.bases, dim=1)).unflatten(0, (self.groups, -1))  # type: ignore[no-untyped-call]


class Gather(torch.autograd.Function):
    """``B x``, (B, groups, m, C), or where `value` acts on positions ``B V``, (B, groups, m, c).

    Args of ``apply``: x, (B, C, H, W); Q, (B, C', n); keys, (B, groups, C', m); W_v, (C, C); groups, way and dtype as
    of :class:`csalr_plugin.attention.positions.Positions`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, Q: Tensor, keys: Tensor, W_v: Tensor, groups: int, way: Plan, dtype: torch.dtype
    ) -> Tensor:
        """See the class."""
        with no_autocast(x):
            gathered = positions_of(x, None, groups, way, dtype).gather(Q, keys, W_v)
        ctx.save_for_backward(x, Q, keys, W_v, *gathered)
        ctx.settings = groups, way, dtype
        return gathered.rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        """From the gradient of the rows to those of the tensors."""
        x, Q, keys, W_v, *gathered = ctx.saved_tensors
        groups, way, dtype = ctx.settings
        with no_autocast(x):
            d_x = torch.zeros_like(x.flatten(2), dtype=dtype)
            positions = positions_of(x, None, groups, way, dtype)
            d_Q, d_keys, d_W_v = positions.gather_backward(d_x, Q, keys, W_v, Gathered(*gathered), d_rows)
        return d_x.to(x.dtype).view_as(x), d_Q, d_keys, d_W_v, None, None, None


class SpreadOut(torch.autograd.Function):
    """``x + alpha O`` or, with alpha None, O; and if `pooled` the mean of ``x * O`` over positions, (B, C).

    Args of ``apply``: x, Q and keys as of :class:`Gather`; what W spreads, (B, groups, m, C or c); weight and bias of
    `fuse`, where that acts on positions; alpha; groups, way, pooled and dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        Q: Tensor,
        keys: Tensor,
        source: Tensor,
        W_f: Tensor | None,
        b_f: Tensor | None,
        alpha: Tensor | None,
        groups: int,
        way: Plan,
        pooled: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        """See the class."""
        with no_autocast(x):
            bias = torch.zeros_like(keys[:, :, :1])  # B, groups, 1, m
            positions = positions_of(x, None, groups, way, dtype)
            out, mean = positions.spread(Spread(Q, keys, bias, source, W_f, b_f, alpha), pooled)
        ctx.save_for_backward(x, Q, keys, source, W_f, b_f, alpha)
        ctx.settings = groups, way, dtype
        ctx.output = Output(positions, out)
        return out, mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_mean: Tensor | None) -> tuple[Tensor | None, ...]:
        """From the gradients of the two outputs to those of the tensors."""
        x, Q, keys, source, W_f, b_f, alpha = ctx.saved_tensors
        groups, way, dtype = ctx.settings
        with no_autocast(x):
            bias = torch.zeros_like(keys[:, :, :1])
            out = ctx.output.unchanged()
            positions = positions_of(x, None, groups, way, dtype)
            given = Spread(Q, keys, bias, source, W_f, b_f, alpha)
            d = positions.spread_backward(given, out, grad_out, grad_mean)
        d_x = d.x.to(x.dtype).view_as(x)
        return d_x, d.Q, d.for_queries, d.source.to(source.dtype), d.W_f, d.b_f, d.alpha, None, None, None, None
