"""CSALR: compressed self-attention with low-rank approximation (section 3.2, Eq. 10-17)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csalr_plugin.attention.block import (
    AttentionBlock,
    autocast_like,
    full_range,
    logit_scale,
    observing,
    soften,
    softmax,
)
from csalr_plugin.attention.landmarks import LandmarkGrid


class CSALR(AttentionBlock):
    """``O = (S_nm + P) (S_mm + I)^-1 S_mn V`` a group, with m landmarks in place of n positions.

    Q' and K' are the landmarks' means of Q and K, P says in which landmark's patch a position lies, and

        S_nm = softmax(Q K'^T) (Eq. 15)    S_mm = softmax(Q' K'^T) (Eq. 16)    S_mn = softmax(Q' K^T) (Eq. 13).

    It is evaluated from the right, so neither an n x n map nor the n x m product W of Eq. 14 is formed.

    The paper says that (S_mm + I)^-1 always exists; in floating point two landmarks that attend only to each
    other make it singular. So a landmark attends to itself with at least ``self_attention_floor``: the rows of
    S_mm still sum to 1, ||(S_mm + I)^-1||_inf <= 500, and |O| <= 1000 max |V| for any input. Wherever every
    S_ii is at least 1e-3 this is the paper's formula, to the last digit.

    Args:
        channels: C, channels of the feature map.
        groups: heads, each with the same landmark positions and its own share of the channels.
        landmarks: (H', W'), the landmarks' grid; m = H' W'. At most one landmark a position.
        key_ratio: C'/C, the width of queries and keys.
    """

    self_attention_floor = 1e-3

    def __init__(
        self, channels: int, *, groups: int = 2, landmarks: tuple[int, int] = (12, 8), key_ratio: float = 0.25
    ) -> None:
        super().__init__(channels, groups, key_ratio)
        self.landmarks = landmarks
        self.key = nn.Conv2d(channels, self.key_channels, 1)
        self.norm["key"] = nn.BatchNorm1d(self.key_channels)
        soften(self.norm["query"], self.key_channels // groups)
        soften(self.norm["key"], self.key_channels // groups)

    def attend(self, x: Tensor) -> Tensor:
        """O of Eq. 17 before gate and residual: (B, C, H, W) -> (B, C, H, W)."""
        grid = LandmarkGrid(x.shape[-2], x.shape[-1], self.landmarks, x.device)
        Q, K, V = full_range(self._project("query", x), self._project("key", x), self.value(x).flatten(2))
        with autocast_like(Q):
            Q, K, V = self._split(Q), self._split(K), self._split(V)  # B, groups, C'/groups or c, n
            scale = logit_scale(Q, K)
            Q_landmark, K_landmark = grid.pool(Q) * scale, grid.pool(K) * scale  # B, groups, C'/groups, m
            S_nm = softmax(Q.mT @ K_landmark)  # B, groups, n, m
            S_mm = softmax(Q_landmark.mT @ grid.pool(K))  # B, groups, m, m
            S_mn = softmax(Q_landmark.mT @ K)  # B, groups, m, n
            E = S_mn @ V.mT  # B, groups, m, c
            # Rows of S_mn sum to 1, so an affine map of E is the same map of V: it folds into `value`.
            E = self._split(self._normalise("value", E.mT.flatten(1, 2))).mT  # B, groups, m, c
            Z = self._solve(S_mm, E)  # B, groups, m, c
            attended = Z.mT @ (S_nm + grid.membership(S_nm.dtype)).mT  # B, groups, c, n
        return self._join(attended, x)

    def diagnose(self, x: Tensor) -> dict[str, float]:
        """The largest logit of S_nm and S_mn over x, (B, C, H, W), and "smallest_S_ii" of S_mm before the floor.

        1 / (2 min S_ii) bounds the norm of (S_mm + I)^-1: the smaller, the more noise it may amplify.
        """
        grid = LandmarkGrid(x.shape[-2], x.shape[-1], self.landmarks, x.device)
        with observing(self):
            Q, K = (self._split(self._project(name, x)) for name in ("query", "key"))
            Q_landmark, K_landmark = grid.pool(Q), grid.pool(K)
            largest = max((Q.mT @ K_landmark).abs().max().item(), (Q_landmark.mT @ K).abs().max().item())
            own = softmax(Q_landmark.mT @ K_landmark).diagonal(dim1=-2, dim2=-1)
        return {"largest_logit": largest, "smallest_S_ii": own.min().item()}

    def _solve(self, S_mm: Tensor, E: Tensor) -> Tensor:
        """Z with (S_mm + I) Z = E, in fp32 at least: (B, groups, m, m), (B, groups, m, c) -> the shape of E."""
        floor = self.self_attention_floor
        own = S_mm.diagonal(dim1=-2, dim2=-1)[..., None]  # B, groups, m, 1
        raised = (floor - own).clamp(min=0) / (1 - own.clamp(max=floor))  # share given to the landmark itself
        identity = torch.eye(S_mm.shape[-1], dtype=S_mm.dtype, device=S_mm.device)
        system = S_mm * (1 - raised) + identity * (1 + raised)
        with autocast_like(system):
            return solve_dominant(system, E.to(system.dtype))


def solve_dominant(system: Tensor, right: Tensor) -> Tensor:
    """system^-1 right for diagonally dominant systems (..., m, m), (..., m, c), by halves down to 128 rows.

    torch's batched LU on the CPU is wrong beyond 150 rows after torch.set_num_threads(2) (pytorch #142815).
    The Schur complement of a dominant system is dominant too, so halves need no pivoting across them.
    """
    m = system.shape[-1]
    if m <= 128:
        # solve_ex: the check for singularity would be a synchronisation, and it cannot be singular.
        return torch.linalg.solve_ex(system, right)[0]
    half = m // 2
    A, B = system[..., :half, :half], system[..., :half, half:]
    C, D = system[..., half:, :half], system[..., half:, half:]
    solved = solve_dominant(A, torch.cat([B, right[..., :half, :]], dim=-1))  # A^-1 [B, r_1]
    A_B, A_r = solved[..., : m - half], solved[..., m - half :]
    lower = solve_dominant(D - C @ A_B, right[..., half:, :] - C @ A_r)
    return torch.cat([A_r - A_B @ lower, lower], dim=-2)
