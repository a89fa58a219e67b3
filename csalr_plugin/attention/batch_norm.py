"""Batch norm by the statistics of all processes that train one model.

torch's own `SyncBatchNorm` needs a GPU, and the blocks compute some statistics themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def world_size() -> int:
    """How many processes train this model."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def over_processes(mean: Tensor, squares: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """Mean and sum of squared deviations, (channels,) each, and count of values: of this process -> of all.

    Each has the same count. Sums of squares of large values would lose digits (Chan et al., 1979).
    """
    world = world_size()
    if world == 1:
        return mean, squares, count
    own = torch.cat([mean, squares])
    everyone = [torch.empty_like(own) for _ in range(world)]
    distributed.all_gather(everyone, own)
    means, each = torch.stack(everyone).chunk(2, dim=1)  # world, channels
    mean = means.mean(0)
    return mean, (each + count * (means - mean).square()).sum(0), world * count


def sum_over_processes(*vectors: Tensor) -> tuple[Tensor, ...]:
    """Each vector's sum over all processes, by one message."""
    if world_size() == 1:
        return vectors
    total = torch.cat(vectors)
    distributed.all_reduce(total)
    return total.split([len(vector) for vector in vectors])  # type: ignore[no-untyped-call,no-any-return]


class _Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` a channel, by the statistics of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        """Returns the normalised x, (B, channels, ...), mean and biased variance, (channels,)."""
        others = [0, *range(2, x.dim())]
        mean = x.mean(others, dtype=weight.dtype)  # channels
        squares = (x - _per_channel(mean, x)).square().sum(others)
        mean, squares, ctx.count = over_processes(mean, squares, x[:, 0].numel())
        variance = squares / ctx.count
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """As with fixed statistics, then what comes through mean and variance, to which every process adds."""
        x, weight, mean, variance = ctx.saved_tensors
        d_x, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        all_weight, all_bias = sum_over_processes(d_weight, d_bias)
        inverse = (variance + ctx.eps).rsqrt()
        slope = -weight * inverse.square() * all_weight / ctx.count
        constant = -weight * inverse * all_bias / ctx.count - slope * mean
        d_x = d_x + (x * _per_channel(slope, x) + _per_channel(constant, x)).to(d_x.dtype)
        return d_x, d_weight, d_bias, None


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *(1,) * (like.dim() - 2))


class SynchronisedBatchNorm(nn.BatchNorm1d):
    """A batch norm over (B, channels, ...) that sees the batches of all processes while it trains.

    Every process must have as large a batch. In one process, and at test time, it is torch's batch norm.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, channels, ...) -> the same shape."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        weight = torch.ones_like(self.running_mean) if self.weight is None else self.weight
        bias = torch.zeros_like(weight) if self.bias is None else self.bias
        out, mean, variance = _Normalise.apply(input, weight, bias, self.eps)
        track(self, mean, variance, world_size() * input[:, 0].numel())
        return out  # type: ignore[no-any-return]

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions: it takes the place of torch's for vectors and for images."""


def synchronise(network: nn.Module) -> None:
    """Let every batch norm of `network` see the batches of all processes; names and values of weights stay."""
    for module in network.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = SynchronisedBatchNorm  # in place: whoever holds the layer holds the same layer


@torch.no_grad()
def track(norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Update running statistics, as torch's batch norm does, with a mean and a biased variance of `count` values."""
    if not norm.track_running_stats or norm.num_batches_tracked is None:
        return
    assert norm.running_mean is not None and norm.running_var is not None
    norm.num_batches_tracked += 1
    momentum = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_((variance * (count / max(count - 1, 1))).to(norm.running_var.dtype), momentum)
