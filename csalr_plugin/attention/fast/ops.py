"""The custom operators of torch.library: schema, checks, fake tensors and autograd of the passes.

Each operator has a backward operator. Neither can be differentiated again; the plain form can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .passes import Gathered, Inputs, Passes, Settings, Spread, csalr_backward, csalr_forward, kept_shapes


def _ready(tensor: Tensor | None) -> Any:
    """The tensor with plain memory for the C functions: contiguous, without a lazy negation."""
    return None if tensor is None else tensor.resolve_conj().resolve_neg().contiguous()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check(like: Tensor, **shaped: tuple[Tensor | None, Sequence[int]]) -> None:
    """Check device, type and shape of every tensor against x and the shapes given, before C reads its memory."""
    _require(like.is_cpu and like.dtype in (torch.float32, torch.float64), f"x is {like.dtype} on {like.device}")
    for name, (tensor, shape) in shaped.items():
        if tensor is None:
            continue
        _require(
            tensor.device == like.device and tensor.dtype is like.dtype and tuple(tensor.shape) == tuple(shape),
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; "
            f"needed is {like.dtype} {tuple(shape)} on {like.device}",
        )


# CSALR


@custom_op("csalr::csalr", mutates_args=())
def csalr(
    x: Tensor,
    W_q: Tensor,
    gain_q: Tensor,
    shift_q: Tensor,
    W_k: Tensor,
    gain_k: Tensor,
    W_v: Tensor,
    gain_v: Tensor,
    shift_v: Tensor,
    W_f: Tensor | None,
    b_f: Tensor | None,
    alpha: Tensor | None,
    unseen: Sequence[Tensor],
    groups: int,
    landmarks: Sequence[int],
    floor: float,
    eps: float | None,
    everywhere: bool,
    pooled: bool,
    differentiable: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """:func:`.passes.csalr_forward`; `unseen` are parameters without effect, whose gradient is 0."""
    given = Inputs(*map(_ready, (x, W_q, gain_q, shift_q, W_k, gain_k, W_v, gain_v, shift_v, W_f, b_f, alpha)))
    settings = _settings(groups, landmarks, floor, eps, everywhere, pooled, differentiable)
    _check_csalr(given, settings)
    out, mean, statistics, kept = csalr_forward(given, settings)
    return out, x.new_empty(0) if mean is None else mean, statistics, kept


@csalr.register_fake
def _(x: Tensor, W_q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    tensors, settings = arguments[:10], _settings(*arguments[11:])
    C, D = x.shape[1], len(W_q)
    statistics = [x.new_empty(one) for one in (D, D, D, D, C, C)] if settings.eps is not None else []
    kept = [x.new_empty(shape) for shape in kept_shapes(Inputs(x, W_q, *tensors), settings).values()]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, x.new_empty((len(x), C) if settings.pooled else (0,)), statistics, kept


@custom_op("csalr::csalr_backward", mutates_args=())
def csalr_gradient(
    grad_out: Tensor,
    grad_mean: Tensor | None,
    x: Tensor,
    W_q: Tensor,
    gain_q: Tensor,
    shift_q: Tensor,
    W_k: Tensor,
    gain_k: Tensor,
    W_v: Tensor,
    gain_v: Tensor,
    shift_v: Tensor,
    W_f: Tensor | None,
    b_f: Tensor | None,
    alpha: Tensor | None,
    kept: Sequence[Tensor],
    groups: int,
    landmarks: Sequence[int],
    floor: float,
    eps: float | None,
    everywhere: bool,
) -> list[Tensor]:
    """:func:`.passes.csalr_backward`: the gradients of the tensors from x on that are given."""
    given = Inputs(*map(_ready, (x, W_q, gain_q, shift_q, W_k, gain_k, W_v, gain_v, shift_v, W_f, b_f, alpha)))
    settings = _settings(groups, landmarks, floor, eps, everywhere, grad_mean is not None, True)
    _check_csalr(given, settings)
    expected = kept_shapes(given, settings)
    _require(len(kept) == len(expected), f"kept holds {len(kept)} tensors; needed are {len(expected)}")
    _check(given.x, **{name: (one, shape) for one, (name, shape) in zip(kept, expected.items(), strict=True)})
    grad_out, grad_mean = _ready(grad_out), _ready(grad_mean)
    _check(given.x, grad_out=(grad_out, x.shape), grad_mean=(grad_mean, x.shape[:2]))
    gradients = csalr_backward(grad_out, grad_mean, given, settings, kept)
    return [gradient for gradient in gradients if gradient is not None]


@csalr_gradient.register_fake
def _(grad_out: Tensor, grad_mean: Tensor | None, *arguments: Any) -> list[Tensor]:
    return [torch.empty_like(one, memory_format=torch.contiguous_format) for one in arguments[:12] if one is not None]


def _save_csalr(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, _, statistics, kept = output
    ctx.mark_non_differentiable(*statistics, *kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:12], *inputs[12], *kept)
    ctx.unseen, ctx.settings = len(inputs[12]), inputs[13:18]


def _csalr_backward(ctx: Any, grad_out: Tensor | None, grad_mean: Tensor | None, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # read once: a checkpoint recomputes for each read
    given, rest = saved[:12], saved[12:]
    unseen, kept = rest[: ctx.unseen], list(rest[ctx.unseen :])
    if grad_out is None:
        grad_out = torch.zeros_like(given[0])
    gradients = iter(csalr_gradient(grad_out, grad_mean, *given, kept, *ctx.settings))
    return (
        *(None if one is None else next(gradients) for one in given),
        [torch.zeros_like(one) for one in unseen],
        *(None,) * 7,
    )


csalr.register_autograd(_csalr_backward, setup_context=_save_csalr)


def _settings(
    groups: int,
    landmarks: Sequence[int],
    floor: float,
    eps: float | None,
    everywhere: bool,
    pooled: bool,
    differentiable: bool,
) -> Settings:
    return Settings(groups, (landmarks[0], landmarks[1]), floor, eps, everywhere, pooled, differentiable)


def _check_csalr(given: Inputs, settings: Settings) -> None:
    _require(
        given.x.dim() == 4 and given.x.numel() > 0, f"x has the shape {tuple(given.x.shape)}; needed is (B, C, H, W)"
    )
    C, D, groups = given.x.shape[1], len(given.W_q), settings.groups
    _require(groups > 0 and C % groups == 0 and D % groups == 0, f"groups {groups} must divide {C} and {D} channels")
    _require(min(settings.landmarks) > 0, f"landmarks {settings.landmarks} must be positive")
    _require(
        (given.W_f is None) == (given.b_f is None) == (groups == 1), "fuse is needed with more than one group alone"
    )
    names = {"W_q": (D, C), "gain_q": (D,), "shift_q": (D,), "W_k": (D, C), "gain_k": (D,)}
    names |= {"W_v": (C, C), "gain_v": (C,), "shift_v": (C,), "W_f": (C, C), "b_f": (C,), "alpha": ()}
    _check(given.x, **{name: (getattr(given, name), shape) for name, shape in names.items()})


# CSA: B of x or of the values, and W of the result. Between the two, CSA uses torch's operations.


@custom_op("csalr::gather", mutates_args=())
def gather(
    x: Tensor, Q: Tensor, keys: Tensor, W_v: Tensor, at_landmarks: bool, differentiable: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``B X``, (B, C, groups, m), or if not `at_landmarks` ``B V``, (B, groups, c, m), of CSA.

    x is (B, C, H, W), Q (B, C', n), keys (B, groups, C', m) and W_v (C, C). Also returns the logarithm of the sums of
    the softmax, (B, groups, m), and in a list V, (B, C, n), if it is kept.
    """
    x, Q, keys, W_v = map(_ready, (x, Q, keys, W_v))
    passes = _csa_passes(x, Q, keys, at_landmarks)
    _check(x, W_v=(W_v, (x.shape[1], x.shape[1])))
    rows, log_sum, V = passes.gather(Q, keys, W_v, differentiable)
    return rows, log_sum, [] if V is None else [V]


@gather.register_fake
def _(x: Tensor, Q: Tensor, keys: Tensor, W_v: Tensor, at_landmarks: bool, differentiable: bool) -> Any:
    (B, C), (groups, m) = x.shape[:2], keys.shape[1::2]
    rows = x.new_empty((B, C, groups, m) if at_landmarks else (B, groups, C // groups, m))
    kept_V = [] if at_landmarks or not differentiable else [x.new_empty(B, C, Q.shape[2])]
    return rows, x.new_empty(B, groups, m), kept_V


@custom_op("csalr::gather_backward", mutates_args=())
def gather_gradient(
    d_rows: Tensor,
    x: Tensor,
    Q: Tensor,
    keys: Tensor,
    W_v: Tensor,
    rows: Tensor,
    log_sum: Tensor,
    V: Sequence[Tensor],
    at_landmarks: bool,
) -> list[Tensor]:
    """The gradients of x, Q, keys, as (B, groups, m, C'), and, if not `at_landmarks`, W_v."""
    d_rows, x, Q, keys, W_v, rows, log_sum = map(_ready, (d_rows, x, Q, keys, W_v, rows, log_sum))
    passes = _csa_passes(x, Q, keys, at_landmarks)
    shape = (passes.wide() if at_landmarks else passes.narrow()).shape
    _check(x, d_rows=(d_rows, shape), rows=(rows, shape), log_sum=(log_sum, (len(x), passes.groups, passes.m)))
    _check(x, W_v=(W_v, (passes.C, passes.C)))
    _require(len(V) == (not at_landmarks), "V is needed where `value` acts on positions alone")
    _check(x, V=(V[0] if V else None, (len(x), passes.C, passes.n)))
    d_x = torch.zeros_like(x)
    d_Q, d_keys, d_W_v = passes.gather_backward(d_x, Q, keys, W_v, Gathered(rows, log_sum, *V), d_rows)
    return [d_x, d_Q, d_keys, *([] if d_W_v is None else [d_W_v])]


@gather_gradient.register_fake
def _(d_rows: Tensor, x: Tensor, Q: Tensor, keys: Tensor, W_v: Tensor, *rest: Any) -> list[Tensor]:
    return [*(x.new_empty(one.shape) for one in (x, Q, keys.mT)), *([] if rest[-1] else [x.new_empty(W_v.shape)])]


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    rows, log_sum, V = output
    ctx.mark_non_differentiable(log_sum, *V)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], rows, log_sum, *V)
    ctx.at_landmarks = inputs[4]


def _gather_backward(ctx: Any, d_rows: Tensor, *_: Any) -> tuple[Any, ...]:
    x, Q, keys, W_v, rows, log_sum, *V = ctx.saved_tensors
    d_x, d_Q, d_keys, *d_W_v = gather_gradient(d_rows, x, Q, keys, W_v, rows, log_sum, V, ctx.at_landmarks)
    return d_x, d_Q, d_keys.mT, d_W_v[0] if d_W_v else None, None, None


gather.register_autograd(_gather_backward, setup_context=_save_gather)


@custom_op("csalr::spread", mutates_args=())
def spread(
    x: Tensor,
    Q: Tensor,
    keys: Tensor,
    source: Tensor,
    W_f: Tensor | None,
    b_f: Tensor | None,
    alpha: Tensor | None,
    pooled: bool,
) -> tuple[Tensor, Tensor]:
    """``x + alpha O``, or O with alpha None, (B, C, H, W), with O = W E of CSA; if `pooled` the mean of x * O, (B, C).

    x, Q and keys are those of :func:`gather`. `source` is E after `fuse`, (B, C, groups, m), or E, (B, groups, c, m),
    with weight and bias of `fuse` in W_f, (C, C), and b_f, (C,), if there is one.
    """
    x, given, passes = _csa_spread(x, Q, keys, source, W_f, b_f, alpha)
    out, mean = passes.spread(given, pooled)
    return out, x.new_empty(0) if mean is None else mean


@spread.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, x.new_empty(x.shape[:2] if arguments[-1] else (0,))


@custom_op("csalr::spread_backward", mutates_args=())
def spread_gradient(
    grad_out: Tensor,
    grad_mean: Tensor | None,
    x: Tensor,
    Q: Tensor,
    keys: Tensor,
    source: Tensor,
    W_f: Tensor | None,
    b_f: Tensor | None,
    alpha: Tensor | None,
) -> list[Tensor]:
    """The gradients of x, Q, keys, as (B, groups, m, C'), source, and of W_f, b_f and alpha where they are given."""
    x, given, passes = _csa_spread(x, Q, keys, source, W_f, b_f, alpha)
    grad_out, grad_mean = _ready(grad_out), _ready(grad_mean)
    _check(x, grad_out=(grad_out, x.shape), grad_mean=(grad_mean, x.shape[:2]))
    d = passes.spread_backward(given, grad_out, grad_mean)
    gradients = (d.x.view_as(x), d.Q, d.for_queries, d.source, d.W_f, d.b_f, d.alpha)
    return [one for one in gradients if one is not None]


@spread_gradient.register_fake
def _(grad_out: Tensor, grad_mean: Tensor | None, x: Tensor, Q: Tensor, keys: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty(one.shape) for one in (x, Q, keys.mT, *rest) if one is not None]


def _save_spread(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7])


def _spread_backward(ctx: Any, grad_out: Tensor | None, grad_mean: Tensor | None) -> tuple[Any, ...]:
    given = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(given[0])
    gradients = iter(spread_gradient(grad_out, grad_mean, *given))
    d_x, d_Q, d_keys, *others = (None if one is None else next(gradients) for one in given)
    return d_x, d_Q, d_keys.mT, *others, None  # type: ignore[union-attr]


spread.register_autograd(_spread_backward, setup_context=_save_spread)


def _csa_passes(x: Tensor, Q: Tensor, keys: Tensor, at_landmarks: bool) -> Passes:
    _require(x.dim() == 4 and x.numel() > 0, f"x has the shape {tuple(x.shape)}; needed is (B, C, H, W)")
    _require(Q.dim() == 3 and keys.dim() == 4, "needed are Q (B, C', n) and keys (B, groups, C', m)")
    (B, C, height, width), D, (groups, m) = x.shape, Q.shape[1], keys.shape[1::2]
    _require(groups > 0 and m > 0 and C % groups == 0, f"{groups} groups of {m} bases cannot share {C} channels")
    _check(x, Q=(Q, (B, D, height * width)), keys=(keys, (B, groups, D, m)))
    return Passes(x, None, m, groups, at_landmarks)


def _csa_spread(
    x: Tensor, Q: Tensor, keys: Tensor, source: Tensor, W_f: Tensor | None, b_f: Tensor | None, alpha: Tensor | None
) -> tuple[Tensor, Spread, Passes]:
    x, Q, keys, source, W_f, b_f, alpha = map(_ready, (x, Q, keys, source, W_f, b_f, alpha))
    C, at_landmarks = x.shape[1], tuple(source.shape[1:3]) == (x.shape[1], keys.shape[1])
    passes = _csa_passes(x, Q, keys, at_landmarks)
    shape = (passes.wide() if at_landmarks else passes.narrow()).shape
    _check(x, source=(source, shape), W_f=(W_f, (C, C)), b_f=(b_f, (C,)), alpha=(alpha, ()))
    _require(W_f is None or (b_f is not None and not at_landmarks), "W_f needs b_f, and a source without `fuse`")
    bias = keys.new_zeros(len(x), passes.groups, 1, passes.m)
    return x, Spread(Q, keys, bias, source, W_f, b_f, alpha), passes


def _refuse_second_derivative(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"{name} cannot be differentiated twice; the plain form can: call csalr_plugin.attention.set_fast(False)."
        )

    return refuse


for _gradient in (csalr_gradient, gather_gradient, spread_gradient):
    _gradient.register_autograd(_refuse_second_derivative(_gradient._qualname))
