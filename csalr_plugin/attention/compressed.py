"""CSA: compressed self-attention with learned bases (Chen et al., AAAI 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csalr_plugin.attention.block import AttentionBlock, autocast_like, full_range, observing, softmax


class CompressedSelfAttention(AttentionBlock):
    """``O = W (B V)`` a group, with m learned base vectors in place of landmarks.

    With unit-length queries Q_i and bases w_k and the scale s = 14:
    B_kj = softmax over positions j of s w_k.Q_j and W_ik = softmax over bases k of s w_k.Q_i.
    Every group's bases see all C' query channels; the values are split into groups.

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

    def attend(self, x: Tensor) -> Tensor:
        """O before gate and residual: (B, C, H, W) -> (B, C, H, W)."""
        Q, V = full_range(self._project("query", x), self.value(x).flatten(2))  # B, C' or C, n
        with autocast_like(Q):
            logits = self._logits(Q)  # B, groups, m, n
            E = softmax(logits) @ self._split(V).mT  # B, groups, m, c
            E = self._split(self._normalise("value", E.mT.flatten(1, 2)))  # B, groups, c, m
            attended = E @ softmax(logits, dim=-2)  # B, groups, c, n
        return self._join(attended, x)

    def diagnose(self, x: Tensor) -> dict[str, float]:
        """The largest scaled cosine of a query and a base over x, (B, C, H, W); at most 14."""
        with observing(self):
            return {"largest_logit": self._logits(self._project("query", x)).abs().max().item()}

    def _logits(self, Q: Tensor) -> Tensor:
        """s w_k.Q_j with unit vectors: (B, C', n) -> (B, groups, m, n)."""
        return self._split(self.scale * F.normalize(self.bases, dim=1) @ F.normalize(Q, dim=1))
