"""The eight architectures; they need torch and torchvision, and no host.

Importing the package takes neither: what is known without them, names and channels, costs nothing to ask.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from csalr_plugin.errors import UserError, suggest

if TYPE_CHECKING:
    from csalr_plugin.models.pcb import PCB, RefinedPCB

MODEL_NAMES = (
    "pcb",
    "pcb_sa",
    "pcb_csa",
    "pcb_csalr",
    "pcb_rpp",
    "pcb_rpp_sa",
    "pcb_rpp_csa",
    "pcb_rpp_csalr",
)

STAGE_CHANNELS = {1: 256, 2: 512, 3: 1024, 4: 2048}  # of ResNet-50

__all__ = ["MODEL_NAMES", "PCB", "STAGE_CHANNELS", "RefinedPCB", "build_model", "head_and_attention"]


def __getattr__(name: str) -> Any:
    if name in ("PCB", "RefinedPCB"):
        return getattr(importlib.import_module("csalr_plugin.models.pcb"), name)
    raise AttributeError(f"module 'csalr_plugin.models' has no attribute {name!r}")


def head_and_attention(name: str) -> tuple[str, str]:
    """Take a model's name apart: "pcb_rpp_csalr" is ("pcb_rpp", "csalr"), and "pcb" is ("pcb", "none").

    Raises:
        UserError: for an unknown name.
    """
    if name not in MODEL_NAMES:
        raise UserError(f"Unknown model {name!r}: allowed is {', '.join(MODEL_NAMES)}.{suggest(name, MODEL_NAMES)}")
    if name.endswith(("pcb", "rpp")):
        return name, "none"
    head, attention = name.rsplit("_", 1)
    return head, attention


def build_model(
    name: str,
    num_classes: int,
    *,
    loss: str = "softmax",
    pretrained: bool = True,
    pretrained_weights: str = "",
    groups: int = 2,
    landmarks: tuple[int, int] = (12, 8),
    stages: Sequence[int] = (1, 2, 3),
    key_ratio: float = 0.25,
) -> PCB:
    """Build the architecture `name`.

    Args:
        name: one of `MODEL_NAMES`: head ("pcb", "pcb_rpp"), then attention ("", "_sa", "_csa", "_csalr").
        num_classes: training identities.
        loss: "softmax" or "triplet"; see `PCB.forward` for what training mode returns.
        pretrained: start from ImageNet weights of ResNet-50.
        pretrained_weights: path to a state dict of torchvision's ResNet-50; empty means torchvision's download.
        groups, landmarks, key_ratio: see `csalr_plugin.attention.build_attention`.
        stages: stages of the ResNet, 1 to 4, that are followed by a block.

    Raises:
        UserError: for an unknown name, settings that no model can have, or weights that cannot be had.
    """
    from csalr_plugin.models.pcb import PCB, RefinedPCB
    from csalr_plugin.models.weights import load_backbone

    head, attention = head_and_attention(name)
    architecture = RefinedPCB if head == "pcb_rpp" else PCB
    model = architecture(
        num_classes,
        attention=attention,
        loss=loss,
        stages=stages,
        groups=groups,
        landmarks=landmarks,
        key_ratio=key_ratio,
    )
    if pretrained:
        load_backbone(model, pretrained_weights)
    return model
