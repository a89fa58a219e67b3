"""Datasets of both hosts: file names, and mistakes that are told in one line before training."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from csalr_plugin.errors import UserError
from csalr_plugin.hosts.data import MARKET1501, check_evaluation, named_images
from csalr_plugin.hosts.torchreid import register
from csalr_plugin.hosts.torchreid.config import Config, default_config
from csalr_plugin.hosts.torchreid.datasets import build_datamanager

register()
HOSTS = ["torchreid"]
if importlib.util.find_spec("fastreid") is not None:
    HOSTS.append("fastreid")
FOLDER = Path("Market-1501-v15.09.15")
TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"
SOUND = {
    TRAIN: ["0002_c1s1_000451_03.jpg", "0002_c2s1_000451_03.jpg", "0007_c1s1_1_0.jpg", "0007_c2s1_1_0.jpg"],
    QUERY: ["0003_c1s1_000001_00.jpg", "0005_c2s1_000001_00.jpg"],
    GALLERY: ["0003_c2s1_000001_00.jpg", "0005_c1s1_000001_00.jpg", "0000_c1s1_1_0.jpg", "-1_c1s1_1_0.jpg"],
}


def make(root: Path, **changes: list[str]) -> Path:
    """Make a dataset in the layout of Market-1501 under `root`/market1501, with other names where `changes` says."""
    for subset, names in {**SOUND, **changes}.items():
        folder = root / "market1501" / FOLDER / subset
        folder.mkdir(parents=True)
        for name in names:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            if path.suffix.lower() in (".jpg", ".png"):
                Image.new("RGB", (8, 16)).save(path)
            else:
                path.write_text("no image")
    return root


def settings(root: Path, *overrides: Any) -> Config:
    config = default_config()
    config.merge_from_list(["data.root", str(root), "data.workers", 0, "train.batch_size", 2, *overrides])
    return config


def build(host: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any], list[Any]]:
    """Check the dataset as a run of `host` does before training; return its training, query and gallery images."""
    if host == "torchreid":
        manager = build_datamanager(settings(root))
        subsets = manager.test_dataset["market1501"]
        return manager.train_loader.dataset.train, subsets["query"], subsets["gallery"]
    import csalr_plugin.hosts.fastreid as plugin
    from csalr_plugin.hosts.fastreid.datasets import _read, check_data

    # isort: split
    from fastreid.config import get_cfg

    monkeypatch.setenv("FASTREID_DATASETS", str(root / "market1501"))
    cfg = get_cfg()
    plugin.add_csalr_config(cfg)
    check_data(cfg)
    return _read("Market1501", False)


def refusal(host: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    with pytest.raises(UserError) as error:
        build(host, root, monkeypatch)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("above", ["exp2_c1", "set[1]", "0001_c3 [ünïcode]"])
def test_names_are_judged_by_the_files_name_and_never_by_a_folders(
    host: str, above: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, query, gallery = build(host, make(tmp_path / above), monkeypatch)
    assert len({item[1] for item in train}) == 2 and len({item[2] for item in train}) == 2
    assert [item[1:3] for item in query] == [(3, 0), (5, 1)]
    assert [item[1:3] for item in gallery] == [(0, 0), (3, 1), (5, 0)]  # -1 marks an image as unusable


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("subset", "names", "told"),
    [
        (
            TRAIN,
            ["person1.jpg"],
            r"image '.*person1\.jpg': its name does not contain identity and camera; name it like 0002",
        ),
        (
            QUERY,
            ["1502_c1s1_1_0.jpg"],
            "1502_c1s1_1_0.jpg': its name contains identity 1502, and this dataset has 0 to 1501",
        ),
        (QUERY, ["person-0002_c1.jpg"], r"its name contains identity -2, and this dataset has 0 to 1501"),
        (GALLERY, ["0003_c7s1_1_0.jpg"], r"its name contains camera 7, and this dataset has 1 to 6"),
        (GALLERY, ["0003_c12s1_1_0.jpg"], r"its name contains camera 12, and this dataset has 1 to 6"),
        (
            TRAIN,
            ["notes.txt", "x.mat"],
            r"bounding_box_train' has 2 files and no image, such as 'notes\.txt'",
        ),
        (TRAIN, ["0002/1.jpg"], r"bounding_box_train' has images only in sub-folders, such as '0002/1\.jpg'"),
        (GALLERY, [], r"bounding_box_test' is empty"),
        (TRAIN, ["0002_c1_1.jpg", "0002_c2_1.jpg"], "all training images of .* are of one identity"),
        (TRAIN, ["-1_c1_1.jpg"], "has no training images"),
    ],
)
def test_each_mistake_in_a_data_set_has_a_line_of_its_own(
    host: str, subset: str, names: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refusal(host, make(tmp_path, **{subset: names}), monkeypatch)
    assert re.search(told, line), line


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("query", "told"),
    [
        (["0003_c2s1_1_0.jpg"], "no query has a gallery image of its identity from another camera"),
        (["0009_c1s1_1_0.jpg", "0011_c1s1_1_0.jpg"], "none of the 2 query identities is in the gallery"),
    ],
)
def test_a_query_without_a_match_in_the_gallery_is_found_before_training(
    host: str, query: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told in refusal(host, make(tmp_path, query=query), monkeypatch)


@pytest.mark.parametrize("host", HOSTS)
def test_a_single_camera_is_found_before_training(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, query=["0003_c1s1_1_0.jpg"], bounding_box_test=["0003_c1s1_2_0.jpg", "0005_c1s1_1_0.jpg"])
    assert "all query and gallery images are from one camera" in refusal(host, tmp_path, monkeypatch)


@pytest.mark.parametrize("host", HOSTS)
def test_png_and_upper_case_endings_are_images_and_hidden_files_are_not(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["0002_c1s1_1.png", "0007_c2s1_1.JPG", "._0002_c1s1_1.png", "Thumbs.db"]
    train, *_ = build(host, make(tmp_path, bounding_box_train=names), monkeypatch)
    assert [Path(item[0]).name for item in train] == names[:2]


def test_a_match_in_one_query_is_enough() -> None:
    gallery = [("a", 1, 0), ("b", 2, 0)]
    check_evaluation("mine", [("c", 1, 0), ("d", 2, 1)], gallery)
    with pytest.raises(UserError, match="dataset mine has no query images"):
        check_evaluation("mine", [], gallery)


def test_images_are_listed_by_identity_and_name_whatever_the_system_gives(tmp_path: Path) -> None:
    for name in ("0010_c1_b.jpg", "0009_c1_a.jpg", "0010_c1_a.jpg", "-1_c1_a.jpg"):
        (tmp_path / name).touch()
    assert [(Path(path).name, identity) for path, identity, _ in named_images(tmp_path, MARKET1501)] == [
        ("0009_c1_a.jpg", 9),
        ("0010_c1_a.jpg", 10),
        ("0010_c1_b.jpg", 10),
    ]


@pytest.mark.parametrize(
    ("sampler", "overrides", "told"),
    [
        ("RandomIdentitySampler", ("train.batch_size", 16), "16 with sampler.num_instances 4 .* of 2 identities"),
        ("RandomDomainSampler", ("sampler.num_cams", 4, "train.batch_size", 4), "sampler.num_cams 4 .* 2 cameras"),
        ("RandomDatasetSampler", ("sampler.num_datasets", 2), "sampler.num_datasets 2 .* 1 datasets"),
    ],
)
def test_a_samplers_mistake_is_not_told_as_the_data_sets(
    sampler: str, overrides: tuple[Any, ...], told: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=f"{sampler} cannot make batches of train.batch_size .*{told}") as error:
        build_datamanager(settings(tmp_path, "sampler.train_sampler", sampler, *overrides))
    assert "put the images" not in str(error.value)


def test_the_choice_of_data_sets_is_checked_by_itself(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=r"'data\.load_train_targets' is True, and 'market1501' is in both"):
        build_datamanager(settings(tmp_path, "data.load_train_targets", True))
    with pytest.raises(UserError, match=r"'data\.sources' has 'market1501' twice"):
        build_datamanager(settings(tmp_path, "data.sources", ["market1501", "market1501"]))


def msmt17(root: Path) -> Path:
    """A part of MSMT17, whose lists have identities 0 and 5."""
    place = root / "msmt17" / "MSMT17_V1"
    images = {"train": ["0000/0000_000_01_0.jpg 0", "0005/0005_000_02_0.jpg 5"], "val": [], "query": [], "gallery": []}
    images["query"], images["gallery"] = ["0007/0007_000_01_0.jpg 7"], ["0007/0007_000_02_0.jpg 7"]
    for split, lines in images.items():
        place.mkdir(parents=True, exist_ok=True)
        (place / f"list_{split}.txt").write_text("".join(f"{line}\n" for line in lines))
        for line in lines:
            path = place / ("train" if split == "train" else "test") / line.split()[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 16)).save(path)
    return root


def test_labels_with_gaps_are_numbered_from_0_and_two_sources_share_none(tmp_path: Path) -> None:
    make(msmt17(tmp_path))
    train = build_datamanager(settings(tmp_path, "data.sources", ["msmt17"])).train_loader.dataset.train
    assert sorted(item[1] for item in train) == [0, 1]
    both = build_datamanager(settings(tmp_path, "data.sources", ["msmt17", "market1501"]))
    labels: dict[int, set[str]] = {}
    for path, label, *_ in both.train_loader.dataset.train:
        labels.setdefault(label, set()).add(Path(path).name[:4])
    assert labels == {0: {"0000"}, 1: {"0005"}, 2: {"0002"}, 3: {"0007"}}
    assert both.num_train_pids == 4


def test_a_handler_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    make(msmt17(tmp_path))
    (tmp_path / "msmt17" / "MSMT17_V1" / "list_query.txt").write_text("no such form\n")
    with pytest.raises(UserError, match=r"dataset msmt17 cannot be read \(.*\); put the images where") as error:
        build_datamanager(settings(tmp_path, "data.sources", ["msmt17"]))
    assert "\n" not in str(error.value)
