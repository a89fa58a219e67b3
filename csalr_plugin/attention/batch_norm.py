"""Batch norm as a pure function, and batch norm over the batches of all processes.

torch's ``SyncBatchNorm`` needs a GPU, and the blocks update running statistics apart from the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Statistics = dict[str, Sequence[Tensor]]
"""By name of a projection: mean and unbiased variance of the batch, (channels,) each."""


def world_size() -> int:
    """Number of processes that train this model."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def over_processes(mean: Tensor, squares: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """Combine mean, sum of squared deviations, (channels,) each, and number of values over all processes.

    Every process has the same number of values. The deviations are combined as in Chan et al. (1979), since a
    difference of sums of squares of large values loses digits.
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
    """The sum of each vector over all processes, in one all-reduce."""
    if world_size() == 1:
        return vectors
    total = torch.cat(vectors)
    distributed.all_reduce(total)
    return total.split([len(vector) for vector in vectors])  # type: ignore[no-untyped-call,no-any-return]


class _Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` a channel, with the statistics of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        """Returns the normalised x, (B, channels, ...), and mean and biased variance, (channels,)."""
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
        """The gradient with fixed statistics, plus the part through mean and variance, summed over all processes."""
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
    """A batch norm over (B, channels, ...) that normalises with the batches of all processes while it trains.

    Every process must have a batch of the same size. In one process, and at test time, it is torch's batch norm.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, channels, ...) -> the same shape."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        normalised, mean, variance = normalise(self, input)
        track(self, mean, variance)
        return normalised

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions, since this class replaces the norms of vectors and of images."""


def synchronise(network: nn.Module) -> None:
    """Replace every batch norm of `network` by a synchronised one; names and values of weights stay.

    A subclass with a forward pass of its own stays as it is.
    """
    for module in network.modules():
        own = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and type(module).forward is nn.BatchNorm2d.forward
        if own:
            module.__class__ = SynchronisedBatchNorm  # in place: references to the layer stay valid


def normalise(norm: nn.BatchNorm1d, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch norm in training mode as a pure function; :func:`track` updates its running statistics.

    Args:
        norm: with the batches of all processes if it is synchronised.
        features: (B, channels, ...).

    Returns:
        The normalised features; mean and unbiased variance of the batch, (channels,) each, without gradient.

    Raises:
        ValueError: there is one value a channel, as for torch's batch norm.
    """
    count = features[:, 0].numel()
    weight, bias = (_as_wide(vector, features) for vector in (norm.weight, norm.bias))
    if isinstance(norm, SynchronisedBatchNorm) and world_size() > 1:
        weight = features.new_ones(features.shape[1]) if weight is None else weight
        bias = torch.zeros_like(weight) if bias is None else bias
        normalised, mean, variance = _Normalise.apply(features, weight, bias, norm.eps)
        count *= world_size()
    else:
        normalised, mean, inverse_deviation = torch.native_batch_norm(
            features, weight, bias, None, None, True, 0.0, norm.eps
        )
        mean, variance = mean.detach(), inverse_deviation.detach().square().reciprocal() - norm.eps
    return normalised, mean, variance * (count / max(count - 1, 1))


def normalise_with_running_statistics(norm: nn.BatchNorm1d, features: Tensor) -> Tensor:
    """A batch norm in eval mode, also where its vectors are in half precision and `features` are not."""
    vectors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, variance, weight, bias = (_as_wide(vector, features) for vector in vectors)
    return F.batch_norm(features, mean, variance, weight, bias, False, 0.0, norm.eps)


def _as_wide(vector: Tensor | None, features: Tensor) -> Tensor | None:
    return None if vector is None else vector.to(torch.promote_types(vector.dtype, features.dtype))


@torch.no_grad()
def track(norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor) -> None:
    """Update running statistics with mean and unbiased variance of a batch, as torch's batch norm does."""
    if not norm.track_running_stats or norm.num_batches_tracked is None:
        return
    assert norm.running_mean is not None and norm.running_var is not None
    norm.num_batches_tracked += 1
    momentum = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), momentum)
