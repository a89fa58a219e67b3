"""What torchreid lacks on today's torch and NumPy, each mend with its reason.

Numbers are those of issues of KaiyangZhou/deep-person-reid.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from PIL import Image

from csalr_plugin.hosts.data import UNREADABLE, padded, unreadable
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
    except UNREADABLE as error:
        raise unreadable(path, error) from None


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
    if getattr(torchreid.metrics.evaluate_rank, "__module__", None) != padded.__module__:
        _replace(padded(torchreid.metrics.evaluate_rank), torchreid.metrics, torchreid.metrics.rank)


def _replace(function: Callable[..., Any], *modules: ModuleType) -> None:
    for module in modules:
        setattr(module, function.__name__, function)
