"""CSA: compressed self-attention with learned bases (Chen et al., AAAI 2020)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csalr_plugin.attention.block import AttentionBlock, autocast_like, full_range, observing, softmax
from csalr_plugin.attention.low_rank import plan, spread_source, values


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
        """O before gate and residual: (B, C, H, W) -> (B, C, H, W).

        As in CSALR, `value` and `fuse` act on m rows in place of n positions where that is less work.
        """
        X, fuse = x.flatten(2), getattr(self, "fuse", None)  # B, C, n
        Q = self._project("query", x)  # B, C', n
        m = len(self.bases) // self.groups
        way = plan(len(X), X.shape[1], X.shape[2], m, self.groups, x.device)
        Q, X = full_range(Q, X)
        with autocast_like(Q):
            logits = self._logits(Q)  # B, groups, m, n
            B, W = softmax(logits), softmax(logits, dim=2)
            if way.at_landmarks:
                rows = self._split(B.flatten(1, 2) @ X.mT)  # B, groups, m, C
                E = values(rows, self.value.weight.flatten(1), way) + cast(Tensor, self.value.bias).view(
                    self.groups, 1, -1
                )
            else:
                E = B @ self._split(self.value(x).flatten(2)).mT  # B, groups, m, c
            # Rows of B sum to 1, so an affine map of E is the same map of V: it folds into `value`.
            E = self._split(self._normalise("value", E.mT.flatten(1, 2))).mT  # B, groups, m, c
            if not way.at_landmarks or fuse is None:
                return self._join(E.mT @ W, x)
            source = spread_source(E, fuse.weight.flatten(1), fuse.bias, E.dtype, way, total=1)  # B, groups, m, C
            return (source.flatten(1, 2).mT @ W.flatten(1, 2)).view_as(x)

    def diagnose(self, x: Tensor) -> dict[str, float]:
        """The largest scaled cosine of a query and a base over x, (B, C, H, W); at most 14."""
        with observing(self):
            return {"largest_logit": self._logits(self._project("query", x)).abs().max().item()}

    def _logits(self, Q: Tensor) -> Tensor:
        """s w_k.Q_j with unit vectors: (B, C', n) -> (B, groups, m, n)."""
        return self._split(self.scale * F.normalize(self.bases, dim=1) @ F.normalize(Q, dim=1))
