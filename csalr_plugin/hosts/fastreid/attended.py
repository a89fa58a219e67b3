"""fast-reid's meta-architectures Baseline and MGN with attention: MODEL.BACKBONE.WITH_CSALR True."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from fastreid.config import CfgNode
from fastreid.modeling.losses import cross_entropy_loss
from fastreid.modeling.meta_arch import META_ARCH_REGISTRY
from fastreid.modeling.meta_arch.baseline import Baseline
from fastreid.modeling.meta_arch.mgn import MGN
from torch import Tensor, nn

from csalr_plugin.errors import UserError
from csalr_plugin.models import recipe
from csalr_plugin.models.attach import attach, take_branch_logits

_STAGES = ("layer1", "layer2", "layer3")
# Layers of a backbone with a block after them: its stages with maps of about 1/4, 1/8 and 1/16 of the image.
_LAYERS: dict[str, tuple[str, ...]] = {
    "build_effnet_backbone": ("s2", "s3", "s5"),
    "build_mobilenetv2_backbone": ("features.3", "features.6", "features.13"),
    "build_mobilenetv3_backbone": ("features.3", "features.6", "features.12"),
    "build_osnet_backbone": ("conv2", "conv3", "conv4"),
    "build_regnet_backbone": ("s1", "s2", "s3"),
    "build_repvgg_backbone": ("stage1", "stage2", "stage3"),
    "build_resnest_backbone": _STAGES,
    "build_resnet_backbone": _STAGES,
    "build_resnext_backbone": _STAGES,
    "build_shufflenetv2_backbone": ("features.3", "features.11"),
}
_SMALL_MOBILENETV3 = ("features.1", "features.3", "features.8")
_MGN_LAYERS = ("4", "5", "6")  # layer1, layer2 and layer3[0], which the three branches share

_Host: Any = object  # Baseline or MGN takes its place in the two classes below


class _Attended(_Host):
    """A meta-architecture of fast-reid with attention blocks and deep supervision (Eq. 18).

    The weights keep their names; new are `attention.*` and `supervision.*`.

    Args:
        cfg: fast-reid's settings with the node `CSALR`.

    Raises:
        UserError: see `layers_of` and `csalr_plugin.attach`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        settings = cfg.CSALR
        self.supervision_weight: float = settings.SUPERVISION_WEIGHT
        self.bf16: bool = settings.AMP == "bf16"
        self.channels_last: bool = settings.CHANNELS_LAST
        supervised = settings.SUPERVISION_WEIGHT and "CrossEntropyLoss" in cfg.MODEL.LOSSES.NAME
        attach(
            self,  # type: ignore[arg-type]
            settings.ATTENTION,
            layers_of(cfg),
            # 0 in an evaluation, which does not use the branches
            num_classes=max(1, cfg.MODEL.HEADS.NUM_CLASSES) if supervised else None,
            groups=settings.GROUPS,
            landmarks=tuple(settings.LANDMARKS),
            key_ratio=settings.KEY_RATIO,
        )
        if self.channels_last:
            self.to(memory_format=torch.channels_last)

    def forward(self, batched_inputs: Mapping[str, Any] | Tensor) -> Any:
        """Compute the host's losses and those of the branches in training mode, or embeddings in eval mode.

        Args:
            batched_inputs: a batch of fast-reid's loader, or in eval mode also images (B, 3, H, W) alone.

        Returns:
            In training mode scalars by name, whose sum is the loss; in eval mode the host's embeddings (B, width).
        """
        if self.channels_last:
            layout = torch.channels_last
            if isinstance(batched_inputs, Tensor):
                batched_inputs = batched_inputs.to(memory_format=layout)
            else:
                batched_inputs = {**batched_inputs, "images": batched_inputs["images"].to(memory_format=layout)}
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            outputs = super().forward(batched_inputs)
        return outputs if self.training else outputs.float()

    def losses(self, *outputs: Any) -> dict[str, Tensor]:
        """Compute the host's losses, L_F of Eq. 18, and lambda * L_DS_i as "loss_DS_NAME" for each branch.

        Args:
            outputs: of each head, then the identities (B,).
        """
        with torch.autocast(self.device.type, enabled=False) if self.bf16 else nullcontext():
            losses: dict[str, Tensor] = super().losses(*map(_in_fp32, outputs) if self.bf16 else outputs)
            identities, own = outputs[-1], self.loss_kwargs["ce"]
            branches = {
                name: own["scale"] * cross_entropy_loss(logits.float(), identities, own["eps"], own["alpha"])
                for name, logits in take_branch_logits(self).items()  # type: ignore[arg-type]
            }
        terms = recipe.LossTerms(sum(losses.values(), torch.zeros(())), branches, self.supervision_weight)
        return losses | {f"loss_DS_{name}": loss for name, loss in terms.weighted_branches().items()}


class AttendedBaseline(_Attended, Baseline):  # type: ignore[misc]  # fast-reid carries no types
    """fast-reid's Baseline, such as its bag of tricks, AGW and SBS, with attention."""


class AttendedMGN(_Attended, MGN):  # type: ignore[misc]
    """fast-reid's MGN with attention in the trunk that its branches share."""


_ATTENDED = {"Baseline": AttendedBaseline, "MGN": AttendedMGN}


def layers_of(cfg: CfgNode) -> tuple[str, ...]:
    """Return the layers that blocks follow: CSALR.AFTER, or else the stages of the backbone.

    Raises:
        UserError: the backbone is not known, and CSALR.AFTER is empty.
    """
    if cfg.CSALR.AFTER:
        return tuple(cfg.CSALR.AFTER)
    name = cfg.MODEL.BACKBONE.NAME
    if name not in _LAYERS:
        kind = "is a transformer, which has no feature maps" if name == "build_vit_backbone" else "is not known"
        raise UserError(
            f"config key 'MODEL.BACKBONE.WITH_CSALR' is True, and '{name}' {kind}: give another MODEL.BACKBONE.NAME "
            f"({', '.join(_LAYERS)}), or name the layers in CSALR.AFTER."
        )
    layers = _LAYERS[name]
    if name == "build_mobilenetv3_backbone" and cfg.MODEL.BACKBONE.DEPTH == "Small":
        layers = _SMALL_MOBILENETV3
    if cfg.MODEL.META_ARCHITECTURE == "MGN":
        layers = _MGN_LAYERS
    return tuple(f"backbone.{layer}" for layer in layers)


def check_attention(cfg: CfgNode) -> None:
    """Check the settings of attention in fast-reid's own networks.

    Raises:
        UserError: WITH_CSALR is True for a network without such attention, or another key needs it to be.
    """
    name, settings = cfg.MODEL.META_ARCHITECTURE, cfg.CSALR
    if not cfg.MODEL.BACKBONE.WITH_CSALR:
        if settings.AFTER:
            raise UserError(
                f"config key 'CSALR.AFTER' is {list(settings.AFTER)}, and MODEL.BACKBONE.WITH_CSALR is False; set "
                "it to True with MODEL.META_ARCHITECTURE Baseline or MGN."
            )
        return
    if name not in _ATTENDED:
        raise UserError(
            f"config key 'MODEL.BACKBONE.WITH_CSALR' is True, and '{name}' is not one of {', '.join(_ATTENDED)}: set "
            "it to False, or give another MODEL.META_ARCHITECTURE."
        )
    if tuple(settings.STAGES) != (1, 2, 3):
        raise UserError(
            f"config key 'CSALR.STAGES' is {list(settings.STAGES)}, and {name} is no PCB: name layers in CSALR.AFTER, "
            "such as backbone.layer3."
        )
    layers_of(cfg)


def register() -> None:
    """Let fast-reid's Baseline and MGN build their attended form if MODEL.BACKBONE.WITH_CSALR is True."""
    registry: dict[str, Any] = META_ARCH_REGISTRY._obj_map
    for name, attended in _ATTENDED.items():
        if isinstance(registry[name], type):
            registry[name] = _entry(name, registry[name], attended)


def _entry(name: str, plain: type[nn.Module], attended: type[nn.Module]) -> Callable[[CfgNode], nn.Module]:
    def build(cfg: CfgNode) -> nn.Module:
        if not cfg.MODEL.BACKBONE.get("WITH_CSALR", False):
            return plain(cfg)
        if cfg.CSALR.PRETRAINED_WEIGHTS:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.BACKBONE.PRETRAIN_PATH = cfg.CSALR.PRETRAINED_WEIGHTS
        return attended(cfg)

    build.__name__ = build.__qualname__ = name
    return build


def _in_fp32(output: Any) -> Any:
    """Return a head's outputs, or a tensor, in fp32 where they are in a shorter floating-point type."""
    if isinstance(output, Mapping):
        return {name: _in_fp32(value) for name, value in output.items()}
    return output.float() if isinstance(output, Tensor) and output.is_floating_point() else output
