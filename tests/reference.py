"""The equations of the paper, written out in float64: slow, literal, and sharing no code with the package.

Each function takes a folded block, whose projections are plain 1x1 convolutions, and a feature map
x (B, C, H, W), and returns a NumPy array of the same shape: the attention output before gate and residual.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]
# CSALR_TEST_DEVICE=cuda runs the tests of blocks and models on a GPU.
DEVICE = torch.device(os.environ.get("CSALR_TEST_DEVICE", "cpu"))


def attend(name: str, block: nn.Module, x: Tensor, *, groups: int = 1, landmarks: tuple[int, int] = (12, 8)) -> Array:
    """The expected result of `attend` of the block `name` ("sa", "csa", "csalr")."""
    if name == "sa":
        return sa(block, x)
    return csa(block, x, groups) if name == "csa" else csalr(block, x, groups, landmarks)


def gated(block: nn.Module, x: Tensor, attended: Array) -> Array:
    """Eq. 2 and 17: O_i = I_i + alpha * (the attention's output)_i."""
    return array(x) + float(block.alpha.detach()) * attended


def sa(block: nn.Module, x: Tensor) -> Array:
    """Eq. 1-2: sum over j of A_ij V_j, with one group."""
    outputs = []
    for image in images(x):
        Q, K, V = (convolve(getattr(block, name), image) for name in ("query", "key", "value"))
        n = image.shape[1]
        output = np.zeros_like(V)
        for i in range(n):
            A_i = softmax(Q[:, i] @ K)  # Eq. 1, row i: over all positions j
            output[:, i] = V @ A_i  # Eq. 2: sum over j of A_ij V_j
        outputs.append(output)
    return stack(outputs, x)


def csa(block: nn.Module, x: Tensor, groups: int) -> Array:
    """Chen et al. (AAAI 2020): O = W (B V) a group, with learned bases w_k and s = 14.

    B_kj = softmax over positions j of s w_k.Q_j, W_ik = softmax over bases k of s w_k.Q_i, with w_k and Q_i of
    unit length. Every group's bases see all channels of Q; V is split into groups.
    """
    outputs = []
    for image in images(x):
        Q, V = convolve(block.query, image), convolve(block.value, image)
        n = image.shape[1]
        Q_unit = [Q[:, i] / np.linalg.norm(Q[:, i]) for i in range(n)]
        heads = []
        for bases, V_group in zip(np.split(array(block.bases), groups), np.split(V, groups), strict=True):
            w_unit = [base / np.linalg.norm(base) for base in bases]
            similarity = np.array([[14.0 * (w @ q) for q in Q_unit] for w in w_unit])  # m, n
            B = np.stack([softmax(row) for row in similarity])  # m, n
            W = np.stack([softmax(column) for column in similarity.T])  # n, m
            heads.append((W @ (B @ V_group.T)).T)  # c, n
        outputs.append(fuse(block, np.concatenate(heads), groups))
    return stack(outputs, x)


def csalr(block: nn.Module, x: Tensor, groups: int, landmarks: tuple[int, int]) -> Array:
    """Eq. 17 without gate and residual: sum over landmarks k of W_ik sum over positions j of B_kj V_j."""
    outputs = []
    for image in images(x):
        heads = []
        for S_nm, S_mm, S_mn, P, V in csalr_maps(block, image, x.shape[-2:], groups, landmarks):
            A_nm = S_nm + P  # Eq. 15
            A_mm = S_mm + np.eye(len(S_mm))  # Eq. 16
            W = A_nm @ np.linalg.inv(A_mm)  # Eq. 14
            B = S_mn  # Eq. 14
            heads.append((W @ (B @ V.T)).T)  # Eq. 17
        outputs.append(fuse(block, np.concatenate(heads), groups))
    return stack(outputs, x)


def smallest_self_attention(block: nn.Module, x: Tensor, groups: int, landmarks: tuple[int, int]) -> float:
    """The least S_ii of all images' and groups' S_mm: the attention of a landmark to itself (Eq. 16)."""
    return min(
        float(S_mm.diagonal().min())
        for image in images(x)
        for _, S_mm, _, _, _ in csalr_maps(block, image, x.shape[-2:], groups, landmarks)
    )


def csalr_maps(
    block: nn.Module, image: Array, size: tuple[int, int], groups: int, landmarks: tuple[int, int]
) -> Iterator[tuple[Array, Array, Array, Array, Array]]:
    """A group at a time S_nm (n, m), S_mm (m, m), S_mn (m, n), P (n, m) and V (c, n) of Eq. 11-16."""
    P = membership(*size, landmarks)
    patches = P / P.sum(axis=0)  # n, m: column k averages the members of landmark k
    Q, K, V = (convolve(getattr(block, name), image) for name in ("query", "key", "value"))
    for Q_group, K_group, V_group in zip(np.split(Q, groups), np.split(K, groups), np.split(V, groups), strict=True):
        Q_prime, K_prime = Q_group @ patches, K_group @ patches  # C'/groups, m: average pooling
        S_nm = rows_softmax(Q_group.T @ K_prime)  # Eq. 11
        S_mm = rows_softmax(Q_prime.T @ K_prime)  # Eq. 12
        S_mn = rows_softmax(Q_prime.T @ K_group)  # Eq. 13
        yield S_nm, S_mm, S_mn, P, V_group


def membership(height: int, width: int, landmarks: tuple[int, int]) -> Array:
    """The indicator of Eq. 15, (n, m): position (i, j) lies in patch (floor(i H'/H), floor(j W'/W))."""
    rows, columns = min(landmarks[0], height), min(landmarks[1], width)
    P = np.zeros((height * width, rows * columns))
    for i in range(height):
        for j in range(width):
            P[i * width + j, (i * rows // height) * columns + j * columns // width] = 1.0
    return P


def part_features(features: Tensor, weight: Tensor, bias: Tensor) -> Array:
    """Refined part pooling: parts * mean over positions of weight * feature; (B, C, H, W) -> (B, C, parts)."""
    parts = len(bias)
    outputs = []
    for image in images(features):
        n = image.shape[1]
        pooled = np.zeros((image.shape[0], parts))
        for i in range(n):
            share = softmax(array(weight).reshape(parts, -1) @ image[:, i] + array(bias))
            for part in range(parts):
                pooled[:, part] += parts * share[part] * image[:, i] / n
        outputs.append(pooled)
    return np.stack(outputs)


def softmax(logits: Array) -> Array:
    """exp(l) / sum of exp(l); the largest logit is taken off first, which cancels and cannot overflow."""
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def rows_softmax(logits: Array) -> Array:
    return np.stack([softmax(row) for row in logits])


def convolve(convolution: nn.Module, image: Array) -> Array:
    """A 1x1 convolution: (C_in, n) -> (C_out, n)."""
    weight = array(convolution.weight)
    return weight.reshape(len(weight), -1) @ image + array(convolution.bias)[:, None]


def fuse(block: nn.Module, heads: Array, groups: int) -> Array:
    """Groups are fused by a 1x1 convolution; with one group there is nothing to fuse."""
    return convolve(block.fuse, heads) if groups > 1 else heads


def images(x: Tensor) -> list[Array]:
    """Each image's features, (C, H*W)."""
    return [image.reshape(len(image), -1) for image in array(x)]


def stack(outputs: list[Array], x: Tensor) -> Array:
    return np.stack(outputs).reshape(tuple(x.shape))


def array(tensor: Tensor) -> Array:
    return tensor.detach().to(torch.float64).cpu().numpy()
