"""What keeps the training of blocks and gates stable, in whichever host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from csalr_plugin.models import PCB


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a DataParallel or DistributedDataParallel, or the model itself."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model


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
