"""CSA: compressed self-attention with learned bases (Chen et al., AAAI 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batch_norm import Statistics
from .block import AttentionBlock
from .numerics import at_least_fp32, no_autocast, softmax_attention


class CompressedSelfAttention(AttentionBlock):
    """``x + alpha * W (B V)`` a group, with m learned base vectors in place of landmarks.

    With queries Q_i and bases w_k of unit length and the scale s = 14:
    B_kj = softmax over positions j of s w_k.Q_j and W_ik = softmax over bases k of s w_k.Q_i.
    Every group's bases see all C' query channels; the values are split into groups.

    Args:
        channels: C, channels of the feature map.
        groups: heads; each has bases of its own.
        landmarks: (H', W'); m = H' W' bases a group, as many as CSALR has landmarks.
        key_ratio: C'/C, the width of queries and bases.
    """

    fast_form = "csa"
    scale = 14.0

    def __init__(
        self, channels: int, *, groups: int = 2, landmarks: tuple[int, int] = (12, 8), key_ratio: float = 0.25
    ) -> None:
        super().__init__(channels, groups, key_ratio)
        self.bases = nn.Parameter(torch.empty(groups * landmarks[0] * landmarks[1], self.key_channels))
        for group in self.bases.chunk(groups):
            nn.init.orthogonal_(group)

    def attention(self, x: Tensor, statistics: Statistics) -> Tensor:
        """W (B V): (B, C, H, W) -> (B, groups, n, C/groups)."""
        Q = self.project("query", x, statistics).flatten(1, 2)  # B, C', n
        values = self.values(x, len(self.bases) // self.groups)
        with no_autocast(x):
            Q = F.normalize(at_least_fp32(Q), dim=1).to(Q.dtype).mT[:, None].expand(-1, self.groups, -1, -1)
            w = self.unit_bases().to(Q.dtype).expand(x.shape[0], -1, -1, -1)  # B, groups, m, C'
            E = self.weigh(values, statistics, w, Q).to(Q.dtype)  # B V: B, groups, m, c
            return softmax_attention(Q, w, E)  # W E: B, groups, n, c

    def unit_bases(self) -> Tensor:
        """s w_k with w_k of unit length, (groups, m, C')."""
        return (self.scale * F.normalize(self.bases, dim=1)).unflatten(0, (self.groups, -1))  # type: ignore[no-untyped-call]

    def diagnose(self, x: Tensor) -> dict[str, float]:
        """The largest scaled cosine of a query and a base over x, (B, C, H, W); at most 14."""
        Q = F.normalize(self.project("query", x.detach(), {}).flatten(1, 2), dim=1)  # B, C', n
        return {"largest_logit": (self.unit_bases().flatten(0, 1) @ Q).abs().max().item()}
