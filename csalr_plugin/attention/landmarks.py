"""The landmark grid of CSALR (section 3.2 of the paper): which positions a landmark stands for."""

from __future__ import annotations

import torch
from torch import Tensor


class LandmarkGrid:
    """Divides an H x W map into H' x W' patches; each patch is one landmark.

    Position (i, j) belongs to landmark (floor(i H'/H), floor(j W'/W)), where H' and W' are at most H and W.
    A landmark is the mean of its members. Where H' divides H and W' divides W this is the average pooling of
    the paper; every other size works the same way.

    Args:
        height, width: size of the map, in positions.
        landmarks: (H', W') asked for.
        device: where the index tensors live.
    """

    def __init__(self, height: int, width: int, landmarks: tuple[int, int], device: torch.device) -> None:
        self.height, self.width, self.device = height, width, device
        self.rows, self.columns = min(landmarks[0], height), min(landmarks[1], width)

    @property
    def m(self) -> int:
        """Number of landmarks."""
        return self.rows * self.columns

    @property
    def row_of(self) -> Tensor:
        """The landmarks' row of each row of the map, (H,)."""
        return torch.arange(self.height, device=self.device) * self.rows // self.height

    @property
    def column_of(self) -> Tensor:
        """The same of columns, (W,)."""
        return torch.arange(self.width, device=self.device) * self.columns // self.width

    def pool(self, features: Tensor) -> Tensor:
        """Mean of each landmark's members: (..., C, H*W) -> (..., C, m)."""
        *lead, _ = features.shape
        if self.height % self.rows == 0 and self.width % self.columns == 0:
            high, wide = self.height // self.rows, self.width // self.columns
            bands = features.reshape(*lead, self.rows, high, self.width).sum(-2)  # ..., C, H', W
            return bands.reshape(*lead, self.m, wide).sum(-1) / (high * wide)  # ..., C, m
        down = self._averaging(self.row_of, self.rows, features.dtype)  # H', H
        across = self._averaging(self.column_of, self.columns, features.dtype)  # W', W
        image = features.reshape(*lead, self.height, self.width)
        return (down @ image @ across.mT).flatten(-2)  # ..., C, m

    @property
    def sizes(self) -> Tensor:
        """Positions of each landmark, (m,)."""
        rows, columns = (torch.arange(parts, device=self.device) for parts in (self.rows, self.columns))
        heights, widths = (self.row_of[:, None] == rows).sum(0), (self.column_of[:, None] == columns).sum(0)
        return torch.outer(heights, widths).flatten()

    @property
    def landmark_of(self) -> Tensor:
        """The landmark of each position, (H*W,)."""
        return (self.row_of[:, None] * self.columns + self.column_of).flatten()

    def membership(self, dtype: torch.dtype) -> Tensor:
        """P of Eq. 15: (H*W, m), 1 where the position lies in the landmark's patch and 0 elsewhere."""
        return (self.landmark_of[:, None] == torch.arange(self.m, device=self.device)).to(dtype)

    def _averaging(self, part_of: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
        members = (part_of == torch.arange(parts, device=part_of.device)[:, None]).to(dtype)  # parts, size
        return members / members.sum(dim=1, keepdim=True)
