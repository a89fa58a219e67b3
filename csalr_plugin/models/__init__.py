"""The eight architectures. They need torch and torchvision, and no host.

Importing this package imports neither, so that the names of the models are available at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from csalr_plugin.errors import UserError, shown, suggest

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

ATTENTIONS = ("sa", "csa", "csalr")  # as csalr_plugin.attention.ATTENTION_NAMES, whose import takes seconds

STAGE_CHANNELS = {1: 256, 2: 512, 3: 1024, 4: 2048}  # of ResNet-50

__all__ = [
    "ATTENTIONS",
    "MODEL_NAMES",
    "PCB",
    "STAGE_CHANNELS",
    "RefinedPCB",
    "build_model",
    "head_and_attention",
    "split_attention",
]


def __getattr__(name: str) -> Any:
    if name in ("PCB", "RefinedPCB"):
        return getattr(importlib.import_module("csalr_plugin.models.pcb"), name)
    raise AttributeError(f"module 'csalr_plugin.models' has no attribute {name!r}")


def head_and_attention(name: str) -> tuple[str, str]:
    """Split the name of a model: "pcb_rpp_csalr" is ("pcb_rpp", "csalr"), and "pcb" is ("pcb", "none").

    Raises:
        UserError: the name is unknown.
    """
    if name not in MODEL_NAMES:
        raise UserError(
            f"Unknown model {shown(name)}: allowed is {', '.join(MODEL_NAMES)}.{suggest(name, MODEL_NAMES)}"
        )
    if name.endswith(("pcb", "rpp")):
        return name, "none"
    head, attention = name.rsplit("_", 1)
    return head, attention


def split_attention(name: str) -> tuple[str, str]:
    """Split a name that ends with an attention: "osnet_csalr" is ("osnet", "csalr"), and "osnet" is ("osnet", "")."""
    base, _, attention = name.rpartition("_")
    return (base, attention) if base and attention in ATTENTIONS else (name, "")


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
    plain_supervision: bool = False,
) -> PCB:
    """Build the architecture `name`.

    Args:
        name: one of `MODEL_NAMES`: head ("pcb", "pcb_rpp"), then attention ("", "_sa", "_csa", "_csalr").
        num_classes: training identities.
        loss: "softmax" or "triplet"; see `PCB.forward` for the output in training mode.
        pretrained: start from ImageNet weights of ResNet-50.
        pretrained_weights: path to a state dict of torchvision's ResNet-50; empty means torchvision's download.
        groups, landmarks, key_ratio: see `csalr_plugin.attention.build_attention`.
        stages: the stages of the ResNet, from 1 to 4, with a block after them.
        plain_supervision: see `PCB`.

    Raises:
        UserError: the name is unknown, a setting is not allowed, or the weights cannot be downloaded or read.
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
        plain_supervision=plain_supervision,
    )
    if pretrained:
        load_backbone(model, pretrained_weights)
    return model
