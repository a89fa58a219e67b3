"""The plugin's networks as meta-architectures of fast-reid, which compute losses or embeddings of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
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
from csalr_plugin.hosts import add_models, plugin_model
from csalr_plugin.models import MODEL_NAMES, head_and_attention, recipe
from csalr_plugin.models.pcb import PCB, RefinedPCB
from csalr_plugin.models.weights import load_backbone

_Network: Any = object  # PCB or RefinedPCB takes its place in the two classes below


class _InFastReID(_Network):
    """The interface of a meta-architecture of fast-reid. The weights keep the names of the network.

    Args:
        cfg: fast-reid's settings with the node `CSALR`.
        num_classes: number of training identities.
        options: options of the network.
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
        """The device of the network, to which batches are moved."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: Mapping[str, Any] | Tensor) -> Any:
        """Compute losses in training mode, or embeddings in eval mode.

        Args:
            batched_inputs: a batch of fast-reid's loader: "images" (B, 3, H, W), RGB from 0 to 255, and in training
                mode "targets" (B,). In eval mode also the images alone.

        Returns:
            In training mode the terms of Eq. 18 by name, scalars whose sum is the loss. In eval mode the embeddings
            (B, parts * 2048) in fp32, see `PCB.forward`.
        """
        images = batched_inputs if isinstance(batched_inputs, Tensor) else batched_inputs["images"]
        images = images.to(self.device, memory_format=self.layout)
        # Not in place as in fast-reid, whose flip test passes the same tensor twice. In fp32 also for a network in half
        # precision: pixels from 0 to 255 would lose digits.
        dtype = self.conv1.weight.dtype
        mean, std = (one.to(torch.promote_types(dtype, torch.float32)) for one in (self.pixel_mean, self.pixel_std))
        images = ((images - mean) / std).to(dtype)
        if self.bf16:
            with torch.autocast(self.device.type, torch.bfloat16):
                outputs = super().forward(images)
        else:
            outputs = super().forward(images)
        if not self.training:
            return outputs.float()
        assert not isinstance(batched_inputs, Tensor)
        # fast-reid's PreciseBN passes -1 for every identity, and does not use the losses.
        return self.losses(outputs, batched_inputs["targets"].to(self.device).clamp(min=0))

    def losses(self, outputs: Any, identities: Tensor) -> dict[str, Tensor]:
        """Compute the terms of Eq. 18, L_F + lambda * sum_i L_DS_i, with fast-reid's losses and scales.

        Args:
            outputs: outputs of the network in training mode.
            identities: (B,).

        Returns:
            "loss_F", the sum of the losses of the parts; "loss_DS_stageN" for each supervision branch, times lambda;
            and the other losses in MODEL.LOSSES.NAME, computed from the embedding.
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


class FastReIDPCB(_InFastReID, PCB):  # type: ignore[misc]  # forward takes batches, not images
    """PCB as a meta-architecture of fast-reid."""


class FastReIDRefinedPCB(_InFastReID, RefinedPCB):  # type: ignore[misc]
    """PCB with refined part pooling as a meta-architecture of fast-reid."""


def build(name: str, cfg: CfgNode) -> PCB:
    """Build the architecture `name` with fast-reid's settings.

    Args:
        name: one of `MODEL_NAMES`.
        cfg: fast-reid's settings with the node `CSALR`. With ``MODEL.BACKBONE.PRETRAIN True`` and no
            ``MODEL.WEIGHTS`` the backbone gets ImageNet weights from ``CSALR.PRETRAINED_WEIGHTS``, or else from
            ``MODEL.BACKBONE.PRETRAIN_PATH``, or else by a download.

    Raises:
        UserError: the node is missing; and the errors of `csalr_plugin.models.build_model`.
    """
    if "CSALR" not in cfg:
        raise UserError(f"MODEL.META_ARCHITECTURE {name!r} needs the node CSALR: call add_csalr_config(cfg) first.")
    head, attention = head_and_attention(name)
    architecture = FastReIDPCB if head == "pcb" else FastReIDRefinedPCB
    settings, metric_losses = cfg.CSALR, set(cfg.MODEL.LOSSES.NAME) - {"CrossEntropyLoss"}
    model = architecture(
        cfg,
        max(1, cfg.MODEL.HEADS.NUM_CLASSES),  # 0 in an evaluation, which does not use the classifiers
        attention=attention,
        loss="triplet" if metric_losses else "softmax",
        stages=tuple(settings.STAGES),
        groups=settings.GROUPS,
        landmarks=tuple(settings.LANDMARKS),
        key_ratio=settings.KEY_RATIO,
        plain_supervision=settings.PLAIN_SUPERVISION,
    )
    if cfg.MODEL.BACKBONE.PRETRAIN and not cfg.MODEL.WEIGHTS:
        load_backbone(model, settings.PRETRAINED_WEIGHTS or cfg.MODEL.BACKBONE.PRETRAIN_PATH)
    return model


def register(names: Sequence[str] = MODEL_NAMES) -> None:
    """Add the plugin's models to fast-reid's ``META_ARCH_REGISTRY``. Further calls have no effect.

    A model of fast-reid itself keeps its name; see `csalr_plugin.hosts.add_models`.
    """
    add_models("fast-reid", META_ARCH_REGISTRY._obj_map, {name: partial(build, name) for name in names})


def is_plugin_model(name: str) -> bool:
    """Return whether ``META_ARCH_REGISTRY`` has a model of the plugin under `name`."""
    return plugin_model(META_ARCH_REGISTRY._obj_map, name) is not None
