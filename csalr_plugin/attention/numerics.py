"""Numerical safety of the blocks: types of numbers, guarded logits, and the inverse of Eq. 16."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def full_range(tensor: Tensor) -> Tensor:
    """Cast fp16 to fp32 and leave every other type.

    Raw dot products (Eq. 1, 10-16) and the bound on the inverse exceed 65504, the largest number of fp16. bf16 has
    the range of fp32.
    """
    return tensor.float() if tensor.dtype is torch.float16 else tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Cast fp16 and bf16 to fp32. The m x m solve of Eq. 14 runs in fp32 or fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def saturate(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to `dtype`, values beyond its range to its largest finite number."""
    if tensor.dtype is dtype:
        return tensor
    limit = torch.finfo(dtype).max
    return tensor.clamp(-limit, limit).to(dtype)


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; the meta device has no autocast."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Switch autocast off on the device of x: the formulas between the projections choose their types themselves."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def is_captured() -> bool:
    """Whether torch.export or torch.jit.trace records the operations."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def functorch_is_active() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def has_hooks(module: nn.Module) -> bool:
    """Whether `module` has forward or backward hooks of its own."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether `module` is a 1x1 convolution with a bias that nothing replaces, parametrises or hooks.

    Its weight may then be used without calling it.
    """
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
        and module.bias is not None
        and "forward" not in vars(module)
        and not has_hooks(module)
    )


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension, computed in fp32 or fp64 and returned in the type of `logits`."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(-1, dtype=wide).to(logits.dtype)


def softmax_attention(Q: Tensor, K: Tensor, V: Tensor, landmark_of: Tensor | None = None) -> Tensor:
    """``(softmax(Q K^T) + P) V`` without 1/sqrt(d), as in Eq. 1, 13 and 15; without P if `landmark_of` is None.

    Args:
        Q: (B, groups, rows, d).
        K: (B, groups, columns, d).
        V: (B, groups, columns, c), or (B, 1, columns, c) for all groups.
        landmark_of: (rows,), for the 0/1 matrix P with P[i, landmark_of[i]] = 1.

    Returns:
        (B, groups, rows, c), in the type of V.
    """
    S = softmax(Q @ K.mT)  # B, groups, rows, columns
    if landmark_of is not None:
        S = S + (landmark_of[:, None] == torch.arange(K.shape[2], device=K.device))
    if V.shape[1] == 1:  # one product, without a copy of V for each group
        return (S.flatten(1, 2) @ V[:, 0]).unflatten(1, S.shape[1:3])  # type: ignore[no-untyped-call]
    return (V.mT @ S.mT).mT  # as in x, the positions of a channel are adjacent in memory


def self_attention(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """:func:`softmax_attention` without the n x n map in memory on CUDA, by torch's scaled_dot_product_attention.

    It takes the memory-efficient kernel, since flash attention needs V as wide as Q and K. (On Hopper, cuDNN's kernel
    comes first where both are at most 128 wide.) In other than multiples of 4 channels in fp32 or 8 in half precision,
    torch takes its math form. The kernels cannot be differentiated twice;
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` can.
    """
    if not Q.is_cuda or functorch_is_active():
        return softmax_attention(Q, K, V)
    # The backward pass recomputes the map as exp(logit - log sum exp), which overflows where fp32 rounds logits by more
    # than 88. Beyond 2^20 the softmax is a hard maximum in any precision.
    largest = [one.detach().abs().amax(dim=(1, 2, 3), keepdim=True).float() for one in (Q, K)]  # B, 1, 1, 1
    factor = (2.0**20 / (Q.shape[-1] * largest[0] * largest[1])).clamp(max=1)
    rows, columns, values = (_in_standard_strides(one) for one in (Q * factor.to(Q.dtype), K, V))
    return F.scaled_dot_product_attention(rows, columns, values, scale=1.0)


def _in_standard_strides(x: Tensor) -> Tensor:
    """x in contiguous memory. A dimension of size 1 gets the stride that kernels check, which `contiguous` leaves."""
    return x.contiguous().flatten().view(x.shape)


def limit_logits(Q: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """Scale Q and K, (B, groups, d, n), so that no dot product of them overflows fp32.

    The factor is 1 for each image without an entry beyond 1e17. With one, a softmax is a hard maximum in any precision.
    """
    limit = 1e17
    largest = (one.detach().abs().amax(dim=(1, 2, 3), keepdim=True) for one in (Q, K))
    factor_q, factor_k = (limit / one.clamp(min=limit) for one in largest)  # B, 1, 1, 1
    return Q * factor_q, K * factor_k


def raise_diagonal(S_mm: Tensor, floor: float) -> Tensor:
    """``A_mm = S_mm + I`` of Eq. 16, where every S_ii below `floor` is raised to it.

    The row gives up the same share of its other entries, so rows of A_mm still sum to 2. The map of a landmark with
    S_ii >= `floor` is the published one.

    Args:
        S_mm: (..., m, m), rows sum to 1.
        floor: smallest S_ii, from 0 (the published formula) to below 1.
    """
    diagonal = _identity_like(S_mm).bool()  # a mask: a product with the identity would keep it for the backward pass
    zero = S_mm.new_zeros(())
    own = torch.where(diagonal, S_mm, zero).sum(-1, keepdim=True)  # S_ii: ..., m, 1
    share = (floor - own).clamp(min=0) / (1 - own.clamp(max=floor))  # of the row, given to the landmark itself
    return S_mm * (1 - share) + torch.where(diagonal, 1 + share, zero)


def inverse_of_dominant(A: Tensor, floor: float) -> Tensor:
    """The inverse of ``A = S + I`` for row-stochastic S with every S_ii >= `floor`: (..., m, m) -> (..., m, m).

    Split into blocks down to 32 rows: the Schur complement of a diagonally dominant matrix is dominant, so no pivoting
    across blocks is needed. This is three times as fast as LAPACK for many 96 x 96 matrices on a CPU, and torch's
    batched LU is wrong beyond 150 rows after torch.set_num_threads(2) (pytorch issue 142815). A GPU multiplies matrices
    sooner than it factorises them, and exported programs take matrix products alone, since ONNX has no inverse and the
    blocks would depend on m: see :func:`inverse_by_products`.
    """
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or _products_are_faster(A, floor):
        return inverse_by_products(A, floor)
    m = A.shape[-1]
    if m <= 32 or A.is_cuda:
        return torch.linalg.inv_ex(A)[0]  # _ex: checking for singularity would synchronise with the GPU
    half = m // 2
    B, C = A[..., :half, half:], A[..., half:, :half]
    A_inverse = inverse_of_dominant(A[..., :half, :half], floor)
    A_B, C_A = A_inverse @ B, C @ A_inverse
    S_inverse = inverse_of_dominant(A[..., half:, half:] - C @ A_B, floor)
    lower = S_inverse @ C_A
    upper_rows = torch.cat([A_inverse + A_B @ lower, -A_B @ S_inverse], -1)
    return torch.cat([upper_rows, torch.cat([-lower, S_inverse], -1)], -2)


def _products_are_faster(A: Tensor, floor: float) -> bool:
    """On CUDA, unless products would round fp32 to TF32, or no floor bounds the number of iterations."""
    if not A.is_cuda or floor == 0:
        return False
    return A.dtype is torch.float64 or not torch.backends.cuda.matmul.allow_tf32


def inverse_by_products(A: Tensor, floor: float) -> Tensor:
    """Newton-Schulz: X <- X (2 I - A X) from X = I / 2, for the A of :func:`inverse_of_dominant`.

    Rows of A sum to 2, so the residual I - A X starts as (I - S) / 2. Its powers shrink by 1 - `floor` at least, and
    each iteration squares it: with a floor of 1e-3, 15 iterations reach 1e-7. A floor of 0 has no such bound; it is
    treated as 1e-3. Rounding in the last residual decides the accuracy, so exported programs sum that product in parts.

    Gradients flow through the last two iterations alone. From X0 = A0^-1, held constant, k iterations agree with A^-1
    near A0 up to an error of order 2^k in A - A0, so first, second and third derivatives are exact.
    """
    digits = -math.log(torch.finfo(A.dtype).eps)
    iterations = math.ceil(math.log2(digits / (floor or 1e-3))) + 1
    twice = 2 * _identity_like(A)
    X = (twice / 4).expand_as(A)
    for k in range(iterations):
        A_k = A if k >= iterations - 2 else A.detach()
        in_parts = k == iterations - 1 and is_captured()
        X = X @ (twice - (_product_in_parts(A, X) if in_parts else A_k @ X))
    return X


def _product_in_parts(A: Tensor, X: Tensor) -> Tensor:
    """A X as a sum of products of at most 8 columns and rows.

    In one sum of m terms, the rounding errors of similar terms add up: for two halves of landmarks that attend to each
    other, the inverse of m = 192 would be seven times less accurate. A symbolic m is not divided.
    """
    m = _rows(A)
    if not isinstance(m, int):
        return A @ X
    width = next(one for one in range(8, 0, -1) if m % one == 0)
    columns = A.unflatten(-1, (-1, width)).transpose(-3, -2)  # type: ignore[no-untyped-call] # ..., m / width, m, width
    return (columns @ X.unflatten(-2, (-1, width))).sum(-3)  # type: ignore[no-untyped-call]


def _identity_like(A: Tensor) -> Tensor:
    """The m x m identity matrix of the type of A, (..., m, m)."""
    return torch.eye(_rows(A), dtype=A.dtype, device=A.device)


def _rows(A: Tensor) -> int:
    """m of A, (..., m, m); a constant while torch.jit.trace records, a symbol in an exported program of any size."""
    m = A.shape[-1]
    return int(m) if isinstance(m, Tensor) else m
