"""CMC and mAP of torchreid's pure-Python evaluation, without its loop over the whole gallery."""

from __future__ import annotations

import numpy as np
import torchreid
from numpy.typing import NDArray

from csalr_plugin.errors import UserError
from csalr_plugin.hosts.data import fewest_left

Array = NDArray[np.generic]


def evaluate_rank(
    distances: Array,
    query_ids: Array,
    gallery_ids: Array,
    query_cameras: Array,
    gallery_cameras: Array,
    max_rank: int = 50,
    use_metric_cuhk03: bool = False,
) -> tuple[Array, float]:
    """Return the result of ``torchreid.metrics.evaluate_rank(..., use_cython=False)``, to the last bit, ties included.

    The host computes the cuhk03 metric, and galleries in which a query may have fewer than `max_rank` images.

    Args:
        distances: from each query to each gallery image, (Q, G), of any real dtype; NaN counts as the farthest.
        query_ids: identities, (Q,).
        gallery_ids: identities, (G,).
        query_cameras: cameras, (Q,).
        gallery_cameras: cameras, (G,); a query leaves out its own identity in its own camera.
        max_rank: length of the CMC curve, 50 by default.
        use_metric_cuhk03: one image of each gallery identity, drawn with NumPy's global generator; off by default.

    Returns:
        The CMC curve from rank 1 on, (max_rank,), float32, and the mAP, both as fractions.

    Raises:
        UserError: no query has a gallery image of its identity from another camera.
    """
    by_identity = np.argsort(gallery_ids, kind="stable")
    starts, stops = (np.searchsorted(gallery_ids, query_ids, side, by_identity) for side in ("left", "right"))
    own_identity = [by_identity[start:stop] for start, stop in zip(starts, stops, strict=True)]
    in_other_camera = [gallery_cameras[own] != camera for own, camera in zip(own_identity, query_cameras, strict=True)]
    valid = [query for query, others in enumerate(in_other_camera) if others.any()]
    if not valid:
        raise UserError(
            f"none of the {len(query_ids)} query images has an image of its identity from another camera among the "
            f"{len(gallery_ids)} gallery images, so there is nothing to rank; check the dataset's query and gallery."
        )
    if use_metric_cuhk03 or not 1 <= max_rank <= fewest_left(gallery_ids, gallery_cameras):
        result: tuple[Array, float] = torchreid.metrics.evaluate_rank(
            distances,
            query_ids,
            gallery_ids,
            query_cameras,
            gallery_cameras,
            max_rank,
            use_metric_cuhk03,
            use_cython=False,
        )
        return result

    first_matches, precisions = [], []
    precision_at = np.zeros(len(gallery_ids))
    for query in valid:
        own, others = own_identity[query], in_other_camera[query]
        places = _places(distances[query], own, others)
        first_matches.append(places[0])
        # The host's sum includes a zero for each image that is no match. NumPy sums in pairs, so a shorter sum would
        # be rounded differently.
        precision_at[places] = np.arange(1, len(places) + 1) / (places + 1.0)
        left = len(gallery_ids) - (len(others) - len(places))
        precisions.append(precision_at[:left].sum() / len(places))
        precision_at[places] = 0
    curves = (np.array(first_matches)[:, None] <= np.arange(max_rank)).astype(np.float32)
    return curves.sum(0) / float(len(valid)), np.mean(precisions)


def _places(row: Array, own: NDArray[np.intp], others: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return the places of a query's matches in its ranking, from 0 and ascending.

    Args:
        row: the query's distances, (G,).
        own: the columns of the query's identity.
        others: a mask over `own` of the images from another camera, at least one. These are the matches; the other
            images of `own` are left out.
    """
    row = np.ascontiguousarray(row)
    own_distances = np.sort(row[own])
    matches = np.sort(row[own[others]])
    near = np.sort(row[row <= matches[-1]])  # empty if the last match is NaN, which then counts as a tie
    strangers_before, strangers_to = (
        np.searchsorted(near, matches, side) - np.searchsorted(own_distances, matches, side)
        for side in ("left", "right")
    )
    if np.array_equal(strangers_before, strangers_to):
        return strangers_before + np.arange(len(matches))

    # Another identity may have the same distance as a match. The host's sort is not stable, so only the same sort
    # breaks the tie alike.
    order = np.argsort(row)
    is_own, is_left_out = np.zeros((2, len(row)), dtype=bool)
    is_own[own] = True
    is_left_out[own[~others]] = True
    places = np.flatnonzero(is_own[order])
    left_out = is_left_out[order[places]]
    return (places - np.cumsum(left_out))[~left_out]
