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
    """Return torchreid's settings: those of the overrides, else of the file, else of the checkpoint, else the defaults.

    Args:
        recorded: settings of the checkpoint, ``{dotted key: value}``.
        config_file: a .yaml file, or empty.
        overrides: pairs ``[key, value, ...]``.
        source: the checkpoint's name, for messages.

    Raises:
        UserError: a key is unknown, or a value is not allowed.
    """
    config = default_config()
    if config_file:
        config.merge_from_file(config_file)
    config.merge_from_list(overrides)
    config.take_over(recorded, training_keys(config), config.defaults, source)
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
