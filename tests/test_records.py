"""Records of a training in torchreid: console, log file, metrics, results, checkpoints, pictures and the report."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from csalr_plugin.commands import main
from csalr_plugin.errors import UserError
from csalr_plugin.hosts import keys
from csalr_plugin.hosts.ranked import average_precision, draw_ranked
from csalr_plugin.hosts.records import (
    COLUMNS,
    METRICS,
    Checkpoints,
    EpochRecord,
    differing,
    epoch_line,
    forget_later,
    loader_workers,
    phase_line,
    read_metrics,
)
from csalr_plugin.hosts.report import command_line, write_report


def words(data: Path, *overrides: Any) -> list[str]:
    given = ["train", "--config-file", "configs/torchreid/pcb_384x128_sgd.yaml", "--root", str(data)]
    given += ["data.height", "64", "data.width", "32", "model.pretrained", "False", "csalr.stages", "3"]
    return [*given, "train.batch_size", "20", "train.max_epoch", "2", *map(str, overrides)]


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, str]]:
    """The folder, standard output and standard error of a training of two epochs, which are both evaluated."""
    home = tmp_path_factory.mktemp("home")
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
        given = words(tiny_data, "test.eval_freq", 1)
        given[2] = str(Path(given[2]).resolve())
        patch.chdir(home)
        assert main(given) == 0
    yield home / "log" / "pcb_csalr_market1501_seed1", out.getvalue(), err.getvalue()


def test_the_default_folder_names_model_data_set_and_seed(run: tuple[Path, str, str]) -> None:
    assert (run[0] / "model" / "model.pth.tar-2").is_file()


def test_each_epoch_is_one_line_with_loss_accuracy_gates_and_rate(run: tuple[Path, str, str]) -> None:
    lines = [line for line in run[1].splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    assert re.fullmatch(
        r"epoch 1/2: loss [\d.]+ \(L_DS [\d.]+\), accuracy [\d.]+ %, gates -?[\d.]+, lr 0.1, [\d.]+ s, "
        r"\d:\d\d:\d\d left",
        lines[0],
    )


def test_settings_and_machine_are_in_the_log_file_and_only_differences_on_the_console(
    run: tuple[Path, str, str],
) -> None:
    folder, out, _ = run
    (log,) = folder.glob("train.log-*")
    assert "weight_decay: 0.0001" in log.read_text() and "Python version:" in log.read_text()
    assert "weight_decay:" not in out and "Python version:" not in out
    start = out.index("Settings that differ from torchreid's defaults")
    shown = out[start : out.index("Building train transforms")]
    assert "train.max_epoch 2," in shown and "train.weight_decay 0.0001" in shown and "adam.beta1" not in shown
    assert all(len(line) <= COLUMNS for line in shown.splitlines()[1:])


def test_the_warning_about_workers_is_answered_by_fewer_workers(run: tuple[Path, str, str]) -> None:
    _, out, err = run
    assert "data.workers 4 is more than the CPU cores here: 1 worker processes load the images" in out
    assert "This DataLoader will create" not in err


@pytest.mark.parametrize(
    ("workers", "given", "processes", "wanted"), [(8, False, 1, 4), (8, True, 1, 8), (8, False, 3, 1)]
)
def test_workers_are_at_most_the_cores_of_a_process_unless_the_user_gave_them(
    workers: int, given: bool, processes: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)), raising=False)
    told: list[str] = []
    assert loader_workers(workers, "data.workers", given, processes, told.append) == wanted
    assert len(told) == (workers != wanted)


def test_the_newest_checkpoint_and_the_one_with_the_best_map_stay(run: tuple[Path, str, str]) -> None:
    folder, out, _ = run
    assert {file.name for file in (folder / "model").iterdir()} == {"model.pth.tar-2", "model-best.pth.tar"}
    _, evaluations = read_metrics(folder / METRICS)
    best = max(evaluations, key=lambda line: (line["mAP"], -line["epoch"]))
    kept = torch.load(folder / "model" / "model-best.pth.tar", weights_only=True)
    assert kept["epoch"] == best["epoch"]
    assert f"Best mAP so far, {best['mAP']:.1%}" in out


def test_as_many_checkpoints_as_asked_for_stay_and_those_of_others_are_never_removed(tmp_path: Path) -> None:
    for keep, wanted in (("2", ["c", "d", "other"]), ("all", ["a", "b", "c", "d", "other"])):
        kept = Checkpoints(keep)
        (tmp_path / "other").touch()
        for name in "abcdd":  # an epoch is written again after its evaluation
            (tmp_path / name).touch()
            kept.add(tmp_path / name)
        assert sorted(file.name for file in tmp_path.iterdir()) == wanted


@pytest.mark.parametrize("value", ["0", "-1", "some", "1.5"])
def test_a_number_of_checkpoints_that_is_not_allowed_is_one_line(value: str) -> None:
    (key,) = (key for key in keys.KEYS if key.name == "keep")
    with pytest.raises(UserError, match="an integer of at least 1, or all"):
        key.check("csalr.keep", value)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


def test_an_evaluation_changes_no_file_of_the_training_and_names_all_that_it_evaluated(
    run: tuple[Path, str, str], tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run[0]
    before = digests(folder)
    path = folder / "model" / "model.pth.tar-2"
    given = words(tiny_data, "data.save_dir", folder, "test.evaluate", True, "model.load_weights", path)
    assert main([*given, "test.rerank", "True", "test.visrank", "True", "csalr.tensorboard.projector", "True"]) == 0
    after = digests(folder)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("evaluation/") for name in after.keys() - before.keys())
    written = json.loads((folder / "evaluation" / "results_market1501.json").read_text())
    wanted = {"checkpoint": str(path), "epoch": 2, "dataset": "market1501", "image_size": [64, 32], "rerank": True}
    assert written.items() >= {**wanted, "dist_metric": "euclidean"}.items()
    assert (folder / "evaluation" / "ranked_market1501.png").is_file()
    assert not (folder / "evaluation" / METRICS).exists()


def test_a_training_that_starts_anew_removes_the_metrics_of_later_epochs(tmp_path: Path) -> None:
    lines = [{"epoch": epoch, "loss": 1.0} for epoch in (1, 2, 3)] + [{"epoch": 3, "dataset": "d", "mAP": 0.1}]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    forget_later(tmp_path, 2)
    epochs, evaluations = read_metrics(tmp_path / METRICS)
    assert [line["epoch"] for line in epochs] == [1, 2] and not evaluations
    forget_later(tmp_path, 0)
    assert read_metrics(tmp_path / METRICS) == ([], [])
    forget_later(tmp_path / "none", 0)


def test_a_long_epoch_line_fits_the_columns() -> None:
    gates = {f"alpha_stage{number}": -10.123 for number in (1, 2, 3, 4)}
    line = {"epoch": 9999, "seconds": 1e5, "loss": 1e-9 / 3, "L_F": 1e-9 / 3, "L_DS_stage1": 1e-9 / 3, "acc": 100.0}
    text = epoch_line({**line, **gates, "lr_new": 1e-9 / 3}, 1_000_000)
    assert len(text) <= COLUMNS and text.startswith("epoch 9999/1000000: loss 3.333e-10") and "lr 3.33e-10" in text


def test_the_means_of_an_epoch_are_over_its_batches() -> None:
    record = EpochRecord(1, 2, 2, bar=False)
    record.count({"loss": 1.0, "acc": torch.tensor(50.0)}, {"alpha_stage1": 0.1})
    record.count({"loss": 3.0, "acc": torch.tensor(100.0)}, {"alpha_stage1": 0.2})
    line = record.line(record.means())
    assert (line["loss"], line["acc"], line["alpha_stage1"], line["batches"]) == (2.0, 75.0, 0.2, 2)


def test_a_progress_bar_with_loss_and_accuracy_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    with redirect_stderr(terminal):
        record = EpochRecord(3, 9, 4, done=1)
        record.count({"loss": 2.5, "acc": 25.0})
        record._bar.refresh()
        record.close()
    assert re.search(r"Epoch 3/9: +50%.*2/4 .*loss=2.5, acc=25", terminal.getvalue())


def test_settings_that_differ_are_listed_in_lines_of_at_most_the_columns() -> None:
    settings = {f"key.number{number}": number for number in range(40)}
    text = differing(settings, {**settings, "key.number7": 8, "key.number9": 1})
    assert text.strip() == "key.number7 7,  key.number9 9"
    assert all(len(line) <= COLUMNS for line in differing(settings, {}).splitlines())
    assert differing({"a": (1, 2), "b": "one two"}, {"a": [1, 2], "b": ""}).strip() == "b one two"


@pytest.mark.parametrize(("epochs", "pcb", "refused"), [(40, 40, True), (41, 40, False), (1, 0, False)])
def test_refined_part_pooling_that_never_begins_is_refused(
    epochs: int, pcb: int, refused: bool, tiny_data: Path
) -> None:
    from csalr_plugin.hosts.torchreid.config import default_config

    config = default_config()
    config.merge_from_list(["model.name", "pcb_rpp_csalr", "train.max_epoch", epochs, "csalr.rpp.pcb_epochs", pcb])
    if not refused:
        config.validate()
        return
    with pytest.raises(UserError, match=r"'train\.max_epoch' is 40, and 'csalr\.rpp\.pcb_epochs' is 40.*never begin"):
        config.validate()
    config.merge_from_list(["test.evaluate", True])
    config.validate()


def test_each_phase_of_refined_part_pooling_is_announced_once_and_again_when_resumed() -> None:
    told = [phase_line(epoch, 6, 2, 1, starts=epoch == 0) for epoch in range(6)]
    assert [bool(line) for line in told] == [True, False, True, True, False, False]
    assert told[2] == "Epochs 3 to 3: refined part pooling begins, only the part classifier trains"
    assert phase_line(4, 6, 2, 1, starts=True).startswith("Epochs 4 to 6: refined part pooling, all")


def test_average_precision_equals_the_definition_and_that_of_the_evaluation() -> None:
    from csalr_plugin.hosts.torchreid.ranking import evaluate_rank

    random = np.random.default_rng(0)
    distances = random.random((5, 60)).astype(np.float32)
    ids, cameras = random.integers(0, 4, 60), random.integers(0, 3, 60)
    query_ids, query_cameras = np.arange(5) % 4, np.arange(5) % 3
    _, mean = evaluate_rank(distances, query_ids, ids, query_cameras, cameras, max_rank=10)
    own = [
        average_precision(row, ids == one, ~((ids == one) & (cameras == camera)))
        for row, one, camera in zip(distances, query_ids, query_cameras, strict=True)
    ]
    assert np.mean(own) == pytest.approx(float(mean))
    by_hand = average_precision(np.array([3.0, 1.0, 2.0]), np.array([True, True, False]), np.ones(3, bool))
    assert by_hand == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert math.isnan(average_precision(np.zeros(2), np.zeros(2, bool), np.ones(2, bool)))


def test_the_sheet_of_ranked_results_has_the_best_median_and_worst_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from csalr_plugin.hosts import ranked

    rows: list[tuple[str, list[tuple[str, str]]]] = []
    monkeypatch.setattr(ranked, "QUERIES", 1)
    row = ranked._Sheet.row
    monkeypatch.setattr(
        ranked._Sheet,
        "row",
        lambda self, cells: (
            rows.append((cells[0].lines[0], [(one.lines[0], one.colour) for one in cells[1:]])),
            row(self, cells),
        ),
    )
    Image.new("RGB", (30, 60), "blue").save(tmp_path / "one.png")
    path = str(tmp_path / "one.png")
    query = [(path, 1, 0), ((path, path), 1, 0), (path, 1, 0)]
    gallery = [(path, 1, 1), (path, 2, 1), (path, 3, 1), (path, 1, 0)]  # the last one is of the query's camera
    distances = np.array([[0.3, 0.2, 0.4, 0.0], [0.1, 0.2, 0.3, 0.0], [0.4, 0.2, 0.3, 0.0]])
    draw_ranked(tmp_path / "sheet.png", distances, query, gallery, most=2, title="mine")
    assert [name for name, _ in rows] == ["query  AP 100.0%", "query  AP 50.0%", "query  AP 33.3%"]
    assert rows[0][1] == [("rank 1  d 0.1", ranked._RIGHT), ("rank 2  d 0.2", ranked._WRONG)]
    assert rows[2][1] == [("rank 1  d 0.2", ranked._WRONG), ("rank 2  d 0.3", ranked._WRONG)]
    assert Image.open(tmp_path / "sheet.png").size[0] > 300


def test_the_report_is_one_page_with_curves_results_queries_settings_and_command(
    run: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, _ = run
    page = (folder / "report.html").read_text()
    assert "Report of the training:" in out
    for part in ("pcb_csalr on market1501", "Gates alpha", "Learning rates", "Loss (Eq. 18)", "train.max_epoch"):
        assert part in page
    assert page.count("<svg") == 5  # two evaluations are a curve too
    assert 'name="viewport"' in page and not re.search(r'(src|href)="(?!data:|#)', page)  # nothing is loaded
    _, evaluations = read_metrics(folder / METRICS)
    rows = re.findall(r'<tr( class="best")?><td>market1501</td><td>(\d)</td><td>([\d.]+)%', page)
    assert [float(row[2]) for row in rows] == [round(100 * line["mAP"], 1) for line in evaluations]
    best = max(line["mAP"] for line in evaluations)
    assert [bool(row[0]) for row in rows] == [line["mAP"] == best for line in evaluations]
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python", "/opt/bin/csalr", "train", "-s", "folder:my data"])
    assert command_line() == "csalr train -s 'folder:my data'"


def test_the_report_escapes_names(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(json.dumps({"epoch": 1, "loss": 1.0, "seconds": 1.0, "acc": 2.0}) + "\n")
    options = {"settings": {"data.root": "<b>x"}, "defaults": {}, "checkpoints": ["<i>"]}
    page = write_report(tmp_path, host="host", model="<script>", **options).read_text()
    assert "<script>" not in page and "<b>x" not in page and "<i>" not in page and "&lt;script&gt;" in page
