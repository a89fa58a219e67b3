"""Intermediate feature maps of a network, for pictures and reports."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csalr_plugin.models.recipe import attention_blocks


@torch.no_grad()
def block_inputs(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the input of each attention block of a network in eval mode.

    Args:
        network: a network with attention blocks in its child `attention`.
        images: (B, 3, H, W).

    Returns:
        The input (B, C, H', W') of each block by its name, such as "stage1".
    """
    inputs: dict[str, Tensor] = {}
    handles = []
    for name, block in attention_blocks(network).items():

        def record(_: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
            inputs[name] = given[0].detach()

        handles.append(block.register_forward_pre_hook(record))
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return inputs
