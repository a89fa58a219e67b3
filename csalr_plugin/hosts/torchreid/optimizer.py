"""The host's optimizer, with learning rates of their own for blocks and gates."""

from __future__ import annotations

from typing import Any

import torch
import torchreid
from torch import nn

from csalr_plugin.hosts.torchreid.config import active_config
from csalr_plugin.hosts.training import unwrapped
from csalr_plugin.models import PCB

_build_host_optimizer = torchreid.optim.build_optimizer


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
