"""Meta-architectures of fast-reid for trained weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastreid.config import get_cfg
from fastreid.modeling import build_model
from torch import nn

from csalr_plugin.hosts.fastreid.config import Config, add_csalr_config, check_network
from csalr_plugin.hosts.fastreid.resume import training_keys


def read_config(recorded: Mapping[str, Any], config_file: str, overrides: Sequence[str], source: str) -> Config:
    """Return fast-reid's settings for a trained network, see `merge_trained` of the settings."""
    cfg = get_cfg()
    add_csalr_config(cfg)
    cfg.merge_trained(recorded, training_keys(cfg), config_file, overrides, source)
    return cfg


def build_network(name: str, cfg: Config, num_classes: int) -> nn.Module:
    """Build the meta-architecture `name` without pretrained weights. It takes normalised images.

    Raises:
        UserError: fast-reid has no such meta-architecture, or a setting is not allowed.
    """
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", name, "MODEL.HEADS.NUM_CLASSES", num_classes])
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.PRETRAIN", False])
    cfg.merge_from_list(["CSALR.AMP", "none", "CSALR.CHANNELS_LAST", False])  # in fp32, without autocast
    check_network(cfg)
    network: Any = build_model(cfg)
    network.pixel_mean.zero_()  # the file normalises, or its user does
    network.pixel_std.fill_(1)
    assert isinstance(network, nn.Module)
    return network
