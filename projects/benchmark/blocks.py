"""The blocks that CSALR is compared with."""

from __future__ import annotations

import importlib.util

from torch import Tensor, nn

from csalr_plugin.attention import AttentionBlock
from csalr_plugin.attention.batch_norm import Statistics


class Alternative(AttentionBlock):
    """An attention block of the benchmark: parameters as CSALR's, and a formula of its own.

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
        self.recompute = False

    def diagnose(self, x: Tensor) -> dict[str, float]:
        """Nothing; the benchmark does not use it."""
        return {}


class ConvolutionsOnly(Alternative):
    """The 1x1 convolutions of CSALR and nothing between them: its cost if attention were free."""

    def __init__(self, channels: int, **settings: object) -> None:
        super().__init__(channels, **settings)  # type: ignore[arg-type]
        self.norm = nn.ModuleDict()

    def attention(self, x: Tensor, statistics: Statistics) -> Tensor:
        """Values: (B, C, H, W) -> (B, groups, n, C/groups)."""
        # The sums of queries and keys cost next to nothing and make both run backward, too.
        sums = self.query(x).sum(1, keepdim=True) + self.key(x).sum(1, keepdim=True)
        return (self.value(x) + sums).flatten(2).unflatten(1, (self.groups, -1)).mT


class Nystrom(Alternative):
    """`nystrom-attention` in place of the block: the layer of the library with its defaults.

    It has as many landmarks as CSALR, and heads of 64 channels, C channels in all.
    """

    def __init__(self, channels: int, **settings: object) -> None:
        super().__init__(channels, **settings)  # type: ignore[arg-type]
        from nystrom_attention import NystromAttention

        for unused in ("query", "key", "value", "fuse"):
            if hasattr(self, unused):
                delattr(self, unused)
        self.norm = nn.ModuleDict()
        self.groups = 1
        width = min(64, channels)
        landmarks = self.landmarks[0] * self.landmarks[1]
        self.layer = NystromAttention(channels, dim_head=width, heads=channels // width, num_landmarks=landmarks)

    def attention(self, x: Tensor, statistics: Statistics) -> Tensor:
        """(B, C, H, W) -> (B, 1, n, C)."""
        return self.layer(x.flatten(2).mT)[:, None]


def nystrom_is_installed() -> bool:
    """Whether the optional extra `bench` is installed."""
    return importlib.util.find_spec("nystrom_attention") is not None
