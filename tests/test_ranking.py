"""Ranking gives the host's own CMC and mAP to the last bit, in little memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torchreid
from hypothesis import given, settings
from hypothesis import strategies as st

from csalr_plugin.errors import UserError
from csalr_plugin.hosts.torchreid import register
from csalr_plugin.hosts.torchreid.ranking import evaluate_rank

register()


def unlike_every_other(rng: np.random.Generator, size: tuple[int, int]) -> Any:
    return rng.random(size)


def of_four_values(rng: np.random.Generator, size: tuple[int, int]) -> Any:
    return rng.integers(0, 4, size)


def all_equal(rng: np.random.Generator, size: tuple[int, int]) -> Any:
    return np.ones(size)


def of_duplicated_embeddings(rng: np.random.Generator, size: tuple[int, int]) -> Any:
    query = rng.standard_normal((size[0], 8))
    gallery = rng.standard_normal((max(1, size[1] // 3), 8))[rng.integers(0, max(1, size[1] // 3), size[1])]
    return ((query[:, None] - gallery[None]) ** 2).sum(2)


def not_always_finite(rng: np.random.Generator, size: tuple[int, int]) -> Any:
    values = rng.standard_normal(size)
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0])
    return np.where(rng.random(size) < rng.choice([0.01, 0.3, 1]), rng.choice(special, size), values)


KINDS = [unlike_every_other, of_four_values, all_equal, of_duplicated_embeddings, not_always_finite]


def people(rng: np.random.Generator, size: tuple[int, int], identities: int, cameras: int) -> tuple[Any, ...]:
    return (
        rng.integers(0, identities, size[0]) - 1,
        rng.integers(0, identities + 1, size[1]) - 1,
        rng.integers(0, cameras, size[0]),
        rng.integers(0, cameras, size[1]),
    )


def assert_the_hosts(distances: Any, *arguments: Any) -> None:
    cmc, mean_ap = evaluate_rank(distances, *arguments)
    host_cmc, host_mean_ap = torchreid.metrics.evaluate_rank(distances, *arguments, use_cython=False)
    assert (cmc.dtype, cmc.shape) == (host_cmc.dtype, host_cmc.shape)
    assert cmc.tobytes() == host_cmc.tobytes()
    assert np.float64(mean_ap).tobytes() == np.float64(host_mean_ap).tobytes()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    distances=st.sampled_from(KINDS),
    dtype=st.sampled_from([np.float32, np.float64]),
    layout=st.sampled_from("CF"),
    queries=st.integers(1, 8),
    gallery=st.integers(1, 80) | st.integers(200, 1500),
    identities=st.integers(1, 12),
    cameras=st.integers(1, 4),
    max_rank=st.integers(1, 60),
)
def test_cmc_and_map_are_the_hosts_to_the_last_bit(
    seed: int,
    distances: Any,
    dtype: Any,
    layout: Any,
    queries: int,
    gallery: int,
    identities: int,
    cameras: int,
    max_rank: int,
) -> None:
    rng = np.random.default_rng(seed)
    size = (queries, gallery)
    matrix = np.array(distances(rng, size), dtype=dtype, order=layout)
    who = people(rng, size, identities, cameras)
    try:
        evaluate_rank(matrix, *who, max_rank)
    except UserError:
        with pytest.raises(AssertionError, match="do not appear in gallery"):
            torchreid.metrics.evaluate_rank(matrix, *who, max_rank, use_cython=False)
    else:
        assert_the_hosts(matrix, *who, max_rank)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_gallery_is_ranked_as_the_host_does(kind: Any) -> None:
    rng = np.random.default_rng(0)
    size = (12, 19_732)
    assert_the_hosts(kind(rng, size).astype(np.float32), *people(rng, size, 750, 6))


@pytest.mark.parametrize("max_rank", [34, 35, 36, 40, 41])
def test_a_max_rank_above_the_images_of_some_query_gives_the_hosts_curve(max_rank: int) -> None:
    rng = np.random.default_rng(max_rank)
    identities, cameras = np.repeat(np.arange(8), 5), np.tile([0, 0, 0, 0, 1], 8)
    cameras[:5] = [0, 0, 0, 0, 0]  # the largest group: five of 40 are left out
    who = (np.arange(8), identities, np.zeros(8, dtype=int), cameras)
    assert_the_hosts(rng.integers(0, 9, (8, 40)).astype(np.float32), *who, max_rank)


def test_the_cuhk03_metric_is_the_hosts_under_the_same_seed() -> None:
    rng = np.random.default_rng(0)
    size = (10, 300)
    matrix, who = rng.random(size), people(rng, size, 80, 2)
    np.random.seed(3)
    host = torchreid.metrics.evaluate_rank(matrix, *who, 20, use_metric_cuhk03=True, use_cython=False)
    np.random.seed(3)
    ours = evaluate_rank(matrix, *who, 20, use_metric_cuhk03=True)
    assert ours[0].tobytes() == host[0].tobytes()
    assert ours[1] == host[1]


@pytest.mark.parametrize("cuhk03", [False, True])
def test_a_gallery_without_a_match_is_one_line(cuhk03: bool) -> None:
    # One identity is only in the query's own camera, the other nowhere.
    who = (np.array([1, 2]), np.array([1, 3, 4]), np.array([0, 0]), np.array([0, 0, 1]))
    with pytest.raises(UserError, match=r"none of the 2 query images .* the 3 gallery images") as told:
        evaluate_rank(np.ones((2, 3)), *who, use_metric_cuhk03=cuhk03)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", [unlike_every_other, all_equal])
def test_ranking_takes_less_memory_than_the_distances(kind: Any) -> None:
    rng = np.random.default_rng(0)
    size = (100, 6000)
    matrix, who = kind(rng, size).astype(np.float32), people(rng, size, 90, 6)
    tracemalloc.start()
    try:
        evaluate_rank(matrix, *who)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < matrix.nbytes / 2


def test_the_whole_gallery_is_sorted_only_for_a_query_with_a_tie_between_a_match_and_another_identity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    size = (20, 500)
    matrix, who = rng.permuted(np.tile(np.arange(500.0), (20, 1)), axis=1), people(rng, size, 1, 6)
    query_ids, gallery_ids, query_cameras, gallery_cameras = who
    query_ids[:] = 0
    matches = gallery_ids == 0
    for query in range(3):
        match = np.flatnonzero(matches & (gallery_cameras != query_cameras[query]))[0]
        matrix[query, np.flatnonzero(~matches)[0]] = matrix[query, match]
    sorted_whole, argsort = [], np.argsort

    def counted(row: Any, *arguments: Any, **options: Any) -> Any:
        sorted_whole.extend([row] if row.dtype == matrix.dtype else [])
        return argsort(row, *arguments, **options)

    monkeypatch.setattr(np, "argsort", counted)
    evaluate_rank(matrix, *who)
    np.testing.assert_array_equal(sorted_whole, matrix[:3])
