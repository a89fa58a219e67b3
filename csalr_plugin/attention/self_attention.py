"""SA: the original self-attention (section 2.2, Eq. 1-2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from csalr_plugin.attention.block import (
    AttentionBlock,
    autocast_like,
    full_range,
    logit_scale,
    observing,
    soften,
    softmax_backward,
)


class _MapComputedAgain(torch.autograd.Function):
    """``softmax(Q K^T) V``, (B, n, C') twice and (B, n, C) -> (B, n, C), a map at a time and none kept.

    On a CPU this keeps as little as `scaled_dot_product_attention` does on a GPU. There that function keeps the map as
    soon as V is not as wide as Q; and made as wide, it multiplies half as much again.
    """

    @staticmethod
    def forward(ctx: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """See the class."""
        ctx.save_for_backward(Q, K, V)
        return torch.stack([(q @ k.mT).softmax(1) @ v for q, k, v in zip(Q, K, V, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 1 and 2 from the right."""
        Q, K, V = ctx.saved_tensors
        gradients = []
        for q, k, v, g in zip(Q, K, V, gradient, strict=True):
            A = (q @ k.mT).softmax(1)  # n, n
            d_v = A.mT @ g
            d_logits = softmax_backward(g @ v.mT, A, 1)
            gradients.append((d_logits @ k, d_logits.mT @ q, d_v))
        d_Q, d_K, d_V = (torch.stack(parts) for parts in zip(*gradients, strict=True))
        return d_Q, d_K, d_V


class SelfAttention(AttentionBlock):
    """``x + alpha * softmax(Q K^T) V`` with the complete n x n map, n = H W, and one group.

    Args:
        channels: C, channels of the feature map.
        key_ratio: C'/C, the width of queries and keys.
    """

    def __init__(self, channels: int, *, key_ratio: float = 0.25) -> None:
        super().__init__(channels, 1, key_ratio)
        self.key = nn.Conv2d(channels, self.key_channels, 1)
        self.norm["key"] = nn.BatchNorm1d(self.key_channels)
        soften(self.norm["query"], self.key_channels)
        soften(self.norm["key"], self.key_channels)

    def attend(self, x: Tensor) -> Tensor:
        """A V of Eq. 1-2: (B, C, H, W) -> (B, C, H, W)."""
        self._check(x)
        Q, K, V = full_range(*(self._project(name, x).mT for name in ("query", "key", "value")))  # B, n, C' or C
        with autocast_like(Q):
            Q = Q * logit_scale(Q, K)
            if x.is_cuda:
                attended = F.scaled_dot_product_attention(Q, K, V, scale=1.0)  # B, n, C
            else:
                attended = _MapComputedAgain.apply(Q, K, V)
        return self._join(attended.mT, x)

    def diagnose(self, x: Tensor) -> dict[str, float]:
        """The largest dot product of a query and a key over x, (B, C, H, W)."""
        with observing(self):
            logits = self._project("query", x).mT @ self._project("key", x)  # B, n, n
        return {"largest_logit": logits.abs().max().item()}
