"""What torchreid lacks on today's torch and NumPy, each mend with its reason.

Numbers are those of issues of KaiyangZhou/deep-person-reid.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from csalr_plugin.errors import UserError
from csalr_plugin.hosts.torchreid import host
from csalr_plugin.models.weights import read_checkpoint


def apply() -> None:
    """Mend the imported torchreid; may be called again.

    Raises:
        UserError: torchreid is not installed.
    """
    torchreid = host()
    for mend in (
        alias_modules,
        read_weights_only,
        refuse_unreadable_images,
        leave_console_open,
        rank_small_galleries,
    ):
        mend(torchreid)


def alias_modules(torchreid: ModuleType) -> None:
    """Make ``torchreid.utils`` and its like modules under the PyPI package (#526, #563).

    There they are ``torchreid.reid.utils``, so that every script of the repository fails at its first import.
    """
    inner = torchreid.__name__ + ".reid."
    for name, module in list(sys.modules.items()):
        if name.startswith(inner):
            sys.modules.setdefault(f"{torchreid.__name__}.{name.removeprefix(inner)}", module)


def read_weights_only(torchreid: ModuleType) -> None:
    """Load torchreid's own checkpoints again, and keep a checkpoint from ever running code (#592).

    torchreid saves ``rank1`` as a NumPy scalar, for which torch refuses the whole file since 2.6. For a file
    with Python 2 text in it, torchreid asks for plain pickle, which runs what the file says, and leaves the
    module `pickle` of the whole process changed.
    """
    _replace(load_checkpoint, torchreid.utils.torchtools, torchreid.utils)


def load_checkpoint(fpath: str) -> dict[str, Any]:
    """Load a checkpoint onto the CPU: weights, plain values and NumPy scalars only.

    Raises:
        UserError: the file is missing, damaged, or its pickle would run code.
    """
    return read_checkpoint(fpath)


def refuse_unreadable_images(torchreid: ModuleType) -> None:
    """Stop at an image that does not decode; torchreid reads it again for ever ("Just chill")."""
    _replace(read_image, torchreid.utils.tools, torchreid.utils, torchreid.data.datasets.dataset)


def read_image(path: str) -> Image.Image:
    """Read an image as RGB.

    Raises:
        UserError: the file is missing or does not decode.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, UnidentifiedImageError):  # whose text is the path again
            reason = "it is no image"
        raise UserError(
            f"image '{path}' cannot be read ({reason}); replace it, or remove it from the dataset."
        ) from None


def leave_console_open(torchreid: ModuleType) -> None:
    """Keep torchreid's `Logger` from closing the console that it was given.

    It does when it is collected, and what the same process prints afterwards is an error.
    """

    def close(self: Any) -> None:
        if self.file is not None:
            self.file.close()

    torchreid.utils.Logger.close = close


def rank_small_galleries(torchreid: ModuleType) -> None:
    """Rank galleries of fewer than some 50 images (#424).

    The curves of queries then differ in length, which NumPy refuses to average since 1.24, and a rank in
    ``test.ranks`` beyond them is an IndexError, after training and before the checkpoint is saved.
    """
    if getattr(torchreid.metrics.evaluate_rank, "__module__", None) != __name__:
        _replace(_padded(torchreid.metrics.evaluate_rank), torchreid.metrics, torchreid.metrics.rank)


def _padded(evaluate: Callable[..., Any]) -> Callable[..., Any]:
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


def _replace(function: Callable[..., Any], *modules: ModuleType) -> None:
    for module in modules:
        setattr(module, function.__name__, function)
