"""What SA, CSA and CSALR share: projections, groups, gate and residual."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from csalr_plugin.attention.batch_norm import track
from csalr_plugin.errors import UserError


class AttentionBlock(nn.Module, ABC):
    """A gated residual attention over a feature map, ``x + alpha * attend(x)`` (Eq. 2 and 17).

    The projections are 1x1 convolutions. While training, each is followed by a batch norm, kept apart in
    ``norm``: raw dot products under SGD at 0.1 saturate the softmax within ten iterations, and a saturated
    S_mm makes its inverse amplify noise. At test time a convolution followed by batch norm is a convolution;
    :meth:`fold` writes it as one. So Eq. 1-17 hold as they stand.

    Args:
        channels: C, channels of the feature map.
        groups: heads that attend on their own share of the channels; they are fused by a 1x1 convolution
            where there is more than one. Must divide C and C'.
        key_ratio: C'/C, the width of queries and keys.

    Raises:
        UserError: when C' is below 1, or `groups` does not divide C and C'.
    """

    def __init__(self, channels: int, groups: int, key_ratio: float) -> None:
        super().__init__()
        key_channels = round(channels * key_ratio)
        if key_channels < 1:
            raise UserError(
                f"key_ratio {key_ratio!r} leaves no channel of {channels}: allowed is {1 / channels:g} to 1."
            )
        if type(groups) is not int or groups < 1 or channels % groups or key_channels % groups:
            raise UserError(
                f"groups {groups!r} must be a positive integer that divides the {channels} channels of the "
                f"feature map and the {key_channels} channels of queries and keys."
            )
        self.channels, self.key_channels, self.groups = channels, key_channels, groups
        self.query = nn.Conv2d(channels, key_channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.norm = nn.ModuleDict({"query": nn.BatchNorm1d(key_channels), "value": nn.BatchNorm1d(channels)})
        if groups > 1:
            self.fuse = nn.Conv2d(channels, channels, 1)
        self.alpha = nn.Parameter(torch.zeros(()))

    @abstractmethod
    def attend(self, x: Tensor) -> Tensor:
        """The attention's output before gate and residual: (B, C, H, W) -> (B, C, H, W)."""

    def gate(self, x: Tensor, attended: Tensor) -> Tensor:
        """``x + alpha * attended`` (Eq. 2 and 17), all (B, C, H, W)."""
        return x + self.alpha * attended

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); the identity as long as alpha is 0."""
        return self.gate(x, self.attend(x))

    def supervised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``forward(x)`` and what a deep supervision branch sees, the mean over positions of ``x * attend(x)``.

        (B, C, H, W) -> (B, C, H, W), (B, C).
        """
        attended = self.attend(x)
        return self.gate(x, attended), (x * attended).mean(dim=(2, 3))

    @abstractmethod
    def diagnose(self, x: Tensor) -> dict[str, float]:
        """How far the maps over x, (B, C, H, W), are from saturation in the mode of now: "largest_logit", in size."""

    @torch.no_grad()
    def fold(self) -> AttentionBlock:
        """Write each projection and its batch norm as one plain ``nn.Conv2d``, in place, and return the block.

        The output in eval mode stays the same. A folded block trains without normalisation.
        """
        for name, norm in self.norm.items():
            assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
            projection = getattr(self, name)
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            projection.weight.mul_(scale[:, None, None, None])
            projection.bias.copy_((projection.bias - norm.running_mean) * scale + norm.bias)
        self.norm = nn.ModuleDict()
        return self

    def _check(self, x: Tensor) -> None:
        """Refuse what is no feature map of this block's.

        Raises:
            UserError: x is not (B, C, H, W).
        """
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise UserError(f"x has the shape {tuple(x.shape)}; this block takes (B, {self.channels}, H, W).")

    def _project(self, name: str, x: Tensor) -> Tensor:
        """Projection `name` of x: (B, C, H, W) -> (B, C_out, n)."""
        return self._normalise(name, getattr(self, name)(x).flatten(2))

    def _normalise(self, name: str, projected: Tensor) -> Tensor:
        """The batch norm that belongs to projection `name`: (B, C_out, any) -> the same shape."""
        return self.norm[name](projected) if name in self.norm else projected

    def _training_norm(self, name: str) -> nn.BatchNorm1d | None:
        """The batch norm of projection `name` where it goes by the statistics of the batch."""
        norm = dict(self.norm.items()).get(name)
        return norm if isinstance(norm, nn.BatchNorm1d) and norm.training else None

    def _affine(self, name: str) -> tuple[Tensor, ...]:
        """Gain and shift, (C_out,), of what follows the weight of projection `name`: its bias and its batch norm.

        While that goes by the statistics of the batch, they are those after normalisation, which takes the bias away
        again: that comes third, for :class:`Unseen`.
        """
        bias = getattr(self, name).bias
        if name not in self.norm:
            return torch.ones_like(bias), bias
        norm = self.norm[name]
        assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
        if norm.training:
            return norm.weight, norm.bias, bias
        gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return gain, norm.bias + (bias - norm.running_mean) * gain

    @torch.no_grad()
    def _track(self, name: str, mean: Tensor, variance: Tensor, count: int) -> None:
        """Update the running statistics of projection `name`, as its batch norm would.

        `mean` and biased `variance`, (C_out,), are those of `count` values without the projection's bias.
        """
        norm = self.norm[name]
        assert isinstance(norm, nn.BatchNorm1d)
        track(norm, mean + getattr(self, name).bias, variance, count)

    def _split(self, features: Tensor) -> Tensor:
        """Channels into groups: (B, C, n) -> (B, groups, C/groups, n)."""
        return split(features, self.groups)

    def _join(self, attended: Tensor, like: Tensor) -> Tensor:
        """Groups into a feature map, fused: (B, groups, C/groups, n) -> (B, C, H, W)."""
        image = attended.reshape(like.shape)
        if self.groups == 1:
            return image
        with autocast_like(image):  # as wide as O is: 1000 max |V| exceeds fp16
            return self.fuse(image)


class Unseen(torch.autograd.Function):
    """The first tensor; through it the others, parameters that change nothing, get a gradient: 0, not none.

    A process that waits for every parameter's gradient, or an optimizer with weight decay, would treat a missing one
    differently.
    """

    @staticmethod
    def forward(ctx: Any, seen: Tensor, *unseen: Tensor) -> Tensor:
        """See the class."""
        ctx.save_for_backward(*unseen)
        return seen.view_as(seen)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        """As it came, and zeros."""
        return gradient, *(torch.zeros_like(one) for one in ctx.saved_tensors)


class EvaluatedBlock(AttentionBlock):
    """An attention block whose output, gate and mean over positions come from one function."""

    @abstractmethod
    def _evaluate(self, x: Tensor, alpha: Tensor | None, pooled: bool) -> tuple[Tensor, Tensor]:
        """``x + alpha O``, or O with `alpha` None; and if `pooled` the mean over positions of ``x * O``, (B, C)."""

    def attend(self, x: Tensor) -> Tensor:
        """O before gate and residual: (B, C, H, W) -> (B, C, H, W)."""
        return self._evaluate(x, None, pooled=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        """``x + alpha * O`` (Eq. 2 and 17): (B, C, H, W) -> (B, C, H, W); the identity as long as alpha is 0."""
        return self._evaluate(x, self.alpha, pooled=False)[0]

    def supervised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``forward(x)`` and the mean over positions of ``x * O``: (B, C, H, W) -> (B, C, H, W), (B, C)."""
        return self._evaluate(x, self.alpha, pooled=True)


def split(features: Tensor, groups: int) -> Tensor:
    """(b, C, any) -> (b, groups, C/groups, any)."""
    return features.unflatten(1, (groups, -1))  # type: ignore[no-untyped-call]


def softmax_backward(gradient: Tensor, probabilities: Tensor, dim: int) -> Tensor:
    """The gradient of the logits of a softmax over dimension `dim`."""
    return torch._softmax_backward_data(gradient, probabilities, dim, probabilities.dtype)


@contextmanager
def observing(block: AttentionBlock) -> Iterator[None]:
    """No gradient, and batch norms that leave their running statistics alone, for the length of a with statement."""
    norms = [norm for norm in block.norm.values() if isinstance(norm, nn.BatchNorm1d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        with torch.no_grad():
            yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def soften(norm: nn.Module, width: int) -> None:
    """Start a query's or key's batch norm so that dot products over `width` channels have unit variance.

    Eq. 1 and 10-16 have no 1/sqrt(d); training starts at the same place by the scale of Q and K.
    """
    assert isinstance(norm, nn.BatchNorm1d)
    nn.init.constant_(norm.weight, width**-0.25)


def working_type(x: Tensor) -> torch.dtype:
    """In which type to compute: that of x or of autocast, but fp32 in place of fp16.

    Raw dot products and the inverse's bound exceed fp16's range, 65504; bf16 has the range of fp32.
    """
    dtype = x.dtype
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return torch.float32 if dtype is torch.float16 else dtype


def full_range(*tensors: Tensor) -> list[Tensor]:
    """Take fp16 tensors to fp32: raw dot products and the inverse's bound exceed fp16's range, 65504.

    bf16 has the range of fp32 and stays.
    """
    return [tensor.float() if tensor.dtype is torch.float16 else tensor for tensor in tensors]


def autocast_like(tensor: Tensor) -> AbstractContextManager[None]:
    """Autocast for what follows :func:`full_range`: on for bf16 tensors, off for all others."""
    if tensor.is_meta:  # costs are counted there, and autocast does not know that device
        return nullcontext()
    return torch.autocast(tensor.device.type, dtype=torch.bfloat16, enabled=tensor.dtype is torch.bfloat16)


def softmax(logits: Tensor, dim: int = -1) -> Tensor:
    """Softmax in fp32 at least, so that bf16 maps keep rows that sum to 1."""
    return logits.softmax(dim, dtype=torch.promote_types(logits.dtype, torch.float32))


def logit_scale(queries: Tensor, keys: Tensor) -> Tensor:
    """:func:`logit_guard` of two tensors."""
    return logit_guard(*(torch.linalg.vector_norm(side.detach(), float("inf")) for side in (queries, keys)))


def logit_guard(largest_query: Tensor, largest_key: Tensor) -> Tensor:
    """A factor for one side of a dot product so that no logit overflows fp32, from bounds on both sides; all scalars.

    It is exactly 1 in any sane network; below 1 only beyond 1e17, where a softmax is a hard maximum in any precision.
    """
    limit = 1e17
    return (limit / largest_query.clamp(min=limit)) * (limit / largest_key.clamp(min=limit))
