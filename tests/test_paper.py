"""The study of the paper: rows, trainings, report and attention maps."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from csalr_plugin.commands import main
from csalr_plugin.files import write_json
from csalr_plugin.projects.paper import plan
from csalr_plugin.projects.paper.folder import COST, RESULT, RUN, STUDY, epochs_done
from csalr_plugin.version import __version__

# Copied from the paper: Table 1, R-1 R-5 R-10 mAP on Market-1501, DukeMTMC-reID, CUHK03-NP; _ is a missing number.
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
TINY = ("data.height", "32", "data.width", "16", "train.max_epoch", "2", "train.batch_size", "16")


def numbers(words: list[str]) -> list[float | None]:
    return [None if word == "_" else float(word) for word in words]


def refusal(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """Return the error of a command, which must be one line."""
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


def test_the_rows_of_table_1_hold_every_number_of_the_paper() -> None:
    rows = plan.paper()["tables"]["table1"]["rows"]
    typed = [re.split(r"\s{2,}|(?<=[A-Za-z])\s(?=[\d_])", line, maxsplit=1) for line in TABLE1.strip().splitlines()]
    assert [row["name"] for row in rows] == [name for name, _ in typed]
    for row, (_, line) in zip(rows, typed, strict=True):
        values = numbers(line.split())
        for number, dataset in enumerate(DATASETS):
            assert row.get(dataset, [None] * 4) == values[4 * number : 4 * number + 4], (row["name"], dataset)
    assert [row["name"] for row in rows if "run" not in row] == ["DuATM", "Mancs", "SphereReID"]


def test_the_rows_of_tables_2_to_4_hold_every_number_of_the_paper_and_the_setting_that_they_vary() -> None:
    rows = [(table, row) for table in ("table2", "table3", "table4") for row in plan.paper()["tables"][table]["rows"]]
    typed = [line.split() for line in OTHERS.strip().splitlines()]
    for (table, row), (wanted, key, value, *values) in zip(rows, typed, strict=True):
        assert table == wanted
        setting = plan.paper()["runs"][row["run"]][key]
        assert ("x".join(map(str, setting)) if isinstance(setting, list) else str(setting)) == value
        assert row["market1501"] + row["dukemtmcreid"] == numbers(values)


def test_the_rows_of_table_5_hold_every_number_of_the_paper() -> None:
    assert tuple(tuple(row["paper"]) for row in plan.paper()["costs"]["rows"]) == TABLE5


def test_the_full_preset_has_the_settings_of_the_paper_and_no_deviations_on_its_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counts = {"identities": 751, "training": 12936, "query": 3368, "gallery": 15913}
    monkeypatch.setattr(plan, "dataset_counts", lambda name, root: counts)
    options = plan.Options("all", tmp_path / "out", root=tmp_path, preset="full")
    for run in plan.plan(options):
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
    other = plan.plan(plan.Options("table1", tmp_path / "out", tmp_path, preset="full", overrides=("train.lr", "0.05")))
    assert other[0].deviations == ("train.lr 0.05 (paper: 0.1)",)


@pytest.mark.parametrize("preset", ["full", "small"])
def test_the_new_layers_of_a_preset_fit_every_row(tmp_path: Path, preset: str) -> None:
    from csalr_plugin.hosts.torchreid.optimizer import build_optimizer
    from csalr_plugin.models import build_model

    only = ("pcb", "pcb_rpp_csalr")
    options = plan.Options("table1", tmp_path / "out", tmp_path / "none", preset=preset, only=only, dry_run=True)
    for run in plan.plan(options):
        with torch.device("meta"):
            model = build_model(run.config.model.name, 2, pretrained=False)
        train = run.config.train
        assert train.staged_lr
        optimizer = build_optimizer(model, optim="sgd", lr=train.lr, staged_lr=True, new_layers=train.new_layers)
        rate_of = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
        assert rate_of[id(model.classifier[0].weight)] == train.lr > rate_of[id(model.conv1.weight)]
        if hasattr(model, "part_classifier"):
            assert rate_of[id(model.part_classifier.weight)] == train.lr


def test_all_tables_share_their_runs() -> None:
    names = plan.run_names("all")
    assert len(names) == len(set(names)) == 16
    assert plan.run_names("table4") == ("pcb", "pcb_csalr-stage-1", "pcb_csalr-stages-2-3", "pcb_csalr")


def test_the_smoke_preset_ends_in_a_report_of_every_row_without_any_accuracy(tmp_path: Path) -> None:
    out = tmp_path / "study"
    assert main(["reproduce", "all", "--preset", "smoke", "--out", str(out), *TINY]) == 0
    found = cells(out)
    trained = {key: one for key, one in found.items() if key[0] != "table5" and one["state"] != "quoted"}
    assert len(trained) == 8 * 4 + 3 * 4 * 2
    assert all(one["state"] == "1 seed" for one in trained.values())
    for one in (one for key, one in found.items() if key[0] != "table5"):
        assert one["ours"] is one["difference"] is one["standard_deviation"] is None
    measured = [one for key, one in found.items() if key[0] == "table5"]
    assert all(one["state"] == "measured" and one["ours"] > 0 and not one["papers_settings"] for one in measured)
    assert len(list(out.glob("runs/*/seed1/result.json"))) == 16
    assert len(list(out.glob("figure4/market1501/pcb_csalr/*.png"))) == 3 + 1  # three queries and the errors
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    for report in (text, re.sub(r'base64,[^"]+', "", page), (out / "report.tex").read_text()):
        assert re.search(r"PCB \+ CSALR(\W|td)+trained", report) and "mAP" not in report and "rank-" not in report
    assert "no accuracy is printed" in text and not list(out.glob("pictures/cost-*"))
    assert page.count('src="figure4/market1501/pcb_csalr/') == 3
    assert "data.height 32 (paper: 384)" in text and "the dataset is not Market-1501" in text
    assert "csalr train --config-file" in text and "torch " in text and "cores" in text
    assert page.count("data:image/png;base64,") >= 5 and "http" not in page
    rows = list(csv.DictReader((out / "report.csv").open()))
    assert len(rows) == len(found)

    # Remove half of the results: the report leaves these cells empty.
    (out / "runs/market1501-pcb_sa/seed1/result.json").unlink()
    next(out.glob("runs/market1501-pcb_sa/seed1/model/*")).rename(
        out / "runs/market1501-pcb_sa/seed1/model/model.pth.tar-1"
    )
    (out / "runs/market1501-pcb_csa").rename(tmp_path / "elsewhere")
    assert main(["reproduce", "all", "--out", str(out), "--report"]) == 0
    half, text = cells(out), (out / "report.md").read_text()
    assert "**This study is not finished.**" in text
    for row, state in (("PCB + SA", "epoch 1 of 2"), ("PCB + CSA", "not run")):
        assert half["table1", row, "market1501", "mAP"]["ours"] is None
        assert half["table1", row, "market1501", "mAP"]["state"] == state
        assert re.search(rf"\| {re.escape(row)} +\| {state}", text)
    assert half["table1", "PCB", "market1501", "mAP"] == found["table1", "PCB", "market1501", "mAP"]
    assert "14 of 15 trainings are done" in text
    for checkpoint in tmp_path.rglob("model.pth.tar-*"):  # they take gigabytes
        checkpoint.unlink()


def test_a_killed_study_continues_to_the_same_results_as_an_undisturbed_one(tiny_data: Path, tmp_path: Path) -> None:
    def results(out: Path) -> dict[str, float]:
        (path,) = out.glob(f"runs/*/seed1/{RESULT}")
        found: dict[str, float] = json.loads(path.read_text())["results"]
        return found

    def words(out: Path) -> list[str]:
        given = ["reproduce", "table4", "--only", "pcb_csalr-stage-1", "--preset", "smoke", "--root", str(tiny_data)]
        return [*given, "--out", str(out), *TINY]

    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    process = subprocess.Popen([sys.executable, "-m", "csalr_plugin", *words(killed)], start_new_session=True)
    folder = killed / "runs/market1501-pcb_csalr-stage-1/seed1"
    limit = time.monotonic() + 120
    while not (folder / "model/model.pth.tar-1").exists():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert epochs_done(folder) == 1 and not (folder / "result.json").exists()
    assert main(words(killed)) == 0
    assert main(words(undisturbed)) == 0
    assert results(killed) == results(undisturbed) and cells(killed) == cells(undisturbed)
    assert "Resumed from" in (folder / "console.log").read_text()
    # A training that was killed between its last epoch and its results is evaluated from its last checkpoint.
    (folder / "result.json").unlink()
    (folder / "results_market1501.json").unlink()
    assert main(words(killed)) == 0
    assert results(killed) == results(undisturbed) and cells(killed) == cells(undisturbed)
    assert [path.name for path in (folder / "model").iterdir()] == ["model.pth.tar-2"]
    # Finished trainings are not repeated.
    before = {path: path.stat().st_mtime_ns for path in (killed / "runs").rglob("*")}
    assert main(words(killed)) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (killed / "runs").rglob("*")}


def test_dry_run_prints_valid_training_commands(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    from csalr_plugin.hosts.torchreid.arguments import config_from_arguments, parse_arguments

    words = ["table3", "--preset", "small", "--root", str(tiny_data), "--out", str(tmp_path / "out"), "--seeds", "2"]
    assert (
        main(["reproduce", *words, "--only", "pcb_csalr-8-groups", "pcb_csalr", "csalr.amp", "none", "--dry-run"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not (tmp_path / "out").exists()
    configs = [config_from_arguments(parse_arguments(shlex.split(line)[2:], "csalr train")) for line in lines]
    assert [(config.csalr.groups, config.train.seed) for config in configs] == [(2, 1), (8, 1), (2, 2), (8, 2)]
    assert all(config.csalr.amp == "none" and config.data.height == 128 for config in configs)


def made_up_study(out: Path, preset: str, scores: dict[str, list[float | None]], deviations: list[str]) -> str:
    """Write the files of a study of trainings with the given mAP, one per seed, and return its report."""
    counts = {"identities": 751, "training": 12936, "query": 3368, "gallery": 15913}
    for name, values in scores.items():
        for seed, score in enumerate(values, start=1):
            folder = out / f"runs/market1501-{name}" / f"seed{seed}"
            folder.mkdir(parents=True)
            about = {"name": name, "dataset": "market1501", "seed": seed, "epochs": 9, "command": "c"}
            settings = {"model.name": "pcb", "csalr.groups": 2, "csalr.landmarks": [12, 8], "csalr.stages": [1]}
            settings |= {"csalr.key_ratio": 0.25, "data": counts, "data.height": 64, "data.width": 32}
            write_json(folder / RUN, {**about, "deviations": deviations, "settings": settings})
            if score is not None:
                result = {"results": {"mAP": score, "rank-1": score}, "versions": {"torch": "2"}, "machine": "m"}
                write_json(folder / RESULT, result)
                lines = [{"epoch": 9, "loss": 1.0, "seconds": 1}, {"epoch": 9, "dataset": "market1501", "mAP": score}]
                (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(out / STUDY, {"version": __version__, "preset": preset})
    assert main(["reproduce", "table1", "--out", str(out), "--report"]) == 0
    return (out / "report.md").read_text()


def test_several_seeds_give_mean_standard_deviation_and_the_state_of_each(tmp_path: Path) -> None:
    text = made_up_study(tmp_path, "full", {"pcb": [0.5, 0.6, None]}, [])
    one = cells(tmp_path)["table1", "PCB", "market1501", "mAP"]
    assert (one["ours"], one["seeds"], one["papers_settings"]) == (pytest.approx(55.0), 2, True)
    assert one["standard_deviation"] == pytest.approx(50**0.5)
    assert one["state"] == "seed 1: done, seed 2: done, seed 3: not run"
    assert one["difference"] == pytest.approx(55.0 - 77.4)
    assert re.search(r"\| 55\.0 ± 7\.1 +\| 77\.4 +\| -22\.4 ", text)  # and no mark


def test_every_number_stands_beside_its_queries_and_seeds_and_no_other_preset_is_compared_with_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[str] = []
    save = Figure.savefig

    def record(figure: Figure, *args: Any, **options: Any) -> None:
        drawn.append(" ".join([figure.get_suptitle(), *(axis.get_title() for axis in figure.axes)]))
        legend = [text.get_text() for one in figure.legends for text in one.get_texts()]
        assert set(legend) <= {"PCB", "PCB + CSALR", "PCB + SA"}  # as in the table
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    scores: dict[str, list[float | None]] = {"pcb": [0.5, 0.6], "pcb_csalr": [0.55, 0.63], "pcb_sa": [0.7]}
    text = made_up_study(tmp_path, "small", scores, ["data.height 64 (paper: 384)"])
    assert len(drawn) == 2 and all("preset small, 3368 queries, 2 seeds" in title for title in drawn)
    titles = [line for line in text.splitlines() if line.startswith("#") and "Table 1" in line]
    assert titles == ["## Table 1: with and without attention (market1501: 3368 queries, 2 seeds)"]
    assert text.splitlines()[0].endswith("(preset small; market1501: 3368 queries, 2 seeds)")
    # Our gain is paired by seed: 5 and 3. The paper's +5.0 is not beside it.
    assert re.search(r"\| PCB \+ CSALR +\| [^|]+\| [^|]+\| [^|]+\| \+4\.0 ± 1\.4\\\* +\|\n", text)
    assert "difference |" not in text and all(one["difference"] is None for one in cells(tmp_path).values())
    # The largest mean of two seeds is bold, and the larger value of one seed is not.
    assert r"**59.0 ± 5.7\***" in text and r"| 70.0\* " in text
    # Only Table 1 was asked for.
    assert not re.search(r"^## (Table [2-5]|Figure)", text, re.MULTILINE) and len(cells(tmp_path)) == 11 * 4


def test_the_report_has_contents_tables_that_scroll_and_a_latex_export(tmp_path: Path) -> None:
    text = made_up_study(tmp_path, "full", {"pcb": [0.5], "pcb_csa": [0.6]}, [])
    page, latex = (tmp_path / "report.html").read_text(), (tmp_path / "report.tex").read_text()
    assert '<meta name="viewport"' in page and page.count("<table>") == page.count('<div class="scroll"') == 4
    for anchor in re.findall(r'<a href="#([^"]+)"', page):
        assert f'id="{anchor}"' in page and f"(#{anchor})" in text
    assert "<b>60.0</b>" in page and "<b>83.8</b>" in page and r"\textbf{60.0}" in latex
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == latex.count(r"\end{table}") == 3
    assert not re.search(r"(?<!\\)[%_#]", latex.split("\n", 2)[2])
    for line in latex.splitlines():
        if line.startswith("PCB"):
            assert line.count("&") in (13, 8, 3)  # all columns of the table, of the gains, and of the costs


@pytest.fixture
def begun(tiny_data: Path, tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A study's folder with a training in it, and the arguments that continue it; tests must not change its files."""
    out = tmp_path / "study"
    options = plan.Options("table1", out, tiny_data, preset="smoke", only=("pcb",))
    (run,) = plan.plan(options)
    (run.folder / "model").mkdir(parents=True)
    (run.folder / "model/model.pth.tar-1").write_bytes(b"trained for a week")
    write_json(out / STUDY, {"version": __version__, "preset": "smoke"})
    write_json(run.folder / RUN, {"settings": run.settings})
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    yield (
        out,
        ["reproduce", "table1", "--root", str(tiny_data), "--preset", "smoke", "--only", "pcb", "--out", str(out)],
    )
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after.items() >= {key: value for key, value in before.items() if key.name != STUDY}.items()


def test_a_folder_of_another_version_is_refused(
    begun: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = begun
    write_json(out / STUDY, {"version": "0.0.9", "preset": "smoke"})
    line = refusal(capsys, *words)
    assert "0.0.9" in line and __version__ in line and "another" in line


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("train.lr", "0.5"), ("train.lr 0.01, now 0.5", "another --out")),
        (("--preset", "small"), ("the preset smoke", "small")),
        (("--only", "pcb_csarl"), ("pcb_csarl", "'pcb_csalr'")),
        (("csalr.groups", "4"), ("csalr.groups", "--only")),
        (("csalr.warmups", "4"), ("csalr.warmups", "'csalr.warmup'")),
        (("--dataset", "dukemtmcreid"), ("dukemtmcreid", "is missing")),
        (("--dataset", "duke"), ("'duke'", "dukemtmcreid")),
        (("--seeds", "0"), ("--seeds: '0' must be",)),
        (("--weights", "none.pth"), ("none.pth",)),
    ],
)
def test_a_study_that_cannot_be_continued_is_one_line_and_changes_no_file(
    begun: tuple[Path, list[str]],
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    expected: tuple[str, ...],
) -> None:
    line = refusal(capsys, *begun[1], *more)
    assert all(part in line for part in expected), line


def test_two_studies_never_write_into_one_folder(
    begun: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = begun
    with FileLock(out / ".lock"):
        assert "in use by another study" in refusal(capsys, *words)


def test_the_folder_of_a_running_training_is_not_overwritten(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FileLock(tmp_path / ".lock"):
        words = ["--config-file", "configs/torchreid/pcb_demo_64x32_adam.yaml", "--root", str(tiny_data)]
        line = refusal(capsys, "train", *words, "data.save_dir", str(tmp_path))
    assert "being written by another training" in line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("table9",), ("table9", "table1")),
        (("table1",), ("--root is missing",)),
        (("table1", "--preset", "smoke", "--dataset", "cuhk03"), ("smoke", "does not fit", "cuhk03")),
        (("table1", "--preset", "smal"), ("smal", "'small'")),
        (("table1", "--report"), ("no study",)),
    ],
)
def test_a_study_that_cannot_begin_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    line = refusal(capsys, "reproduce", "--out", tmp_path / "out", *words)
    assert all(part in line for part in expected), line


def test_a_preset_that_does_not_fit_the_dataset_is_one_line(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("table1", "--preset", "full", "--root", tiny_data, "--out", tmp_path / "out")
    line = refusal(capsys, "reproduce", *words)
    assert "does not fit the dataset" in line and "train.batch_size is 64" in line and "44 training images" in line
    assert not (tmp_path / "out" / "runs").exists()


def test_a_folder_with_other_files_is_refused(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    words = ("table1", "--preset", "smoke", "--root", tiny_data, "--out", tmp_path)
    assert "holds files that belong to no study" in refusal(capsys, "reproduce", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


class OneBlock(torch.nn.Module):
    """A network of one block, whose input is the first channel of the images."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.attention = torch.nn.ModuleDict({"stage1": block})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.attention["stage1"](images[:, :1])


def known_block(landmarks: tuple[int, int] = (4, 2)) -> torch.nn.Module:
    """Build a CSALR block over one channel with Q = K = x."""
    from csalr_plugin.attention import CSALR

    block = CSALR(1, groups=1, landmarks=landmarks, key_ratio=1.0).fold().eval()
    with torch.no_grad():
        for projection in (block.query, block.key):
            projection.weight.fill_(1.0)
            projection.bias.fill_(0.0)
    return block


def test_full_and_compressed_maps_of_a_two_coloured_image_equal_the_closed_form() -> None:
    from csalr_plugin.attention.maps import maps_of

    height, width, b = 8, 4, 0.7
    n = height * width
    x = torch.full((1, 1, height, width), b)
    x[:, :, height // 2 :] = -b
    maps = maps_of(known_block(), x)
    same, other = torch.tensor(b * b).double().exp(), torch.tensor(-b * b).double().exp()
    value = torch.where(x.flatten()[:, None] * x.flatten() > 0, same, other) / (n / 2 * (same + other))
    torch.testing.assert_close(maps.full[0, 0], value, rtol=1e-6, atol=0)
    # x is constant within the patch of each landmark, so the factors give the full map exactly.
    torch.testing.assert_close(maps.compressed[0, 0], value, rtol=1e-6, atol=1e-9)
    rows = torch.tensor([3, 30])
    torch.testing.assert_close(maps_of(known_block(), x, rows=rows).compressed, maps.compressed[:, :, rows])


def test_compressed_maps_times_values_are_the_outputs_of_the_blocks() -> None:
    from csalr_plugin.attention import build_attention
    from csalr_plugin.attention.maps import maps_of

    torch.manual_seed(0)
    x = torch.randn(2, 16, 9, 5, dtype=torch.float64)
    for name in ("sa", "csa", "csalr"):
        block = build_attention(name, 16, groups=2, landmarks=(3, 2)).eval().double().fold()
        maps = maps_of(block, x)
        V = block.value(x).reshape(2, block.groups, -1, 9 * 5)  # B, groups, c, n
        chosen = maps.full if name == "sa" else maps.compressed
        attended = (chosen @ V.mT).mT.reshape(x.shape)
        torch.testing.assert_close(block.fuse(attended) if block.groups > 1 else attended, block.attend(x))
        torch.testing.assert_close(maps.full.sum(-1), torch.ones_like(maps.full.sum(-1)))


def test_the_control_of_pooled_keys_spreads_the_weight_of_a_landmark_over_its_patch() -> None:
    from csalr_plugin.attention import LandmarkGrid
    from csalr_plugin.attention.maps import pooled_key_map

    Q = K = torch.tensor([0.0, 0.0, 2.0, 4.0]).double().reshape(1, 1, 1, 4)
    found = pooled_key_map(Q, K, LandmarkGrid(1, 4, (1, 2), torch.device("cpu")))[0, 0]
    share = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 6.0], [0.0, 12.0]]).double().softmax(-1)
    torch.testing.assert_close(found, share.repeat_interleave(2, dim=1) / 2)


@pytest.fixture
def two_coloured(tmp_path: Path) -> tuple[Any, Path]:
    """A network of one block with Q = K = x, for images of 8x4, and an image with x = 0 above x = 1."""
    from PIL import Image

    from csalr_plugin.projects.paper.attention_maps import Network

    picture = torch.zeros(8, 4, 3, dtype=torch.uint8)
    picture[4:] = 255
    Image.fromarray(picture.numpy()).save(tmp_path / "person.png")
    network = Network(OneBlock(known_block()).eval(), "one", (8, 4), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return network, tmp_path / "person.png"


def test_figure_4_is_drawn_for_a_block_whose_map_is_known(
    two_coloured: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from csalr_plugin.projects.paper import attention_maps

    network, person = two_coloured
    shown: list[torch.Tensor] = []
    original = attention_maps._show
    monkeypatch.setattr(
        attention_maps,
        "_show",
        lambda axis, image, values, *rest: (shown.append(values), original(axis, image, values, *rest)),
    )
    options = {"points": [(0.5, 0.9)], "grid": True, "panels": attention_maps.PANELS, "smooth": True}
    drawn = attention_maps.draw(network, person, tmp_path / "maps", formats=("png", "svg"), **options)
    e = torch.tensor(1.0).double().exp()
    top, bottom = (1 / (16 * (1 + e))).item(), (e / (16 * (1 + e))).item()
    wanted = torch.tensor([top] * 16 + [bottom] * 16).double().reshape(8, 4)
    for values, expected in zip(shown, (wanted, wanted, torch.zeros(8, 4).double()), strict=True):
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-9)
    assert [path.name for path in drawn] == ["person.png", "person.svg"]
    assert Image.open(drawn[0]).size[0] > 400


def test_the_measured_errors_of_a_known_map_and_of_a_uniform_one_equal_the_closed_form(
    two_coloured: tuple[Any, Path], tmp_path: Path
) -> None:
    from csalr_plugin.projects.paper import attention_maps

    network, person = two_coloured
    rows = attention_maps.reconstruction(network, [person])
    found = {(row["map"], row["points"]): row for row in rows if row["groups"] == 1}
    # x is constant within each patch, so all of these maps are exact.
    for name in ("CSALR", "pooled keys", "pooled queries", attention_maps.KEYS_AVERAGED):
        row = found[name, 8]
        assert row["error"] < 1e-6 and row["output_error"] < 1e-6 and row["agreement"] == 1.0
    assert found[attention_maps.PERFECT, None]["error"] == 0 and found["CSALR", 8]["below_floor"] == 0
    # Of 32 queries, 16 with x = 0 have a uniform row. The others weigh x = 1 by `more` and x = 0 by `less`.
    e = torch.tensor(1.0).double().exp().item()
    less, more = 1 / (16 * (1 + e)), e / (16 * (1 + e))
    n, uniform = 32, found[attention_maps.UNIFORM, None]
    difference, whole = (less - 1 / n) ** 2 + (more - 1 / n) ** 2, less**2 + more**2 + 2 / n**2
    assert uniform["error"] == pytest.approx((difference / whole) ** 0.5)
    block = network.blocks["stage1"]
    w, b = block.value.weight.item(), block.value.bias.item()
    outputs = w / 2 + b, w * e / (1 + e) + b
    wanted = abs(outputs[1] - outputs[0]) / (outputs[0] ** 2 + outputs[1] ** 2) ** 0.5
    assert uniform["output_error"] == pytest.approx(wanted, rel=1e-5)
    assert uniform["agreement"] == pytest.approx(0.75)  # all 8 patches are equal; 16 queries attend most to 4 of them
    text = attention_maps.write_reconstruction(tmp_path, network, 1, rows)
    assert "one, initial weights, images of 8x4; 1 image; gates: stage1 +0.0000." in text
    assert f"uniform map has a map error of {uniform['error']:.1%}" in text and "They keep every query" in text
    assert (tmp_path / "reconstruction-one.png").is_file()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    from csalr_plugin.models import build_model

    folder = tmp_path_factory.mktemp("checkpoints")
    Image.new("RGB", (16, 32)).save(folder / "person.jpg")
    size = {"data.height": 48, "data.width": 16}
    for name, settings in (("pcb", {}), ("pcb_csa", size)):
        content = {"state_dict": build_model(name, 2, pretrained=False).state_dict(), "settings": settings}
        torch.save(content, folder / f"{name}.pth")
    return folder


def test_maps_are_of_the_model_and_the_image_size_that_the_checkpoint_records(checkpoints: Path) -> None:
    from csalr_plugin.hosts.torchreid.arguments import Arguments
    from csalr_plugin.projects.paper.attention_maps import load_network

    network = load_network(checkpoints / "pcb_csa.pth")
    assert network.title == "pcb_csa, pcb_csa.pth, images of 48x16"
    assert network.images([checkpoints / "person.jpg"]).shape == (1, 3, 48, 16)
    assert load_network(checkpoints / "pcb_csa.pth", Arguments(overrides=["data.width", "32"])).size == (48, 32)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--checkpoint", "pcb_csa.pth", "MODEL.NAME", "pcb_csalr"), ("with attention csa", "has attention csalr")),
        (("--checkpoint", "pcb.pth"), ("'pcb' has no attention", "pcb_csalr")),
        (("--checkpoint", "pcb.pth", "MODEL.NAME", "pcb_sa"), ("of another network than pcb_sa", "attention")),
        (("--panels", "ful"), ("'ful'", "full, compressed, difference")),
        (("--formats", "gif"), ("'gif'", "png, pdf, svg")),
        (("--colours", "infern"), ("'infern'", "'inferno'")),
        (("--checkpoint", "none.pth"), ("none.pth", "not a file")),
        (("MODEL.NAME", "pcb"), ("'pcb' has no attention",)),
        (("--points", "0.5,1.5"), ("0.5,1.5", "0 to below 1")),
        (("--image", "note.txt"), ("note.txt", "not an image")),
        (("--root", "."), ("either images", "--root")),
        (("--image", "a/person.jpg", "b/person.jpg"), ("'person'", "--out")),
    ],
)
def test_maps_that_cannot_be_drawn_are_one_line(
    checkpoints: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    expected: tuple[str, ...],
) -> None:
    monkeypatch.chdir(checkpoints)
    Path("note.txt").write_text("not an image")
    given = () if "--image" in more else ("--image", "person.jpg")
    line = refusal(capsys, "attention-maps", "--out", "maps", *given, *more, "model.pretrained", "False")
    assert all(part in line for part in expected), line


def test_metrics_of_a_repeated_epoch_replace_the_earlier_ones_and_an_incomplete_line_is_ignored(tmp_path: Path) -> None:
    from csalr_plugin.hosts.records import read_metrics

    lines = [{"epoch": 1, "loss": 9.0}, {"epoch": 2, "loss": 8.0}, {"epoch": 2, "dataset": "d", "mAP": 0.1}]
    lines += [{"epoch": 2, "loss": 7.0}, {"epoch": 2, "dataset": "d", "mAP": 0.2}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 3, "lo')
    epochs, evaluations = read_metrics(path)
    assert [(line["epoch"], line["loss"]) for line in epochs] == [(1, 9.0), (2, 7.0)]
    assert [line["mAP"] for line in evaluations] == [0.2]
    assert read_metrics(tmp_path / "none") == ([], [])


def test_tensorboard_has_losses_gates_rates_heads_maps_and_the_optional_projector(
    tiny_data: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["train", "--config-file", "configs/torchreid/pcb_384x128_sgd.yaml", "--root", str(tiny_data)]
    words += ["data.height", "64", "data.width", "32", "train.max_epoch", "1", "train.batch_size", "8"]
    words += ["model.pretrained", "False", "data.workers", "0", "csalr.stages", "2,3", "data.save_dir", str(tmp_path)]
    assert main([*words, "csalr.tensorboard.maps_every", "1", "csalr.tensorboard.projector", "True"]) == 0
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    heads = [f"Epoch/accuracy_{name}" for name in ("part1", "part6", "stage2", "stage3")]
    rates = [f"Epoch/lr_{name}" for name in ("backbone", "new", "attention", "gate")]
    assert tags.issuperset({"Train/L_F", "Train/L_DS_stage2", "Train/alpha_stage3", *heads, *rates})
    assert events.Scalars("Epoch/lr_gate")[0].value == pytest.approx(0.01)
    assert set(events.Tags()["images"]) == {"Maps/stage2", "Maps/stage3"}
    assert (tmp_path / "projector_config.pbtxt").is_file()
    (line,) = (line for line in map(json.loads, (tmp_path / "metrics.jsonl").open()) if "batches" in line)
    assert line["L_F"] > 0 and "alpha_stage2" in line and 0 <= line["accuracy_part1"] <= 100


def test_table_5_has_the_results_of_the_bench_and_their_change_from_pcb(tmp_path: Path) -> None:
    out = tmp_path / "study"
    (out / "cost").mkdir(parents=True)
    summary = {
        name: {"kept_bytes": {"value": 1e6 * size}, "eval_fps": {"value": speed}}
        for name, size, speed in (("pcb", 100.0, 50.0), ("csalr-2", 125.0, 40.0))
    }
    bench = {"settings": {"height": 384, "rows": ["pcb"]}, "machine": {"cpu": "a CPU"}, "summary": summary}
    write_json(out / COST, bench)
    write_json(out / STUDY, {"version": __version__, "preset": "full"})
    assert main(["reproduce", "table5", "--out", str(out), "--report"]) == 0
    text = (out / "report.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("| PCB + CSALR, 2 groups"))
    found = [cell.strip() for cell in line.split("|")[2:-1]]
    assert found == [r"125.0\*", "192.25", r"+25.0%\*", "+39.7%", r"40.0\*", "460.43", r"-20.0%\*", "-20.9%"]
    assert re.search(r"\| PCB \+ SA +\| not run", text) and "a CPU" in text
