"""`csalr export`: files equal the network for any batch, describe and check their input, or are not written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn.functional import one_hot

from csalr_plugin import export as export_module
from csalr_plugin.attention.numerics import inverse_by_products, raise_diagonal
from csalr_plugin.commands import main
from csalr_plugin.errors import UserError
from csalr_plugin.export import FORMATS, Interface, export
from csalr_plugin.hosts.trained import load_trained
from csalr_plugin.models import PCB, build_model
from csalr_plugin.version import __version__

SIZE = (128, 64)  # 8 rows at the end, which the six stripes do not divide
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GROUPS = 4
METADATA = {
    "model": "pcb_csalr",
    "input": "images",
    "output": "output",
    "height": "128",
    "width": "64",
    "batch": "dynamic",
    "channels": "RGB",
    "pixels": "normalised",
    "input_type": "float32",
    "mean": json.dumps(MEAN),
    "std": json.dumps(STD),
    "embedding": "12288",
    "precision": "fp32",
    "csalr_plugin": __version__,
    "framework": "torchreid",
    "weights_sha256": "",
}
RECORDED = {"csalr.groups": GROUPS, "data.height": SIZE[0], "data.width": SIZE[1]}

pytestmark = pytest.mark.on_cpu


def trained_network(name: str, **options: Any) -> PCB:
    """A network in eval mode with open gates, running statistics of its own, and logits scaled by 10."""
    torch.manual_seed(0)
    model = build_model(name, 3, pretrained=False, **options).eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            if not module.weight.any():  # of a residual branch
                nn.init.constant_(module.weight, 0.2)
    for block in model.attention.values():
        nn.init.constant_(block.alpha, 0.3)  # type: ignore[arg-type]
        with torch.no_grad():
            block.query.weight.mul_(10)  # type: ignore[operator, union-attr]
    return model


def random_bytes(count: int) -> Tensor:
    return torch.randint(256, (count, 3, *SIZE), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (MEAN, STD))
    return (images / 255 - mean) / std


@cache
def run_file(path: Path) -> Callable[[Tensor], Tensor]:
    """A function that runs an exported file in its runtime."""
    if path.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        return lambda images: torch.from_numpy(session.run(["output"], {"images": images.numpy()})[0])
    if path.suffix == ".xml":
        openvino = pytest.importorskip("openvino")
        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda images: torch.from_numpy(compiled({"images": images.numpy()})["output"].copy())
    loaded = torch.jit.load(path) if path.suffix == ".torchscript" else torch.export.load(path).module()
    return lambda images: loaded(images).detach()  # type: ignore[no-any-return]


def metadata_of(path: Path) -> dict[str, str]:
    if path.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        return dict(session.get_modelmeta().custom_metadata_map)
    if path.suffix == ".xml":
        model = pytest.importorskip("openvino").Core().read_model(path)
        return {name: model.get_rt_info(["model_info", name]).astype(str) for name in METADATA}
    extra = {"metadata.json": ""}
    if path.suffix == ".torchscript":
        torch.jit.load(path, _extra_files=extra)
    else:
        torch.export.load(path, extra_files=extra)
    metadata: dict[str, str] = json.loads(extra["metadata.json"])
    return metadata


def refused(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that exits with 2 and leaves the folder as it was."""
    before = sorted(folder.rglob("*"))
    assert main(["export", *words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("csalr: error: ") and line.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
    return line


# Files


@pytest.fixture(scope="module")
def network() -> PCB:
    return trained_network("pcb_csalr", groups=GROUPS)


@pytest.fixture(scope="module")
def checkpoint(network: PCB, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as `csalr train` writes it."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth.tar-3"
    settings = {"model.name": "pcb_csalr", **RECORDED}
    torch.save({"state_dict": network.state_dict(), "epoch": 3, "settings": settings}, path)
    return path


@pytest.fixture(scope="module")
def files(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of all formats, written once for all processes of pytest-xdist."""
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    output = folder / "export" / "pcb_csalr.onnx"
    with FileLock(folder / "export.lock"):
        if not output.exists():
            assert main(["export", "--weights", str(checkpoint), "--output", str(output), "--include", *FORMATS]) == 0
    return {name: output.with_suffix(kind.suffix) for name, kind in FORMATS.items()}


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_a_file_equals_the_network_for_any_batch_with_gates_open_and_queries_scaled_by_10(
    name: str, files: dict[str, Path], network: PCB
) -> None:
    images, run = normalised(random_bytes(7)), run_file(files[name])
    for batch in (1, 3, 5, 7):
        got = run(images[:batch])
        assert got.shape == (batch, 12288)
        torch.testing.assert_close(got, network(images[:batch]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_the_metadata_say_model_input_normalisation_and_origin(
    name: str, files: dict[str, Path], checkpoint: Path
) -> None:
    metadata = metadata_of(files[name])
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert metadata.items() >= {**METADATA, "weights_sha256": sha256}.items()


@pytest.mark.parametrize("name", FORMATS)
def test_images_of_another_size_are_refused(name: str, files: dict[str, Path]) -> None:
    run = run_file(files[name])
    for height, width in ((192, 64), (128, 128), (64, 64)):
        with pytest.raises(Exception):  # noqa: B017  # each runtime has an error of its own
            run(torch.rand(2, 3, height, width))


# OpenVINO's Python API converts the type of NumPy arrays.
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "openvino"])
def test_bytes_are_refused_where_normalised_images_are_expected(name: str, files: dict[str, Path]) -> None:
    with pytest.raises(Exception):  # noqa: B017
        run_file(files[name])(random_bytes(2))


def test_the_report_has_the_proof_of_each_file_and_batch(files: dict[str, Path]) -> None:
    report = json.loads(files["onnx"].with_name("pcb_csalr.onnx.json").read_text())
    assert report["model"] == "pcb_csalr" and report["limit"] == 1e-4 and report["opset"] == 18
    for name, path in files.items():
        proof = report["files"][name]
        assert Path(proof["path"]) == path and list(proof["batches"]) == ["1", "3", "5"]
        assert 0 < proof["largest_difference"] < 1e-5 and proof["smallest_cosine"] > 0.99999
    assert sorted(path.name for path in files["onnx"].parent.iterdir()) == sorted(
        ["pcb_csalr.bin", "pcb_csalr.onnx.json", *(path.name for path in files.values())]
    )


def test_an_onnx_file_has_names_for_its_input_and_output_and_no_path_of_this_machine(files: dict[str, Path]) -> None:
    model = pytest.importorskip("onnx").load(files["onnx"])
    (given,), (got,) = model.graph.input, model.graph.output
    assert (given.name, got.name) == ("images", "output")
    dims = [[dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in (given, got)]
    assert dims == [["batch", 3, *SIZE], ["batch", 12288]]
    assert str(Path(__file__).parents[1]).encode() not in files["onnx"].read_bytes()


def test_the_tracker_of_the_documentation_keeps_the_ids_of_two_people_who_pass_each_other(
    files: dict[str, Path],
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=files["onnx"].parent, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0 [0, 1]", "1 [1, 0]", "2 [0, 1]", "3 [1, 0]", "4 [0, 1]"]


# Options


@torch.no_grad()
def test_a_checkpoint_of_fastreid_takes_bytes_and_refuses_images_that_are_normalised_already(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = trained_network("pcb_rpp_csa", groups=2)
    settings = {
        "MODEL.META_ARCHITECTURE": "pcb_rpp_csa",
        "INPUT.SIZE_TEST": list(SIZE),
        "MODEL.PIXEL_MEAN": [120.0, 110.0, 100.0],
        "MODEL.PIXEL_STD": [60.0, 50.0, 55.0],
    }
    torch.save({"model": model.state_dict(), "epoch": 1, "settings": settings}, tmp_path / "model_final.pth")
    words = ["--weights", str(tmp_path / "model_final.pth"), "--output", str(tmp_path / "m"), "--opset", "11"]
    assert main(["export", *words, "--include", "onnx", "torchscript"]) == 0
    images = random_bytes(3)
    mean, std = (torch.tensor(settings[f"MODEL.PIXEL_{name}"]).view(1, 3, 1, 1) for name in ("MEAN", "STD"))
    for name in ("m.onnx", "m.torchscript"):
        run, metadata = run_file(tmp_path / name), metadata_of(tmp_path / name)
        torch.testing.assert_close(run(images), model((images - mean) / std), rtol=0, atol=1e-5)
        assert (metadata["pixels"], metadata["input_type"], metadata["framework"]) == ("0-255", "uint8", "fastreid")
        np.testing.assert_allclose(json.loads(metadata["mean"]), [120 / 255, 110 / 255, 100 / 255])
        with pytest.raises(Exception):  # noqa: B017
            run((images - mean) / std)
    opset = pytest.importorskip("onnx").load(tmp_path / "m.onnx").opset_import[0].version
    assert opset == 11


@torch.no_grad()
def test_half_precision_keeps_the_blocks_in_fp32_and_is_judged_in_torch(
    network: PCB, checkpoint: Path, tmp_path: Path
) -> None:
    words = ["--weights", str(checkpoint), "--output", str(tmp_path / "half"), "--include", "torchscript", "--half"]
    assert main(["export", *words, "--pixels", "0-255"]) == 0
    loaded, images = torch.jit.load(tmp_path / "half.torchscript"), random_bytes(3)
    types = {name: value.dtype for name, value in loaded.named_parameters()}
    assert {types[name] for name in types if ".attention." in name} == {torch.float32}
    assert {types[name] for name in types if ".layer" in name} == {torch.float16}
    got, expected = loaded(images), network(normalised(images))
    assert got.dtype is torch.float32
    assert 1e-6 < (got - expected).abs().max() < 1e-3
    report = json.loads((tmp_path / "half.json").read_text())
    assert report["precision"] == "fp16" and report["limit"] == 1e-3
    assert 1e-6 < report["fp16_in_torch"]["largest_difference"] < 1e-3


@torch.no_grad()
def test_a_fixed_batch_is_exported_only_when_asked_for_and_refuses_any_other(checkpoint: Path, tmp_path: Path) -> None:
    words = ["--weights", str(checkpoint), "--output", str(tmp_path / "two.onnx"), "--opset", "17", "--simplify"]
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxslim")
    assert main(["export", *words, "--include", "onnx", "torchscript", "--no-dynamic", "--batch-size", "2"]) == 0
    for name in ("two.onnx", "two.torchscript"):
        run = run_file(tmp_path / name)
        assert run(normalised(random_bytes(2))).shape == (2, 12288) and metadata_of(tmp_path / name)["batch"] == "2"
        with pytest.raises(Exception):  # noqa: B017
            run(normalised(random_bytes(3)))


@pytest.mark.parametrize("name", ["osnet_x0_25", "osnet_x0_25_csalr"])
def test_a_network_of_torchreids_zoo_is_exported_from_its_state_dict(name: str, tmp_path: Path) -> None:
    torchreid = pytest.importorskip("torchreid")
    from csalr_plugin.hosts.torchreid.config import default_config, set_active_config

    torch.manual_seed(0)
    config = default_config()
    config.merge_from_list(["csalr.groups", 4, "csalr.landmarks", "4,2"])
    set_active_config(config)
    model = torchreid.models.build_model(name, num_classes=4, pretrained=False).eval()
    set_active_config(None)
    for block in getattr(model, "attention", {}).values():
        nn.init.constant_(block.alpha, 0.3)
    torch.save(model.state_dict(), tmp_path / "osnet.pth")
    words = ["--weights", str(tmp_path / "osnet.pth"), "--output", str(tmp_path / "osnet"), "--model", name]
    assert main(["export", *words, "--include", "torchscript", "data.height", "64", "data.width", "32"]) == 0
    images = torch.rand(3, 3, 64, 32)
    torch.testing.assert_close(run_file(tmp_path / "osnet.torchscript")(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recorded", [True, False], ids=["its checkpoint", "a config file"])
def test_a_network_of_fastreids_zoo_is_built_from_the_settings_of(recorded: bool, tmp_path: Path) -> None:
    pytest.importorskip("fastreid")
    from csalr_plugin.hosts.fastreid.trained import build_network, read_config

    settings: dict[str, Any] = {"MODEL.BACKBONE.DEPTH": "18x", "MODEL.BACKBONE.FEAT_DIM": 512}
    settings |= {"MODEL.BACKBONE.WITH_CSALR": True, "CSALR.GROUPS": 4, "CSALR.LANDMARKS": [4, 2], "CSALR.AMP": "bf16"}
    settings |= {"MODEL.META_ARCHITECTURE": "Baseline", "INPUT.SIZE_TEST": [64, 32]}
    torch.manual_seed(0)
    model: Any = build_network("Baseline", read_config(settings, "", (), ""), 4).eval()
    for block in model.attention.values():
        nn.init.constant_(block.alpha, 0.3)
    torch.save({"model": model.state_dict(), "settings": settings if recorded else {}}, tmp_path / "model.pth")
    (tmp_path / "config.yml").write_text(
        "MODEL: {META_ARCHITECTURE: Baseline, BACKBONE: {DEPTH: 18x, FEAT_DIM: 512, WITH_CSALR: True}}\n"
        "INPUT: {SIZE_TEST: [64, 32]}\n"
    )
    words = ["--weights", str(tmp_path / "model.pth"), "--output", str(tmp_path / "r18"), "--include", "torchscript"]
    assert main(["export", *words, *([] if recorded else ["--config-file", str(tmp_path / "config.yml")])]) == 0
    images = torch.randint(256, (3, 3, 64, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(normalised(images))
    torch.testing.assert_close(run_file(tmp_path / "r18.torchscript")(images), expected, rtol=1e-4, atol=1e-4)


# Files that are not written


class Wrong(nn.Module):
    """A network whose captured program is not the network: it knows the size of its first batch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, images: Tensor) -> Tensor:
        pooled = images.mean((2, 3))
        if self.how == "inverse":
            return pooled @ torch.linalg.inv(images[0, :, :3, :3] + 9 * torch.eye(3))
        if self.how == "wrong":
            return pooled * int(pooled.shape[0])
        return pooled.reshape(int(pooled.shape[0]), 3)


@pytest.mark.parametrize(
    ("how", "format", "complaint"),
    [
        (
            "wrong",
            "torchscript",
            r"the torchscript file differs from the network wrong by \d\.\de[+-]\d\d, above the limit of 1e-04",
        ),
        ("fixed", "torchscript", r"the torchscript file of fixed fails with a batch of 1 \(.*shape"),
        ("inverse", "onnx", r"inverse cannot be exported to onnx \(.*linalg_inv.* another --opset from 11 to 24"),
    ],
)
def test_a_file_that_differs_has_a_fixed_batch_or_an_unknown_operation_is_not_written(
    how: str, format: str, complaint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript" if format == "onnx" else "torch")
    with pytest.raises(UserError, match=complaint) as error:
        export(Wrong(how), Interface(how, 16, 16), tmp_path / "new" / "m", [format], opset=17)
    assert tuple(capfd.readouterr()) == ("", "")
    assert "no file is written" in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_difference_above_the_limit_exits_with_2_and_keeps_the_file_that_was_there(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_module, "LIMIT", 1e-12)
    (tmp_path / "m.torchscript").write_text("an earlier file")
    words = ["--weights", str(checkpoint), "--output", str(tmp_path / "m"), "--include", "torchscript"]
    line = refused(words, tmp_path, capsys)
    assert "above the limit of 1e-12" in line and "smallest cosine" in line
    assert (tmp_path / "m.torchscript").read_text() == "an earlier file"


def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten())
    nn.init.constant_(network[0].weight, float("nan"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the embeddings of m are not finite"):
        export(network, Interface("m", 16, 16), tmp_path / "m", ["torchscript"])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--include onxx", "invalid choice: 'onxx'"),
        ("--opset 99", "argument --opset: '99' must be an integer from 11 to 24"),
        ("--imgsz 0 64", "'0' must be an integer from 16"),
        ("--imgsz 128", "expected 2 arguments"),
        ("--pixels 0-1", "invalid choice: '0-1'"),
        ("--batch-size 0", "'0' must be an integer from 1"),
        ("--dynamc", "unrecognized arguments: --dynamc"),
        ("--model pcb_sa", "was trained with attention csalr, and this network has attention sa"),
        ("--model pcb_csa", "was trained with attention csalr, and this network has attention csa"),
        ("--model pcb", "is of another architecture"),
        ("--model pcb_rpp_csalr", "it lacks part_classifier"),
        ("--model pcb_cslar", "Did you mean 'pcb_csalr'"),
        ("csalr.groups 2", "was trained with groups 4, and this network has groups 2"),
        ("csalr.landmarks 6,4", "was trained with landmarks 12,8, and this network has landmarks 6,4"),
        ("csalr.group 2", "unknown config key 'csalr.group'"),
        ("csalr.groups", "has no value"),
        ("--config-file none.yaml", "config file 'none.yaml' does not exist"),
        ("--weights none.pth", "Checkpoint 'none.pth' is not a file"),
        ("--output FOLDER", "is a folder; give the path of a file"),
        ("--output FILE/m.onnx", "/FILE/m.onnx' cannot be written (File exists)"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    words: str, complaint: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if words.startswith("--model pcb_cslar") or words.startswith(("csalr", "--config")):
        pytest.importorskip("torchreid")
    (tmp_path / "FILE").write_text("")
    (tmp_path / "FOLDER").mkdir()
    given = words.replace("FILE", str(tmp_path / "FILE")).replace("FOLDER", str(tmp_path / "FOLDER")).split()
    start = ["--weights", str(checkpoint), "--output", str(tmp_path / "new" / "m"), "--include", "torchscript"]
    assert complaint in refused([*start, *given], tmp_path, capsys)


@pytest.mark.parametrize(
    ("kept", "complaint"),
    [
        ({}, "does not record its model: give its name"),
        ({"model.name": "pcb_csalr"}, "groups and landmarks: give those that it was trained with, such as csalr.gro"),
        ({"model.name": "pcb_csalr", "csalr.groups": 4, "csalr.landmarks": [12, 8]}, "does not record its image size"),
        ({"model.name": "pcb_csalr", "csalr.groups": "four"}, "records settings that are not allowed: config key"),
    ],
)
def test_a_setting_that_nobody_gives_is_never_assumed(
    kept: dict[str, Any], complaint: str, network: PCB, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = dict(network.state_dict())  # a plain dictionary, which has lost the settings
    torch.save({"state_dict": state, "settings": kept}, tmp_path / "m.pth")
    words = ["--weights", str(tmp_path / "m.pth"), "--output", str(tmp_path / "m"), "--include", "torchscript"]
    assert complaint in refused(words, tmp_path, capsys)


def test_settings_that_the_checkpoint_does_not_record_are_taken_from_the_command_line(
    network: PCB, tmp_path: Path
) -> None:
    pytest.importorskip("torchreid")
    torch.save(dict(network.state_dict()), tmp_path / "m.pth")
    overrides = ["CSALR.GROUPS", "4", "csalr.landmarks", "12,8", "data.height", "128", "data.width", "64"]
    trained = load_trained(tmp_path / "m.pth", model="pcb_csalr", overrides=overrides)
    images = normalised(random_bytes(2))
    assert trained.size == SIZE and trained.host == "torchreid"
    with torch.no_grad():
        assert torch.equal(trained.network(images), network(images))


# torchreid's own functions


@torch.no_grad()
def test_the_feature_extractor_builds_network_size_and_normalisation_from_a_checkpoint_alone(
    network: PCB, tmp_path: Path
) -> None:
    torchreid = pytest.importorskip("torchreid")
    settings = {"model.name": "pcb_csalr", **RECORDED, "data.norm_mean": [0.5, 0.4, 0.3], "data.norm_std": [0.2] * 3}
    torch.save({"state_dict": network.state_dict(), "settings": settings}, tmp_path / "m.pth")
    image = random_bytes(1)
    array = image[0].permute(1, 2, 0).numpy()
    mean = torch.tensor(settings["data.norm_mean"]).view(1, 3, 1, 1)
    expected = network((image / 255 - mean) / 0.2)
    for given in ({"model_path": str(tmp_path / "m.pth")}, {"model_name": "pcb_csalr", "image_size": SIZE}):
        extractor = torchreid.utils.FeatureExtractor(
            **{"model_path": str(tmp_path / "m.pth"), **given}, device="cpu", verbose=False
        )
        assert extractor.model.network_settings["groups"] == GROUPS
        torch.testing.assert_close(extractor(array), expected)


def test_torchreid_never_loads_other_groups_or_another_attention_in_silence(checkpoint: Path) -> None:
    torchreid = pytest.importorskip("torchreid")
    with pytest.raises(UserError, match="was trained with groups 4, and this network has groups 2"):
        torchreid.utils.load_pretrained_weights(build_model("pcb_csalr", 3, pretrained=False), str(checkpoint))
    with pytest.raises(UserError, match="was trained with attention csalr, and this network has attention sa"):
        torchreid.utils.FeatureExtractor("pcb_sa", str(checkpoint), device="cpu", verbose=False)


# The inverse

Maps = dict[str, Tensor]


def adversarial_maps(m: int) -> Maps:
    """Row-stochastic matrices S_mm (m, m) in fp64 whose S + I is singular or nearly so, and random ones."""
    torch.manual_seed(m)
    index = torch.arange(m)
    half = index < m // 2
    other_half = (half[:, None] != half).double() / (m // 2)

    def attends_to(landmark: Tensor) -> Tensor:
        return one_hot(landmark, m).double()

    logits = torch.randn(m, m, dtype=torch.double)
    maps = {
        "mutual pairs": attends_to(index ^ 1),
        "a cycle": attends_to((index + 1) % m),
        "cycles of three": attends_to(index // 3 * 3 + (index + 1) % 3),
        "a permutation": attends_to(torch.randperm(m)),
        "random one-hot rows": attends_to(torch.randint(m, (m,))),
        "one landmark for all": attends_to(torch.zeros_like(index)),
        "a star": torch.cat([torch.full((1, m), 1 / m, dtype=torch.double), attends_to(torch.zeros_like(index))[1:]]),
        "a chain": attends_to((index + 1).clamp(max=m - 1)),
        "repelled by itself": (logits - 50 * torch.eye(m)).softmax(-1),
        "two halves": other_half,
        "two random halves": (3 * logits).masked_fill(half[:, None] == half, -1e9).softmax(-1),
    }
    return maps | {f"logits of deviation {one}": (one * logits).softmax(-1) for one in (0.1, 1, 3, 10, 30, 100)}


class Inverse(nn.Module):
    def forward(self, A: Tensor) -> Tensor:
        return inverse_by_products(A, 1e-3)


@pytest.mark.parametrize("m", [24, 48, 96, 192])
def test_the_inverse_of_exported_programs_is_as_accurate_as_lapack(m: int, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    maps = adversarial_maps(m)
    A = torch.stack([raise_diagonal(one.float(), 1e-3) for one in maps.values()])
    exact = torch.linalg.inv(A.double())
    scale = exact.abs().amax((1, 2))

    def error(inverse: Tensor) -> Tensor:
        return (inverse.double() - exact).abs().amax((1, 2)) / scale

    # The error of LAPACK depends on the order of the landmarks by chance.
    lapack = torch.zeros(len(A), dtype=torch.double)
    for _ in range(20):
        order = torch.randperm(m)
        back = order.argsort()
        lapack = torch.maximum(lapack, error(torch.linalg.inv(A[:, order][:, :, order])[:, back][:, :, back]))
    torch.onnx.export(Inverse(), (A[:2],), str(tmp_path / "i.onnx"), dynamo=False, input_names=["A"], opset_version=17,
                      dynamic_axes={"A": [0]})  # fmt: skip
    session = runtime.InferenceSession(tmp_path / "i.onnx", providers=["CPUExecutionProvider"])
    in_onnxruntime = torch.from_numpy(session.run(None, {"A": A.numpy()})[0])
    in_torch = torch.jit.trace(Inverse(), (A[:2],))(A)  # type: ignore[no-untyped-call]
    for found in (in_torch, in_onnxruntime):
        wrong = {name: found for name, found, limit in zip(maps, error(found), 3 * lapack, strict=True)
                 if found > max(1e-5, limit)}  # fmt: skip
        assert not wrong
