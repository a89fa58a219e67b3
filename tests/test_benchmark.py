"""`csalr bench`: its counts, its statistics, invalid arguments, continuing, and each study from end to end."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from csalr_plugin.attention import build_attention, set_fast
from csalr_plugin.commands import main
from csalr_plugin.errors import UserError
from csalr_plugin.models import build_model
from csalr_plugin.models.cost import count_gmacs, count_kept_bytes, kept_bytes
from csalr_plugin.projects.benchmark import cost, harness, scale, zoo

COST = ["bench", "cost", "--quick", "--height", "64", "--width", "32", "--batch-size", "2", "--threads", "1"]
SCALE = ["bench", "scale", "--quick", "--channels", "32", "--positions", "192", "768", "--threads", "1"]
ZOO = ["bench", "zoo", "--quick", "--height", "64", "--width", "32", "--batch-size", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def settings_of_torch() -> Iterator[None]:
    """Restore the global settings that a study changes."""
    threads, search = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = search


def results_of(folder: Path, study: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{study}.json").read_text())
    return content


class Chain(nn.Module):
    """Keeps the output of its ReLU, once for the gradient of the ReLU and of the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def test_kept_bytes_counts_each_storage_once_and_neither_weights_nor_the_input() -> None:
    assert kept_bytes(Chain(), torch.ones(16, 4)) == 16 * 8 * 4


class SavesItsSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x * x)
        return x * 3

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 3


class KeepsOneOfTwo(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        SavesItsSquare.apply(x)  # freed at once, with its saved tensor
        return SavesItsSquare.apply(x)


def test_kept_bytes_counts_tensors_saved_by_a_custom_function_unless_they_are_freed() -> None:
    assert kept_bytes(KeepsOneOfTwo(), torch.ones(10, requires_grad=True)) == 40


@pytest.mark.parametrize("name", ["pcb", "pcb_sa", "pcb_csalr"])
def test_kept_bytes_on_the_meta_device_equal_those_on_a_cpu_and_the_model_does_not_change(name: str) -> None:
    model = build_model(name, 5, pretrained=False).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    set_fast(False)  # a device without data has the plain form alone
    try:
        kept = count_kept_bytes(model, 64, 32, batch_size=2)
    finally:
        set_fast(True)
    assert not model.training and torch.equal(state, torch.get_rng_state())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert kept == count_kept_bytes(model.to("meta"), 64, 32, batch_size=2)


@pytest.fixture(scope="module")
def pcb_cost() -> tuple[float, float]:
    """Return the kept bytes and the GMACs per image of PCB at 384x128."""
    return cost_of("pcb")


def cost_of(name: str, groups: int = 2) -> tuple[float, float]:
    with torch.device("meta"):
        model = build_model(name, 751, pretrained=False, groups=groups)
    return count_kept_bytes(model, 384, 128), count_gmacs(model, 384, 128)


def test_pcb_keeps_95_mb_an_image_and_takes_6_08_gmacs_at_384x128(pcb_cost: tuple[float, float]) -> None:
    assert pcb_cost == pytest.approx((95.0e6, 6.08), rel=0.01)


@pytest.mark.parametrize(
    ("name", "groups", "kept", "gmacs"),
    [
        ("pcb_csalr", 1, 0.06, 0.13),
        ("pcb_csalr", 2, 0.06, 0.26),
        ("pcb_csalr", 4, 0.06, 0.30),
        ("pcb_csalr", 8, 0.06, 0.33),
        ("pcb_csa", 2, 0.06, 0.24),
        ("pcb_sa", 1, 0.06, 0.72),
    ],
)
def test_attention_adds_at_most_this_fraction_to_the_memory_and_operations_of_pcb(
    name: str, groups: int, kept: float, gmacs: float, pcb_cost: tuple[float, float]
) -> None:
    kept_of_model, operations = cost_of(name, groups)
    assert kept_of_model <= pcb_cost[0] * (1 + kept)
    assert operations <= pcb_cost[1] * (1 + gmacs)


@pytest.mark.parametrize(("groups", "share"), [(1, 0.079), (2, 0.120), (4, 0.136), (8, 0.145)])
def test_the_compiled_passes_of_csalr_keep_no_more_memory_than_this_share_of_pcb(groups: int, share: float) -> None:
    with torch.device("meta"):
        pcb = count_kept_bytes(build_model("pcb", 751, pretrained=False), 384, 128, batch_size=2)
    model = build_model("pcb_csalr", 751, pretrained=False, groups=groups)
    kept = count_kept_bytes(model, 384, 128, batch_size=2)
    assert 0.055 * pcb < kept - pcb < (share + 0.001) * pcb


def test_a_recomputing_block_keeps_its_input_alone() -> None:
    with torch.device("meta"):
        block = build_attention("csalr", 256, groups=8)
        assert kept_bytes(block, torch.empty(1, 256, 96, 32, requires_grad=True)) == 0


def test_activations_of_csalr_grow_linearly_with_the_positions() -> None:
    with torch.device("meta"):
        block = build_attention("csalr", 256, groups=8).set_recompute(False)
        kept = [kept_bytes(block, torch.empty(1, 256, 24 * k, 8 * k, requires_grad=True)) for k in (1, 4, 16)]
    assert 0.8 < harness.fit_exponent([192, 3072, 49152], kept) <= scale.LINEAR


def test_an_inverse_counts_m_cubed_multiplications() -> None:
    class Inverts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.system = nn.Parameter(torch.eye(30).repeat(5, 1, 1))

        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(self.system)

    assert count_gmacs(Inverts(), 8, 8) == pytest.approx(5 * 30**3 / 1e9)


def test_peak_bytes_are_the_largest_sum_of_live_allocations() -> None:
    def action() -> None:
        first = torch.empty(1_000_000, dtype=torch.uint8)
        del first
        second, third = (torch.empty(700_000, dtype=torch.uint8) for _ in range(2))
        del second, third

    assert harness.peak_bytes(action, torch.device("cpu")) == pytest.approx(1_400_000, rel=0.01)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_fitted_exponent_is_that_of_a_power_law(power: float) -> None:
    sizes = [192.0, 768.0, 3072.0]
    assert harness.fit_exponent(sizes, [5e-6 * n**power for n in sizes]) == pytest.approx(power)


def test_changes_are_taken_within_a_round_so_that_a_drift_of_the_machine_cancels() -> None:
    baseline = [1.0, 2.0, 4.0, 1.5, 3.0]
    found = harness.change([0.9 * one for one in baseline], baseline)
    assert (found.median, found.spread) == (pytest.approx(-0.1), pytest.approx(0.0, abs=1e-12))
    assert harness.as_percent(found) == "-10.0%"


def test_a_change_smaller_than_its_spread_is_not_printed() -> None:
    assert harness.as_percent(harness.Statistic(median=-0.02, spread=0.03)) == harness.TOO_LARGE
    assert harness.as_percent(harness.Statistic(median=-0.04, spread=0.03)) == "-4.0%"


@pytest.mark.parametrize("row", ["plain-2", "keeping-2", "convolutions", "nystrom"])
def test_every_parameter_of_an_alternative_is_trained(row: str) -> None:
    if row == "nystrom":
        pytest.importorskip("nystrom_attention")
    contestant = cost.Contestant(cost.ROWS[row].build(0.1), torch.randn(2, 3, 64, 32))
    contestant.model.train()
    contestant.train_step()
    untouched = [name for name, one in contestant.model.attention.named_parameters() if one.grad is None]
    assert not untouched


def test_bench_cost_measures_every_row_and_writes_json_table_and_picture(tmp_path: Path) -> None:
    rows = ["csalr-2", "plain-2"]
    assert main([*COST, "--out", str(tmp_path), "--repeats", "1", "--only", *rows]) == 0
    results = results_of(tmp_path, "cost")
    assert results["settings"]["rows"] == ["pcb", *rows] and results["machine"]["cpu"] and results["versions"]["torch"]
    assert [set(one) for one in results["rounds"]] == [{"pcb", *rows}]
    assert all(sample > 0 for one in results["rounds"] for row in one.values() for sample in row.values())
    assert results["counts"]["csalr-2"]["parameters"] == results["counts"]["plain-2"]["parameters"]
    for row in rows:
        assert results["summary"][row]["kept_bytes"]["change"] > 0 and results["summary"][row]["gmacs"]["change"] > 0
        assert results["counts"][row]["peak_bytes"] > results["counts"][row]["kept_bytes"]
    table = (tmp_path / "cost.md").read_text()
    assert "192.25 (+39.7%)" in table and "460.43 (-20.9%)" in table  # Table 5, 2 groups
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_study_continues_with_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*SCALE, "--out", str(tmp_path), "--repeats", "3"]
    sample, cases, taken = scale.Pass.sample, 2 * len(scale.CURVES), 0

    def interrupted(self: scale.Pass) -> harness.Sample:
        nonlocal taken
        taken += 1
        if taken == 4 * cases + 5:  # counting (twice), warm-up, one round, a part of the second
            raise KeyboardInterrupt
        return sample(self)

    monkeypatch.setattr(scale.Pass, "sample", interrupted)
    assert main(command) == 130
    before = results_of(tmp_path, "scale")
    assert len(before["rounds"]) == 1 and not before["summary"]
    assert main(command) == 0
    after = results_of(tmp_path, "scale")
    assert len(after["rounds"]) == 3 and after["rounds"][:1] == before["rounds"] and after["counts"] == before["counts"]
    done = taken
    assert main(command) == 0
    assert taken == done and results_of(tmp_path, "scale") == after  # complete: nothing is measured again


def test_samples_of_other_settings_or_another_machine_never_mix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*SCALE, "--out", str(tmp_path), "--repeats", "1"]
    assert main(command) == 0
    before = (tmp_path / "scale.json").read_text()
    assert main([*command, "--batch-size", "3"]) == 2
    assert "batch_size 1, not 3" in capsys.readouterr().err
    changed = json.loads(before)
    changed["machine"]["cpu"] = "Another CPU"
    (tmp_path / "scale.json").write_text(json.dumps(changed))
    assert main(command) == 2
    assert "cpu 'Another CPU'" in capsys.readouterr().err
    (tmp_path / "scale.json").write_text(before[: len(before) // 2])
    assert main(command) == 2
    assert "is damaged" in capsys.readouterr().err


def test_the_digest_of_the_code_includes_the_compiled_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.csalr_plugin, "__file__", str(tmp_path / "__init__.py"))
    folder = tmp_path / "attention" / "fast" / "csrc"
    folder.mkdir(parents=True)
    codes = {harness.code_digest()}
    for name in ("passes.cpp", "tiles.h"):
        (folder / name).write_text(name)
        codes.add(harness.code_digest())
    assert len(codes) == 3


def test_bench_scale_fits_an_exponent_to_every_block(tmp_path: Path) -> None:
    assert main([*SCALE, "--out", str(tmp_path), "--repeats", "2"]) == 0
    results = results_of(tmp_path, "scale")
    assert set(results["summary"]) == set(scale.CURVES)
    for curve, figures in results["summary"].items():
        assert figures["positions"] == [192, 768], curve
        largest = 2.1 if curve == "sa" else scale.LINEAR
        assert 0.5 < figures["kept_exponent"] <= largest and figures["time_exponent"]["median"] > -1, curve
    assert "CSALR's largest exponents" in (tmp_path / "scale.md").read_text()
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


def test_a_size_beyond_the_limits_of_time_or_memory_is_left_out_with_all_larger_ones() -> None:
    def counts(seconds: float, peak: float) -> dict[str, Any]:
        return {"first_pass_seconds": seconds, "peak_bytes": peak}

    quadratic = [(192, counts(0.1, 1e6)), (768, counts(1.6, 16e6))]
    assert scale.why_left_out(3072, quadratic, 1, limit=30, budget=1e12) is None
    assert scale.why_left_out(3072, quadratic, 1, limit=20, budget=1e12) == "over 20 s"
    assert scale.why_left_out(3072, quadratic, 8, limit=30, budget=1e9) == "over 1 GB"
    left_out = [*quadratic, (3072, {"left_out": "over 20 s"})]
    assert scale.why_left_out(12288, left_out, 1, limit=30, budget=1e12) == "over 20 s"


def test_bench_zoo_measures_the_hosts_models_beside_ours(tmp_path: Path) -> None:
    models = ["mobilenetv2_x1_0", "hacnn", "pcb_p6", "pcb_csalr"]
    assert main([*ZOO, "--out", str(tmp_path), "--repeats", "1", "--only", *models]) == 0
    counts = results_of(tmp_path, "zoo")["counts"]
    assert set(counts) == set(models) and counts["hacnn"]["size"] == [160, 64]
    assert counts["pcb_p6"]["embedding"] == counts["pcb_csalr"]["embedding"] == 12288
    assert counts["pcb_p6"]["gmacs"] < counts["pcb_csalr"]["gmacs"]
    assert all(one["checkpoint_bytes"] > 4 * one["parameters"] for one in counts.values())
    assert "| pcb_csalr" in (tmp_path / "zoo.md").read_text()
    assert "with CSALR / without" not in (tmp_path / "zoo.md").read_text()
    assert (tmp_path / "zoo.png").read_bytes().startswith(b"\x89PNG")


def test_bench_zoo_compares_a_model_with_csalr_to_the_plain_one(tmp_path: Path) -> None:
    models = ["mobilenetv2_x1_0", "mobilenetv2_x1_0_csalr"]
    assert main([*ZOO, "--out", str(tmp_path), "--repeats", "2", "--only", *models]) == 0
    found = results_of(tmp_path, "zoo")
    plain, twin = (found["counts"][name] for name in models)
    ratios = found["summary"]["mobilenetv2_x1_0_csalr"]["ratios"]
    assert ratios["parameters"] == twin["parameters"] / plain["parameters"] > 1
    assert ratios["gmacs"] == twin["gmacs"] / plain["gmacs"] > 1
    times = [[sample[name]["latency_seconds"] for name in models] for sample in found["rounds"]]
    assert ratios["latency"]["median"] == pytest.approx(sum(own / other for other, own in times) / 2)
    row = f"| mobilenetv2_x1_0       | {ratios['parameters']:.2f}         | {ratios['gmacs']:.2f}    |"
    assert row in (tmp_path / "zoo.md").read_text()


def test_bench_zoo_adds_the_accuracy_of_given_weights_without_timing_again(tmp_path: Path, tiny_data: Path) -> None:
    command = [*ZOO, "--out", str(tmp_path), "--repeats", "1", "--only", "mobilenetv2_x1_0", "pcb"]
    assert main(command) == 0
    before = results_of(tmp_path, "zoo")
    path = tmp_path / "weights.pth"
    torch.save(build_model("pcb", 4, pretrained=False).state_dict(), path)
    evaluation = ["--root", str(tiny_data), "-s", "market1501", "--weights", f"pcb={path}"]
    assert main([*command, *evaluation]) == 0
    after = results_of(tmp_path, "zoo")
    assert after["rounds"] == before["rounds"]
    accuracy = after["counts"]["pcb"]["accuracy"]["market1501"]
    assert 0 < accuracy["mAP"] <= 1 and 0 <= accuracy["rank-1"] <= 1
    assert f"{accuracy['mAP']:.1%}" in (tmp_path / "zoo.md").read_text()


def test_bench_zoo_evaluates_on_a_folder_without_a_root() -> None:
    options = argparse.Namespace(weights=[f"pcb={__file__}"], root=None, sources=["folder:mine"], targets=None)
    assert zoo.checkpoints(options, ["pcb"]) == {"pcb": Path(__file__)}
    options.targets = ["market1501"]
    with pytest.raises(UserError, match="add --root DIR and -s NAME, or -s folder:PATH"):
        zoo.checkpoints(options, ["pcb"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["bench"], "a study is missing"),
        (["bench", "scal", "--out", "x"], "Did you mean 'scale'?"),
        (["bench", "cost"], "--out"),
        (["bench", "cost", "--out", "x", "--repeats", "4"], "--repeats 4 is too few"),
        (["bench", "cost", "--out", "x", "--device", "tpu"], "--device 'tpu'"),
        (["bench", "cost", "--out", "x", "--only", "csalr-3"], "unknown row 'csalr-3'"),
        (["bench", "cost", "--out", "x", "--batch-size", "1"], "--batch-size 1"),
        (["bench", "cost", "--out", "x", "--height", "8"], "--height: '8' must be an integer from 16 to 4096"),
        (["bench", "cost", "--out", "x", "--gate", "nan"], "--gate: 'nan' must be a number from -10 to 10"),
        (["bench", "cost", "--out", "x", "--threads", "0"], "'0' must be an integer from 1 to"),
        (["bench", "scale", "--out", "x", "--positions", "200", "192"], "--positions 200"),
        (["bench", "scale", "--out", "x", "--positions", "192"], "is one size"),
        (["bench", "scale", "--out", "x", "--channels", "100"], "--channels 100"),
        (["bench", "zoo", "--out", "x", "--only", "resnet51"], "Did you mean"),
        (["bench", "zoo", "--out", "x", "--weights", "pcb"], "is not MODEL=PATH"),
        (["bench", "zoo", "--out", "x", "--weights", "pbc=setup.cfg"], "model 'pbc'"),
        (["bench", "zoo", "--out", "x", "--weights", "pcb=absent.pth"], "is not a file"),
        (["bench", "zoo", "--out", "x", "--weights", f"pcb={__file__}"], "--root DIR and -s NAME"),
    ],
)
def test_every_mistake_is_one_line_that_names_it(
    words: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1 and "Traceback" not in message


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main([*COST, "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COST, "--out", str(tmp_path), "--device", "cuda"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_without_nystrom_attention_its_row_is_left_out_and_a_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cost, "nystrom_is_installed", lambda: False)
    assert cost.chosen_rows(None) == [name for name in cost.ROWS if name != "nystrom"]
    assert "pip install 'csalr-plugin[bench]'" in capsys.readouterr().out
    assert cost.chosen_rows(["csa"]) == ["pcb", "csa"]
    with pytest.raises(ValueError, match="pip install"):
        cost.chosen_rows(["nystrom"])
