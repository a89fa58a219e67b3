"""Pictures of attention maps over a photograph."""

from __future__ import annotations

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csalr_plugin.attention.maps import maps_of
from csalr_plugin.models.inspect import block_inputs
from csalr_plugin.models.recipe import attention_blocks

OPACITY = 0.65
"""Opacity of a map over its photograph."""


def overlay(
    photograph: Tensor, values: Tensor, largest: float, *, colours: str = "inferno", mode: str = "bilinear"
) -> Tensor:
    """Return attention weights as colours over a grey photograph.

    Args:
        photograph: (3, H, W), from 0 to 1.
        values: weights of the positions of a feature map, (h, w).
        largest: the weight that gets the last colour; 0 gets the first.
        colours: a colour map of matplotlib.
        mode: interpolation between positions, "bilinear" or "nearest".

    Returns:
        (3, H, W), from 0 to 1.
    """
    options = {"align_corners": False} if mode == "bilinear" else {}
    share = (values.float() / max(largest, torch.finfo(torch.float32).tiny)).clamp(0, 1)
    share = F.interpolate(share[None, None], photograph.shape[-2:], mode=mode, **options)[0, 0]  # H, W
    coloured = torch.from_numpy(
        matplotlib.colormaps[colours](share.cpu().numpy())[..., :3].astype(np.float32)
    )  # H, W, 3
    grey = photograph.float().mean(dim=0, keepdim=True).cpu()
    return OPACITY * coloured.permute(2, 0, 1) + (1 - OPACITY) * grey


@torch.no_grad()
def map_pictures(network: nn.Module, images: Tensor, photographs: Tensor) -> dict[str, Tensor]:
    """Draw the photograph, the full map and the compressed map of the middle position, side by side.

    The maps are means over the groups, and share one scale, from 0 to the largest weight of the full map. A white frame
    marks the position.

    Args:
        network: a network with attention blocks; it is evaluated, and gets back its modes afterwards.
        images: the network's inputs, (B, 3, H, W).
        photographs: the same images with colours from 0 to 1, (B, 3, H, W).

    Returns:
        Pictures (B, 3, H, 3 W), from 0 to 1, by the name of the block, such as "stage1".
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        inputs = block_inputs(network, images)
        blocks = attention_blocks(network)
        drawn = {}
        for stage, x in inputs.items():
            height, width = x.shape[-2:]
            row, column = height // 2, width // 2
            maps = maps_of(blocks[stage], x, rows=torch.tensor([row * width + column], device=x.device))
            pair = [one.mean(dim=1).reshape(len(x), height, width) for one in (maps.full, maps.compressed)]  # B, h, w
            drawn[stage] = torch.stack(
                [
                    _panels(photograph, [full, compressed], (row, column))
                    for photograph, full, compressed in zip(photographs.cpu().clamp(0, 1), *pair, strict=True)
                ]
            )
        return drawn
    finally:
        for module, mode in modes.items():
            module.training = mode


def _panels(photograph: Tensor, maps: list[Tensor], position: tuple[int, int]) -> Tensor:
    largest = float(maps[0].max())
    panels = [photograph.float(), *(overlay(photograph, one, largest) for one in maps)]
    height, width = maps[0].shape
    tall, wide = photograph.shape[-2:]
    top, left = position[0] * tall // height, position[1] * wide // width
    below, right = max(top + 1, (position[0] + 1) * tall // height), max(left + 1, (position[1] + 1) * wide // width)
    for panel in panels:
        panel[:, [top, below - 1], left:right] = 1.0
        panel[:, top:below, [left, right - 1]] = 1.0
    return torch.cat(panels, dim=2)
