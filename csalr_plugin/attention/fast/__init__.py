"""The door to the compiled passes: the same numbers as the plain blocks, sooner, on a CPU in fp32 and fp64.

:func:`takes` says why a block does not use them. :func:`set_fast` and the variable CSALR_FAST=0 turn them off.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..batch_norm import Statistics, SynchronisedBatchNorm
from ..numerics import autocast_enabled, functorch_is_active, is_plain_convolution

if TYPE_CHECKING:
    from ..block import AttentionBlock

_enabled = os.environ.get("CSALR_FAST", "1") != "0"


def set_fast(enabled: bool) -> None:
    """Allow the compiled passes in this process, or let every block run in its plain form."""
    global _enabled
    _enabled = enabled


def takes(block: AttentionBlock, x: Tensor) -> str | None:
    """Why `block` does not run x, (B, C, H, W), through the compiled passes; None if it does.

    The forward pass asks once; its backward pass takes the same path.
    """
    if not _enabled:
        return "the compiled passes are switched off"
    if block.fast_form is None:
        return f"{type(block).__name__} has no compiled passes"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "the block is compiled, exported or traced"
    if type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu":
        return f"x is a {type(x).__name__} on {x.device.type}; the passes take a Tensor on cpu"
    if x.dtype not in (torch.float32, torch.float64) or autocast_enabled(x):
        return "x is computed in another type than float32 or float64"
    if x.numel() == 0:
        return "x is empty"
    if functorch_is_active() or torch.autograd.forward_ad._current_level >= 0:
        return "a transform of torch.func or forward-mode differentiation is running"
    if _get_current_dispatch_mode() is not None:
        return "a dispatch mode observes single operations"
    return _unusual(block, x) or (None if _library(x.dtype) else "csrc/ cannot be compiled")


def evaluate(block: AttentionBlock, x: Tensor, gated: bool, pooled: bool) -> list[Tensor]:
    """The results of ``block._formula(x, gated, pooled)``, from the compiled passes."""
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    alpha = block.alpha if gated else None
    evaluate_block = _csalr if block.fast_form == "csalr" else _csa
    out, *others = evaluate_block(block, x.contiguous(), alpha, pooled)
    return [out.contiguous(memory_format=layout), *others]


def _csalr(block: Any, x: Tensor, alpha: Tensor | None, pooled: bool) -> list[Tensor]:
    from .ops import csalr

    gain_q, shift_q, *unseen_q = _affine(block, "query")
    gain_k, *unseen_k = _affine(block, "key")
    gain_v, shift_v, *unseen_v = _affine(block, "value")
    norm = dict(block.norm.items()).get("value")
    fuse = block.fuse if block.groups > 1 else None
    out, mean, statistics, _ = csalr(
        x,
        *(block.query.weight.flatten(1), gain_q, shift_q),
        *(block.key.weight.flatten(1), gain_k),
        *(block.value.weight.flatten(1), gain_v, shift_v),
        None if fuse is None else fuse.weight.flatten(1),
        None if fuse is None else fuse.bias,
        alpha,
        [*unseen_q, *unseen_k, *unseen_v],
        block.groups,
        block.landmarks,
        block.self_attention_floor,
        norm.eps if norm is not None and norm.training else None,
        isinstance(norm, SynchronisedBatchNorm),
        pooled,
        torch.is_grad_enabled(),
    )
    if statistics:
        means, variances = (
            dict(zip("qkv", statistics[::2], strict=True)),
            dict(zip("qkv", statistics[1::2], strict=True)),
        )
        of = {name: (means[name[0]] + getattr(block, name).bias.detach(), variances[name[0]]) for name in block.norm}
        statistics = [one for name in block.norm for one in of[name]]
    return [out, *([mean] if pooled else []), *statistics]


def _csa(block: Any, x: Tensor, alpha: Tensor | None, pooled: bool) -> list[Tensor]:
    from .ops import gather, spread
    from .passes import plan

    statistics: Statistics = {}
    groups, differentiable = block.groups, torch.is_grad_enabled()
    keys = block.unit_bases().mT.expand(len(x), -1, -1, -1)  # B, groups, C', m
    at_landmarks = plan(block.channels, x[0, 0].numel(), keys.shape[3], groups, differentiable).at_landmarks
    Q = F.normalize(block.project("query", x, statistics).flatten(1, 2), dim=1)  # B, C', n
    W_v = block.value.weight.flatten(1)
    rows, _, _ = gather(x, Q, keys, W_v, at_landmarks, differentiable)
    if at_landmarks:  # `value` as a convolution whose groups share x: B, C, groups, m -> B, C, m
        rows = F.conv1d(rows.transpose(1, 2).flatten(1, 2), W_v[..., None], groups=groups)
    E = block.normalise("value", rows.reshape(len(x), block.channels, -1) + block.value.bias[:, None], statistics)
    fuse = block.fuse if groups > 1 else None
    if at_landmarks and fuse is not None:
        W_f = fuse.weight.view(block.channels, groups, -1).transpose(0, 1).flatten(0, 1)  # groups C, c
        fused = F.conv1d(E, W_f[..., None], groups=groups).view(len(x), groups, block.channels, -1).transpose(1, 2)
        source, fuse = fused + (fuse.bias / groups)[:, None, None], None  # B, C, groups, m; rows of W sum to 1
    else:
        source = E[:, :, None] if at_landmarks else E.view(len(x), groups, -1, keys.shape[3])
    W_f, b_f = (None, None) if fuse is None else (fuse.weight.flatten(1), fuse.bias)
    out, mean = spread(x, Q, keys, source, W_f, b_f, alpha, pooled)
    in_order = [one for name in block.norm if name in statistics for one in statistics[name]]
    return [out, *([mean] if pooled else []), *in_order]


def _affine(block: Any, name: str) -> tuple[Tensor, ...]:
    """Gain and shift, (C_out,), of the affine map after the weight of projection `name`: its bias and its batch norm.

    While that takes the statistics of the batch, they are gain and shift after normalisation. Normalisation cancels the
    bias, which comes third.
    """
    bias = getattr(block, name).bias
    if name not in block.norm:
        return torch.ones_like(bias), bias
    norm = block.norm[name]
    if norm.training:
        return norm.weight, norm.bias, bias
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return gain, norm.bias + (bias - norm.running_mean) * gain


def _unusual(block: AttentionBlock, x: Tensor) -> str | None:
    """Why the modules of `block` are not those that the passes compute, or None."""
    if any(getattr(nn.modules.module, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward")):
        return "modules are hooked globally"
    for name, module in (*block.named_children(), *block.norm.items()):
        if isinstance(module, nn.Conv2d):
            width = block.key_channels if name in ("query", "key") else block.channels
            if not is_plain_convolution(module) or module.weight.shape != (width, block.channels, 1, 1):
                return f"{name} is replaced, parametrised or hooked"
        elif isinstance(module, nn.BatchNorm1d):
            if type(module) not in (nn.BatchNorm1d, SynchronisedBatchNorm) or module.running_mean is None:
                return f"norm.{name} is replaced"
        elif name != "norm":
            return f"{name} is replaced, parametrised or hooked"
    if len({norm.training for norm in block.norm.values()}) > 1:
        return "some batch norms train and others do not"
    if any(one.dtype is not x.dtype or one.device != x.device for one in block.parameters()):
        return "parameters and x are of different types or devices"
    return None


def _library(dtype: torch.dtype) -> object | None:
    from .build import library

    return library(dtype)
