"""What a model costs, counted rather than timed: parameters and multiply-accumulate operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def _solve_flops(system: tuple[int, ...], right: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Floating-point operations of a linear solve: an LU factorisation, then two triangular solves a column."""
    *batch, m, _m = system
    systems = 1
    for size in batch:
        systems *= size
    return round(systems * (2 / 3 * m**3 + 2 * m**2 * right[-1]))


def count_gmacs(model: nn.Module, height: int, width: int) -> float:
    """Multiply-accumulate operations of one image in eval mode, in units of 1e9.

    Every convolution, linear layer, matrix product (those inside attention included) and linear solve is counted;
    element-wise operations are not.

    Args:
        model: on any device; on "meta" nothing is computed.
        height, width: size of the image, in pixels.
    """
    was_training, device = model.training, next(model.parameters()).device
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._linalg_solve_ex: _solve_flops})
    model.eval()
    try:
        with torch.no_grad(), counter:
            model(torch.zeros(1, 3, height, width, device=device))
    finally:
        model.train(was_training)
    return counter.get_total_flops() / 2e9


def count_parameters(model: nn.Module) -> int:
    """Number of learned parameters, those that only training needs included."""
    return sum(parameter.numel() for parameter in model.parameters())
