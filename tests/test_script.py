"""`csalr run`: an unmodified script of the host with the plugin loaded."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchreid
from PIL import Image

from csalr_plugin.commands import main
from csalr_plugin.errors import UserError
from csalr_plugin.hosts.script import find_host
from csalr_plugin.hosts.torchreid.config import active_config, default_config
from csalr_plugin.hosts.torchreid.script import run_script
from csalr_plugin.hosts.torchreid.train import check_isfile

# A train script of the shape of the host's: greedy flags, its settings in a module beside it, imports by
# the repository's module paths, a log opened before anything is checked.
SCRIPT = """
import argparse, sys
import torchreid
from torchreid.utils import Logger, check_isfile, load_pretrained_weights, resume_from_checkpoint, set_random_seed
from default_config import engine_settings, get_default_config, image_settings

parser = argparse.ArgumentParser()
parser.add_argument("--config-file", default="")
parser.add_argument("-s", "--sources", nargs="+")
parser.add_argument("-t", "--targets", nargs="+")
parser.add_argument("--transforms", nargs="+")
parser.add_argument("--root", default="")
parser.add_argument("opts", nargs=argparse.REMAINDER)

if __name__ == "__main__":
    args = parser.parse_args()
    cfg = get_default_config()
    cfg.use_gpu = False
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    for name in ("root", "sources", "targets", "transforms"):
        if getattr(args, name):
            cfg.data[name] = getattr(args, name)
    cfg.merge_from_list(args.opts)
    set_random_seed(cfg.train.seed)
    sys.stdout = Logger(cfg.data.save_dir + "/script.log")
    print("groups", cfg.csalr.groups, "sources", cfg.data.sources)
    manager = torchreid.data.ImageDataManager(**image_settings(cfg))
    model = torchreid.models.build_model(
        cfg.model.name, manager.num_train_pids, loss=cfg.loss.name, pretrained=cfg.model.pretrained, use_gpu=False
    )
    if cfg.model.load_weights and check_isfile(cfg.model.load_weights):
        load_pretrained_weights(model, cfg.model.load_weights)
    optimizer = torchreid.optim.build_optimizer(model, optim="sgd", lr=cfg.train.lr)
    scheduler = torchreid.optim.build_lr_scheduler(optimizer, stepsize=20)
    if cfg.model.resume and check_isfile(cfg.model.resume):
        cfg.train.start_epoch = resume_from_checkpoint(cfg.model.resume, model, optimizer, scheduler)
    engine = torchreid.engine.ImageSoftmaxEngine(
        manager, model, optimizer, scheduler=scheduler, use_gpu=False, label_smooth=False
    )
    engine.run(**engine_settings(cfg))
"""

SETTINGS = """
from yacs.config import CfgNode

DEFAULTS = {defaults}
IMAGE = {image}
RUN = {run}


def get_default_config():
    return CfgNode(DEFAULTS)


def _read(cfg, key):
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def image_settings(cfg):
    return {{name: _read(cfg, key) for name, key in IMAGE.items()}}


def engine_settings(cfg):
    return {{name: _read(cfg, key) for name, key in RUN.items()}}
"""

SMALL = {
    "model.name": "osnet_x0_25",
    "model.pretrained": "False",
    "data.height": "64",
    "data.width": "32",
    "data.workers": "0",
    "train.batch_size": "4",
    "train.max_epoch": "1",
}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from csalr_plugin.hosts.torchreid.config import ENGINE_RUN, HOST_DEFAULTS, IMAGE_DATA

    defaults = {name: value for name, value in HOST_DEFAULTS.items() if name != "use_gpu"}
    folder = tmp_path_factory.mktemp("repository") / "scripts"
    folder.mkdir()
    (folder / "main.py").write_text(SCRIPT)
    (folder / "default_config.py").write_text(SETTINGS.format(defaults=defaults, image=IMAGE_DATA, run=ENGINE_RUN))
    return folder / "main.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in the layout of Market-1501: four training identities, three query identities, two cameras."""
    root = tmp_path_factory.mktemp("data")
    home = root / "market1501" / "Market-1501-v15.09.15"
    rng = np.random.default_rng(0)
    for subset, identities, cameras in (
        ("bounding_box_train", range(1, 5), (1, 2)),
        ("query", range(11, 14), (1,)),
        ("bounding_box_test", range(11, 14), (1, 2)),
    ):
        (home / subset).mkdir(parents=True)
        for identity in identities:
            for camera in cameras:
                image = Image.fromarray(rng.integers(0, 255, (64, 32, 3), dtype=np.uint8))
                image.save(home / subset / f"{identity:04d}_c{camera}s1_000001_01.jpg")
    return root


@pytest.fixture
def arguments(data: Path, tmp_path: Path) -> list[str]:
    settings = {"data.save_dir": str(tmp_path / "log"), **SMALL}
    overrides = [word for pair in settings.items() for word in pair]
    return ["-s", "market1501", "-t", "market1501", "--root", str(data), *overrides]


def patched() -> list[object]:
    return [
        torchreid.engine.ImageSoftmaxEngine,
        torchreid.engine.VideoTripletEngine,
        torchreid.data.ImageDataManager,
        torchreid.models.build_model,
        torchreid.optim.build_optimizer,
        *(getattr(torchreid.utils, name) for name in ("set_random_seed", "check_isfile", "load_pretrained_weights")),
    ]


def test_the_hosts_script_trains_resumes_and_evaluates_and_leaves_no_trace(
    script: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sys.argv, sys.path[:], sys.stdout, patched(), sys.modules.get("default_config")
    # Overrides right after -t, in capitals: the script's own parser would take them for datasets.
    swallowed = ["-s", "market1501", "CSALR.GROUPS", "4", "Train.LR", "0.01", *arguments]
    run_script(script, swallowed)
    out = capsys.readouterr().out
    assert "groups 4 sources ['market1501']" in out
    assert "groups 4" in (tmp_path / "log" / "script.log").read_text()
    checkpoint = tmp_path / "log" / "model" / "model.pth.tar-1"
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1

    # The rate is given now, the groups are not: they go on from the checkpoint.
    resume = ["model.resume", str(checkpoint), "train.max_epoch", "2", "train.lr", "0.02"]
    run_script(script, [*arguments, *resume])
    out = capsys.readouterr().out
    assert "train.lr 0.02: given now; 0.01 in the checkpoint" in out
    assert "csalr.groups 4: from the checkpoint" in out and "groups 4" in out
    assert (tmp_path / "log" / "model" / "model.pth.tar-2").is_file()
    run_script(script, [*arguments, "model.load_weights", str(checkpoint), "test.evaluate", "True"])
    assert "mAP" in capsys.readouterr().out

    assert before == (sys.argv, sys.path, sys.stdout, patched(), sys.modules.get("default_config"))
    assert active_config() == default_config()
    print("the console is still open")


def test_a_folder_of_images_is_a_data_set_of_the_hosts_script(
    script: Path, arguments: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"folder:{data / 'market1501' / 'Market-1501-v15.09.15'}"
    run_script(script, ["-s", name, "-t", name, *arguments[6:], "data.root", "nowhere", "test.evaluate", "True"])
    out = capsys.readouterr().out
    assert out.count("identities") == 1 and f"##### Evaluating {name} (source) #####" in out
    assert len(list((tmp_path / "log").glob("results_folder_*.json"))) == 1


def test_a_model_of_the_plugin_trains_through_the_hosts_script(
    script: Path, arguments: list[str], tmp_path: Path
) -> None:
    more = ["Model.Name", "pcb_csalr", "csalr.stages", "1", "csalr.landmarks", "4,2", "data.height", "96"]
    assert main(["run", str(script), *arguments, *more]) == 0
    state = torch.load(tmp_path / "log" / "model" / "model.pth.tar-1", weights_only=True)["state_dict"]
    assert len([name for name in state if name.endswith("alpha")]) == 1


@pytest.mark.parametrize("command", ["train", "run"])
def test_a_model_of_the_host_with_two_outputs_trains_through_both_commands(
    command: str, script: Path, arguments: list[str], tmp_path: Path
) -> None:
    more = ["model.name", "hacnn", "data.height", "160", "data.width", "64", "use_gpu", "False"]
    if command == "train":
        more += ["loss.name", "triplet", "sampler.num_instances", "2", "loss.triplet.weight_x", "1"]
    words = [str(script)] if command == "run" else []
    assert main([command, *words, *arguments, *more]) == 0
    assert (tmp_path / "log" / "model" / "model.pth.tar-1").is_file()


def test_the_log_of_the_hosts_script_can_fail_without_ending_the_run(
    script: Path,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "log" / "script.log").mkdir(parents=True)
    assert main(["run", str(script), *arguments]) == 0
    captured = capsys.readouterr()
    assert "Warning: the log file" in captured.err and "** Results **" in captured.out
    assert (tmp_path / "log" / "model" / "model.pth.tar-1").is_file()


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["csalr.group", "2"], "'csalr.groups'"),
        (["csalr.groups", "3"], "does not divide the 256 channels"),
        (["model.name", "pcb_cslar"], "'pcb_csalr'"),
        (["train.lr"], "'train.lr' has no value"),
        (["--root", "/no/such/folder"], "/no/such/folder"),
        (["model.load_weights", "/no/such/file.pth"], "/no/such/file.pth"),
        (["-s", "market1510"], "'market1501'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_before_anything_is_written(
    script: Path,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    complaint: str,
) -> None:
    assert main(["run", str(script), *arguments, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("csalr: error: ") and error.count("\n") == 1
    assert complaint in error
    assert not list(tmp_path.rglob("script.log"))


def test_weights_that_cannot_be_downloaded_are_one_line_too(
    script: Path,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    assert main(["run", str(script), *arguments, "model.name", "resnet50", "model.pretrained", "True"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("csalr: error: ImageNet weights of 'resnet50' cannot be downloaded (no network)")


def test_an_earlier_runs_checkpoints_are_not_overwritten(
    script: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "log" / "model" / "model.pth.tar-7"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"precious")
    assert main(["run", str(script), *arguments]) == 2
    assert "csalr.overwrite" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["model"]
    assert checkpoint.read_bytes() == b"precious"


def test_an_image_that_does_not_decode_is_named_before_training(
    script: Path, arguments: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "data"
    for file in data.rglob("*.jpg"):
        target = copied / file.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    target.write_bytes(b"no image")
    assert main(["run", str(script), *arguments, "data.root", str(copied)]) == 2
    captured = capsys.readouterr()
    assert str(target) in captured.err.splitlines()[-1]
    assert "Start training" not in captured.out


def test_a_script_without_settings_gets_its_words_unchanged_and_the_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "neighbour.py").write_text("NAME = 'neighbour'\n")
    path = tmp_path / "own.py"
    path.write_text(
        "import sys, torchreid, neighbour\nfrom torchreid.utils import Logger\n"
        "print(__name__, sys.argv[1:], neighbour.NAME, 'pcb_csa' in vars(torchreid.models)['__model_factory'])\n"
        "sys.exit(3)\n"
    )
    engine = torchreid.engine.ImageSoftmaxEngine
    with pytest.raises(SystemExit) as exit_:
        run_script(path, ["-s", "a", "Model.Name", "x", "--own-flag"])
    assert exit_.value.code == 3
    assert capsys.readouterr().out == "__main__ ['-s', 'a', 'Model.Name', 'x', '--own-flag'] neighbour True\n"
    assert torchreid.engine.ImageSoftmaxEngine is engine


def test_flags_that_the_host_does_not_have_reach_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "default_config.py").write_text("")
    (tmp_path / "main.py").write_text("import sys; print(sys.argv[1:])")
    run_script(tmp_path / "main.py", ["--gpu-devices", "0", "-s", "a", "model.name", "x"])
    assert capsys.readouterr().out == "['--gpu-devices', '0', '-s', 'a', 'model.name', 'x']\n"


def test_a_missing_script_or_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.py"):
        run_script(tmp_path / "nothing.py", [])
    with pytest.raises(UserError, match=r"nothing\.pth"):
        check_isfile(str(tmp_path / "nothing.pth"))
    assert check_isfile(__file__) is True


@pytest.mark.parametrize(
    ("installed", "beside", "wanted"),
    [(True, True, "the script's repository"), (False, True, "the script's repository"), (True, False, "the installed")],
)
def test_the_host_in_the_repository_of_the_script_comes_before_the_installed_one_and_is_named(
    installed: bool,
    beside: bool,
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder, present in (("site", installed), ("checkout", beside)):
        (tmp_path / folder / "reid_host").mkdir(parents=True)
        if present:
            (tmp_path / folder / "reid_host" / "__init__.py").write_text(f"where = {folder!r}")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    find_host("reid_host", tmp_path / "checkout" / "tools" / "train_net.py")
    try:
        host = importlib.import_module("reid_host")
        assert host.where == ("checkout" if beside else "site")
        assert f"csalr run: reid_host is {wanted}" in capsys.readouterr().out
        (tmp_path / "other" / "reid_host").mkdir(parents=True)
        (tmp_path / "other" / "reid_host" / "__init__.py").touch()
        find_host("reid_host", tmp_path / "other" / "tools" / "train_net.py")
        assert importlib.import_module("reid_host") is host  # which was imported already
    finally:
        sys.modules.pop("reid_host", None)


@pytest.mark.skipif("TORCHREID_REPO" not in os.environ, reason="TORCHREID_REPO names no checkout of torchreid")
@pytest.mark.parametrize("layout", ["package", "repository"])
def test_the_real_script_trains_under_both_layouts(layout: str, arguments: list[str], tmp_path: Path) -> None:
    repository = Path(os.environ["TORCHREID_REPO"])
    own = Path(__file__).resolve().parent.parent
    paths = [str(own)] + [str(repository)] * (layout == "repository")
    done = subprocess.run(
        [sys.executable, "-m", "csalr_plugin", "run", str(repository / "scripts" / "main.py"), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log" / "model" / "model.pth.tar-1").is_file()


@pytest.fixture
def empty_script(tmp_path: Path) -> str:
    """An empty script."""
    (tmp_path / "x.py").touch()
    return str(tmp_path / "x.py")


def test_an_error_in_a_worker_of_the_loader_is_one_line(
    empty_script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        try:
            raise UserError("image 'a.jpg' cannot be read.")
        except UserError:
            torch._utils.ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    monkeypatch.setattr("csalr_plugin.hosts.torchreid.script.run_script", fail)
    assert main(["run", empty_script]) == 2
    assert capsys.readouterr().err == "csalr: error: image 'a.jpg' cannot be read.\n"


def test_the_hosts_script_under_torchrun_is_refused_in_one_line(
    empty_script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("csalr_plugin.command_line.time.sleep", lambda _: None)
    assert main(["run", empty_script]) == 2
    assert capsys.readouterr().err == ""  # the first process tells it
    monkeypatch.setenv("RANK", "0")
    assert main(["run", empty_script]) == 2
    assert "torchrun started 2" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_exit_code_130(
    empty_script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("csalr_plugin.hosts.torchreid.script.run_script", stop)
    assert main(["run", empty_script]) == 130
    assert capsys.readouterr().err == "csalr: interrupted\n"


@pytest.mark.parametrize("command", ["", "train", "run", "models", "demo"])
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main([*command.split(), "--help"]) == 0
    except SystemExit as exit_:
        assert exit_.code == 0
    assert "example:\n  csalr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "a command is missing"),
        (["trian"], "Did you mean 'train'?"),
        (["run"], "the path of a script is missing"),
        (["models", "--height", "0"], "--height: '0' must be an integer from 16 to 4096"),
        (["demo"], "--out"),
        (["train", "modle.name", "pcb"], "'model.name'"),
        (["train", "--host", "mmreid"], "--host 'mmreid' is not known; it must be one of torchreid, fastreid"),
    ],
)
def test_a_wrong_command_line_is_one_line(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("csalr: error: ") and error.count("\n") == 1
    assert complaint in error
