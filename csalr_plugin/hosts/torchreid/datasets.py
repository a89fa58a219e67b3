"""Building and checking the datasets of a torchreid run."""

from __future__ import annotations

import contextlib
import glob
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torchreid

from csalr_plugin.errors import UserError, first_line
from csalr_plugin.hosts import distributed
from csalr_plugin.hosts.data import check_evaluation, check_training
from csalr_plugin.hosts.folder import FolderData, is_folder_name, read_folder_data
from csalr_plugin.hosts.images import check_images
from csalr_plugin.hosts.script import replaced
from csalr_plugin.hosts.torchreid.config import IMAGE_DATA, VIDEO_DATA, Config

# The setting for the number of images an identity, of cameras or of datasets in a batch.
_SAMPLER_KEYS = {
    "RandomIdentitySampler": "sampler.num_instances",
    "RandomDomainSampler": "sampler.num_cams",
    "RandomDatasetSampler": "sampler.num_datasets",
}


def build_datamanager(config: Config) -> Any:
    """Build torchreid's data manager for `config`, and check its datasets before training starts.

    Raises:
        UserError: a dataset is missing or cannot be used, the sampler does not fit it, or an image does not decode.
    """
    image = config.data.type == "image"
    manager = torchreid.data.ImageDataManager if image else torchreid.data.VideoDataManager
    _check_choice(config)
    own = _read_folders(config)
    root = Path(config.data.root)
    present = set(root.iterdir()) if root.is_dir() else set()
    module = sys.modules[manager.__module__]
    build = f"init_{config.data.type}_dataset"
    functions = {
        build: partial(_build_dataset, config, getattr(module, build), own),
        "build_train_sampler": partial(_build_sampler, config, module.build_train_sampler),
    }
    try:
        with replaced(module, functions):
            datamanager = manager(**config.keyword_arguments(IMAGE_DATA if image else VIDEO_DATA))
    except UserError:
        for folder in (set(root.iterdir()) if root.is_dir() else set()) - present:
            _remove_empty(folder)
        raise
    if not config.test.evaluate:
        check_training(config.data.sources, datamanager.num_train_pids)
    for name, subsets in datamanager.test_dataset.items():
        check_evaluation(name, subsets["query"], subsets["gallery"])
    if distributed.local_rank() == 0:
        check_images(_paths(datamanager))
    return datamanager


def _check_choice(config: Config) -> None:
    """Check that the names of the datasets fit each other and the settings."""
    sources, targets = config.data.sources, config.data.targets
    twice = next((name for name in sources if sources.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"config key 'data.sources' has '{twice}' twice, so each of its identities counts as two; give it once."
        )
    both = next((name for name in sources if name in targets), None)
    if config.data.load_train_targets and both is not None:
        raise UserError(
            f"config key 'data.load_train_targets' is True, and '{both}' is in both data.sources and data.targets; "
            "give other targets, or set it to False."
        )
    own = next((name for name in (*sources, *targets) if is_folder_name(name)), None)
    if config.data.combineall and own is not None:
        raise UserError(
            f"config key 'data.combineall' is True, which '{own}' does not support; move all images for training into "
            "its train split, or set it to False."
        )


def _read_folders(config: Config) -> dict[str, FolderData]:
    """Read each dataset ``folder:PATH`` of the run, print its report, and check it."""
    sources, targets = config.data.sources, config.data.targets
    found = {name: read_folder_data(name) for name in dict.fromkeys((*sources, *targets)) if is_folder_name(name)}
    for name, data in found.items():
        if distributed.is_main():
            print(f"{data.report()}\n")
        as_source = name in sources or config.data.load_train_targets
        data.check(as_source, name in targets, config.csalr.shared_identities, "csalr.shared_identities")
    return found


class FolderDataset(torchreid.data.ImageDataset):  # type: ignore[misc]  # torchreid carries no types
    """A user dataset ``folder:PATH`` for torchreid.

    Args:
        data: the images of the dataset.
        mode: "train", "query" or "gallery": the split that the object is for.
        options: options of torchreid's `ImageDataset`.
    """

    def __init__(self, data: FolderData, mode: str = "train", **options: Any) -> None:
        # The host requires images in every split, but a source needs no query and a target no training images.
        items = data.items(mode)
        super().__init__(items, items, items, mode=mode, **options)

    def show_summary(self) -> None:
        """Print nothing. The report of the dataset takes the place of the host's summary."""


def _build_dataset(
    config: Config, host_build: Callable[..., Any], own: dict[str, FolderData], name: str, **options: Any
) -> Any:
    """Build one dataset. An error of its handler becomes a `UserError` with the name of the dataset."""
    if name in own:
        return FolderDataset(own[name], **options)
    root = config.data.root
    try:
        return host_build(name, **options)
    except UserError:
        raise
    except Exception as error:  # handlers raise errors of all types if the files differ from their layout
        if isinstance(error, OSError) and error.filename is None:  # from the download
            reason = f"is missing and cannot be downloaded ({first_line(error)})"
        else:
            reason = f"cannot be read ({first_line(error)})"
        where = ", for market1501 in ROOT/market1501/Market-1501-v15.09.15/{bounding_box_train,query,bounding_box_test}"
        hint = where if name == "market1501" else ""
        if glob.escape(root) != root:
            hint += "; it cannot read below a folder with *, ? or [ in its name"
        raise UserError(
            f"data.root {root!r}: dataset {name} {reason}; put the images where torchreid's handler looks for them"
            f"{hint}."
        ) from error


def _build_sampler(config: Config, host_build: Callable[..., Any], items: Any, name: str, **options: Any) -> Any:
    try:
        return host_build(items, name, **options)
    except (AssertionError, ValueError) as error:
        key = _SAMPLER_KEYS.get(name, "sampler.train_sampler")
        identities, cameras, datasets = (len({item[place] for item in items}) for place in (1, 2, 3))
        raise UserError(
            f"{name} cannot make batches of train.batch_size {config.train.batch_size} with {key} {config.lookup(key)} "
            f"from {len(items)} training images of {identities} identities, {cameras} cameras and {datasets} datasets; "
            f"give a smaller {key}, a smaller multiple of it as train.batch_size, or another sampler."
        ) from error


def _remove_empty(folder: Path) -> None:
    """Remove a folder that a failed download of the host has left, if it is empty."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _paths(datamanager: Any) -> dict[str, None]:
    """Return the path of every image of the run, without duplicates."""
    subsets = [datamanager.train_loader.dataset.train]
    for target in datamanager.test_dataset.values():
        subsets += [target["query"], target["gallery"]]
    paths = [item[0] for subset in subsets for item in subset]
    # A video dataset has a tuple of paths in the place of one path.
    return dict.fromkeys(path for item in paths for path in ([item] if isinstance(item, str) else item))
