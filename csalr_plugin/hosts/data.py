"""Datasets of both hosts: file names, checks before training, and the ranking of small galleries."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from csalr_plugin.errors import UserError
from csalr_plugin.hosts.images import is_image_name

_OWN_LAYOUT = "or use a user dataset, folder:PATH (docs/own-data.md)"


class NameRule(NamedTuple):
    """Pattern of the file names of a dataset, with the ranges of its identities and cameras."""

    pattern: re.Pattern[str]  # group 1: identity, group 2: camera
    example: str
    identities: range  # -1 marks unusable images
    cameras: range


_IDENTITY_AND_CAMERA = re.compile(r"(-?\d+)_c(\d+)", re.ASCII)
MARKET1501 = NameRule(_IDENTITY_AND_CAMERA, "0002_c1s1_000451_03.jpg", range(-1, 1502), range(1, 7))
DUKEMTMC = NameRule(_IDENTITY_AND_CAMERA, "0002_c1_f0044158.jpg", range(10_000), range(1, 9))
VERI = NameRule(_IDENTITY_AND_CAMERA, "0002_c002_00030600_0.jpg", range(-1, 777), range(1, 21))
CUHK_SYSU = NameRule(re.compile(r"p(-?\d+)_s(\d+)", re.ASCII), "p1_s1_1.jpg", range(1_000_000), range(1_000_000))


def named_images(folder: str | Path, rule: NameRule) -> list[tuple[str, int, int]]:
    """List the images of one folder of a dataset, with the identity and camera in their file names.

    The handlers of the hosts search the whole path, so that a folder named "exp2_c1" gives every image below it the
    same identity and camera. They also read only one digit of the camera, find no images below a folder with "[" in
    its name, and ignore all files but ``*.jpg``.

    Returns:
        Path, identity and camera of each image, sorted by identity, then by name. Images of identity -1 are skipped.

    Raises:
        UserError: the folder has no images, or the name of an image has no identity and camera or one out of range.
    """
    folder = Path(folder)
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    images = [name for name in names if is_image_name(name)]
    if not images:
        raise UserError(_why_empty(folder, names))
    found = []
    for name in images:
        match = rule.pattern.search(name)
        if match is None:
            raise UserError(
                f"image {str(folder / name)!r}: its name does not contain identity and camera; name it like "
                f"{rule.example}, {_OWN_LAYOUT}."
            )
        identity, camera = int(match[1]), int(match[2])
        for word, number, allowed in (("identity", identity, rule.identities), ("camera", camera, rule.cameras)):
            if number not in allowed:
                raise UserError(
                    f"image {str(folder / name)!r}: its name contains {word} {number}, and this dataset has "
                    f"{max(allowed.start, 0)} to {allowed.stop - 1}; rename it, {_OWN_LAYOUT}."
                )
        if identity != -1:
            found.append((str(folder / name), identity, camera))
    return sorted(found, key=lambda item: (item[1], item[0]))


def _why_empty(folder: Path, names: Sequence[str]) -> str:
    below = next((file for file in folder.rglob("*") if file.is_file() and is_image_name(file.name)), None)
    if below is not None:
        return (
            f"folder '{folder}' has images only in sub-folders, such as '{below.relative_to(folder)}', which the host "
            f"does not read; move them into the folder itself, {_OWN_LAYOUT}."
        )
    if names:
        return f"folder '{folder}' has {len(names)} files and no image, such as {names[0]!r}; put the images there."
    return f"folder '{folder}' is empty; put the images of the dataset there."


def check_training(names: Sequence[str], identities: int) -> None:
    """Check that the training images have at least two identities.

    Args:
        names: of the datasets.
        identities: their number.

    Raises:
        UserError: there is only one identity, so that every prediction is right and nothing is learned.
    """
    if identities < 2:
        raise UserError(
            f"all training images of {', '.join(names)} are of one identity, and training needs two or more; check the "
            "file names, or add images of other people."
        )


def check_evaluation(name: str, query: Sequence[Any], gallery: Sequence[Any]) -> None:
    """Check that at least one query has a match: a gallery image of its identity from another camera.

    Without this check the first evaluation fails, after training.

    Args:
        name: of the dataset.
        query: tuples that begin with path, identity and camera.
        gallery: the same.

    Raises:
        UserError: no query has a match, or there are no query or no gallery images.
    """
    for subset, items in (("query", query), ("gallery", gallery)):
        if not items:
            raise UserError(f"dataset {name} has no {subset} images, so it cannot be evaluated; add some.")
    cameras = defaultdict(set)
    for _, identity, camera, *_ in gallery:
        cameras[identity].add(camera)
    if any(cameras.get(identity, set()) - {camera} for _, identity, camera, *_ in query):
        return
    all_cameras = {camera for _, _, camera, *_ in (*query, *gallery)}
    if not any(identity in cameras for _, identity, *_ in query):
        reason = f"none of the {len({item[1] for item in query})} query identities is in the gallery"
    elif len(all_cameras) == 1:
        reason = "all query and gallery images are from one camera"
    else:
        reason = "no query has a gallery image of its identity from another camera"
    raise UserError(
        f"dataset {name} cannot be evaluated: {reason}, and a query matches images of its identity from other cameras "
        "only; check identities and cameras, or leave the cameras out (docs/own-data.md)."
    )


def padded(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """Return a host's `evaluate_rank` for galleries of any size; the arguments are the same in both hosts."""

    def evaluate_rank(
        distmat: Any,
        q_pids: Any,
        g_pids: Any,
        q_camids: Any,
        g_camids: Any,
        max_rank: int = 50,
        use_metric_cuhk03: bool = False,
        use_cython: bool = True,
    ) -> Any:
        # The cuhk03 metric counts identities.
        left = len(np.unique(g_pids)) - 1 if use_metric_cuhk03 else fewest_left(g_pids, g_camids)
        if (missing := max_rank - left) > 0:
            # Other identities at an infinite distance: no match comes after them, so no precision changes.
            others = max(np.max(q_pids), np.max(g_pids)) + 1 + np.arange(missing)
            distmat = np.pad(distmat, ((0, 0), (0, missing)), constant_values=np.inf)
            g_pids, g_camids = np.append(g_pids, others), np.append(g_camids, np.zeros_like(others))
        return evaluate(distmat, q_pids, g_pids, q_camids, g_camids, max_rank, use_metric_cuhk03, use_cython)

    return evaluate_rank


def fewest_left(gallery_ids: Any, gallery_cameras: Any) -> int:
    """Return the fewest gallery images that a query is ranked against.

    A query leaves out the images of its own identity in its own camera.
    """
    pairs = np.unique([gallery_ids, gallery_cameras], axis=1, return_counts=True)
    return len(gallery_ids) - int(pairs[1].max())
