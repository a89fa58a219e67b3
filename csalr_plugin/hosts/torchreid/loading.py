"""Batches of the host's loaders, shared between processes, and drawn alike however many there are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from csalr_plugin.hosts import distributed

Draw = tuple[int, int, int]
"""Epoch, place in the epoch, index in the dataset."""


class TrainingShare(Sampler[Draw]):
    """This process's part of each batch of a host's sampler: consecutive images, so identities stay whole.

    Args:
        sampler: the host's, over all images; the first process's order counts.
        batch_size: of all processes together, a multiple of their number.

    Attributes:
        epoch: from 0; set it before each.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int) -> None:
        self.sampler, self.batch_size, self.epoch = sampler, batch_size, 0

    def __iter__(self) -> Iterator[Draw]:
        """In whole batches; what does not fill one is left out."""
        order = distributed.from_main(list(self.sampler) if distributed.is_main() else [])
        size = len(self) // self.batches if self.batches else 0
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            first = start + distributed.rank() * size
            for place in range(first, first + size):
                yield self.epoch, place, order[place]

    @property
    def batches(self) -> int:
        """In an epoch."""
        return len(self.sampler) // self.batch_size  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.batches * (self.batch_size // distributed.world_size())


class DrawnByPlace(Dataset[Any]):
    """A host's dataset whose augmentations depend on seed, epoch and the image's place in it, and on nothing else.

    So resuming, the number of workers and the number of processes change no image.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, draw: Draw) -> Any:
        epoch, place, index = draw
        draw_from(self.seed, epoch, place, "image")
        return self.dataset[index]


def draw_from(seed: int, epoch: int, number: int, purpose: str) -> None:
    """Seed all random numbers: for an "epoch", the "model" in batch `number`, or the "image" in place `number`."""
    entropy = [seed, epoch, number, ("epoch", "image", "model").index(purpose)]
    state = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def training_loader(loader: Any, seed: int) -> Any:
    """The host's training loader for this process: its part of each batch, whose images are drawn by place."""
    dataset = loader.dataset
    if distributed.world_size() > 1:
        dataset.data = distributed.from_main(dataset.data)  # machines may list a folder in another order
    share = TrainingShare(loader.sampler, loader.batch_size)
    return _like(loader, DrawnByPlace(dataset, seed), share, loader.batch_size // distributed.world_size())


def evaluation_loader(loader: Any) -> Any:
    """The host's query or gallery loader for this process: its rows of the dataset, see `distributed.rows_of`."""
    if distributed.world_size() == 1:
        return loader
    dataset = loader.dataset
    dataset.data = distributed.from_main(dataset.data)
    return _like(loader, dataset, distributed.rows_of(distributed.rank(), len(dataset)), loader.batch_size)


def _like(loader: Any, dataset: Any, sampler: Any, batch_size: int) -> Any:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
    )
