"""ResNet-50 PCB and PCB-RPP with attention and deep supervision (section 3.3, Figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from csalr_plugin.attention import AttentionBlock, build_attention
from csalr_plugin.attention.numerics import is_captured
from csalr_plugin.errors import UserError
from csalr_plugin.models import STAGE_CHANNELS
from csalr_plugin.models.weights import record_network_settings


def identity_classifier(channels: int, num_classes: int) -> nn.Linear:
    """Return a linear layer to the identities with weights near zero, as in torchreid."""
    linear = nn.Linear(channels, num_classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return linear


class Supervision(nn.Module):
    """The end of a deep supervision branch: from the pooled product to the logits of the identities (training only).

    A branch is the elementwise product of stage output and attention output, global average pooling (both in
    `AttentionBlock.supervised`), and one linear layer. A batch norm before the linear layer keeps the scale of its
    input; it could be folded into the linear layer.

    Args:
        channels: C of the stage.
        num_classes: training identities.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        # For any C, the initial norm of the input is that of a part's 256 channels: one learning rate suits both.
        nn.init.constant_(self.norm.weight, 0.5 * (256 / channels) ** 0.5)
        self.classifier = identity_classifier(channels, num_classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, C) -> (B, num_classes)."""
        return self.classifier(self.norm(pooled))


class PartReduction(nn.Module):
    """The shared 1x1 convolution 2048 -> 256 with batch norm and ReLU; the names are those of torchreid's PCB."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(channels, reduced, 1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        self.layers = nn.Sequential(convolution, nn.BatchNorm2d(reduced), nn.ReLU(inplace=True))

    def forward(self, parts: Tensor) -> Tensor:
        """(B, 2048, parts, 1) -> (B, 256, parts, 1)."""
        return cast(Tensor, self.layers(parts))


class PCB(nn.Module):
    """Part-based convolutional baseline (Sun et al., ECCV 2018) on a ResNet-50 with attention after its stages.

    Layers that torchreid's `pcb_p6` has too carry its names, so its checkpoints load by name. With every alpha = 0,
    the two then give identical embeddings. The new layers are in the children `attention`, `supervision` and
    `part_classifier`.

    Args:
        num_classes: training identities.
        attention: "none", "sa", "csa" or "csalr".
        loss: "softmax" or "triplet"; decides the output of `forward` in training mode.
        stages: the stages of the ResNet, from 1 to 4, with a block after them.
        parts: horizontal stripes.
        groups, landmarks, key_ratio: see `csalr_plugin.attention.build_attention`. State dicts record them.
        plain_supervision: without attention, supervise the mean over positions of each stage's output: the control
            that separates deep supervision from attention.

    Attributes:
        feature_dim: width of the embedding, parts * 2048.

    Raises:
        UserError: the loss is unknown, `plain_supervision` is True for a model with attention, a stage is outside 1 to
            4 or repeated, or a block refuses its settings.
    """

    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    relu: nn.ReLU
    maxpool: nn.MaxPool2d
    network_settings: dict[str, Any]

    def __init__(
        self,
        num_classes: int,
        *,
        attention: str = "none",
        loss: str = "softmax",
        stages: Sequence[int] = (1, 2, 3),
        parts: int = 6,
        groups: int = 2,
        landmarks: Sequence[int] = (12, 8),
        key_ratio: float = 0.25,
        plain_supervision: bool = False,
    ) -> None:
        super().__init__()
        if loss not in ("softmax", "triplet"):
            raise UserError(f"loss {loss!r} is not known: allowed is 'softmax' or 'triplet'.")
        given = tuple(stages) if isinstance(stages, Sequence) else ()
        allowed = all(type(stage) is int and stage in STAGE_CHANNELS for stage in given)
        if not given or not allowed or len(set(given)) != len(given):
            raise UserError(f"stages {stages!r} must be distinct integers from 1 to 4, for example (1, 2, 3).")
        self.loss, self.parts, self.feature_dim = loss, parts, parts * STAGE_CHANNELS[4]
        # With residual branches initialised to zero, a network from random weights learns several times faster.
        resnet = torchvision.models.resnet50(weights=None, zero_init_residual=True)
        for layer in (resnet.layer4[0].conv2, resnet.layer4[0].downsample[0]):
            layer.stride = (1, 1)
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, getattr(resnet, name))
        if plain_supervision and attention != "none":
            raise UserError(
                "csalr.plain_supervision True is for a model without attention, pcb or pcb_rpp: the branches of a "
                "model with attention have its attention."
            )
        attended = sorted(stages) if attention != "none" else []
        settings: dict[str, Any] = {"groups": groups, "landmarks": landmarks, "key_ratio": key_ratio}
        self.attention = nn.ModuleDict(
            {f"stage{stage}": build_attention(attention, STAGE_CHANNELS[stage], **settings) for stage in attended}
        )
        self.supervision = nn.ModuleDict(
            {
                f"stage{stage}": Supervision(STAGE_CHANNELS[stage], num_classes)
                for stage in (sorted(stages) if plain_supervision else attended)
            }
        )
        network: dict[str, Any] = {"head": "pcb", "attention": attention}
        if attended:
            network |= {"stages": tuple(attended), "key_ratio": float(key_ratio)}
        if attention in ("csa", "csalr"):
            network |= {"groups": groups, "landmarks": tuple(landmarks)}
        record_network_settings(self, network)
        self.dropout = nn.Dropout(0.5)
        reduced = 256
        self.conv5 = PartReduction(STAGE_CHANNELS[4], reduced)
        self.classifier = nn.ModuleList(identity_classifier(reduced, num_classes) for _ in range(parts))

    def featuremaps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the backbone with attention: images (B, 3, H, W) -> feature map (B, 2048, H/16, W/16), branch logits.

        The supervision branches run in training mode only; their logits are (B, num_classes) each.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        branch_logits: list[Tensor] = []
        for number in STAGE_CHANNELS:
            x = getattr(self, f"layer{number}")(x)
            stage = f"stage{number}"
            if stage in self.attention:
                block = cast(AttentionBlock, self.attention[stage])
                if self.training:
                    x, pooled = block.supervised(x)
                    branch_logits.append(self.supervision[stage](pooled))
                else:
                    x = block(x)
            elif self.training and stage in self.supervision:  # `plain_supervision`
                branch_logits.append(self.supervision[stage](x.mean((2, 3))))
        return x, branch_logits

    def pool_parts(self, features: Tensor) -> Tensor:
        """Return the part features, the means over horizontal stripes: (B, 2048, H, W) -> (B, 2048, parts, 1)."""
        if is_captured():  # ONNX has no adaptive pooling, so the stripes are a product with a constant matrix
            stripes = F.adaptive_avg_pool1d(torch.eye(int(features.shape[2])), self.parts)  # H, parts
            return (features.mean(3) @ stripes.to(features))[..., None]
        return F.adaptive_avg_pool2d(features, (self.parts, 1))

    def reduced_embedding(self, x: Tensor) -> Tensor:
        """Return the small embedding, the reduced part features of unit length: (B, 3, H, W) -> (B, parts * 256).

        The reduced features of a channel are adjacent, as in the embedding of `forward`.
        """
        reduced = self.conv5(self.pool_parts(self.featuremaps(x)[0]))  # B, 256, parts, 1
        return F.normalize(reduced, dim=1).flatten(1)

    def forward(self, x: Tensor, return_featuremaps: bool = False) -> Any:
        """Compute embeddings (eval mode) or logits (training mode) of images (B, 3, H, W).

        Args:
            x: the images.
            return_featuremaps: return the last feature map (B, 2048, H/16, W/16) instead.

        Returns:
            In eval mode: the embedding (B, parts * 2048). The 2048-vector of each part has unit length, and the
            parts of a channel are adjacent, as in torchreid's PCB.
            In training mode with loss "softmax": a list of logits (B, num_classes), first those of the parts, then
            those of the supervision branches in the order of the stages. With loss "triplet": that list, and the
            embedding.
        """
        features, branch_logits = self.featuremaps(x)
        if return_featuremaps:
            return features
        parts = self.pool_parts(features)  # B, 2048, parts, 1
        if not self.training:
            return F.normalize(parts, dim=1).flatten(1)
        parts = self.dropout(parts)
        reduced = self.conv5(parts)  # B, 256, parts, 1
        logits = [linear(reduced[:, :, part, 0]) for part, linear in enumerate(self.classifier)]
        logits += branch_logits
        return logits if self.loss == "softmax" else (logits, F.normalize(parts, dim=1).flatten(1))


class RefinedPCB(PCB):
    """PCB with refined part pooling (RPP): a part classifier assigns each position to the parts by weights.

    Training begins as PCB, with `refining` False, and continues with the part classifier (section 4.2).

    Args:
        num_classes, options: as for `PCB`.

    Attributes:
        refining: pool the parts with the part classifier (True), or by stripes as in PCB (False). It is saved with
            the weights, so that a checkpoint is evaluated in the phase that it was saved in.
    """

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.network_settings["head"] = "pcb_rpp"
        self.refining = True
        self.part_classifier = nn.Conv2d(STAGE_CHANNELS[4], self.parts, 1)
        nn.init.normal_(self.part_classifier.weight, std=0.001)
        nn.init.zeros_(cast(Tensor, self.part_classifier.bias))

    def pool_parts(self, features: Tensor) -> Tensor:
        """Return the part features, parts * mean over positions of weight * feature: -> (B, 2048, parts, 1)."""
        if not self.refining:
            return super().pool_parts(features)
        weights = self.part_classifier(features).softmax(dim=1)  # B, parts, H, W
        pooled = features.flatten(2) @ weights.to(features.dtype).flatten(2).mT  # B, 2048, parts
        # With the indicators of the stripes as weights, this gives the means over the stripes, as in PCB.
        return (pooled * (self.parts / (features.shape[2] * features.shape[3])))[..., None]

    def get_extra_state(self) -> Tensor:
        """Return `refining` as a tensor, because hosts expect only tensors in a state dict."""
        return torch.tensor(self.refining)

    def set_extra_state(self, state: Tensor) -> None:
        """Set `refining` to its value in a checkpoint."""
        self.refining = bool(state)
