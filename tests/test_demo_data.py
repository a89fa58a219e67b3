from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from csalr_plugin import demo_data
from csalr_plugin.demo_data import FOLDER, GALLERY, MANIFEST, QUERY, TRAIN, make_demo_data
from csalr_plugin.errors import UserError

TINY: dict[str, int] = {
    "seed": 3,
    "train_identities": 2,
    "test_identities": 2,
    "train_images": 2,
    "gallery_images": 2,
    "distractors": 3,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_data(tmp_path_factory.mktemp("made"), **TINY)


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the files empty, for tests of files alone."""
    monkeypatch.setattr(demo_data, "_render", lambda *_: b"")


def default_settings() -> dict[str, int]:
    return dict(make_demo_data.__kwdefaults__ or {})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def people(root: Path, split: str) -> list[tuple[int, int]]:
    """Return the (identity, camera) of every image, read from its name as the host does."""
    found = (re.search(r"([-\d]+)_c(\d)", path.name) for path in (root / FOLDER / split).glob("*.jpg"))
    return [(int(match[1]), int(match[2])) for match in found if match]


def identities(pairs: Iterable[tuple[int, int]]) -> set[int]:
    return {identity for identity, _ in pairs}


def test_the_same_settings_give_the_same_bytes_in_another_process(root: Path, tmp_path: Path) -> None:
    # An empty stand-in for the package, whose own import of torch takes seconds.
    code = f"""
import sys, types
sys.modules["csalr_plugin"] = types.ModuleType("csalr_plugin")
sys.modules["csalr_plugin"].__path__ = [{str(Path(demo_data.__file__).parent)!r}]
from csalr_plugin.demo_data import make_demo_data
make_demo_data({str(tmp_path)!r}, **{TINY})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert contents(tmp_path) == contents(root)


def test_a_picture_depends_on_no_other_picture_and_no_global_state(root: Path) -> None:
    demo_data._scene.cache_clear()
    for shot in reversed(demo_data._plan(TINY)):
        np.random.seed(shot.number)
        assert demo_data._render(TINY["seed"], shot) == (root / FOLDER / shot.split / shot.name).read_bytes()


def test_another_seed_gives_other_pictures(root: Path, tmp_path: Path) -> None:
    other = contents(make_demo_data(tmp_path, **{**TINY, "seed": 4}))
    assert not set(other.values()) & set(contents(root).values())


def test_the_settings_determine_the_number_of_people_and_images(root: Path) -> None:
    train, query, gallery = (people(root, split) for split in (TRAIN, QUERY, GALLERY))
    assert (len(train), len(query), len(gallery)) == (2 * 2, 2 * 2, 2 * 2 + 3)
    assert sorted(identities(train)) == [1, 2]
    assert sorted(identities(query)) == [3, 4]
    assert sorted(identities(gallery)) == [0, 3, 4]


def test_images_are_of_the_stated_size(root: Path) -> None:
    for path in (root / FOLDER).rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == (
                "JPEG",
                "RGB",
                (demo_data.WIDTH, demo_data.HEIGHT),
            )


def test_train_and_test_identities_are_disjoint_at_the_default_settings() -> None:
    shots = demo_data._plan(default_settings())
    train = {shot.identity for shot in shots if shot.split == TRAIN}
    test = {shot.identity for shot in shots if shot.split != TRAIN}
    assert not train & test
    assert len(train) == 60
    assert len(test - {0}) == 40


def test_no_two_images_have_one_name() -> None:
    shots = demo_data._plan(default_settings())
    assert len({(shot.split, shot.name) for shot in shots}) == len(shots)


@pytest.mark.parametrize("gallery_images", [2, 3, 6])
def test_every_query_has_a_match_in_another_camera(gallery_images: int) -> None:
    shots = demo_data._plan({**default_settings(), "gallery_images": gallery_images})
    gallery = {(shot.identity, shot.camera) for shot in shots if shot.split == GALLERY}
    for query in (shot for shot in shots if shot.split == QUERY):
        assert any(identity == query.identity and camera != query.camera for identity, camera in gallery)


def test_each_training_identity_is_seen_by_four_cameras_or_more() -> None:
    seen: dict[int, set[int]] = {}
    for shot in demo_data._plan(default_settings()):
        if shot.split == TRAIN:
            seen.setdefault(shot.identity, set()).add(shot.camera)
    assert min(map(len, seen.values())) >= 4


def test_members_of_a_family_share_colours_and_differ_in_pattern() -> None:
    family = [demo_data._Person(0, identity) for identity in range(4, 8)]
    assert len({(person.upper, person.lower) for person in family}) == 1
    assert len({person.pattern for person in family}) == 4


def test_the_market1501_handler_of_torchreid_reads_the_data(root: Path) -> None:
    torchreid: Any = pytest.importorskip("torchreid")
    manager = torchreid.data.ImageDataManager(
        root=str(root),
        sources="market1501",
        height=128,
        width=64,
        batch_size_train=4,
        batch_size_test=4,
        workers=0,
        use_gpu=False,
    )
    assert (manager.num_train_pids, len(manager.train_loader.dataset)) == (2, 4)
    loaders = manager.test_loader["market1501"]
    assert (len(loaders["query"].dataset), len(loaders["gallery"].dataset)) == (4, 7)
    assert next(iter(manager.train_loader))["img"].shape == (4, 3, 128, 64)


def test_a_second_call_changes_nothing_and_draws_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    monkeypatch.setattr(demo_data, "_render", lambda *_: pytest.fail("an image was drawn again"))
    assert make_demo_data(str(root), **TINY) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.usefixtures("blank")
def test_files_that_others_put_beside_a_finished_set_do_not_matter(tmp_path: Path) -> None:
    make_demo_data(tmp_path, **TINY)
    (tmp_path / "log").mkdir()
    assert make_demo_data(tmp_path, **TINY) == tmp_path


@pytest.mark.parametrize("name", ["photo.jpg", "market1501/Market-1501-v15.09.15/query/0002_c1s1_000451_03.jpg"])
def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(UserError, match="holds something else"):
        make_demo_data(tmp_path, **TINY)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"mine")
    with pytest.raises(UserError, match="is a file"):
        make_demo_data(tmp_path / "taken", **TINY)


def test_a_set_of_other_settings_or_of_another_version_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(root)
    with pytest.raises(UserError, match=r"'seed': 3.*'seed': 9.*another folder"):
        make_demo_data(root, **{**TINY, "seed": 9})
    monkeypatch.setattr(demo_data, "VERSION", demo_data.VERSION + 1)
    with pytest.raises(UserError, match="version"):
        make_demo_data(root, **TINY)
    assert contents(root) == before


@pytest.mark.usefixtures("blank")
def test_a_set_that_lost_an_image_is_refused(tmp_path: Path) -> None:
    make_demo_data(tmp_path, **TINY)
    next((tmp_path / FOLDER / QUERY).iterdir()).unlink()
    with pytest.raises(UserError, match="14 of its 15 images"):
        make_demo_data(tmp_path, **TINY)


def test_an_interrupted_build_leaves_no_half_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seed: int, shot: demo_data._Shot, cast: float) -> bytes:
        if shot.split == GALLERY:
            raise KeyboardInterrupt
        return b""

    monkeypatch.setattr(demo_data, "_render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_demo_data(tmp_path, **TINY)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(demo_data, "_render", lambda *_: b"")
    assert (make_demo_data(tmp_path, **TINY) / FOLDER.parent / MANIFEST).is_file()


@pytest.mark.usefixtures("blank")
def test_leftovers_of_a_killed_build_are_ignored(tmp_path: Path) -> None:
    (tmp_path / ".demo-data-killed" / FOLDER / TRAIN).mkdir(parents=True)
    make_demo_data(tmp_path, **TINY)
    assert len(people(tmp_path, TRAIN)) == 4


def test_the_second_of_two_simultaneous_builds_uses_the_data_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(seed: int, shot: demo_data._Shot, cast: float) -> bytes:
        monkeypatch.setattr(demo_data, "_render", lambda *_: b"")
        make_demo_data(tmp_path, **TINY)
        return b"of the second"

    monkeypatch.setattr(demo_data, "_render", overtaken)
    make_demo_data(tmp_path, **TINY)
    assert len(contents(tmp_path)) == 15 + 1
    assert b"of the second" not in contents(tmp_path).values()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed is -1; give 0 or more"),
        ({"train_identities": 1}, "train_identities is 1; give 2 or more"),
        ({"gallery_images": 1}, "gallery_images is 1; give 2 or more"),
        ({"train_identities": 1500, "test_identities": 2}, "1500 \\+ 2 identities; give 1501 or fewer"),
    ],
)
def test_a_setting_out_of_range_is_one_line_with_the_allowed_values(
    tmp_path: Path, change: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_demo_data(tmp_path, **{**TINY, **change})
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == {}
