"""Attention maps to look at and to measure: the full map of SA's formula, and what stands in for it.

Plain formulas in float64, for pictures and reports; blocks never form these maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csalr_plugin.attention.block import AttentionBlock
from csalr_plugin.attention.compressed import CompressedSelfAttention
from csalr_plugin.attention.csalr import CSALR
from csalr_plugin.attention.landmarks import LandmarkGrid


@dataclass(frozen=True)
class Maps:
    """Two maps over the same queries, each (B, groups, rows, n); every row sums to 1.

    Attributes:
        full: softmax(Q K^T), the map of SA's formula (Eq. 10).
        compressed: the map that the factors give in its place.
    """

    full: Tensor
    compressed: Tensor

    def error(self) -> float:
        """The relative Frobenius error, |compressed - full| / |full|."""
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

    CSALR's factors are those of Eq. 13-16. For SA the same factors say what CSALR would make of its map. CSA has
    queries alone: its full map is the one that its factors stand for, softmax(s Q Q^T) with unit-length Q, s = 14.

    Args:
        block: in eval mode.
        x: the block's input.
        rows: indices of the queries, all n = H W by default.
        groups: of CSALR's factors; the block's own by default. CSA's are always its own.
        landmarks: grid of CSALR's factors; the block's own by default, (12, 8) for SA.
    """
    with torch.no_grad():
        if isinstance(block, CompressedSelfAttention):
            return _csa(block, block._project("query", x).double(), rows)
        Q, K = queries_and_keys(block, x, groups)
        grid = _grid(block, x, landmarks)
        floor = CSALR.self_attention_floor
        return Maps(full_map(Q, K, rows), csalr_map(Q, K, grid, rows, floor=floor))


def queries_and_keys(block: AttentionBlock, x: Tensor, groups: int | None = None) -> tuple[Tensor, Tensor]:
    """Q and K of an SA or CSALR block over x, (B, C, H, W), in float64: each (B, groups, C'/groups, n)."""
    count = block.groups if groups is None else groups
    Q, K = (block._project(name, x).double() for name in ("query", "key"))  # B, C', n
    shape = (len(x), count, Q.shape[1] // count, -1)
    return Q.reshape(shape), K.reshape(shape)


def full_map(Q: Tensor, K: Tensor, rows: Tensor | None = None) -> Tensor:
    """Eq. 10: (B, groups, c, n) twice -> (B, groups, rows, n)."""
    return (_rows(Q, rows).mT @ K).softmax(-1)


def csalr_map(Q: Tensor, K: Tensor, grid: LandmarkGrid, rows: Tensor | None = None, *, floor: float = 0.0) -> Tensor:
    """(S_nm + P) (S_mm + I)^-1 S_mn, Eq. 13-16: (B, groups, c, n) twice -> (B, groups, rows, n).

    Args:
        Q, K: queries and keys.
        grid: which position belongs to which landmark.
        rows: indices of the queries, all n by default.
        floor: the least that a landmark attends to itself with, as in `CSALR`; 0 is the published formula.
    """
    Q_landmark, K_landmark = grid.pool(Q), grid.pool(K)  # B, groups, c, m
    S_nm = (_rows(Q, rows).mT @ K_landmark).softmax(-1)
    S_mm = (Q_landmark.mT @ K_landmark).softmax(-1)
    S_mn = (Q_landmark.mT @ K).softmax(-1)
    P = grid.membership(Q.dtype)  # n, m
    P = P if rows is None else P[rows]
    identity = torch.eye(grid.m, dtype=Q.dtype, device=Q.device)
    own = S_mm.diagonal(dim1=-2, dim2=-1)[..., None]  # B, groups, m, 1
    raised = (floor - own).clamp(min=0) / (1 - own.clamp(max=floor))
    S_mm = S_mm * (1 - raised) + identity * raised
    return (S_nm + P) @ torch.linalg.solve(S_mm + identity, S_mn)


def pooled_key_map(Q: Tensor, K: Tensor, grid: LandmarkGrid, rows: Tensor | None = None) -> Tensor:
    """A control for CSALR: the full map of keys that are replaced by their landmark's, softmax(Q (K' P^T)^T).

    (B, groups, c, n) twice -> (B, groups, rows, n).
    """
    return full_map(Q, grid.pool(K) @ grid.membership(K.dtype).mT, rows)


def block_inputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What each block of a model in eval mode is given for images (B, 3, H, W): {"stage1": (B, C, H, W), ...}."""
    seen: dict[str, Tensor] = {}
    handles = []
    for stage, block in cast(nn.ModuleDict, model.attention).items():

        def look(_: nn.Module, inputs: tuple[Tensor, ...], stage: str = stage) -> None:
            seen[stage] = inputs[0].detach()

        handles.append(block.register_forward_pre_hook(look))
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _rows(Q: Tensor, rows: Tensor | None) -> Tensor:
    return Q if rows is None else Q[..., rows]


def _grid(block: AttentionBlock, x: Tensor, landmarks: tuple[int, int] | None) -> LandmarkGrid:
    wanted = landmarks or (block.landmarks if isinstance(block, CSALR) else (12, 8))
    return LandmarkGrid(x.shape[-2], x.shape[-1], wanted, x.device)


def _csa(block: CompressedSelfAttention, Q: Tensor, rows: Tensor | None) -> Maps:
    """W B of each group, and softmax(s Q Q^T): Q is (B, C', n)."""
    Q = F.normalize(Q, dim=1)[:, None]  # B, 1, C', n
    bases = F.normalize(block.bases.double(), dim=1).reshape(block.groups, -1, Q.shape[2])  # groups, m, C'
    logits = block.scale * bases @ Q  # B, groups, m, n
    B, W = logits.softmax(-1), _rows(logits, rows).softmax(-2).mT
    full = full_map(block.scale * Q, Q, rows)
    return Maps(full.expand(-1, block.groups, -1, -1), W @ B)
