"""Bad input to `csalr train` is one line and exit code 2, and no file is lost."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch

from csalr_plugin.commands import main
from csalr_plugin.errors import UserError
from csalr_plugin.models import build_model

FOLDER = Path("market1501/Market-1501-v15.09.15")


def arguments(data: Path, folder: Path, *overrides: Any) -> list[str]:
    fixed = ["--config-file", "configs/torchreid/pcb_384x128_sgd.yaml", "--root", str(data)]
    fixed += ["data.save_dir", str(folder), "data.workers", "0", "model.pretrained", "False", "data.height", "64"]
    fixed += ["data.width", "32", "train.batch_size", "8", "train.max_epoch", "1", "csalr.stages", "3"]
    return ["train", *fixed, *map(str, overrides)]


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line with which the command refuses `words`."""
    assert main(list(words)) == 2
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if line.strip() and not line.startswith("Checking images")]  # the progress bar
    assert len(lines) == 1, lines
    assert lines[0].startswith("csalr: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("MODEL.NAME", "pcb_csarl"), ("pcb_csarl", "'pcb_csalr'")),
        (("csalr.group", "2"), ("csalr.group", "'csalr.groups'")),
        (("train.max_epochs", "2"), ("train.max_epochs", "'train.max_epoch'")),
        (("csalr.groups", "3"), ("csalr.groups", "3", "1024")),
        (("csalr.landmarks", "12"), ("csalr.landmarks", "two positive integers")),
        (("csalr.landmarks", "0,8"), ("csalr.landmarks", "two positive integers")),
        (("csalr.stages", "0,1"), ("csalr.stages", "1 to 4")),
        (("csalr.stages", "2,2"), ("csalr.stages", "1 to 4")),
        (("-s", "market150"), ("market150", "'market1501'")),
        (("model.load_weights", "none.pth"), ("model.load_weights", "none.pth")),
        (("test.visrank", "True"), ("test.visrank", "test.evaluate True")),
        (("--config-file", "none.yaml"), ("none.yaml", "does not exist")),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it_and_the_allowed_values(
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: tuple[str, ...],
    expected: tuple[str, ...],
) -> None:
    line = refusal(capsys, *arguments(tiny_data, tmp_path / "log", *overrides))
    assert all(part in line for part in expected), line


def test_a_data_root_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, *arguments(tmp_path / "nowhere", tmp_path / "log"))
    assert "nowhere" in line and "market1501 with --root" in line


@pytest.mark.parametrize("subset", ["bounding_box_train", "query", "bounding_box_test"])
def test_an_empty_folder_of_the_dataset_is_named(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], subset: str
) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / FOLDER / subset)
    (tmp_path / "data" / FOLDER / subset).mkdir()
    line = refusal(capsys, *arguments(tmp_path / "data", tmp_path / "log"))
    assert subset in line


def test_a_dataset_that_is_missing_leaves_no_folder_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchreid

    def offline(url: str, path: str) -> None:
        raise URLError("no network")

    module = __import__("sys").modules[torchreid.data.datasets.dataset.__name__]
    monkeypatch.setattr(module, "download_url", offline)
    (tmp_path / "data").mkdir()
    line = refusal(capsys, *arguments(tmp_path / "data", tmp_path / "log"))
    assert "market1501" in line and "no network" in line
    assert not list((tmp_path / "data").iterdir())


def test_an_image_that_does_not_decode_is_named_before_training_starts(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    image = min((tmp_path / "data" / FOLDER / "bounding_box_train").glob("*.jpg"))
    image.write_bytes(image.read_bytes()[:200])
    line = refusal(capsys, *arguments(tmp_path / "data", tmp_path / "log"))
    assert image.name in line
    assert not (tmp_path / "log" / "model").exists()


def test_a_save_folder_that_cannot_be_written_is_named(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    line = refusal(capsys, *arguments(tiny_data, tmp_path / "file" / "log"))
    assert "data.save_dir" in line and str(tmp_path / "file" / "log") in line


@pytest.mark.parametrize("key", ["model.load_weights", "model.resume"])
def test_a_truncated_checkpoint_is_refused(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    path = tmp_path / "model.pth.tar-7"
    torch.save({"state_dict": {"weight": torch.zeros(5000)}, "epoch": 7}, path)
    path.write_bytes(path.read_bytes()[:9000])
    line = refusal(capsys, *arguments(tiny_data, tmp_path / "log", key, path))
    assert "truncated" in line and path.name in line


@pytest.mark.parametrize("key", ["model.load_weights", "model.resume"])
def test_a_checkpoint_of_another_architecture_is_refused_with_counts(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    path = tmp_path / "other.pth.tar-1"
    other = build_model("pcb_csa", 4, pretrained=False, stages=(3,))
    torch.save({"state_dict": dict(other.state_dict()), "epoch": 1}, path)  # it records no network settings
    line = refusal(capsys, *arguments(tiny_data, tmp_path / "log", key, path))
    assert re.search(r"\d+ (of the model's \d+ )?tensors", line) and "attention.stage3." in line


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network and nothing downloaded before."""
    import gdown

    def fail(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(gdown, "download", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))


@pytest.mark.parametrize("name", ["resnet50", "osnet_x0_25"])
def test_weights_of_a_model_of_the_hosts_that_cannot_be_downloaded_are_one_line(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], offline: None, name: str
) -> None:
    line = refusal(capsys, *arguments(tiny_data, tmp_path / "log", "model.pretrained", "True", "model.name", name))
    assert repr(name) in line and "no network" in line and "model.pretrained False" in line


@pytest.mark.parametrize("key", ["load_weights", "resume"])
@pytest.mark.parametrize("name", ["osnet_x0_25", "pcb"])
def test_nothing_is_downloaded_where_a_checkpoint_is_loaded_anyway(offline: None, key: str, name: str) -> None:
    from csalr_plugin.hosts.torchreid.config import default_config, set_active_config
    from csalr_plugin.hosts.torchreid.train import build_model as build_host_model

    config = default_config()
    set_active_config(config)
    with pytest.raises(UserError, match="no network"):
        build_host_model(name, 4)
    config.model[key] = "model.pth.tar-1"
    build_host_model(name, 4)


def test_compiling_for_several_gpus_is_refused(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from csalr_plugin.hosts.torchreid.config import default_config
    from csalr_plugin.hosts.torchreid.train import prepare

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = default_config()
    config.merge_from_list(["data.root", str(tiny_data), "data.save_dir", str(tmp_path), "csalr.compile", True])
    with pytest.raises(UserError, match=r"csalr\.compile True is for one GPU a process, and there are 2"):
        prepare(config)
    config.use_gpu = False
    prepare(config)


@pytest.mark.parametrize(("gpus", "batch", "refused"), [(4, 5, True), (4, 4, True), (4, 8, False), (4, 6, False)])
def test_a_batch_that_leaves_a_gpu_a_single_image_is_refused(
    gpus: int, batch: int, refused: bool, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from csalr_plugin.hosts.torchreid.config import default_config
    from csalr_plugin.hosts.torchreid.train import prepare

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = default_config()
    config.merge_from_list(["data.root", str(tiny_data), "data.save_dir", str(tmp_path), "train.batch_size", batch])
    # DataParallel splits a batch as torch.chunk does.
    assert refused == any(len(chunk) == 1 for chunk in torch.arange(batch).chunk(gpus))
    if not refused:
        prepare(config)
        return
    with pytest.raises(UserError, match=r"one of 4 GPUs gets a single image.*give 8 or more"):
        prepare(config)


def test_weights_that_cannot_be_downloaded_say_where_to_put_them_and_which_key_takes_a_path(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], offline: None
) -> None:
    line = refusal(capsys, *arguments(tiny_data, tmp_path / "log", "model.pretrained", "True"))
    assert "csalr.pretrained_weights" in line and str(tmp_path / "hub") in line


def test_an_earlier_runs_checkpoint_is_overwritten_only_when_told_to(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "log" / "model" / "model.pth.tar-1"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"trained for a week")
    line = refusal(capsys, *arguments(tiny_data, tmp_path / "log"))
    assert "csalr.overwrite True" in line and "model.pth.tar-1" in line
    assert earlier.read_bytes() == b"trained for a week"
    assert main(arguments(tiny_data, tmp_path / "log", "csalr.overwrite", "True")) == 0
    assert earlier.stat().st_size > 1e6


def test_the_paper_s_configs_hold_the_papers_settings() -> None:
    from csalr_plugin.hosts.torchreid.config import default_config

    for head in ("pcb", "pcb_rpp"):
        config = default_config()
        config.merge_from_file(f"configs/torchreid/{head}_384x128_sgd.yaml")
        config.validate()
        assert (config.data.height, config.data.width, config.data.transforms) == (384, 128, ["random_flip"])
        train = config.train
        assert (train.optim, train.lr, train.weight_decay, config.sgd.momentum) == ("sgd", 0.1, 1e-4, 0.9)
        assert (train.batch_size, train.max_epoch, train.stepsize, train.gamma) == (64, 100, [40], 0.1)
        assert train.staged_lr and train.base_lr_mult == 0.1
        assert not config.loss.softmax.label_smooth and not config.test.rerank
        assert (config.csalr.landmarks, config.csalr.groups, config.csalr.stages) == ((12, 8), 2, (1, 2, 3))
        assert config.csalr.supervision_weight == 1.0
        assert config.csalr.rpp.pcb_epochs == 40


def test_a_gpu_is_used_only_where_torch_sees_one(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from csalr_plugin.hosts.torchreid.config import default_config
    from csalr_plugin.hosts.torchreid.train import prepare

    for seen, asked, used in ((False, True, False), (True, True, True), (True, False, False)):
        config = default_config()
        config.merge_from_list(["data.root", str(tiny_data), "data.save_dir", str(tmp_path), "use_gpu", asked])
        monkeypatch.setattr(torch.cuda, "is_available", lambda seen=seen: seen)
        prepare(config)
        assert config.use_gpu is used
