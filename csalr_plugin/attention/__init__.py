"""Attention blocks over a feature map (B, C, H, W).

They need torch alone. To have them elsewhere, copy this folder and, beside it, errors.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError, suggest
from .block import AttentionBlock
from .compressed import CompressedSelfAttention
from .csalr import CSALR
from .fast import set_fast, takes
from .landmarks import LandmarkGrid
from .self_attention import SelfAttention

ATTENTION_NAMES = ("sa", "csa", "csalr")

__all__ = [
    "ATTENTION_NAMES",
    "CSALR",
    "AttentionBlock",
    "CompressedSelfAttention",
    "LandmarkGrid",
    "SelfAttention",
    "build_attention",
    "set_fast",
    "takes",
]


def build_attention(
    name: str,
    channels: int,
    *,
    groups: int = 2,
    landmarks: tuple[int, int] = (12, 8),
    key_ratio: float = 0.25,
) -> AttentionBlock:
    """Build the attention block `name` for a feature map of `channels` channels.

    Args:
        name: "sa" (Eq. 1-2), "csa" (Chen et al., 2020) or "csalr" (Eq. 11-17).
        channels: channels C of the feature map.
        groups: heads of CSA and CSALR. SA has one group, as in the paper (section 4.2), whatever is given.
        landmarks: (H', W'): H' W' landmarks of CSALR, or bases of CSA, a group.
        key_ratio: C'/C, the width of queries and keys.

    Raises:
        UserError: for an unknown name, or settings that no block can have.
    """
    pair = tuple(landmarks) if isinstance(landmarks, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(size, int) and size > 0 for size in pair):
        raise UserError(f"landmarks {landmarks!r} must be two positive integers (H', W'), for example (12, 8).")
    if not isinstance(key_ratio, (int, float)) or not 0 < key_ratio <= 1:
        raise UserError(f"key_ratio {key_ratio!r} must be above 0 and at most 1.")
    if name == "sa":
        return SelfAttention(channels, key_ratio=key_ratio)
    if name == "csa":
        return CompressedSelfAttention(channels, groups=groups, landmarks=pair, key_ratio=key_ratio)
    if name == "csalr":
        return CSALR(channels, groups=groups, landmarks=pair, key_ratio=key_ratio)
    raise UserError(
        f"Unknown attention {name!r}: allowed is {', '.join(ATTENTION_NAMES)}.{suggest(name, ATTENTION_NAMES)}"
    )
