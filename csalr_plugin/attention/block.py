"""AttentionBlock: the base of SA, CSA and CSALR, with projections, groups, gate and residual."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from . import fast
from .batch_norm import Statistics, normalise, normalise_with_running_statistics, track
from .numerics import (
    at_least_fp32,
    autocast_enabled,
    full_range,
    functorch_is_active,
    is_captured,
    is_plain_convolution,
    saturate,
    softmax_attention,
)


class AttentionBlock(nn.Module, ABC):
    """A gated residual attention over a feature map, ``x + alpha * attend(x)`` (Eq. 2 and 17).

    A subclass writes its formula in :meth:`attention`, in plain torch operations. On a CPU in fp32 or fp64 the same
    numbers may come from :mod:`.fast`; ``fast.takes(block, x)`` says whether they do.

    The projections are 1x1 convolutions. In training each is followed by a batch norm, kept in ``norm``: raw dot
    products under SGD at 0.1 saturate the softmax within ten iterations, and a saturated S_mm makes its inverse amplify
    noise. At test time a convolution followed by a batch norm is a convolution, which :meth:`fold` writes. So Eq. 1-17
    hold as they stand.

    Args:
        channels: C, channels of the feature map.
        groups: heads, each with its own share of the channels. A 1x1 convolution fuses them where there is more than
            one. Must divide C and C'.
        key_ratio: C'/C, the width of queries and keys.

    Attributes:
        recompute: see :meth:`set_recompute`.
        fast_form: name of the compiled passes for this formula in :mod:`.fast`, if there are any.

    Raises:
        UserError: when C' is below 1, or `groups` does not divide C and C'.
    """

    fast_form: str | None = None

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
        self.recompute = True
        self.query = nn.Conv2d(channels, key_channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.norm = nn.ModuleDict({"query": nn.BatchNorm1d(key_channels), "value": nn.BatchNorm1d(channels)})
        if groups > 1:
            self.fuse = nn.Conv2d(channels, channels, 1)
        self.alpha = nn.Parameter(torch.zeros(()))

    @abstractmethod
    def attention(self, x: Tensor, statistics: Statistics) -> Tensor:
        """The formula of the block: (B, C, H, W) -> (B, groups, n, C/groups), before `fuse`, gate and residual.

        `statistics` collects the batch statistics of the projections; see :meth:`normalise`.
        """

    @abstractmethod
    def diagnose(self, x: Tensor) -> dict[str, float]:
        """Softmax saturation on x, (B, C, H, W), in the current mode: at least "largest_logit", the largest |logit|."""

    def attend(self, x: Tensor) -> Tensor:
        """The attention output before gate and residual: (B, C, H, W) -> (B, C, H, W)."""
        return self._evaluate(x, gated=False, pooled=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        """``x + alpha * attend(x)``: (B, C, H, W) -> (B, C, H, W); the identity as long as alpha is 0."""
        return self._evaluate(x, gated=True, pooled=False)[0]

    def supervised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``forward(x)``, and the input of a deep supervision branch: the mean over positions of ``x * attend(x)``.

        (B, C, H, W) -> (B, C, H, W), (B, C).
        """
        out, pooled = self._evaluate(x, gated=True, pooled=True)
        return out, pooled

    def set_recompute(self, enabled: bool = True) -> AttentionBlock:
        """Choose between recomputing in the backward pass (the default) and keeping every activation.

        Recomputing keeps nothing but x. Keeping is faster and takes more memory. Transforms of torch.func refuse
        recomputation, so a block under one of them keeps.
        """
        self.recompute = enabled
        return self

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

    def project(self, name: str, x: Tensor, statistics: Statistics) -> Tensor:
        """Projection `name` of x with its batch norm: (B, C, H, W) -> (B, groups, C_out/groups, n)."""
        return self._split(self.normalise(name, full_range(getattr(self, name)(x).flatten(2)), statistics))

    def values_act_on_landmarks(self, m: int, n: int) -> bool:
        """Whether `value` acts on the m rows of S X in place of the n positions of x, for S with rows that sum to 1.

        ``S (X W + 1 b^T) = (S X) W + 1 b^T`` is exact, and here it multiplies less. A replaced or hooked `value` acts
        on positions, and so does one in an exported or traced program, where n may be a symbol.
        """
        if is_captured() or not is_plain_convolution(self.value):
            return False
        return self.groups * m * n + m * self.channels <= n * self.channels + m * n

    def values(self, x: Tensor, m: int) -> Tensor:
        """V, (B, groups, n, C/groups), or x as (B, 1, n, C) where `value` acts on m landmarks."""
        if self.values_act_on_landmarks(m, x.shape[2] * x.shape[3]):
            return x.flatten(2).mT[:, None]
        return self._split(full_range(self.value(x).flatten(2))).mT

    def weigh(self, values: Tensor, statistics: Statistics, rows: Tensor, columns: Tensor) -> Tensor:
        """``S V`` with ``S = softmax(rows columns^T)``, then the batch norm of `value`.

        CSA and CSALR normalise S V in place of V. Rows of S sum to 1, so at test time the two are the same.

        Args:
            values: the result of :meth:`values`.
            statistics: see :meth:`normalise`.
            rows: (B, groups, m, d).
            columns: (B, groups, n, d).

        Returns:
            (B, groups, m, C/groups), in fp32 at least.
        """
        E = softmax_attention(rows, columns, values.to(columns.dtype)).mT.flatten(1, 2)  # B, C, m or B, groups C, m
        if self.values_act_on_landmarks(rows.shape[2], columns.shape[2]):
            weight, bias = (one.to(E.dtype) for one in (self.value.weight.flatten(1), cast(Tensor, self.value.bias)))
            E = F.conv1d(E, weight[..., None], bias, groups=self.groups)  # B, C, m
        return self._split(self.normalise("value", at_least_fp32(E), statistics)).mT

    def normalise(self, name: str, features: Tensor, statistics: Statistics) -> Tensor:
        """The batch norm of projection `name`: (B, C_out, any) -> the same shape.

        A batch norm in training mode leaves its running statistics alone, since the formula may run twice; it puts
        mean and variance of the batch into `statistics`.
        """
        if name not in self.norm:
            return features
        norm = self.norm[name]
        assert isinstance(norm, nn.BatchNorm1d)
        if not norm.training:
            return normalise_with_running_statistics(norm, features)
        normalised, *statistics[name] = normalise(norm, features)
        return normalised

    def _evaluate(self, x: Tensor, *, gated: bool, pooled: bool) -> list[Tensor]:
        """``x + alpha * O`` if `gated`, else O; and the mean over positions of ``x * O``, (B, C), if `pooled`."""
        self._check(x)
        if fast.takes(self, x) is None:
            results = fast.evaluate(self, x, gated, pooled)
        elif self.recompute and _recomputation_is_possible():
            results = checkpoint(self._formula, x, gated, pooled, use_reentrant=False)
        else:
            results = self._formula(x, gated, pooled)
        outputs, statistics = results[: 1 + pooled], results[1 + pooled :]
        norms = [norm for norm in self.norm.values() if norm.training]
        for norm, mean, variance in zip(norms, statistics[::2], statistics[1::2], strict=True):
            track(norm, mean, variance)  # type: ignore[arg-type]
        return list(outputs)

    def _formula(self, x: Tensor, gated: bool, pooled: bool) -> list[Tensor]:
        """A pure function: the outputs of :meth:`_evaluate`, then mean and variance of the batch of each norm."""
        statistics: Statistics = {}
        attended = self.attention(x, statistics).mT.reshape(x.shape)
        autocast = autocast_enabled(x)
        if not autocast:
            attended = saturate(attended, x.dtype)
        if self.groups > 1:
            # Autocast to fp16 would overflow, since 1000 max |V| exceeds its range.
            enabled = autocast and attended.dtype is torch.bfloat16
            with torch.autocast(x.device.type, enabled=enabled) if autocast else nullcontext():
                attended = self.fuse(attended)
        outputs = [torch.addcmul(x, attended, self.alpha) if gated else attended]
        if pooled:
            mean = (x * attended).mean(dim=(2, 3), dtype=torch.promote_types(attended.dtype, torch.float32))
            outputs.append(mean if autocast else saturate(mean, x.dtype))
        in_order = [statistics[name] for name in self.norm if name in statistics]
        return outputs + [one for pair in in_order for one in pair]

    def _check(self, x: Tensor) -> None:
        """Refuse an x that is no feature map of this block.

        Raises:
            UserError: x is not (B, C, H, W), or has no positions.
        """
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise UserError(f"x has the shape {tuple(x.shape)}; this block takes (B, {self.channels}, H, W).")
        if x.shape[2] == 0 or x.shape[3] == 0:
            raise UserError(f"x has the shape {tuple(x.shape)}, with no positions; H and W must be at least 1.")

    def _split(self, features: Tensor) -> Tensor:
        """Channels into groups: (B, C, n) -> (B, groups, C/groups, n)."""
        return features.unflatten(1, (self.groups, -1))  # type: ignore[no-untyped-call]


def start_with_unit_logits(norm: nn.Module, width: int) -> None:
    """Set the scale of a query or key batch norm so that dot products over `width` channels have unit variance.

    Eq. 1 and 10-16 have no 1/sqrt(d); the scale of Q and K gives training the same start.
    """
    assert isinstance(norm, nn.BatchNorm1d)
    nn.init.constant_(norm.weight, width**-0.25)


def _recomputation_is_possible() -> bool:
    if not torch.is_grad_enabled() or is_captured():
        return False
    return torch.compiler.is_compiling() or not functorch_is_active()
