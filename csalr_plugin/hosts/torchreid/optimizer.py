"""The host's optimizer, with learning rates of their own for blocks and gates."""

from __future__ import annotations

from typing import Any

import torch
import torchreid
from torch import nn

from csalr_plugin.hosts.torchreid.config import active_config
from csalr_plugin.hosts.training import unwrapped
from csalr_plugin.models import recipe

_build_host_optimizer = torchreid.optim.build_optimizer


def build_optimizer(model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """Build the host's optimizer; the blocks and gates of a network with attention get parameter groups of their own.

    Their learning rates are `csalr.attention_lr` and `csalr.gate_lr` times that of new layers, see
    :func:`recipe.assign_role`.

    Args:
        model: any model of the host's registry; the host alone decides for one without attention.
        args, kwargs: those of the host's ``torchreid.optim.build_optimizer``.
    """
    optimizer = _build_host_optimizer(model, *args, **kwargs)
    network = unwrapped(model)
    if not recipe.attention_blocks(network):
        return optimizer
    settings = active_config().csalr
    role_of = recipe.parameter_roles(network)
    for group in optimizer.param_groups:
        group["params"] = [one for one in group["params"] if role_of[one] is recipe.Role.HOST]
    host_groups = list(optimizer.param_groups)
    for role in (recipe.Role.ATTENTION, recipe.Role.GATE):
        group = {"params": [one for one in role_of if role_of[one] is role], "lr": optimizer.defaults["lr"]}
        recipe.assign_role(group, role, attention_lr=settings.attention_lr, gate_lr=settings.gate_lr)
        optimizer.add_param_group(group)
    # The host prints the learning rate of the last group, which must be that of new layers.
    optimizer.param_groups[:] = [*optimizer.param_groups[-2:], *host_groups]
    return optimizer
