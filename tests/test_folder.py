"""Datasets of one's own, `folder:PATH`: layouts, lists, and mistakes that are told with file and row."""

from __future__ import annotations

import csv
import importlib.util
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from csalr_plugin.commands import main
from csalr_plugin.demo_data import FOLDER
from csalr_plugin.errors import UserError
from csalr_plugin.hosts.folder import FolderData, file_stem, read_folder_data

HOSTS = ["torchreid"]
if importlib.util.find_spec("fastreid") is not None:
    HOSTS.append("fastreid")


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 16)).save(path)


def make(root: Path, *names: str) -> str:
    """Draw an image at each of `names` below `root`; return the name of the dataset."""
    for name in names:
        draw(root / name)
    return f"folder:{root}"


def listed(root: Path, rows: Sequence[Sequence[str]], header: str = "path,identity,camera,split") -> str:
    """Write a CSV list of `rows`; return the name of the dataset."""
    root.mkdir(exist_ok=True)
    with (root / "list.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return f"folder:{root / 'list.csv'}"


def found(data: FolderData, split: str) -> list[tuple[str, int, int]]:
    return [(Path(path).name, identity, camera) for path, identity, camera in data.items(split)]


def refusal(name: str) -> str:
    with pytest.raises(UserError) as error:
        data = read_folder_data(name)
        data.check(True, True, False, "csalr.shared_identities")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_an_identity_takes_any_file_name_and_any_word_for_an_identity(tmp_path: Path) -> None:
    names = ["train/7/a.jpg", "train/0010/b.png", "train/Zoë Müller/c d.jpg", "train/赵/深/1.jpg"]
    names += ["query/ben/1.jpg", "gallery/ben/2.jpg", "gallery/anna/1.jpg"]
    data = read_folder_data(make(tmp_path / "my data", *names))
    data.check(True, True, False, "csalr.shared_identities")
    # Numbers come first, as numbers, then words; gaps are closed.
    assert found(data, "train") == [("a.jpg", 0, 0), ("b.png", 1, 0), ("c d.jpg", 2, 0), ("1.jpg", 3, 0)]
    assert found(data, "query") == [("1.jpg", 1, 0)]
    assert found(data, "gallery") == [("1.jpg", 0, 1), ("2.jpg", 1, 2)]


def test_names_in_the_manner_of_market1501_give_identity_and_camera(tmp_path: Path) -> None:
    names = ["bounding_box_train/0002_c1s1_000451_03.jpg", "bounding_box_train/0010_c12s1_1_0.jpg"]
    names += ["query/anna_c1_x.jpg", "bounding_box_test/anna_c3_y.jpg", "bounding_box_test/-1_c1_y.jpg"]
    data = read_folder_data(make(tmp_path / "exp2_c1 [x]", *names))
    data.check(True, True, False, "csalr.shared_identities")
    assert [image.camera for image in data.images["train"]] == [1, 12]
    assert found(data, "query") == [("anna_c1_x.jpg", 0, 0)]
    assert found(data, "gallery") == [("anna_c3_y.jpg", 0, 1)]
    assert "images of identity -1 (unusable): 1" in data.report()


def test_an_identity_is_the_same_with_leading_zeros_and_in_every_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD"))
    names = ["query/7/1.jpg", f"query/{composed}/1.jpg", "gallery/0007/1.jpg", f"gallery/{decomposed}/1.jpg"]
    data = read_folder_data(make(tmp_path, *names))
    assert [item[1] for item in data.items("query")] == [item[1] for item in data.items("gallery")] == [0, 1]


def test_the_report_says_what_was_found_and_what_was_skipped_and_why(tmp_path: Path) -> None:
    name = make(tmp_path, "train/1/a.jpg", "train/1/b.jpg", "train/2/a.jpg", "train/lost.jpg", "train/3/.b.jpg")
    make(tmp_path, "train/.ipynb_checkpoints/a.jpg", "train/1/.ipynb_checkpoints/a.jpg")
    make(tmp_path, "query/8/a.jpg", "gallery/8/b.jpg", "gallery/9/a.jpg")
    (tmp_path / "train" / "1" / "notes.txt").touch()
    lines = read_folder_data(name).report().splitlines()
    assert lines[0].split()[1:] == ["images", "identities", "cameras", "skipped"]
    table = {line.split()[0]: line for line in lines[2:5]}
    assert table["train"].split()[1:5] == ["3", "2", "not", "known"]
    for reason in (
        "not images ('.txt'): 1",
        "hidden files: 1",
        "folders without images: 1",
        "of identities: 1",
        "hidden folders: 1",
    ):
        assert reason in table["train"]
    assert table["gallery"].split()[1:3] == ["2", "2"] and table["gallery"].endswith("none")
    assert lines[5:] == ["The cameras are not known: images of one identity count as images from different cameras."]


def test_a_missing_query_is_drawn_from_the_gallery_the_same_in_every_run_and_said(tmp_path: Path) -> None:
    names = [f"gallery/{person}/{number}.jpg" for person in range(6) for number in range(8)]
    name = make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", *names, "gallery/single/1.jpg")
    data = read_folder_data(name)
    data.check(True, True, False, "csalr.shared_identities")
    query, gallery = data.images["query"], data.images["gallery"]
    assert [image.identity for image in query] == list(range(6))
    assert len({Path(image.path).name for image in query}) > 1
    assert len(gallery) == 6 * 7 + 1 and not {image.path for image in query} & {image.path for image in gallery}
    assert read_folder_data(name).images == data.images
    assert (
        "one for each identity, with seed 0: 6. Identities without a query, because they have no second image: 1."
        in data.report()
    )
    make(tmp_path, "gallery/another/1.jpg", "gallery/another/2.jpg")
    assert read_folder_data(name).images["query"][:6] == query  # one more person changes no other person's query


def test_a_query_is_drawn_only_where_another_camera_has_a_match(tmp_path: Path) -> None:
    names = ["train/1_c1_a.jpg", "train/2_c1_a.jpg", "gallery/5_c1_a.jpg", "gallery/5_c1_b.jpg"]
    assert "no gallery identity has two images from different cameras" in refusal(make(tmp_path, *names))
    data = read_folder_data(make(tmp_path, "gallery/6_c1_a.jpg", "gallery/6_c2_a.jpg"))
    assert [image.identity for image in data.images["query"]] == [6]


@pytest.mark.parametrize("written", ["csv", "semicolons", "json"])
def test_a_list_gives_path_identity_camera_and_split(tmp_path: Path, written: str) -> None:
    names = ("sub/a b.jpg", "sub/ü.jpg", "q.jpg", "g.jpg")
    make(tmp_path, *names)
    rows = [("sub/a b.jpg", "7", "door", "train"), ("sub/ü.jpg", "anna", "hall", "Train")]
    rows += [("q.jpg", "9", "door", "query"), (str(tmp_path / "g.jpg"), "09", "hall", "gallery")]
    name = listed(tmp_path, rows)
    if written == "semicolons":  # as a spreadsheet writes it, with a byte order mark and an empty last line
        text = (tmp_path / "list.csv").read_text(encoding="utf-8").replace(",", ";")
        (tmp_path / "list.csv").write_text(f"{text}\n", encoding="utf-8-sig")
    if written == "json":
        entries = [dict(zip(("path", "identity", "camera", "split"), row, strict=True)) for row in rows]
        entries[0]["identity"] = 7
        (tmp_path / "list.json").write_text(json.dumps(entries))
        name = f"folder:{tmp_path / 'list.json'}"
    data = read_folder_data(name)
    data.check(True, True, False, "csalr.shared_identities")
    assert found(data, "train") == [("a b.jpg", 0, 0), ("ü.jpg", 1, 1)]
    assert found(data, "query") == [("q.jpg", 0, 0)] and found(data, "gallery") == [("g.jpg", 0, 1)]


ROWS = [("a.jpg", "1", "1", "train"), ("b.jpg", "2", "1", "train"), ("c.jpg", "3", "1", "query")]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (("missing.jpg", "3", "2", "gallery"), r"list.csv, row 5: image '.*missing.jpg' does not exist"),
        (("", "3", "2", "gallery"), "list.csv, row 5: path is empty"),
        (("d.jpg", " ", "2", "gallery"), "list.csv, row 5: identity is empty"),
        (("d.jpg", "3", "2", "galery"), "row 5: split is 'galery'; it must be one of train, query, gallery.*'gallery'"),
        (("d.jpg", "3", "gallery"), "list.csv, row 5: there are 3 values for 4 columns"),
        (("a.jpg", "3", "2", "gallery"), r"row 5: image '.*a.jpg' is already in row 2"),
        ((".", "3", "2", "gallery"), "row 5: image '.*' is not a file"),
    ],
)
def test_a_mistake_in_a_list_is_told_with_file_and_row(tmp_path: Path, row: tuple[str, ...], told: str) -> None:
    make(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    with pytest.raises(UserError, match=told) as error:
        read_folder_data(listed(tmp_path, [*ROWS, row]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("list.csv", b"path,camera,split\n", "row 1 has no column 'identity'"),
        ("list.csv", b"path,path,identity,split\n", "row 1 has more than one column 'path'"),
        ("list.csv", b"", "row 1 has no column 'path'"),
        ("list.csv", b"path,identity,split\n", "lists no images"),
        ("list.csv", b"path,identity,split\n\xff\xfe,1,train\n", "it is not UTF-8 text"),
        ("list.csv", b'path,identity,split\n"a"b,1,train\n', "row 2 cannot be read as CSV"),
        ("list.json", b"[", "cannot be read as JSON"),
        ("list.json", b"[" * 100_000, "cannot be read as JSON"),
        ("list.json", b"{}", "must be a JSON list of objects"),
        ("list.json", b"[1]", "entry 1: it must be an object"),
        ("list.json", b'[{"path": "a.jpg", "identity": 1.5, "split": "train"}]', "entry 1: identity must be text or"),
        ("list.json", b'[{"path": "a.jpg", "split": "train"}]', "entry 1: identity is empty"),
        ("list.txt", b"", "is neither a folder nor a .csv or .json list"),
    ],
)
def test_a_list_that_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    make(tmp_path, "a.jpg")
    (tmp_path / name).write_bytes(content)
    line = refusal(f"folder:{tmp_path / name}")
    assert told in line and name in line


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a/1.jpg"], "needs train/, query/ and gallery/, each with ID/anything.jpg or .*; .* has a."),
        (["train/1/a.jpg", "train/2_c1_a.jpg"], "train mixes two layouts"),
        (["train/person1.jpg"], r"image '.*person1.jpg': its name does not contain identity and camera"),
        (["train/1/a.jpg", "bounding_box_train/1/a.jpg"], "has both train/ and bounding_box_train/"),
        (["train/1/notes.txt"], "train has no images"),
        (["query/1/a.jpg", "gallery/1/b.jpg"], "has no training images"),
        (["train/1/a.jpg", "train/2/b.jpg"], "has no gallery images"),
        (["train/1/a.jpg", "query/2/a.jpg", "gallery/3/a.jpg"], "none of the 1 query identities is in the gallery"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path, names: list[str], told: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=told) as error:
        read_folder_data(f"folder:{tmp_path}").check(True, True, False, "csalr.shared_identities")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["folder:", "folder: ", "folder:/no/such/place", "folder:~nobody", "folder:" + 300 * "x"]
)
def test_a_path_that_does_not_exist_is_one_line(name: str) -> None:
    assert "dataset 'folder:" in refusal(name)


def test_an_identity_in_train_and_query_needs_a_word_of_its_own(tmp_path: Path) -> None:
    name = make(tmp_path, "train/1/a.jpg", "train/2/a.jpg", "query/2/b.jpg", "gallery/2/c.jpg")
    line = refusal(name)
    assert "identity '2' is in train" in line and "train/2/a.jpg" in line and "csalr.shared_identities True" in line
    data = read_folder_data(name)
    data.check(True, True, True, "csalr.shared_identities")  # with it
    data.check(False, True, False, "csalr.shared_identities")  # not trained on


def test_the_name_of_a_data_set_makes_a_file_name() -> None:
    assert file_stem("folder:/data/Zoë's crops") == "folder_data_Zoë_s_crops"
    assert file_stem("market1501") == "market1501"
    assert len(file_stem("folder:" + "x/" * 300)) == 97


def items_of(host: str, name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, Any, Any]]]:
    """Training images with labels as the loss sees them, query and gallery of a run."""
    if host == "torchreid":
        from csalr_plugin.hosts.torchreid.config import default_config
        from csalr_plugin.hosts.torchreid.datasets import build_datamanager

        config = default_config()
        config.merge_from_list(["data.root", str(root), "data.workers", 0, "train.batch_size", 4])
        config.merge_from_list(["data.sources", [name], "data.targets", [name]])
        manager = build_datamanager(config)
        subsets = manager.test_dataset[name]
        items = [manager.train_loader.dataset.train, subsets["query"], subsets["gallery"]]
    else:
        import csalr_plugin.hosts.fastreid as plugin

        # isort: split
        from fastreid.config import get_cfg

        monkeypatch.setenv("FASTREID_DATASETS", str(root / "market1501"))
        cfg = get_cfg()
        plugin.add_csalr_config(cfg)
        cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 4, "DATALOADER.NUM_WORKERS", 0])
        cfg.DATASETS.NAMES = cfg.DATASETS.TESTS = (name,)
        train = plugin.Trainer.build_train_loader(cfg).dataset
        loader, queries = plugin.Trainer.build_test_loader(cfg, name)
        test = loader.dataset.img_items
        items = [[(path, train.pid_dict[one], 0) for path, one, _ in train.img_items], test[:queries], test[queries:]]
    return [[(Path(item[0]).name, *item[1:3]) for item in subset] for subset in items]


def relaid(root: Path, folder: Path) -> str:
    """Copy the demo data to `folder` as ID/file.jpg, with a list that says the cameras; return the dataset's name."""
    rows = []
    for subset, split in (("bounding_box_train", "train"), ("query", "query"), ("bounding_box_test", "gallery")):
        for path in sorted((root / FOLDER / subset).iterdir(), reverse=True):
            identity, camera = path.name.split("_")[0], path.name.split("_c")[1][0]
            target = folder / split / identity / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
            rows.append((str(target.relative_to(folder)), identity, camera, split))
    return listed(folder, rows)


@pytest.mark.parametrize("host", HOSTS)
def test_images_relaid_by_identity_are_the_data_set_of_the_market1501_handler(
    host: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = {"torchreid": "market1501", "fastreid": "Market1501"}[host]
    theirs = items_of(host, handler, tiny_data, monkeypatch)
    with_cameras = items_of(host, relaid(tiny_data, tmp_path / "own"), tiny_data, monkeypatch)
    in_place = items_of(host, f"folder:{tiny_data / FOLDER}", tiny_data, monkeypatch)
    assert [[item[0] for item in subset] for subset in with_cameras] == [[item[0] for item in one] for one in theirs]
    assert with_cameras[0] == theirs[0] == in_place[0]  # the same images with the same labels in the same order
    for mine in (with_cameras, in_place):
        for subset in (1, 2):  # identities are numbered, cameras are the same
            labels = {(a[1], b[1]) for a, b in zip(mine[subset], theirs[subset], strict=True)}
            assert len(labels) == len({one for one, _ in labels}) == len({other for _, other in labels})
            assert [item[2] for item in mine[subset]] == [item[2] for item in theirs[subset]]


def test_csalr_train_evaluates_a_folder_without_cameras_and_writes_its_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["train/a/1.jpg", "train/b/1.jpg", "gallery/ü 1/1.jpg", "gallery/ü 1/2.jpg", "gallery/x/1.jpg"]
    name = make(tmp_path / "my data", *names)
    words = ["train", "-s", name, "-t", name, "--root", str(tmp_path / "nowhere"), "MODEL.NAME", "pcb"]
    words += ["test.evaluate", "True", "model.pretrained", "False", "data.height", "64", "data.width", "32"]
    assert main([*words, "data.workers", "0", "data.save_dir", str(tmp_path / "log")]) == 0
    said = capsys.readouterr().out
    assert said.count("The cameras are not known") == 1 and "There is no query split" in said
    results = json.loads((tmp_path / "log" / f"results_{file_stem(name)}.json").read_text())
    assert results["mAP"] > 0


def test_a_video_run_and_combined_splits_are_refused_for_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = make(tmp_path, "train/a/1.jpg")
    for overrides, told in ((["data.type", "video"], "data.type"), (["data.combineall", "True"], "data.combineall")):
        words = ["train", "-s", name, "-t", name, "data.save_dir", str(tmp_path / "log"), *overrides]
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line and "folder:" in line


def test_a_data_manager_made_in_code_takes_a_folder_and_prints_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torchreid

    names = ["train/a/1.jpg", "train/b/1.jpg", "query/x/1.jpg", "gallery/x/2.jpg"]
    name = make(tmp_path, *names)
    manager = torchreid.data.ImageDataManager(sources=name, batch_size_train=2, workers=0, use_gpu=False)
    assert next(iter(manager.train_loader))["img"].shape == (2, 3, 256, 128)
    assert "identities" in capsys.readouterr().out


@pytest.mark.skipif("fastreid" not in HOSTS, reason="fast-reid is not installed")
def test_fastreid_checks_a_folder_before_each_evaluation_and_logs_its_report_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import csalr_plugin.hosts.fastreid as plugin

    # isort: split
    from fastreid.config import get_cfg

    cfg = get_cfg()
    plugin.add_csalr_config(cfg)
    sound = make(tmp_path / "sound", "train/a/1.jpg", "query/x/1.jpg", "gallery/x/2.jpg")
    with caplog.at_level("INFO", logger="fastreid"):
        for _ in range(2):
            _, queries = plugin.Trainer.build_test_loader(cfg, sound)
    assert queries == 1 and caplog.text.count("identities") == 1
    one_camera = make(tmp_path / "one", "query/5_c1_a.jpg", "gallery/5_c1_b.jpg")
    with pytest.raises(UserError, match="all query and gallery images are from one camera"):
        plugin.Trainer.build_test_loader(cfg, one_camera)


def test_a_query_without_a_match_is_counted_in_the_report(tmp_path: Path) -> None:
    name = make(tmp_path, "query/x/1.jpg", "query/y/1.jpg", "gallery/x/2.jpg")
    assert "without a gallery image of their identity from another camera: 1." in read_folder_data(name).report()


def test_a_folder_and_a_data_set_of_the_host_are_trained_on_together(tiny_data: Path, tmp_path: Path) -> None:
    from csalr_plugin.hosts.torchreid.config import default_config
    from csalr_plugin.hosts.torchreid.datasets import build_datamanager

    own = make(tmp_path, "train/a/1.jpg", "train/b/1.jpg")
    config = default_config()
    config.merge_from_list(["data.root", str(tiny_data), "data.workers", 0, "train.batch_size", 4])
    config.merge_from_list(["data.sources", [own, "market1501"]])
    manager = build_datamanager(config)
    labels = {label: Path(path).parent.name for path, label, *_ in manager.train_loader.dataset.train}
    assert labels == {0: "a", 1: "b", **{label: "bounding_box_train" for label in range(2, 6)}}
