"""How much the attention of a trained network adds: its accuracy with its gates, and with every gate set to 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from tqdm import tqdm

from csalr_plugin.errors import UserError
from csalr_plugin.hosts.images import read_image
from csalr_plugin.hosts.trained import Trained
from csalr_plugin.models.recipe import attention_blocks

Items = Sequence[tuple[str, int, int]]
"""Path, identity and camera of each image."""

_BATCH = 64


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of each query that has a match from another camera.

    Attributes:
        precisions: average precision of each query, from 0 to 1.
        hits: whether the nearest gallery image shows the query's identity.
    """

    precisions: NDArray[np.float64]
    hits: NDArray[np.bool_]

    @property
    def mean_precision(self) -> float:
        """The mAP, from 0 to 1."""
        return float(self.precisions.mean())

    @property
    def rank_1(self) -> float:
        """The share of queries whose nearest gallery image shows their identity."""
        return float(self.hits.mean())


def gates_of(network: nn.Module) -> dict[str, float]:
    """Return the gate alpha of each attention block; empty for a network without attention."""
    return {name: float(block.alpha.detach()) for name, block in attention_blocks(network).items()}


@contextmanager
def closed_gates(network: nn.Module) -> Iterator[None]:
    """Set every gate of `network` to 0 inside a with statement, so that each block is the identity."""
    gates = [block.alpha for block in attention_blocks(network).values()]
    values = [gate.detach().clone() for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
        try:
            yield
        finally:
            for gate, value in zip(gates, values, strict=True):
                gate.copy_(value)


def evaluate(trained: Trained, query: Items, gallery: Items) -> Accuracy:
    """Rank the gallery for each query by the Euclidean distance of the embeddings, as hosts do.

    A gallery image of the query's identity from the query's camera is left out. Images are read and embedded in
    batches, on the device of the network, in float32.

    Raises:
        UserError: the size of the images is not known, or no query has a match from another camera.
    """
    if trained.size is None:
        raise UserError(f"the checkpoint of {trained.model} does not record its image size.")
    distances = torch.cdist(_embed(trained, query), _embed(trained, gallery)).numpy()
    (_, query_ids, query_cameras), (_, gallery_ids, gallery_cameras) = (
        (paths, np.array(ids), np.array(cameras))
        for paths, ids, cameras in (zip(*items, strict=True) for items in (query, gallery))
    )
    precisions, hits = [], []
    for row, identity, camera in zip(distances, query_ids, query_cameras, strict=True):
        kept = (gallery_ids != identity) | (gallery_cameras != camera)
        matches = (gallery_ids[kept] == identity)[np.argsort(row[kept], kind="stable")]
        if matches.any():
            places = np.flatnonzero(matches) + 1
            precisions.append(float((np.arange(1, len(places) + 1) / places).mean()))
            hits.append(bool(matches[0]))
    if not precisions:
        raise UserError("no query has a gallery image of its identity from another camera; there is nothing to rank.")
    return Accuracy(np.array(precisions), np.array(hits))


def read_batch(
    paths: Sequence[Path | str], size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Read, resize and normalise images like a host at test time: (B, 3, H, W).

    Args:
        paths: of the images.
        size: H and W.
        mean, std: of each channel, for pixels scaled to 0 to 1.

    Raises:
        UserError: an image cannot be read.
    """
    images = [TF.to_tensor(read_image(str(path)).resize(size[::-1], Image.Resampling.BILINEAR)) for path in paths]
    return TF.normalize(torch.stack(images), list(mean), list(std))


def in_words(gates: Mapping[str, float]) -> str:
    """Return the gates for a line of text: "stage1 +0.113, stage2 -0.096"."""
    return ", ".join(f"{name} {gate:+.3f}" for name, gate in gates.items())


def _embed(trained: Trained, items: Items) -> Tensor:
    """The embeddings of the images, (N, width), on the CPU."""
    assert trained.size is not None
    device, found = next(trained.network.parameters()).device, []
    for start in tqdm(range(0, len(items), _BATCH), desc="embedding", unit="batch", leave=False, mininterval=2.0):
        paths = [path for path, *_ in items[start : start + _BATCH]]
        batch = read_batch(paths, trained.size, trained.mean, trained.std)
        with torch.inference_mode():
            found.append(trained.network(batch.to(device)).float().cpu())
    return torch.cat(found)
