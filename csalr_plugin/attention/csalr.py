"""CSALR: compressed self-attention with low-rank approximation (section 3.2, Eq. 10-17)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from .batch_norm import Statistics
from .block import AttentionBlock, start_with_unit_logits
from .landmarks import LandmarkGrid
from .numerics import (
    at_least_fp32,
    inverse_of_dominant,
    limit_logits,
    no_autocast,
    raise_diagonal,
    softmax,
    softmax_attention,
)


def low_rank_attention(
    Q: Tensor, K: Tensor, weigh_V: Callable[[Tensor, Tensor], Tensor], grid: LandmarkGrid, floor: float
) -> Tensor:
    """``O = (S_nm + P) (S_mm + I)^-1 S_mn V`` of Eq. 13-17, evaluated from the right.

    Neither an n x n map nor the n x m product W of Eq. 14 is formed.

    Args:
        Q, K: (B, groups, d, n).
        weigh_V: from Q' and K, (B, groups, m, d) and (B, groups, n, d), to softmax(Q' K^T) V, (B, groups, m, c).
        grid: landmark of each position; Q' and K' are the means of Q and K over the patch of each landmark.
        floor: smallest S_ii; see `CSALR`.

    Returns:
        (B, groups, n, c).
    """
    Q, K = limit_logits(Q, K)
    Q_, K_ = grid.pool(Q), grid.pool(K)  # Q', K': B, groups, d, m
    E = weigh_V(Q_.mT, K.mT)  # S_mn V, Eq. 13: B, groups, m, c
    S_mm = softmax(at_least_fp32(Q_).mT @ at_least_fp32(K_))  # Eq. 16: B, groups, m, m
    A_mm = raise_diagonal(S_mm, floor)  # S_mm + I
    Z = (inverse_of_dominant(A_mm, floor) @ E).to(Q.dtype)  # Eq. 14: B, groups, m, c
    return softmax_attention(Q.mT, K_.mT, Z, grid.landmark_of)  # (S_nm + P) Z, Eq. 15, 17: B, groups, n, c


class CSALR(AttentionBlock):
    """``x + alpha * O`` with O of :func:`low_rank_attention`: m landmarks in place of n positions.

        S_nm = softmax(Q K'^T) (Eq. 15)    S_mm = softmax(Q' K'^T) (Eq. 16)    S_mn = softmax(Q' K^T) (Eq. 13)

    The paper says that (S_mm + I)^-1 always exists. In floating point two landmarks that attend only to each other make
    it singular. So a landmark attends to itself with at least ``self_attention_floor``: rows of S_mm still sum to 1,
    ``||(S_mm + I)^-1||_inf <= 500``, and ``|O| <= 1000 max |V|`` for any input. Wherever every S_ii is at least 1e-3
    this is the formula of the paper. A floor of 0 is the formula as published.

    Args:
        channels: C, channels of the feature map.
        groups: heads, each with the same landmark positions and its own share of the channels.
        landmarks: (H', W'), the grid of landmarks; m = H' W'. A smaller map has one landmark a row or column.
        key_ratio: C'/C, the width of queries and keys.
    """

    fast_form = "csalr"
    self_attention_floor = 1e-3

    def __init__(
        self, channels: int, *, groups: int = 2, landmarks: tuple[int, int] = (12, 8), key_ratio: float = 0.25
    ) -> None:
        super().__init__(channels, groups, key_ratio)
        self.landmarks = landmarks
        self.key = nn.Conv2d(channels, self.key_channels, 1)
        self.norm["key"] = nn.BatchNorm1d(self.key_channels)
        start_with_unit_logits(self.norm["query"], self.key_channels // groups)
        start_with_unit_logits(self.norm["key"], self.key_channels // groups)

    def attention(self, x: Tensor, statistics: Statistics) -> Tensor:
        """O of Eq. 17: (B, C, H, W) -> (B, groups, n, C/groups)."""
        grid = LandmarkGrid(x.shape[2], x.shape[3], self.landmarks, x.device)
        Q, K = self.project("query", x, statistics), self.project("key", x, statistics)  # B, groups, d, n
        values = self.values(x, grid.m)
        with no_autocast(x):
            weigh = partial(self.weigh, values, statistics)
            return low_rank_attention(Q, K, weigh, grid, self.self_attention_floor)

    def diagnose(self, x: Tensor) -> dict[str, float]:
        """The largest logit of S_nm and S_mn over x, (B, C, H, W), and "smallest_S_ii" of S_mm before the floor.

        1 / (2 min S_ii) bounds the norm of (S_mm + I)^-1: the smaller, the more it may amplify noise.
        """
        grid = LandmarkGrid(x.shape[2], x.shape[3], self.landmarks, x.device)
        Q, K = (self.project(name, x.detach(), {}).detach() for name in ("query", "key"))
        Q_, K_ = grid.pool(Q), grid.pool(K)
        largest = max((Q.mT @ K_).abs().max().item(), (Q_.mT @ K).abs().max().item())
        own = (Q_.mT @ K_).softmax(-1).diagonal(dim1=-2, dim2=-1)
        return {"largest_logit": largest, "smallest_S_ii": own.min().item()}
