"""What CSALR is compared with: blocks that take the place of a model's attention."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from csalr_plugin.attention import AttentionBlock, LandmarkGrid


class Alternative(AttentionBlock):
    """A block of the bench: the base's gate and residual, parameters as CSALR's, `attend` of its own.

    Args:
        channels: C, channels of the feature map.
        groups: heads.
        landmarks: (H', W').
        key_ratio: C'/C.
    """

    def __init__(
        self, channels: int, *, groups: int = 1, landmarks: tuple[int, int] = (12, 8), key_ratio: float = 0.25
    ) -> None:
        super().__init__(channels, groups, key_ratio)
        self.landmarks = landmarks
        self.key = nn.Conv2d(channels, self.key_channels, 1)
        self.norm["key"] = nn.BatchNorm1d(self.key_channels)

    def diagnose(self, x: Tensor) -> dict[str, float]:
        """Nothing: the bench does not ask."""
        return {}

    def _normalised(self, name: str, projected: Tensor) -> Tensor:
        return self.norm[name](projected) if name in self.norm else projected

    def _heads(self, features: Tensor) -> Tensor:
        return features.reshape(len(features), self.groups, -1, features.shape[-1])

    def _fused(self, attended: Tensor) -> Tensor:
        return self.fuse(attended) if self.groups > 1 else attended


class PublishedCSALR(Alternative):
    """CSALR as the paper writes it, with plain operations: every map is kept, each position has a value, W is formed.

    Batch norms stand where CSALR has them, so that the two are the same function of the same parameters.
    """

    def attend(self, x: Tensor) -> Tensor:
        """O of Eq. 17 before gate and residual: (B, C, H, W) -> (B, C, H, W)."""
        grid = LandmarkGrid(x.shape[-2], x.shape[-1], self.landmarks, x.device)
        Q = self._heads(self._normalised("query", self.query(x).flatten(2)))  # B, groups, C'/groups, n
        K = self._heads(self._normalised("key", self.key(x).flatten(2)))  # B, groups, C'/groups, n
        V = self._heads(self.value(x).flatten(2))  # B, groups, c, n
        Q_landmark, K_landmark = grid.pool(Q), grid.pool(K)  # B, groups, C'/groups, m
        S_nm = (Q.mT @ K_landmark).softmax(-1)  # Eq. 11: B, groups, n, m
        S_mm = (Q_landmark.mT @ K_landmark).softmax(-1)  # Eq. 12: B, groups, m, m
        S_mn = (Q_landmark.mT @ K).softmax(-1)  # Eq. 13: B, groups, m, n
        A_nm = S_nm + grid.membership(S_nm.dtype)  # Eq. 15
        A_mm = S_mm + torch.eye(grid.m, dtype=S_mm.dtype, device=x.device)  # Eq. 16
        W = A_nm @ torch.linalg.inv(A_mm)  # Eq. 14: B, groups, n, m
        E = S_mn @ V.mT  # B, groups, m, c
        E = self._heads(self._normalised("value", E.mT.flatten(1, 2))).mT
        attended = (W @ E).mT  # Eq. 17: B, groups, c, n
        return self._fused(attended.reshape(x.shape))


class ConvolutionsOnly(Alternative):
    """The 1x1 convolutions of the published block and nothing between them: what it cost if attention were free."""

    def __init__(self, channels: int, **settings: object) -> None:
        super().__init__(channels, **settings)  # type: ignore[arg-type]
        self.norm = nn.ModuleDict()

    def attend(self, x: Tensor) -> Tensor:
        """Values, fused; (B, C, H, W) -> (B, C, H, W)."""
        # Queries and keys are added as a sum, which is next to free, so that they run backward too.
        sums = self.query(x).sum(1, keepdim=True) + self.key(x).sum(1, keepdim=True)
        return self._fused(self.value(x) + sums)


class Nystrom(Alternative):
    """`nystrom-attention` in the block's place: the library's own layer and defaults over the same positions.

    As many landmarks as CSALR has; heads of 64 channels, as the library has them, C of them in all.
    """

    def __init__(self, channels: int, **settings: object) -> None:
        super().__init__(channels, **settings)  # type: ignore[arg-type]
        from nystrom_attention import NystromAttention

        for unused in ("query", "key", "value", "norm", "fuse"):
            if hasattr(self, unused):
                delattr(self, unused)
        width = min(64, channels)
        landmarks = self.landmarks[0] * self.landmarks[1]
        self.layer = NystromAttention(channels, dim_head=width, heads=channels // width, num_landmarks=landmarks)

    def attend(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.layer(x.flatten(2).mT).mT.reshape(x.shape)


def nystrom_is_installed() -> bool:
    """Whether the optional extra `bench` is there."""
    return importlib.util.find_spec("nystrom_attention") is not None
