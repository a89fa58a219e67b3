"""Networks of torchreid's registry for trained weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from csalr_plugin.hosts.torchreid import host, register
from csalr_plugin.hosts.torchreid.config import (
    Config,
    default_config,
    set_active_config,
    training_keys,
)


def read_config(recorded: Mapping[str, Any], config_file: str, overrides: Sequence[str], source: str) -> Config:
    """Return torchreid's settings for a trained network, see `merge_trained` of the settings."""
    config = default_config()
    config.merge_trained(recorded, training_keys(config), config_file, overrides, source)
    return config


def build_network(name: str, config: Config, num_classes: int) -> nn.Module:
    """Build the network `name` of torchreid's registry, without pretrained weights.

    Raises:
        UserError: the registry has no such name, or a setting is not allowed.
    """
    register()
    config.model.name = name
    config.validate()
    previous = set_active_config(config)
    try:
        network: nn.Module = host().models.build_model(name, num_classes, pretrained=False, use_gpu=False)
    finally:
        set_active_config(previous)
    return network
