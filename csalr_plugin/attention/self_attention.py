"""SA: the original self-attention (section 2.2, Eq. 1-2)."""

from __future__ import annotations

from torch import Tensor, nn

from .batch_norm import Statistics
from .block import AttentionBlock, start_with_unit_logits
from .numerics import limit_logits, no_autocast, self_attention


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
        start_with_unit_logits(self.norm["query"], self.key_channels)
        start_with_unit_logits(self.norm["key"], self.key_channels)

    def attention(self, x: Tensor, statistics: Statistics) -> Tensor:
        """A V of Eq. 1-2: (B, C, H, W) -> (B, 1, n, C)."""
        Q, K, V = (self.project(name, x, statistics).mT for name in ("query", "key", "value"))  # B, 1, n, C' or C
        with no_autocast(x):
            return self_attention(*limit_logits(Q, K), V)

    def diagnose(self, x: Tensor) -> dict[str, float]:
        """The largest dot product of a query and a key over x, (B, C, H, W)."""
        Q, K = (self.project(name, x.detach(), {}).detach() for name in ("query", "key"))  # B, 1, C', n
        return {"largest_logit": (Q.mT @ K).abs().max().item()}
