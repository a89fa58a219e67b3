"""The host's optimizer, with learning rates of their own for blocks and gates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchreid
from torch import Tensor, nn

from csalr_plugin.hosts.torchreid.config import active_config
from csalr_plugin.models import PCB

_build_host_optimizer = torchreid.optim.build_optimizer


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a DataParallel, or the model itself."""
    return model.module if isinstance(model, nn.DataParallel) else model


def build_optimizer(model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """Build the host's optimizer; blocks and gates of a plugin model get parameter groups of their own.

    Blocks, with their supervision branches, learn at `csalr.attention_lr` times the learning rate of new layers,
    and gates (alpha) at `csalr.gate_lr` times that rate and without weight decay: a gate's gradient is a sum over
    all positions, and a gate that is decayed never opens.

    Args:
        model: any model of the host's registry; one that is not the plugin's is left to the host.
        args, kwargs: those of the host's ``torchreid.optim.build_optimizer``.
    """
    optimizer = _build_host_optimizer(model, *args, **kwargs)
    network = unwrapped(model)
    if not isinstance(network, PCB) or not network.attention:
        return optimizer
    settings = active_config().csalr
    gates = [block.alpha for block in network.attention.values()]
    blocks = [
        parameter
        for child in (network.attention, network.supervision)
        for parameter in child.parameters()
        if not any(parameter is gate for gate in gates)
    ]
    moved = {id(parameter) for parameter in [*gates, *blocks]}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    rate = optimizer.defaults["lr"]
    host_groups = list(optimizer.param_groups)
    optimizer.add_param_group({"params": blocks, "lr": rate * settings.attention_lr, "role": "attention"})
    optimizer.add_param_group({"params": gates, "lr": rate * settings.gate_lr, "role": "gate", "weight_decay": 0.0})
    # The host prints the learning rate of the last group: keep its own there.
    optimizer.param_groups[:] = [*optimizer.param_groups[-2:], *host_groups]
    return optimizer


class WarmUp:
    """Scales the learning rate of blocks and gates linearly from 0 over the first optimizer steps.

    Args:
        optimizer: from :func:`build_optimizer`.
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
