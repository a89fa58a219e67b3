"""The plugin's networks as fast-reid's meta-architectures: batches in, a dictionary of losses or embeddings out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from fastreid.config import CfgNode
from fastreid.modeling.losses import (
    cross_entropy_loss,
    log_accuracy,
    pairwise_circleloss,
    pairwise_cosface,
    triplet_loss,
)
from fastreid.modeling.meta_arch import META_ARCH_REGISTRY
from torch import Tensor

from csalr_plugin.errors import UserError
from csalr_plugin.models import MODEL_NAMES, head_and_attention, recipe
from csalr_plugin.models.pcb import PCB, RefinedPCB
from csalr_plugin.models.weights import load_backbone

_Network: Any = object  # in the two classes that are built, PCB or RefinedPCB comes next


class _InFastReID(_Network):
    """What fast-reid asks of a meta-architecture; the weights have the names that they have in the network alone.

    Args:
        cfg: fast-reid's settings with the node `CSALR`.
        num_classes: training identities.
        options: those of the network.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, cfg: CfgNode, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, **options)
        for name, value in (("pixel_mean", cfg.MODEL.PIXEL_MEAN), ("pixel_std", cfg.MODEL.PIXEL_STD)):
            # Not in the state dict: the same checkpoint then fits every host.
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.loss_settings = cfg.MODEL.LOSSES
        self.supervision_weight: float = cfg.CSALR.SUPERVISION_WEIGHT
        self.bf16: bool = cfg.CSALR.AMP == "bf16"
        self.layout = torch.channels_last if cfg.CSALR.CHANNELS_LAST else torch.preserve_format
        if cfg.CSALR.CHANNELS_LAST:
            self.to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        """Where the network is, and where its batches go."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: Mapping[str, Any] | Tensor) -> Any:
        """A batch of fast-reid's loader to what the mode asks for.

        Args:
            batched_inputs: "images" (B, 3, H, W), RGB from 0 to 255, and in training mode "targets" (B,); or the
                images alone.

        Returns:
            In training mode the terms of Eq. 18 by name, scalars that add up to the loss; in eval mode the embedding
            (B, parts * 2048), see `PCB.forward`.
        """
        images = batched_inputs if isinstance(batched_inputs, Tensor) else batched_inputs["images"]
        images = images.to(self.device, memory_format=self.layout)
        # Not in place as in fast-reid, whose flip test gives the same tensor again. In fp32 also for a network in half
        # precision, where pixels from 0 to 255 would lose digits.
        images = ((images - self.pixel_mean.float()) / self.pixel_std.float()).to(self.conv1.weight.dtype)
        if self.bf16:
            with torch.autocast(self.device.type, torch.bfloat16):
                outputs = super().forward(images)
        else:
            outputs = super().forward(images)
        if not self.training:
            return outputs.float()
        assert not isinstance(batched_inputs, Tensor)
        # Precise batch norm gives -1 for identities that it does not know; the losses are not used then.
        return self.losses(outputs, batched_inputs["targets"].to(self.device).clamp(min=0))

    def losses(self, outputs: Any, identities: Tensor) -> dict[str, Tensor]:
        """The terms of Eq. 18, L_F + lambda * sum_i L_DS_i, each by fast-reid's own losses and scales.

        Args:
            outputs: of the network in training mode.
            identities: (B,).

        Returns:
            "loss_F", the sum of the parts' losses, "loss_DS_stageN" for each supervision branch, times lambda, and
            what else MODEL.LOSSES.NAME names, of the embedding.
        """
        logits, features = outputs if isinstance(outputs, tuple) else (outputs, None)
        logits = [one.float() for one in logits]
        log_accuracy(recipe.vote(self, logits).detach(), identities)
        settings, terms = self.loss_settings, {}
        if "CrossEntropyLoss" in settings.NAME:
            own = settings.CE

            def identity_loss(one: Tensor) -> Tensor:
                return own.SCALE * cross_entropy_loss(one, identities, own.EPSILON, own.ALPHA)

            identity = recipe.loss_terms(self, logits, identity_loss, self.supervision_weight)
            terms["loss_F"] = identity.main
            terms |= {f"loss_DS_{stage}": branch for stage, branch in identity.weighted_branches().items()}
        if features is not None:
            terms |= self._metric_losses(features.float(), identities)
        return terms

    def _metric_losses(self, features: Tensor, identities: Tensor) -> dict[str, Tensor]:
        losses, terms = self.loss_settings, {}
        if "TripletLoss" in losses.NAME:
            triplet = losses.TRI
            distance = triplet_loss(features, identities, triplet.MARGIN, triplet.NORM_FEAT, triplet.HARD_MINING)
            terms["loss_triplet"] = triplet.SCALE * distance
        for name, key, loss in (
            ("CircleLoss", "CIRCLE", pairwise_circleloss),
            ("Cosface", "COSFACE", pairwise_cosface),
        ):
            if name in losses.NAME:
                own = losses[key]
                terms[f"loss_{key.lower()}"] = own.SCALE * loss(features, identities, own.MARGIN, own.GAMMA)
        return terms


class FastReIDPCB(_InFastReID, PCB):  # type: ignore[misc]  # batches in, not images
    """PCB as a meta-architecture of fast-reid."""


class FastReIDRefinedPCB(_InFastReID, RefinedPCB):  # type: ignore[misc]
    """PCB with refined part pooling as a meta-architecture of fast-reid."""


def build(name: str, cfg: CfgNode) -> PCB:
    """Build the architecture `name` with fast-reid's settings.

    Args:
        name: one of `MODEL_NAMES`.
        cfg: with the node `CSALR`. ``MODEL.BACKBONE.PRETRAIN`` asks for ImageNet weights, from
            ``CSALR.PRETRAINED_WEIGHTS``, else ``MODEL.BACKBONE.PRETRAIN_PATH``, else a download; not where
            ``MODEL.WEIGHTS`` is given.

    Raises:
        UserError: the node is missing, or as `csalr_plugin.models.build_model`.
    """
    if "CSALR" not in cfg:
        raise UserError(f"MODEL.META_ARCHITECTURE {name!r} needs the node CSALR: call add_csalr_config(cfg) first.")
    head, attention = head_and_attention(name)
    architecture = FastReIDPCB if head == "pcb" else FastReIDRefinedPCB
    settings, metric_losses = cfg.CSALR, set(cfg.MODEL.LOSSES.NAME) - {"CrossEntropyLoss"}
    model = architecture(
        cfg,
        # 0 where only an evaluation follows: its classifiers are not used.
        max(1, cfg.MODEL.HEADS.NUM_CLASSES),
        attention=attention,
        loss="triplet" if metric_losses else "softmax",
        stages=tuple(settings.STAGES),
        groups=settings.GROUPS,
        landmarks=tuple(settings.LANDMARKS),
        key_ratio=settings.KEY_RATIO,
    )
    if cfg.MODEL.BACKBONE.PRETRAIN and not cfg.MODEL.WEIGHTS:
        load_backbone(model, settings.PRETRAINED_WEIGHTS or cfg.MODEL.BACKBONE.PRETRAIN_PATH)
    return model


def register(names: Sequence[str] = MODEL_NAMES) -> None:
    """Add the plugin's models to fast-reid's ``META_ARCH_REGISTRY``; may be called again.

    Raises:
        UserError: fast-reid has a model of its own under one of the names.
    """
    present: dict[str, Any] = META_ARCH_REGISTRY._obj_map
    for name in names:
        if name not in present:
            META_ARCH_REGISTRY.register(_entry(name))
        elif getattr(present[name], "__module__", None) != __name__:
            raise UserError(
                f"fast-reid already has a model named '{name}' ({present[name]!r}), which csalr_plugin does not "
                "replace; rename that one to use the plugin's."
            )


def _entry(name: str) -> Callable[[CfgNode], PCB]:
    def entry(cfg: CfgNode) -> PCB:
        return build(name, cfg)

    entry.__name__ = entry.__qualname__ = name
    return entry
