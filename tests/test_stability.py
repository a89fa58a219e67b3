"""The stability study: its verdict on a run, and that finished runs are not repeated."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from csalr_plugin.models import build_model


@pytest.fixture(scope="module")
def study() -> ModuleType:
    path = Path(__file__).parents[1] / "projects" / "stability" / "run.py"
    spec = importlib.util.spec_from_file_location("stability_study", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scaling_every_stage_by_10_multiplies_the_last_feature_map_by_10(study: ModuleType) -> None:
    model = build_model("pcb", 3, pretrained=False).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.0)
    images = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        before = model.double()(images.double(), return_featuremaps=True)
        model.load_state_dict(study.scale_stages(model.state_dict(), 10))
        after = model(images.double(), return_featuremaps=True)
    # Approximately: the eps of the batch norms is not scaled.
    torch.testing.assert_close(after, 10 * before, rtol=1e-2, atol=1e-2)


def run(start: float, end: float, model: str = "pcb", seed: int = 1, stopped: str | None = None) -> dict[str, Any]:
    curves = [{"loss": value, "L_F": value} for value in [start] * 30 + [end] * 30]
    return {"data": "d", "start": "s", "model": model, "seed": seed, "stopped": stopped, "curves": curves, "maps": []}


@pytest.mark.parametrize(
    ("attention", "verdict"),
    [
        (run(30, 20.5, "pcb_csalr"), "stable"),
        (run(30, 22.5, "pcb_csalr"), "above PCB's"),
        (run(30, 31, "pcb_csalr"), "not falling"),
        (run(30, 20, "pcb_csalr", stopped="L_F = nan"), "L_F = nan"),
    ],
)
def test_a_stable_run_is_finite_and_falls_and_exceeds_pcb_by_no_more_than_its_two_seeds_differ(
    study: ModuleType, attention: dict[str, Any], verdict: str
) -> None:
    runs = [run(30, 20), run(30, 21, seed=2), attention]
    by_key = {(one["data"], one["start"], one["model"], one["seed"]): one for one in runs}
    assert verdict in study.judge(attention, by_key)


def test_a_finished_run_is_not_repeated_and_never_mixed_with_other_settings(
    study: ModuleType,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(study, "MODELS", (("pcb", 1), ("pcb_csalr", 1)))
    size = ["--height", "64", "--width", "32", "--batch-size", "8", "--iterations", "2"]
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path), "--data", f"tiny={tiny_data}", *size])
    study.main()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert {path.name for path in files} == {"tiny-random-pcb-1.json", "tiny-random-pcb_csalr-1.json"}
    assert "smallest_S_ii" in min(files).with_name("tiny-random-pcb_csalr-1.json").read_text()
    study.main()
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert (tmp_path / "summary.md").is_file() and (tmp_path / "curves.png").is_file()
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "3"])
    assert study.main() == 2
    assert "is a run with iterations 2, not 3; give another --out." in capsys.readouterr().err
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--data", "demo=root"], "--out"),
        (["--out", "out"], "--data"),
        (["--out", "", "--data", "demo=root"], "the path is empty"),
        (["--out", "out", "--data", "root"], "'root' is not NAME=ROOT"),
        (["--out", "out", "--data", "a/b=root"], "'a/b=root' is not NAME=ROOT"),
        (["--out", "out", "--data", "demo=root", "--iterations", "0"], "from 1 to 1000000"),
        (["--out", "out", "--data", "demo=root", "--height", "٣"], "from 16 to 4096"),
        (["--out", "out", "--data", "demo=root"], "data.root 'root'"),
        (["--out", "out", "--data", "demo=root", "train.lr"], "'train.lr' has no value"),
    ],
)
def test_a_mistake_is_one_line(
    study: ModuleType,
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    assert study.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stability: error: ") and complaint in line
