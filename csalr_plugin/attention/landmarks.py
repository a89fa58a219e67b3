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
        self.height, self.width = height, width
        self.rows, self.columns = min(landmarks[0], height), min(landmarks[1], width)
        self.device = device

    @property
    def m(self) -> int:
        """Number of landmarks."""
        return self.rows * self.columns

    def pool(self, features: Tensor) -> Tensor:
        """Mean of each landmark's members: (..., C, H*W) -> (..., C, m)."""
        *lead, channels, _ = features.shape
        if self.height % self.rows == 0 and self.width % self.columns == 0:
            patches = features.reshape(
                *lead, channels, self.rows, self.height // self.rows, self.columns, self.width // self.columns
            )
            return patches.mean(dim=(-3, -1)).flatten(-2)  # ..., C, m
        down = self._averaging(self.height, self.rows, features.dtype)  # H', H
        across = self._averaging(self.width, self.columns, features.dtype)  # W', W
        image = features.reshape(*lead, channels, self.height, self.width)
        return (down @ image @ across.mT).flatten(-2)  # ..., C, m

    def membership(self, dtype: torch.dtype) -> Tensor:
        """P of Eq. 15: (H*W, m), 1 where the position lies in the landmark's patch and 0 elsewhere."""
        rows = self._one_hot(self.height, self.rows, dtype)  # H, H'
        columns = self._one_hot(self.width, self.columns, dtype)  # W, W'
        return torch.einsum("ir,jc->ijrc", rows, columns).reshape(self.height * self.width, self.m)

    def _one_hot(self, size: int, parts: int, dtype: torch.dtype) -> Tensor:
        part = torch.arange(size, device=self.device) * parts // size
        return (part[:, None] == torch.arange(parts, device=self.device)).to(dtype)  # size, parts

    def _averaging(self, size: int, parts: int, dtype: torch.dtype) -> Tensor:
        members = self._one_hot(size, parts, dtype).mT  # parts, size
        return members / members.sum(dim=1, keepdim=True)
