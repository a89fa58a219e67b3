"""The study of the paper: its rows, its runs, its report, its maps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from csalr_plugin.commands import main
from csalr_plugin.projects.paper import study

# Typed from the paper: Table 1, R-1 R-5 R-10 mAP on Market-1501, DukeMTMC-reID, CUHK03-NP; _ where it has none.
TABLE1 = """
DuATM           91.4 97.1 _ 76.6       81.8 90.1 _ 64.6       _ _ _ _
Mancs           93.1 _ _ 82.3          84.9 _ _ 71.8          65.5 _ _ 60.5
SphereReID      94.4 98.0 98.7 83.6    83.9 90.6 92.4 68.5    _ _ _ _
PCB             92.3 97.2 98.2 77.4    81.7 89.7 91.9 66.1    59.7 77.7 85.2 53.2
PCB + SA        93.8 97.7 98.5 82.2    85.3 92.7 94.8 73.4    65.9 82.3 88.4 62.7
PCB + CSA       93.7 98.2 98.8 82.3    85.5 92.8 94.5 73.5    67.2 83.9 88.9 63.7
PCB + CSALR     93.9 97.8 98.6 82.4    86.1 93.2 95.1 74.0    67.6 82.4 88.4 64.0
PCB-RPP         93.8 97.5 98.5 81.6    83.3 90.5 92.5 69.2    62.8 79.8 86.8 56.7
PCB-RPP + SA    93.3 97.5 98.7 83.2    84.9 92.8 94.7 72.9    66.1 84.0 89.0 64.6
PCB-RPP + CSA   93.9 97.8 98.8 83.5    85.4 93.1 94.5 73.1    67.4 83.6 89.1 65.0
PCB-RPP + CSALR 94.0 98.1 98.8 83.8    85.4 93.3 95.0 73.8    68.8 84.4 89.1 65.3
"""
# Tables 2 to 4: R-1 mAP on Market-1501 and DukeMTMC-reID, with the setting that the row varies.
OTHERS = """
table2 csalr.landmarks 6x4       93.6 82.1    85.5 73.5
table2 csalr.landmarks 12x4      93.8 82.3    85.8 73.8
table2 csalr.landmarks 12x8      93.9 82.4    86.1 74.0
table2 csalr.landmarks 24x8      93.9 82.6    86.3 74.2
table3 csalr.groups 1            93.6 82.0    85.8 73.8
table3 csalr.groups 2            93.9 82.4    86.1 74.0
table3 csalr.groups 4            93.7 82.3    86.0 73.8
table3 csalr.groups 8            93.6 82.1    85.7 73.6
table4 model.name pcb            92.3 77.4    81.7 66.1
table4 csalr.stages 1            93.3 81.4    84.8 73.0
table4 csalr.stages 2x3          92.9 80.9    84.4 72.3
table4 csalr.stages 1x2x3        93.9 82.4    86.1 74.0
"""
# Table 5: megabytes an image, images a second.
TABLE5 = ((137.64, 581.81), (300.68, 266.67), (165.00, 507.93), (192.25, 460.43), (221.97, 418.30), (254.75, 380.95))
DATASETS = ("market1501", "dukemtmcreid", "cuhk03")
TINY = ("data.height", "32", "data.width", "16", "train.max_epoch", "2")


def numbers(words: list[str]) -> list[float | None]:
    return [None if word == "_" else float(word) for word in words]


def refusal(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The one line that the command refuses `words` with."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if line.startswith("csalr: error: ")]
    assert len(lines) == 1 and said[-1] == lines[0], said
    assert "Traceback" not in "\n".join(said)
    return lines[0]


def cells(out: Path) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    found = json.loads((out / "report.json").read_text())["cells"]
    return {(one["table"], one["row"], one["dataset"], one["metric"]): one for one in found}


def test_table_1_s_rows_hold_every_number_of_the_paper() -> None:
    rows = study.paper()["tables"]["table1"]["rows"]
    typed = [re.split(r"\s{2,}|(?<=[A-Za-z])\s(?=[\d_])", line, maxsplit=1) for line in TABLE1.strip().splitlines()]
    assert [row["name"] for row in rows] == [name for name, _ in typed]
    for row, (_, line) in zip(rows, typed, strict=True):
        values = numbers(line.split())
        for number, dataset in enumerate(DATASETS):
            assert row.get(dataset, [None] * 4) == values[4 * number : 4 * number + 4], (row["name"], dataset)
    assert [row["name"] for row in rows if "run" not in row] == ["DuATM", "Mancs", "SphereReID"]


def test_the_rows_of_tables_2_to_4_hold_every_number_of_the_paper_and_the_setting_that_they_vary() -> None:
    rows = [(table, row) for table in ("table2", "table3", "table4") for row in study.paper()["tables"][table]["rows"]]
    typed = [line.split() for line in OTHERS.strip().splitlines()]
    for (table, row), (wanted, key, value, *values) in zip(rows, typed, strict=True):
        assert table == wanted
        setting = study.paper()["runs"][row["run"]][key]
        assert ("x".join(map(str, setting)) if isinstance(setting, list) else str(setting)) == value
        assert row["market1501"] + row["dukemtmcreid"] == numbers(values)


def test_table_5_s_rows_hold_every_number_of_the_paper() -> None:
    assert tuple(tuple(row["paper"]) for row in study.paper()["costs"]["rows"]) == TABLE5


def test_the_full_preset_is_the_paper_s_settings_and_deviates_in_nothing_on_the_paper_s_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counts = {"identities": 751, "training": 12936, "query": 3368, "gallery": 15913}
    monkeypatch.setattr(study, "dataset_counts", lambda name, root: counts)
    options = study.Options("all", tmp_path / "out", root=tmp_path, preset="full")
    for run in study.plan(options):
        config = run.config
        assert (config.data.height, config.data.width, config.data.transforms) == (384, 128, ["random_flip"])
        train = config.train
        assert (train.optim, train.lr, train.weight_decay, config.sgd.momentum) == ("sgd", 0.1, 1e-4, 0.9)
        assert (train.batch_size, train.max_epoch, train.stepsize, train.gamma) == (64, 100, [40], 0.1)
        assert train.staged_lr and train.base_lr_mult == 0.1
        assert not config.loss.softmax.label_smooth and not config.test.rerank
        assert config.csalr.supervision_weight == 1.0 and config.csalr.rpp.pcb_epochs == 40
        assert not config.cuhk03.labeled_images and not config.cuhk03.classic_split
        assert run.deviations == ()
    other = study.plan(
        study.Options("table1", tmp_path / "out", tmp_path, preset="full", overrides=("train.lr", "0.05"))
    )
    assert other[0].deviations == ("train.lr 0.05 (paper: 0.1)",)


def test_all_tables_share_their_runs() -> None:
    names = study.run_names("all")
    assert len(names) == len(set(names)) == 16
    assert study.run_names("table4") == ("pcb", "pcb_csalr-stage-1", "pcb_csalr-stages-2-3", "pcb_csalr")
