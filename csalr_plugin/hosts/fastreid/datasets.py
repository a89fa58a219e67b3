"""Checking the datasets of a fast-reid run."""

from __future__ import annotations

import glob
import logging
import os
from typing import Any

from fastreid.config import CfgNode
from fastreid.data.datasets import DATASET_REGISTRY
from fastreid.data.datasets.bases import ImageDataset
from fastreid.utils import comm

from csalr_plugin.errors import UserError, first_line
from csalr_plugin.hosts.data import check_evaluation, check_training
from csalr_plugin.hosts.folder import FolderData, is_folder_name, read_folder_data
from csalr_plugin.hosts.images import check_images

_logged: set[str] = set()
logger = logging.getLogger(__name__.replace("csalr_plugin.hosts.fastreid", "fastreid.csalr"))


def data_root() -> str:
    """Return the current value of the environment variable FASTREID_DATASETS, the folder of the datasets."""
    return os.path.expanduser(os.environ.get("FASTREID_DATASETS", "datasets"))


class FolderDataset(ImageDataset):  # type: ignore[misc]  # fast-reid carries no types
    """A user dataset ``folder:PATH`` for fast-reid.

    Args:
        data: the images of the dataset.
        root: unused; the path is in the name of the dataset.
        options: options of fast-reid's `ImageDataset`.
    """

    def __init__(self, data: FolderData, root: str = "", **options: Any) -> None:
        # As in the handlers of fast-reid, a training identity is text that starts with the name of the dataset.
        labelled = zip(data.items("train"), data.images["train"], strict=True)
        train = [
            (path, f"{data.name}_{image.identity}", f"{data.name}_{camera}") for (path, _, camera), image in labelled
        ]
        super().__init__(train, data.items("query"), data.items("gallery"), **options)
        self.report = data.report()

    def show_train(self) -> None:
        """Log the report of the dataset, once in each process."""
        if self.report not in _logged:
            _logged.add(self.report)
            logger.info(f"Dataset:\n{self.report}")

    show_test = show_train


def check_data(cfg: CfgNode) -> None:
    """Check the datasets of a run and decode all of their images, before training starts.

    Raises:
        UserError: a dataset is missing or cannot be used, or an image does not decode.
    """
    paths: dict[str, None] = {}
    identities: set[Any] = set()
    for name in dict.fromkeys([*cfg.DATASETS.NAMES, *cfg.DATASETS.TESTS]):
        as_source, as_target = name in cfg.DATASETS.NAMES, name in cfg.DATASETS.TESTS
        if is_folder_name(name):
            _check_folder(cfg, name, as_source, as_target)
        train, query, gallery = _read(name, cfg.DATASETS.COMBINEALL and as_source)
        if as_source and not train:
            raise UserError(f"FASTREID_DATASETS '{data_root()}': dataset {name} has no training images.")
        if as_target:
            check_evaluation(name, query, gallery)
            _check_neighbours(cfg, name, len(query) + len(gallery))
        identities |= {item[1] for item in train if as_source}
        used = [*(train if as_source else ()), *((*query, *gallery) if as_target else ())]
        paths |= dict.fromkeys(item[0] for item in used)
    check_training(cfg.DATASETS.NAMES, len(identities))
    if comm.is_main_process():
        check_images(paths)


def check_target(cfg: CfgNode, name: str) -> None:
    """Check one dataset before an evaluation.

    Raises:
        UserError: the dataset is missing or cannot be evaluated.
    """
    if is_folder_name(name):
        read_folder_data(name).check(False, True, cfg.CSALR.SHARED_IDENTITIES, "CSALR.SHARED_IDENTITIES")
    _, query, gallery = _read(name, False)
    check_evaluation(name, query, gallery)
    _check_neighbours(cfg, name, len(query) + len(gallery))


def _check_neighbours(cfg: CfgNode, name: str, images: int) -> None:
    """Check that a search for the nearest images finds as many as it asks for; otherwise faiss returns wrong images."""
    for key, enabled, value in (
        ("AQE.QE_K", cfg.TEST.AQE.ENABLED, cfg.TEST.AQE.QE_K),
        ("RERANK.K1", cfg.TEST.RERANK.ENABLED, cfg.TEST.RERANK.K1),
    ):
        if enabled and value >= images:
            raise UserError(
                f"config key 'TEST.{key}' is {value}; it must be less than {images}, the query and gallery images of "
                f"{name}."
            )


def _check_folder(cfg: CfgNode, name: str, as_source: bool, as_target: bool) -> None:
    if cfg.DATASETS.COMBINEALL:
        raise UserError(
            f"config key 'DATASETS.COMBINEALL' is True, which '{name}' does not support; move all images for training "
            "into its train split, or set it to False."
        )
    read_folder_data(name).check(as_source, as_target, cfg.CSALR.SHARED_IDENTITIES, "CSALR.SHARED_IDENTITIES")


def _read(name: str, combine_all: bool) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the training, query and gallery images of a dataset."""
    try:
        dataset = DATASET_REGISTRY.get(name)(root=data_root(), combineall=combine_all)
        return dataset.train, dataset.query, dataset.gallery
    except UserError:
        raise
    except Exception as error:  # handlers raise errors of all types if the files differ from their layout
        where = ", for Market1501 in ROOT/Market-1501-v15.09.15/{bounding_box_train,query,bounding_box_test}"
        hint = where if name == "Market1501" else ""
        if glob.escape(data_root()) != data_root():
            hint += "; it cannot read below a folder with *, ? or [ in its name"
        raise UserError(
            f"FASTREID_DATASETS '{data_root()}': dataset {name} cannot be read ({first_line(error)}); put the images "
            f"where fast-reid's handler looks for them{hint}."
        ) from error
