"""What keeps the training of blocks and gates stable, and its memory at hand, in whichever host."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from csalr_plugin.models import PCB


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a DataParallel or DistributedDataParallel, or the model itself."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model


def keep_freed_memory() -> None:
    """Ask the C library, from now on and in this process, to keep the memory that is freed.

    glibc gives each block above 32 MB back to the system, which hands it out again page by page: on a CPU 4 % of a
    training step (384x128, batch 8). Results do not depend on it. A GPU's memory is kept by torch.
    """
    trim_threshold, most_mapped = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(most_mapped, 0)
        library.mallopt(trim_threshold, 2**31 - 1)


class WarmUp:
    """Scales the learning rate of blocks and gates linearly from 0 over the first optimizer steps.

    Args:
        optimizer: one whose groups of blocks and gates have a "role".
        steps: length; 0 means none.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.groups = [group for group in optimizer.param_groups if "role" in group]
        self.steps = steps

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """The rates of step `step`, counted from 0 over the whole training, for the length of a with statement.

        They are put back afterwards, so that the host's scheduler and checkpoints never see the scaling.
        """
        rates = [group["lr"] for group in self.groups]
        share = min(1.0, (step + 1) / self.steps) if self.steps else 1.0
        for group in self.groups:
            group["lr"] *= share
        try:
            yield
        finally:
            for group, rate in zip(self.groups, rates, strict=True):
                group["lr"] = rate


def clip_gradients(network: nn.Module, limit: float) -> Tensor:
    """Clip each block's gradient to norm `limit` and each gate's to +-0.1 `limit`; 0 leaves them as they are.

    Each apart: the inverse may amplify one block's gradient a hundredfold, and a gate's, a sum over all positions,
    would take the whole norm for itself. Clipped so, a gate moves at a pace that its learning rate sets.

    Returns:
        The norm of all of the network's gradients before clipping, a scalar where the gradients are; not finite
        when one of them is not, and what is clipped is then spoilt.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
    if limit and isinstance(network, PCB):
        for block in network.attention.values():
            if block.alpha.grad is None:  # frozen, as while the part classifier trains alone
                continue
            rest = [parameter for name, parameter in block.named_parameters() if name != "alpha"]
            torch.nn.utils.clip_grad_norm_(rest, limit)
            torch.nn.utils.clip_grad_value_(block.alpha, 0.1 * limit)  # type: ignore[arg-type]
    return norm
