"""Counts of a model's cost: parameters, multiply-accumulate operations, and bytes kept for the backward pass."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def _solve_flops(system: tuple[int, ...], right: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Floating-point operations of a linear solve: an LU factorisation, then two triangular solves a column."""
    *batch, m, _m = system
    return round(math.prod(batch) * (2 / 3 * m**3 + 2 * m**2 * right[-1]))


def _inverse_flops(system: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Floating-point operations of an inverse: that of a solve with as many columns as rows, less its zeros."""
    *batch, m, _m = system
    return 2 * m**3 * math.prod(batch)


def count_gmacs(model: nn.Module, height: int, width: int) -> float:
    """Multiply-accumulate operations of one image in eval mode, in units of 1e9.

    Every convolution, linear layer, matrix product (those inside attention included), linear solve and inverse is
    counted; element-wise operations are not.

    Args:
        model: on any device; on "meta" nothing is computed.
        height, width: size of the image, in pixels.
    """
    was_training, device = model.training, next(model.parameters()).device
    own = {torch.ops.aten._linalg_solve_ex: _solve_flops, torch.ops.aten.linalg_inv_ex: _inverse_flops}
    counter = FlopCounterMode(display=False, custom_mapping=own)
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


class _Kept:
    """A stand-in for a tensor that a node of autograd's graph saves."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage


def kept_bytes(module: nn.Module, inputs: Tensor) -> int:
    """Bytes that the backward pass of `module(inputs)` needs and that are kept for it from the forward pass on.

    Each storage counts once and as a whole, whoever shares it; those of parameters, buffers and `inputs` do not
    count. Tensors that a custom function keeps without ``save_for_backward`` do not count.

    Args:
        module: in the mode that it is in, on any device; on "meta" nothing is computed. Its buffers stay as they are.
        inputs: the input of `module`, on the same device.
    """
    saved: list[weakref.ref[_Kept]] = []  # weak: autograd may free a tensor during the forward pass

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor.untyped_storage())
        saved.append(weakref.ref(kept))
        return kept

    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    # The output must live until all is counted: it holds the graph.
    with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(pack, _never_unpacked):
        output = module(inputs)
    alive = [kept.storage for reference in saved if (kept := reference()) is not None]
    sizes = {storage._cdata: storage.nbytes() for storage in alive}
    del output
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(before[name])
    given = {one.untyped_storage()._cdata for one in (inputs, *module.parameters(), *module.buffers())}
    return sum(size for storage, size in sizes.items() if storage not in given)


def _never_unpacked(_: Any) -> Tensor:
    raise RuntimeError("kept_bytes runs no backward pass")


def count_kept_bytes(model: nn.Module, height: int, width: int, *, batch_size: int = 8) -> float:
    """Bytes an image that a forward pass in training mode keeps for the backward pass; see `kept_bytes`.

    Args:
        model: on any device; on "meta" nothing is computed.
        height, width: size of the image, in pixels.
        batch_size: images in the batch; batch norms need 2 at least.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.train()
    try:
        return kept_bytes(model, torch.zeros(batch_size, 3, height, width, device=device)) / batch_size
    finally:
        model.train(was_training)
