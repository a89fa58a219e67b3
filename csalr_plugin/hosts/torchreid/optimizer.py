"""The host's optimizer, with learning rates of their own for blocks and gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchreid
from torch import nn

from csalr_plugin.errors import UserError, shown, suggest
from csalr_plugin.hosts.resume import name_parameters
from csalr_plugin.hosts.torchreid.config import active_config
from csalr_plugin.hosts.training import unwrapped
from csalr_plugin.models import recipe
from csalr_plugin.models.weights import NEW_LAYERS

_build_host_optimizer = torchreid.optim.build_optimizer


def build_optimizer(model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """Build the host's optimizer; the blocks and gates of a network with attention get parameter groups of their own.

    Their learning rates are `csalr.attention_lr` and `csalr.gate_lr` times that of new layers, see
    :func:`recipe.assign_role`.

    Args:
        model: any model of the host's registry; the host alone decides for one without attention.
        args, kwargs: those of the host's ``torchreid.optim.build_optimizer``.

    Raises:
        UserError: with `staged_lr`, a name in `new_layers` is neither a layer of this model nor of another of the
            plugin's models.
    """
    network = unwrapped(model)
    if kwargs.get("staged_lr"):
        given = kwargs.get("new_layers", ())
        names = [given] if isinstance(given, str) else given
        # A config file for all of the plugin's models may name layers that only some of them have.
        check_layers(network, [name for name in names if name not in NEW_LAYERS], "train.new_layers")
    optimizer = _build_host_optimizer(model, *args, **kwargs)
    if recipe.attention_blocks(network):
        _give_roles(optimizer, network)
    recipe.fuse_steps(optimizer)
    name_parameters(optimizer, network)
    return optimizer


def _give_roles(optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
    """Move blocks and gates to parameter groups of their own."""
    settings = active_config().csalr
    role_of = recipe.parameter_roles(network)
    for group in optimizer.param_groups:
        group["params"] = [one for one in group["params"] if role_of[one] is recipe.Role.HOST]
    host_groups = list(optimizer.param_groups)
    gate_lr = recipe.gate_rate(settings.gate_lr, optimizer)
    for role in (recipe.Role.ATTENTION, recipe.Role.GATE):
        group = {"params": [one for one in role_of if role_of[one] is role], "lr": optimizer.defaults["lr"]}
        recipe.assign_role(group, role, attention_lr=settings.attention_lr, gate_lr=gate_lr)
        optimizer.add_param_group(group)
    # The host prints the learning rate of the last group, which must be that of new layers.
    optimizer.param_groups[:] = [*optimizer.param_groups[-2:], *host_groups]


def check_layers(network: nn.Module, names: str | Sequence[str], key: str) -> None:
    """Check that `names` are layers of `network`: the host ignores other names, or ends with an assertion.

    Args:
        network: the model; its layers are its children.
        names: the value of the config key.
        key: the config key, for the message.

    Raises:
        UserError: a name is no layer; the message has the nearest names and all layers.
    """
    layers = [name for name, _ in network.named_children()]
    for name in [names] if isinstance(names, str) else names:
        if name not in layers:
            raise UserError(
                f"config key '{key}' names {shown(name)}, which is no layer of {type(network).__name__}; its layers "
                f"are {', '.join(layers)}.{suggest(name, layers)}"
            )
