"""Images that do not decode and galleries that are small: what both hosts stumble over."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from csalr_plugin.errors import UserError

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises for a file that is missing or does not decode."""


def unreadable(path: str, error: BaseException) -> UserError:
    """Return the one line about an image that PIL raised `error`, one of `UNREADABLE`, for."""
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, UnidentifiedImageError):  # whose text is the path again
        reason = "it is no image"
    return UserError(f"image '{path}' cannot be read ({reason}); replace it, or remove it from the dataset.")


def decode_all(paths: Collection[str], read_image: Callable[[str], object]) -> None:
    """Decode every image once, before training starts rather than hours into it.

    Raises:
        UserError: the first one that `read_image` raises.
    """

    def decode(path: str) -> None:
        read_image(path)

    with ThreadPoolExecutor() as pool:
        for _ in tqdm(pool.map(decode, paths), total=len(paths), desc="Checking images", unit="", mininterval=2.0):
            pass


def padded(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """Return a host's `evaluate_rank` for galleries of any size; both hosts' has the same arguments."""

    def evaluate_rank(
        distmat: Any,
        q_pids: Any,
        g_pids: Any,
        q_camids: Any,
        g_camids: Any,
        max_rank: int = 50,
        use_metric_cuhk03: bool = False,
        use_cython: bool = True,
    ) -> Any:
        # The cuhk03 metric counts identities.
        left = len(np.unique(g_pids)) - 1 if use_metric_cuhk03 else fewest_left(g_pids, g_camids)
        if (missing := max_rank - left) > 0:
            # Strangers at an infinite distance: no match comes after them, so no precision changes.
            strangers = max(np.max(q_pids), np.max(g_pids)) + 1 + np.arange(missing)
            distmat = np.pad(distmat, ((0, 0), (0, missing)), constant_values=np.inf)
            g_pids, g_camids = np.append(g_pids, strangers), np.append(g_camids, np.zeros_like(strangers))
        return evaluate(distmat, q_pids, g_pids, q_camids, g_camids, max_rank, use_metric_cuhk03, use_cython)

    return evaluate_rank


def fewest_left(gallery_ids: Any, gallery_cameras: Any) -> int:
    """How many gallery images a query has at the least, leaving out its own identity in its own camera."""
    pairs = np.unique([gallery_ids, gallery_cameras], axis=1, return_counts=True)
    return len(gallery_ids) - int(pairs[1].max())
