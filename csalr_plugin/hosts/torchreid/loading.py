"""Batches of the host's loaders: shared between processes, and drawn alike for any number of processes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from csalr_plugin.errors import UserError
from csalr_plugin.hosts import distributed

Draw = tuple[int, int, int]
"""Epoch, place in the epoch, index in the dataset."""


class TrainingShare(Sampler[Draw]):
    """This process's part of each batch of a host's sampler: consecutive images, so that identities stay together.

    Args:
        sampler: the host's sampler over all images; the order of the first process counts.
        batch_size: images in a batch of all processes, a multiple of their number.

    Attributes:
        epoch: the epoch, counted from 0; set it before each one.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int) -> None:
        self.sampler, self.batch_size, self.epoch = sampler, batch_size, 0

    def __iter__(self) -> Iterator[Draw]:
        """Yield the images of whole batches; the rest is left out."""
        order = distributed.from_main(list(self.sampler) if distributed.is_main() else [])
        size = len(self) // self.batches if self.batches else 0
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            first = start + distributed.rank() * size
            for place in range(first, first + size):
                yield self.epoch, place, order[place]

    @property
    def batches(self) -> int:
        """Batches in an epoch."""
        return len(self.sampler) // self.batch_size  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.batches * (self.batch_size // distributed.world_size())


class DrawnByPlace(Dataset[Any]):
    """A host's dataset whose augmentations depend on the seed, the epoch and the image's place in it alone.

    Resuming, the number of workers and the number of processes change no image.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, draw: Draw) -> Any:
        epoch, place, index = draw
        draw_from(self.seed, epoch, place, "image")
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


def draw_from(seed: int, epoch: int, number: int, purpose: str) -> None:
    """Seed all random generators: for an "epoch", the "model" in batch `number`, or the "image" at place `number`."""
    entropy = [seed, epoch, number, ("epoch", "image", "model").index(purpose)]
    state = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def training_loader(loader: Any, seed: int) -> Any:
    """Return the host's training loader for this process: its part of each batch, with images drawn by place."""
    dataset = loader.dataset
    if distributed.world_size() > 1:
        dataset.data = distributed.from_main(dataset.data)  # machines may list a folder in another order
    share = TrainingShare(loader.sampler, loader.batch_size)
    return _like(loader, DrawnByPlace(dataset, seed), share, loader.batch_size // distributed.world_size())


def evaluation_loader(loader: Any) -> Any:
    """Return the host's query or gallery loader for this process's rows of the dataset, see `distributed.rows_of`."""
    if distributed.world_size() == 1:
        return loader
    dataset = loader.dataset
    dataset.data = distributed.from_main(dataset.data)
    return _like(loader, dataset, distributed.rows_of(distributed.rank(), len(dataset)), loader.batch_size)


def check_batches(loader: Any) -> None:
    """Check that an epoch of a `training_loader` has a batch.

    Raises:
        UserError: the images do not fill one batch; the message has both numbers.
    """
    share = loader.sampler
    if not share.batches:
        drawn = len(share.sampler)
        raise UserError(
            f"config key 'train.batch_size' is {share.batch_size}, more than the {drawn} training images that the "
            f"sampler draws in an epoch; give {drawn} or less."
        )


def check_tracklets(loader: Any, key: str) -> None:
    """Check that the tracklets of a loader fit into batches, where `video.sample_method` "all" reads every image.

    Args:
        loader: the host's loader of a video or image dataset.
        key: the config key of its batch size, for the message.

    Raises:
        UserError: tracklets in one batch have different lengths.
    """
    dataset = getattr(loader.dataset, "dataset", loader.dataset)
    batch_size = getattr(loader.sampler, "batch_size", loader.batch_size)
    if getattr(dataset, "sample_method", "") != "all" or batch_size == 1:
        return
    lengths = {len(paths) for paths, *_ in dataset.data}
    if len(lengths) > 1:
        raise UserError(
            f"config key 'video.sample_method' is 'all', and tracklets of {min(lengths)} to {max(lengths)} images do "
            f"not form batches of '{key}' {batch_size}; set {key} 1, or video.sample_method evenly."
        )


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
