"""CSALR: compressed self-attention with low-rank approximation (section 3.2, Eq. 10-17)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csalr_plugin.attention.batch_norm import SynchronisedBatchNorm, world_size
from csalr_plugin.attention.block import EvaluatedBlock, Unseen, observing, soften, working_type
from csalr_plugin.attention.landmarks import LandmarkGrid
from csalr_plugin.attention.low_rank import LowRankAttention
from csalr_plugin.attention.positions import plan


class CSALR(EvaluatedBlock):
    """``O = (S_nm + P) (S_mm + I)^-1 S_mn V`` a group, with m landmarks in place of n positions.

    Q' and K' are the landmarks' means of Q and K, P says in which landmark's patch a position lies, and

        S_nm = softmax(Q K'^T) (Eq. 15)    S_mm = softmax(Q' K'^T) (Eq. 16)    S_mn = softmax(Q' K^T) (Eq. 13).

    It is evaluated from the right, so neither an n x n map nor the n x m product W of Eq. 14 is formed; how is said
    in `csalr_plugin.attention.low_rank`.

    The paper says that (S_mm + I)^-1 always exists; in floating point two landmarks that attend only to each
    other make it singular. So a landmark attends to itself with at least ``self_attention_floor``: the rows of
    S_mm still sum to 1, ||(S_mm + I)^-1||_inf <= 500, and |O| <= 1000 max |V| for any input. Wherever every
    S_ii is at least 1e-3 this is the paper's formula, to the last digit.

    Args:
        channels: C, channels of the feature map.
        groups: heads, each with the same landmark positions and its own share of the channels.
        landmarks: (H', W'), the landmarks' grid; m = H' W'. At most one landmark a position.
        key_ratio: C'/C, the width of queries and keys.
    """

    self_attention_floor = 1e-3

    def __init__(
        self, channels: int, *, groups: int = 2, landmarks: tuple[int, int] = (12, 8), key_ratio: float = 0.25
    ) -> None:
        super().__init__(channels, groups, key_ratio)
        self.landmarks = landmarks
        self.key = nn.Conv2d(channels, self.key_channels, 1)
        self.norm["key"] = nn.BatchNorm1d(self.key_channels)
        soften(self.norm["query"], self.key_channels // groups)
        soften(self.norm["key"], self.key_channels // groups)

    def _evaluate(self, x: Tensor, alpha: Tensor | None, pooled: bool) -> tuple[Tensor, Tensor]:
        self._check(x)
        dtype = working_type(x)
        wide = torch.promote_types(dtype, torch.float32)
        m = LandmarkGrid(x.shape[2], x.shape[3], self.landmarks, x.device).m
        n, differentiable = x.shape[2] * x.shape[3], torch.is_grad_enabled()
        way = plan(len(x), self.channels, n, m, self.groups, x.device, differentiable)
        gain_q, shift_q, *unseen_q = self._affine("query")
        gain_k, *unseen_k = self._affine("key")  # no softmax sees the shift of keys
        gain_v, shift_v, *unseen_v = self._affine("value")
        if differentiable:
            gain_q = Unseen.apply(gain_q, *unseen_q, *unseen_k, *unseen_v)
        value_norm, fuse = self._training_norm("value"), getattr(self, "fuse", None)
        everywhere = isinstance(value_norm, SynchronisedBatchNorm)
        out, mean, *statistics = LowRankAttention.apply(
            x,
            *(self.query.weight, gain_q.to(wide), shift_q.to(wide)),
            *(self.key.weight, gain_k.to(wide)),
            *(self.value.weight, gain_v.to(wide), shift_v.to(wide)),
            None if fuse is None else fuse.weight,
            None if fuse is None else fuse.bias,
            alpha,
            self.groups,
            self.landmarks,
            way,
            self.self_attention_floor,
            None if value_norm is None else value_norm.eps,
            everywhere,
            pooled,
            dtype,
        )
        if value_norm is not None:
            images = len(x) * (world_size() if everywhere else 1)
            for name, count in (("query", images * n), ("key", images * n), ("value", images * m)):
                mean_of, variance_of, *statistics = statistics
                self._track(name, mean_of, variance_of, count)
        return out, mean

    def diagnose(self, x: Tensor) -> dict[str, float]:
        """The largest logit of S_nm and S_mn over x, (B, C, H, W), and "smallest_S_ii" of S_mm before the floor.

        1 / (2 min S_ii) bounds the norm of (S_mm + I)^-1: the smaller, the more noise it may amplify.
        """
        grid = LandmarkGrid(x.shape[-2], x.shape[-1], self.landmarks, x.device)
        with observing(self):
            Q, K = (self._split(self._project(name, x)) for name in ("query", "key"))
            Q_landmark, K_landmark = grid.pool(Q), grid.pool(K)
            largest = max((Q.mT @ K_landmark).abs().max().item(), (Q_landmark.mT @ K).abs().max().item())
            own = (Q_landmark.mT @ K_landmark).softmax(-1).diagonal(dim1=-2, dim2=-1)
        return {"largest_logit": largest, "smallest_S_ii": own.min().item()}
