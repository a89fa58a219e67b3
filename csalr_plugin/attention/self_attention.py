"""SA: the original self-attention (section 2.2, Eq. 1-2)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from csalr_plugin.attention.block import (
    AttentionBlock,
    autocast_like,
    full_range,
    logit_scale,
    observing,
    soften,
)


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
        Q, K, V = full_range(*(self._project(name, x).mT for name in ("query", "key", "value")))  # B, n, C' or C
        with autocast_like(Q):
            Q = Q * logit_scale(Q, K)
            attended = F.scaled_dot_product_attention(Q, K, V, scale=1.0)  # B, n, C
        return self._join(attended.mT, x)

    def diagnose(self, x: Tensor) -> dict[str, float]:
        """The largest dot product of a query and a key over x, (B, C, H, W)."""
        with observing(self):
            logits = self._project("query", x).mT @ self._project("key", x)  # B, n, n
        return {"largest_logit": logits.abs().max().item()}
