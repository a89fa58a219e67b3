"""The ablation: closed gates, the control without attention, paired intervals, and the settings of short trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from csalr_plugin.demo_data import FOLDER, make_demo_data
from csalr_plugin.errors import UserError
from csalr_plugin.hosts.folder import read_folder_data
from csalr_plugin.hosts.gates import closed_gates, evaluate, gates_of
from csalr_plugin.hosts.trained import Trained
from csalr_plugin.models import build_model
from csalr_plugin.models.recipe import WarmUp, gate_rate, loss_terms, split_logits
from csalr_plugin.projects.paper.ablation import CLOSED, HEADER, ablation_rows, paired_difference
from csalr_plugin.projects.paper.plan import Options, paper, plan
from csalr_plugin.projects.paper.report import Trained as Training
from csalr_plugin.projects.paper.report import _branches, source


class Colours(nn.Module):
    """Embeds an image as its mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) * self.weight


def test_precisions_are_those_of_torchreids_evaluation(tiny_data: Path) -> None:
    from torchreid.metrics import compute_distance_matrix, evaluate_rank

    dataset = read_folder_data(f"folder:{tiny_data / FOLDER}")
    query, gallery = dataset.items("query"), dataset.items("gallery")
    trained = Trained(Colours(), "colours", "torchreid", (64, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "", 1)
    found = evaluate(trained, query, gallery)

    from csalr_plugin.hosts.gates import _embed

    distances = compute_distance_matrix(_embed(trained, query), _embed(trained, gallery)).numpy()
    ids, cameras = ([np.array([item[place] for item in one]) for one in (query, gallery)] for place in (1, 2))
    cmc, mean_ap = evaluate_rank(distances, *ids, *cameras, max_rank=1, use_cython=False)
    assert found.mean_precision == pytest.approx(mean_ap, abs=1e-6)
    assert found.rank_1 == pytest.approx(cmc[0], abs=1e-6)


def test_closed_gates_make_the_baseline_and_open_again() -> None:
    torch.manual_seed(0)
    model = build_model("pcb_csalr", 4, pretrained=False).eval()
    for block in model.attention.values():
        nn.init.constant_(block.alpha, 0.5)
    baseline = build_model("pcb", 4, pretrained=False).eval()
    baseline.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(2, 3, 96, 48)
    with torch.no_grad(), closed_gates(model):
        assert set(gates_of(model).values()) == {0.0}
        torch.testing.assert_close(model(images), baseline(images))
    assert gates_of(model) == {"stage1": 0.5, "stage2": 0.5, "stage3": 0.5}
    assert gates_of(baseline) == {}


def test_plain_supervision_puts_branches_on_the_means_of_the_stage_outputs() -> None:
    torch.manual_seed(0)
    model = build_model("pcb", 4, pretrained=False, plain_supervision=True).train()
    logits = model(torch.randn(2, 3, 96, 48))
    outputs, branches = split_logits(model, logits)
    assert len(outputs) == 6 and list(branches) == ["stage1", "stage2", "stage3"]
    terms = loss_terms(model, logits, lambda one: one.square().mean(), 1.0)
    terms.total().backward()
    assert all(parameter.grad is not None for parameter in model.supervision.parameters())
    assert not model.attention
    plain = build_model("pcb", 4, pretrained=False).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(1, 3, 96, 48)
    assert torch.equal(model.eval()(images), plain(images))


def test_plain_supervision_of_a_model_with_attention_is_refused() -> None:
    with pytest.raises(UserError, match=r"csalr\.plain_supervision True is for a model without attention"):
        build_model("pcb_csalr", 4, pretrained=False, plain_supervision=True)


def test_the_automatic_rate_of_gates_follows_the_optimizer() -> None:
    parameters = [nn.Parameter(torch.zeros(()))]
    assert gate_rate("auto", torch.optim.SGD(parameters, lr=0.1)) == 0.1
    assert gate_rate("auto", torch.optim.Adam(parameters)) == 1
    assert gate_rate("0.3", torch.optim.Adam(parameters)) == 0.3


def test_a_warm_up_of_everything_scales_every_group() -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(()))], "lr": 0.1}], lr=0.1)
    with WarmUp(optimizer, 4).at(0):
        assert optimizer.param_groups[0]["lr"] == 0.1
    with WarmUp(optimizer, 4, everything=True).at(0):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_an_interval_covers_queries_and_seeds() -> None:
    rng = np.random.default_rng(1)
    baseline = rng.uniform(0.2, 0.6, (3, 200))
    same = paired_difference(baseline, baseline)
    assert (same.mean, same.low, same.high) == (0, 0, 0) and not same.holds
    better = paired_difference(baseline + 0.05 + rng.normal(0, 0.05, baseline.shape), baseline)
    assert better.low < 5 < better.high and better.holds and str(better).startswith("**+")
    # The seeds disagree: whatever the queries say, the interval holds 0.
    disputed = paired_difference(baseline + np.array([[0.1], [-0.1], [0.02]]), baseline)
    assert disputed.low < 0 < disputed.high and not str(disputed).startswith("**")
    one = paired_difference(baseline[:1] + 0.1 + rng.normal(0, 0.1, (1, 200)), baseline[:1])
    assert (one.seeds, one.queries) == (1, 200) and one.low > 0


def finished(folder: Path, seed: int, precision: float, accuracy: float, closed: float | None = None) -> Path:
    """Write the files of a finished training."""
    place = folder / f"seed{seed}"
    place.mkdir(parents=True)
    measured: dict[str, Any] = {"gates": {}, "AP": [precision, precision + 0.1], "hits": [True, False]}
    if closed is not None:
        measured |= {"gates": {"stage1": -0.2}, "AP_closed": [closed, closed], "hits_closed": [False, False]}
    (place / "queries.json").write_text(json.dumps(measured))
    (place / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "batches": 1, "seconds": 1.0, "acc": accuracy}) + "\n")
    return place


def test_rows_are_paired_by_seed_and_followed_by_their_closed_gates(tmp_path: Path) -> None:
    folders = {
        "pcb": [finished(tmp_path / "pcb", seed, 0.3, 99.0) for seed in (1, 2)],
        "pcb-branches": [finished(tmp_path / "branches", 1, 0.4, 90.0)],
        "pcb_csalr": [finished(tmp_path / "csalr", seed, 0.5, 99.0, closed=0.2) for seed in (1, 2)],
    }
    table = paper()["ablation"]
    rows = {row.name: row for row in ablation_rows(table, folders)}
    assert list(rows) == [
        "PCB",
        "PCB + branches on the plain stage outputs",
        "PCB + CSALR",
        f"PCB + CSALR, {CLOSED}",
    ]
    csalr = rows["PCB + CSALR"]
    assert csalr.differences["PCB"].mean == pytest.approx(20) and csalr.differences["PCB"].seeds == 2
    assert csalr.differences["PCB + branches on the plain stage outputs"].seeds == 1
    assert rows[f"PCB + CSALR, {CLOSED}"].differences["PCB + CSALR"].mean == pytest.approx(-35)
    cells = dict(zip(HEADER, csalr.cells, strict=True))
    assert cells["mAP"] == "55.0 ± 0.0" and cells["largest gate"] == "0.20 ± 0.00" and cells["seeds"] == "2"
    assert "not converged" in rows["PCB + branches on the plain stage outputs"].cells[3]


def test_the_ablation_trains_pcb_its_control_and_each_attention(tmp_path: Path) -> None:
    runs = plan(Options("ablation", tmp_path, preset="drawn", dry_run=True))
    assert [run.name for run in runs] == [row["run"] for row in paper()["ablation"]["rows"]]
    settings = {run.name: run.config for run in runs}
    assert settings["pcb-branches"].model.name == "pcb" and settings["pcb-branches"].csalr.plain_supervision
    assert settings["pcb_csalr-no-branches"].csalr.supervision_weight == 0
    assert all(config.csalr.warmup_all for config in settings.values())


def test_branches_that_learn_nothing_have_no_loss_in_the_report() -> None:
    for weight, losses in ((1.0, [2.0, 3.0]), (0.0, [])):
        about = {"settings": {"csalr.supervision_weight": weight}}
        run = Training("pcb_csalr", "market1501", 1, 1, 1, True, about, None, [], [])
        assert _branches(run, {"epoch": 1, "L_F": 1.0, "L_DS_stage1": 2.0, "L_DS_stage2": 3.0}) == losses


def test_other_images_in_the_layout_of_a_dataset_do_not_bear_its_name(tmp_path: Path) -> None:
    (run,) = plan(Options("ablation", tmp_path, preset="drawn", only=("pcb",), dry_run=True))
    about = {"settings": run.settings}
    assert source("market1501", [Training("pcb", "market1501", 1, 1, 0, False, about, None, [], [])]) == (
        "other data in the layout of market1501"
    )
    market1501 = {"identities": 751, "training": 12936, "query": 3368, "gallery": 15913}
    about["settings"] = {**run.settings, "data": market1501}  # with other settings than the paper's
    assert source("market1501", [Training("pcb", "market1501", 1, 1, 0, False, about, None, [], [])]) == "market1501"


def test_a_cast_changes_the_colours_and_no_cast_changes_nothing(tmp_path: Path) -> None:
    few = {"train_identities": 2, "test_identities": 1, "train_images": 1, "gallery_images": 2, "distractors": 0}
    plain, again, cast = (
        sorted((make_demo_data(tmp_path / name, cast=value, **few) / FOLDER).rglob("*.jpg"))
        for name, value in (("plain", 0.0), ("again", 0.0), ("cast", 0.5))
    )
    assert [one.name for one in plain] == [one.name for one in cast]
    assert [one.read_bytes() for one in plain] == [one.read_bytes() for one in again]
    assert all(one.read_bytes() != other.read_bytes() for one, other in zip(plain, cast, strict=True))
    with pytest.raises(UserError, match=r"cast is 1\.0; give 0 to 0.9"):
        make_demo_data(tmp_path / "bad", cast=1.0, **few)
