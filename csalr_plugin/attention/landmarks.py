"""The landmark grid of CSALR (section 3.2): which positions a landmark stands for."""

from __future__ import annotations

import torch
from torch import Tensor


class LandmarkGrid:
    """Divides an H x W map into H' x W' patches; each patch is one landmark.

    Position (i, j) belongs to landmark (floor(i H'/H), floor(j W'/W)), where H' and W' are at most H and W. A
    landmark is the mean of its members. Where H' divides H and W' divides W this is the average pooling of the paper;
    every other size works the same way.

    Args:
        height, width: size of the map, in positions.
        landmarks: the requested (H', W').
        device: device of the index tensors.
    """

    def __init__(self, height: int, width: int, landmarks: tuple[int, int], device: torch.device) -> None:
        if isinstance(height, Tensor):  # while torch.jit.trace records, where the size becomes a constant
            height, width = int(height), int(width)
        self.height, self.width, self.device = height, width, device
        # sym_min: the same as min, also for the symbolic sizes of an exported program.
        self.rows: int = torch.sym_min(landmarks[0], height)  # type: ignore[assignment]
        self.columns: int = torch.sym_min(landmarks[1], width)  # type: ignore[assignment]

    @property
    def m(self) -> int:
        """Number of landmarks."""
        return self.rows * self.columns

    @property
    def row_of(self) -> Tensor:
        """Landmark row of each row of the map, (H,)."""
        return torch.arange(self.height, device=self.device) * self.rows // self.height

    @property
    def column_of(self) -> Tensor:
        """Landmark column of each column of the map, (W,)."""
        return torch.arange(self.width, device=self.device) * self.columns // self.width

    @property
    def landmark_of(self) -> Tensor:
        """Landmark of each position, (n,)."""
        return (self.row_of[:, None] * self.columns + self.column_of).flatten()

    @property
    def sizes(self) -> Tensor:
        """Number of positions of each landmark, (m,)."""
        return torch.outer(
            _members(self.row_of, self.rows).sum(1), _members(self.column_of, self.columns).sum(1)
        ).flatten()

    def pool(self, features: Tensor) -> Tensor:
        """Mean of each landmark's members: (..., n) -> (..., m)."""
        exporting = torch.compiler.is_exporting()  # where sizes may be symbols, which cannot be tested
        if not exporting and self.height % self.rows == 0 and self.width % self.columns == 0:
            high, wide = self.height // self.rows, self.width // self.columns
            bands = features.unflatten(-1, (self.rows, high, self.width)).sum(-2)  # type: ignore[no-untyped-call] # ..., H', W
            return bands.unflatten(-1, (self.columns, wide)).sum(-1).flatten(-2) / (high * wide)  # ..., m
        image = features.unflatten(-1, (self.height, self.width))  # type: ignore[no-untyped-call]
        down = _averages(self.row_of, self.rows, features.dtype)  # H', H
        across = _averages(self.column_of, self.columns, features.dtype)  # W', W
        return (down @ image @ across.mT).flatten(-2)  # ..., m

    def membership(self, dtype: torch.dtype) -> Tensor:
        """P of Eq. 15: (n, m), 1 where the position lies in the landmark's patch and 0 elsewhere."""
        return (self.landmark_of[:, None] == torch.arange(self.m, device=self.device)).to(dtype)


def _members(part_of: Tensor, parts: int) -> Tensor:
    """(size,) -> (parts, size): whether the row or column belongs to the part."""
    return part_of == torch.arange(parts, device=part_of.device)[:, None]


def _averages(part_of: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """(size,) -> (parts, size): the matrix that averages the members of each part."""
    members = _members(part_of, parts).to(dtype)
    return members / members.sum(dim=1, keepdim=True)
