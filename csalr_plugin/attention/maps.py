"""Attention maps for pictures and reports: the full n x n map, and the map that the factors of a block multiply to.

Computed in float64 from the formulas of the blocks, which never form these maps themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .block import AttentionBlock
from .compressed import CompressedSelfAttention
from .csalr import CSALR, low_rank_attention
from .landmarks import LandmarkGrid
from .numerics import softmax


@dataclass(frozen=True)
class Maps:
    """Two maps over the same queries, each (B, groups, rows, n); every row sums to 1.

    Attributes:
        full: softmax(Q K^T), the map of SA's formula (Eq. 10).
        compressed: the product of the factors that replace it.
    """

    full: Tensor
    compressed: Tensor

    def error(self) -> float:
        """Return the relative Frobenius error, ``|compressed - full| / |full|``."""
        return float(torch.linalg.vector_norm(self.compressed - self.full) / torch.linalg.vector_norm(self.full))


def maps_of(
    block: AttentionBlock,
    x: Tensor,
    *,
    rows: Tensor | None = None,
    groups: int | None = None,
    landmarks: tuple[int, int] | None = None,
) -> Maps:
    """The full map of a block's own Q and K over x, (B, C, H, W), and the map of its factors.

    CSALR's factors are those of Eq. 13-16. For SA they are the factors that CSALR would make of its Q and K. CSA has
    queries alone: its factors replace softmax(s Q Q^T) with unit-length Q, s = 14.

    Args:
        block: in eval mode.
        x: the input of the block.
        rows: indices of the queries, all n = H W by default.
        groups: of CSALR's factors; the block's own by default. CSA's are always its own.
        landmarks: grid of CSALR's factors; the block's own by default, (12, 8) for SA.
    """
    with torch.no_grad():
        if isinstance(block, CompressedSelfAttention):
            return _csa(block, block.project("query", x, {}).flatten(1, 2).double(), rows)
        Q, K = queries_and_keys(block, x, groups)
        wanted = landmarks or (block.landmarks if isinstance(block, CSALR) else (12, 8))
        grid = LandmarkGrid(x.shape[2], x.shape[3], wanted, x.device)
        return Maps(full_map(Q, K, rows), csalr_map(Q, K, grid, rows, floor=CSALR.self_attention_floor))


def queries_and_keys(block: AttentionBlock, x: Tensor, groups: int | None = None) -> tuple[Tensor, Tensor]:
    """Q and K of an SA or CSALR block over x, (B, C, H, W), in float64: each (B, groups, C'/groups, n)."""
    count = block.groups if groups is None else groups
    Q, K = (block.project(name, x, {}).flatten(1, 2).double() for name in ("query", "key"))  # B, C', n
    shape = (len(x), count, Q.shape[1] // count, -1)
    return Q.reshape(shape), K.reshape(shape)


def full_map(Q: Tensor, K: Tensor, rows: Tensor | None = None) -> Tensor:
    """Eq. 10: (B, groups, d, n) twice -> (B, groups, rows, n)."""
    return softmax(_rows(Q, rows).mT @ K)


def csalr_map(Q: Tensor, K: Tensor, grid: LandmarkGrid, rows: Tensor | None = None, *, floor: float = 0.0) -> Tensor:
    """(S_nm + P) (S_mm + I)^-1 S_mn, Eq. 13-16: (B, groups, d, n) twice -> (B, groups, rows, n).

    This is :func:`.csalr.low_rank_attention` of values V = I.

    Args:
        Q, K: queries and keys.
        grid: landmark of each position.
        rows: indices of the queries, all n by default.
        floor: smallest S_ii, as in `CSALR`; 0 is the published formula.
    """

    def weigh_identity(queries: Tensor, keys: Tensor) -> Tensor:
        return softmax(queries @ keys.mT)

    def of_image(Q: Tensor, K: Tensor) -> Tensor:
        return _rows(low_rank_attention(Q[None], K[None], weigh_identity, grid, floor).mT, rows).mT[0]

    return torch.stack([of_image(*pair) for pair in zip(Q, K, strict=True)])  # one n x n map of all rows at a time


def pooled_key_map(Q: Tensor, K: Tensor, grid: LandmarkGrid, rows: Tensor | None = None) -> Tensor:
    """A control for CSALR: the full map of keys that are replaced by the mean of their patch, softmax(Q (K' P^T)^T).

    (B, groups, d, n) twice -> (B, groups, rows, n).
    """
    return full_map(Q, grid.pool(K)[..., grid.landmark_of], rows)


def _rows(Q: Tensor, rows: Tensor | None) -> Tensor:
    return Q if rows is None else Q[..., rows]


def _csa(block: CompressedSelfAttention, Q: Tensor, rows: Tensor | None) -> Maps:
    """W B of each group, and softmax(s Q Q^T): Q is (B, C', n)."""
    Q = F.normalize(Q, dim=1)[:, None]  # B, 1, C', n
    logits = block.unit_bases().double() @ Q  # B, groups, m, n
    B, W = softmax(logits), softmax(_rows(logits, rows).mT)
    full = full_map(block.scale * Q, Q, rows)
    return Maps(full.expand(-1, block.groups, -1, -1), W @ B)
