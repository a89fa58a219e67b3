"""Data sets of a run in torchreid: built, checked before training, with each mistake told in one line."""

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
from csalr_plugin.hosts.folder import OwnData, is_own, read_own
from csalr_plugin.hosts.images import check_images
from csalr_plugin.hosts.script import replaced
from csalr_plugin.hosts.torchreid.config import IMAGE_DATA, VIDEO_DATA, Config

# The setting that says how many identities, cameras or data sets a batch of the sampler has.
_SAMPLER_KEYS = {
    "RandomIdentitySampler": "sampler.num_instances",
    "RandomDomainSampler": "sampler.num_cams",
    "RandomDatasetSampler": "sampler.num_datasets",
}


def build_datamanager(config: Config) -> Any:
    """Build torchreid's data manager for `config`, and check that its data can be trained and evaluated on.

    Raises:
        UserError: a data set is missing, empty or cannot be used, or an image does not decode.
    """
    image = config.data.type == "image"
    manager = torchreid.data.ImageDataManager if image else torchreid.data.VideoDataManager
    _check_choice(config)
    own = _read_own_data(config)
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
    """Check the names of the data sets against each other and against the settings."""
    sources, targets = config.data.sources, config.data.targets
    twice = next((name for name in sources if sources.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"config key 'data.sources' names '{twice}' twice, so each of its people would count as two; name it once."
        )
    both = next((name for name in sources if name in targets), None)
    if config.data.load_train_targets and both is not None:
        raise UserError(
            f"config key 'data.load_train_targets' is True, and '{both}' is in both data.sources and data.targets; "
            "give other targets, or set it to False."
        )
    own = next((name for name in (*sources, *targets) if is_own(name)), None)
    if config.data.combineall and own is not None:
        raise UserError(
            f"config key 'data.combineall' is True, which is not for '{own}': move the images to train on into its "
            "train split, or set it to False."
        )


def _read_own_data(config: Config) -> dict[str, OwnData]:
    """Read each data set ``folder:PATH`` of the run, print what was found, and check it."""
    sources, targets = config.data.sources, config.data.targets
    found = {name: read_own(name) for name in dict.fromkeys((*sources, *targets)) if is_own(name)}
    for name, data in found.items():
        if distributed.is_main():
            print(f"{data.report()}\n")
        as_source = name in sources or config.data.load_train_targets
        data.check(as_source, name in targets, config.csalr.shared_identities, "csalr.shared_identities")
    return found


class OwnDataset(torchreid.data.ImageDataset):  # type: ignore[misc]  # torchreid carries no types
    """A data set ``folder:PATH`` as one of torchreid's.

    Args:
        data: its images.
        mode: "train", "query" or "gallery"; the host reads no other split than this one of the object.
        options: those of torchreid's `ImageDataset`.
    """

    def __init__(self, data: OwnData, mode: str = "train", **options: Any) -> None:
        # The host requires images in every split, and a source may have no query, a target no training images.
        items = data.items(mode)
        super().__init__(items, items, items, mode=mode, **options)

    def show_summary(self) -> None:
        """Print nothing: the report of the data set has been printed."""


def _build_dataset(
    config: Config, host_build: Callable[..., Any], own: dict[str, OwnData], name: str, **options: Any
) -> Any:
    """Build one data set; a mistake in it is told with its name."""
    if name in own:
        return OwnDataset(own[name], **options)
    root = config.data.root
    try:
        return host_build(name, **options)
    except UserError:
        raise
    except Exception as error:  # a handler fails in any way where files are not as it expects them
        if isinstance(error, OSError) and error.filename is None:  # of the download
            reason = f"is not there and cannot be downloaded ({first_line(error)})"
        else:
            reason = f"cannot be read ({first_line(error)})"
        where = ", for market1501 in ROOT/market1501/Market-1501-v15.09.15/{bounding_box_train,query,bounding_box_test}"
        hint = where if name == "market1501" else ""
        if glob.escape(root) != root:
            hint += "; it finds none below a folder with *, ? or [ in its name"
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
            f"from {len(items)} training images of {identities} identities, {cameras} cameras and {datasets} data "
            f"sets; give a train.batch_size that is a multiple of {key} and smaller than the data, or another sampler."
        ) from error


def _remove_empty(folder: Path) -> None:
    """Remove a folder that the host's failed download left, unless it holds something."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _paths(datamanager: Any) -> dict[str, None]:
    """Return the path of every image of the run, once."""
    subsets = [datamanager.train_loader.dataset.train]
    for target in datamanager.test_dataset.values():
        subsets += [target["query"], target["gallery"]]
    paths = [item[0] for subset in subsets for item in subset]
    # A video data set has a tuple of paths where an image data set has one.
    return dict.fromkeys(path for item in paths for path in ([item] if isinstance(item, str) else item))
