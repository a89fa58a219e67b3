"""The command `csalr reproduce`: runs the trainings and measurements of the paper's tables, and reports them."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from csalr_plugin.command_line import INTERRUPTED, Parser, argument, path_argument
from csalr_plugin.errors import UserError, shown, suggest
from csalr_plugin.files import write_json
from csalr_plugin.hosts.keys import integer
from csalr_plugin.hosts.torchreid.arguments import parse_arguments
from csalr_plugin.version import __version__

from .ablation import describe_gates, measure_gates
from .folder import (
    CONSOLE,
    COST,
    QUERIES,
    RESULT,
    RUN,
    add_target,
    check_version,
    epochs_done,
    locked,
    newest_checkpoint,
    read_json,
)
from .plan import HERE, PRESETS, TARGETS, Options, Run, as_word, config_of, paper, plan, split_overrides


def main(argv: Sequence[str]) -> None:
    """``csalr reproduce``.

    Raises:
        UserError: the arguments, the data or the folder cannot be used (checked before anything is trained or
            overwritten), or a training stopped (reported at the end).
    """
    options = _parse(argv)
    if options.target == "figure4" and options.only:
        raise UserError("--only selects rows of a table; leave it out for figure4.")
    if options.report:
        report(options.out, options.target)
        return
    if options.dry_run:
        for run in plan(options):
            print(run.command)
        if options.target in ("table5", "all"):
            print(shlex.join(["csalr", *_bench(options)]))
        return
    study(options)


def _parse(argv: Sequence[str]) -> Options:
    parser = Parser(
        prog="csalr reproduce",
        usage="csalr reproduce TARGET --out DIR [--root DATA] [--dataset NAME] [--preset NAME]\n"
        "       [--only ROW ...] [--seeds N] [--weights PATH] [--dry-run] [KEY VALUE ...]",
        description="Run the trainings that a table or figure of the paper needs, and report our numbers beside the "
        "paper's in DIR/report.md and report.html.\nThe same command continues a stopped study; finished trainings are "
        "not repeated.",
        epilog="TARGET: " + ", ".join(TARGETS) + "\n"
        "KEY VALUE: config keys as in 'csalr train', for every row.\n\n"
        "examples:\n  csalr reproduce all --preset smoke --out smoke\n"
        "  csalr reproduce table1 --root reid-data --dataset cuhk03 --preset full --out study\n"
        "  csalr reproduce table1 --root reid-data --preset small --only pcb pcb_csalr --seeds 2 \\\n"
        "    --weights resnet50.pth --out study",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="TARGET", help="the table or figure to reproduce")
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--root", type=path_argument, metavar="DATA", help="folder of the datasets; without it smoke draws its own"
    )
    parser.add_argument(
        "--dataset", default="market1501", metavar="NAME", help=f"{', '.join(paper()['datasets'])} (market1501)"
    )
    parser.add_argument("--preset", default="small", metavar="NAME", help=f"{', '.join(PRESETS)} (small)")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="train only these rows, such as pcb_csalr")
    parser.add_argument(
        "--seeds", type=argument(integer(1, 1000)), default=1, metavar="N", help="train with seeds 1 to N (1)"
    )
    parser.add_argument(
        "--jobs", type=argument(integer(1, 256)), default=1, metavar="N", help="trainings at the same time (1)"
    )
    parser.add_argument("--weights", type=path_argument, metavar="PATH", help="ResNet-50 state dict to start from")
    parser.add_argument(
        "--report", action="store_true", help="train nothing: write the report of the present state of DIR"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the training commands")
    words, overrides = split_overrides(argv)
    given, rest = parser.parse_known_args(words)
    for value, allowed, name in (
        (given.target, TARGETS, "target"),
        (given.preset, PRESETS, "--preset"),
        (given.dataset, tuple(paper()["datasets"]), "--dataset"),
    ):
        if value not in allowed:
            raise UserError(f"{name} {shown(value)} must be one of {', '.join(allowed)}.{suggest(value, allowed)}")
    pairs = parse_arguments([*rest, *overrides], "csalr reproduce")
    if any(vars(pairs)[name] for name in ("config_file", "sources", "targets", "transforms")):
        raise UserError("csalr reproduce takes a --preset and a --dataset in place of --config-file, -s and -t.")
    varied = {key for keys in paper()["runs"].values() for key in keys}
    fixed = varied | {"data.sources", "data.targets", "data.root", "data.save_dir", "train.seed", "model.resume"}
    for key in pairs.overrides[::2]:
        if key.lower() in fixed:
            raise UserError(
                f"config key '{key}' is set by the study itself; choose rows with --only, seeds with --seeds."
            )
    names = vars(given) | {"only": tuple(given.only), "overrides": tuple(pairs.overrides)}
    return Options(**names)


def study(options: Options) -> None:
    """Run the missing trainings of a plan, then write the report.

    Raises:
        UserError: see `main`.
    """
    with locked(options.out, options.preset):
        runs = plan(options)
        for run in runs:
            _check_folder(run)
            size = run.settings["data"]["training"]
            if run.config.train.batch_size > size:
                raise UserError(
                    f"the preset {options.preset} does not fit the dataset: train.batch_size is "
                    f"{run.config.train.batch_size} and {run.dataset} has {size} training images; add "
                    f"train.batch_size {max(1, size // 2)}."
                )
        _check_weights(options, runs)
        for run in runs:
            _mark_planned(run)
        add_target(options.out, options.target)
        failures: list[str] = []
        try:
            failures = _train_all(options, runs)
            if options.target in ("table5", "all"):
                failures += _measure(options)
            if options.target in ("figure4", "all") and not failures:
                _draw_figure4(options, runs)
        finally:
            report(options.out, options.target)
    if failures:
        raise UserError(f"{'; '.join(failures)}. The report shows the finished trainings; the same command continues.")


def _bench(options: Options) -> list[str]:
    """Return the command that measures Table 5, at the preset's image size."""
    data = config_of(("--config-file", str(HERE / "presets" / f"{options.preset}.yaml"), *options.overrides)).data
    rows = [row["bench"] for row in paper()["costs"]["rows"][1:]]
    words = ["bench", "cost", "--out", str((options.out / COST).parent), "--only", *rows]
    words += ["--height", str(data.height), "--width", str(data.width)]
    return [*words, *(["--quick", "--repeats", "1", "--threads", "1"] if options.preset == "smoke" else [])]


def _measure(options: Options) -> list[str]:
    """Measure Table 5 unless it is measured; return the reason of a failure in a list."""
    if (options.out / COST).exists() and read_json(options.out / COST).get("summary"):
        return []
    import torch

    words = [*_bench(options), *(["--device", "cuda"] if torch.cuda.is_available() else [])]
    log = options.out / "cost.log"
    with log.open("a", encoding="utf-8") as file:
        print(f"table5: csalr {shlex.join(words)}")
        done = subprocess.run([sys.executable, "-m", "csalr_plugin", *words], stdout=file, stderr=subprocess.STDOUT)
    return [f"table5: {_last_line(log, done.returncode)}"] if done.returncode else []


def _draw_figure4(options: Options, runs: Sequence[Run]) -> None:
    """Draw Figure 4 for the trained CSALR, and measure the same errors for CSA where it is trained too."""
    from .attention_maps import figure4

    names = ("pcb_csalr", "pcb_csa") if options.target == "all" else ("pcb_csalr",)
    for run in runs:
        checkpoint = newest_checkpoint(run.folder)
        if run.seed == 1 and run.name in names and checkpoint is not None:
            place = options.out / "figure4" / run.dataset / run.name
            figure4(checkpoint, Path(run.config.data.root), place, run.dataset)


def report(out: Path, target: str) -> None:
    """Write the report of the present state of a study, with the targets that were asked for.

    Args:
        out: the folder of the study.
        target: shown beside the targets of earlier commands.

    Raises:
        UserError: `out` holds no study, or one of another version.
    """
    from .report import write_report

    check_version(out)
    print(f"report: {write_report(out, target)}, and beside it report.html, report.tex, report.json, report.csv")


def _begun(run: Run) -> bool:
    return (run.folder / RESULT).exists() or newest_checkpoint(run.folder) is not None


def _mark_planned(run: Run) -> None:
    """Describe the run in its folder, so that a report can list it before it is trained."""
    if not _begun(run) or not (run.folder / RUN).exists():
        run.folder.mkdir(parents=True, exist_ok=True)
        marker = {"version": __version__, "settings": run.settings, "command": run.command, "epochs": run.epochs}
        marker |= {"name": run.name, "dataset": run.dataset, "seed": run.seed, "deviations": run.deviations}
        write_json(run.folder / RUN, marker)


def _check_folder(run: Run) -> None:
    """Check that the folder of `run` is new, or was made for a training with the same settings.

    Raises:
        UserError: it was made for another training.
    """
    marker = run.folder / RUN
    if not marker.exists():
        if (run.folder / "model").exists():
            raise UserError(
                f"'{run.folder}' holds checkpoints that belong to no study; move them away, or give another --out."
            )
        return
    if not _begun(run):
        return  # planned but not begun
    theirs = read_json(marker).get("settings", {})
    differing = [key for key in {**theirs, **run.settings} if theirs.get(key) != run.settings.get(key)]
    if differing:
        key = differing[0]
        raise UserError(
            f"'{run.folder}' was trained with other settings ({key} {as_word(theirs.get(key))}, now "
            f"{as_word(run.settings.get(key))}); give another --out, or the settings that it was trained with."
        )


def _check_weights(options: Options, runs: Sequence[Run]) -> None:
    """Load the backbone's weights once before the first training, which downloads them if necessary."""
    left = [run for run in runs if not (run.folder / RESULT).exists() and run.config.model.pretrained]
    if left:
        from csalr_plugin.models import build_model

        build_model("pcb", 2, pretrained=True, pretrained_weights=left[0].config.csalr.pretrained_weights)


def _train_all(options: Options, runs: Sequence[Run]) -> list[str]:
    """Run the trainings that are not finished; return a line for each one that stopped."""
    left = [run for run in runs if not (run.folder / RESULT).exists()]
    if not runs:
        return []
    print(f"{len(runs)} trainings, {len(runs) - len(left)} of them finished before; in {options.out / 'runs'}")
    failures = []
    done = sum(run.epochs for run in runs) - sum(run.epochs - epochs_done(run.folder) for run in left)
    with tqdm(total=sum(run.epochs for run in runs), initial=done, unit="epoch", mininterval=1.0) as progress:

        def one(run: Run) -> None:
            progress.set_description(f"{run.name}, seed {run.seed}")
            reason = train(run, progress)
            if reason:
                failures.append(f"{run.name}, seed {run.seed}: {reason}")
                tqdm.write(f"{run.name}, seed {run.seed} stopped: {reason}", file=sys.stderr)
            elif options.preset != "smoke":  # it prints no accuracy
                tqdm.write(describe_gates(f"{run.name}, seed {run.seed}", read_json(run.folder / QUERIES)))

        if options.jobs == 1:  # in this thread, which gets Ctrl-C
            for run in left:
                one(run)
        else:
            with ThreadPoolExecutor(options.jobs) as pool:
                list(pool.map(one, left))
    return failures


def train(run: Run, progress: Any) -> str:
    """Train a run in a process of its own, from its newest checkpoint; return the reason why it stopped, or "".

    The end of the process frees all its memory, and a killed process does not harm the study.
    """
    words = [sys.executable, "-m", "csalr_plugin", "train", *run.arguments]
    from csalr_plugin.hosts.torchreid import registered_name

    if (key := registered_name(run.config.model.name)) != run.config.model.name:
        words += ["model.name", key]
    if checkpoint := newest_checkpoint(run.folder):
        words += ["model.resume", str(checkpoint)]
    seen = epochs_done(run.folder)
    with (run.folder / CONSOLE).open("a", encoding="utf-8") as log:
        child = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.5)
                now = epochs_done(run.folder)
                if now != seen:
                    progress.update(now - seen)
                    seen = now
        except KeyboardInterrupt:
            # The terminal sent Ctrl-C to the training too; after a second signal it would save no checkpoint.
            tqdm.write("Stopping after this batch; press Ctrl-C again to stop at once.", file=sys.stderr)
            try:
                child.wait()
            except KeyboardInterrupt:
                child.terminate()
                child.wait()
            raise
    if child.returncode in (INTERRUPTED, -signal.SIGINT):  # the latter during its imports
        raise KeyboardInterrupt
    if child.returncode:
        return _last_line(run.folder / CONSOLE, child.returncode)
    return _conclude(run)


def _last_line(log: Path, code: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = next((line for line in reversed(lines) if line.startswith("csalr: error: ")), "")
    return said.removeprefix("csalr: error: ").rstrip(".") or f"exit code {code}, see {log}"


def _conclude(run: Run) -> str:
    """Write the result of a finished training, and remove all checkpoints but the last."""
    found = read_json(run.folder / f"results_{run.dataset}.json")
    if found.get("epoch") != run.epochs:
        return f"its results are of epoch {found.get('epoch')}, not of {run.epochs}; see {run.folder / CONSOLE}"
    from csalr_plugin.hosts.records import METRICS, read_metrics

    from ..environment import machine, versions

    epochs, _ = read_metrics(run.folder / METRICS)
    results = {name: value for name, value in found.items() if name == "mAP" or name.startswith("rank-")}
    about = {"version": __version__, "versions": versions(), "machine": machine(), "epochs": run.epochs}
    seconds = round(sum(epoch["seconds"] for epoch in epochs))
    finished = time.strftime("%Y-%m-%d %H:%M:%S %z")
    last = newest_checkpoint(run.folder)
    assert last is not None
    write_json(run.folder / QUERIES, measure_gates(run, last))
    # Written last: this file marks the training as finished.
    write_json(run.folder / RESULT, {**about, "training_seconds": seconds, "finished": finished, "results": results})
    for path in (run.folder / "model").glob("model*.pth.tar*"):  # the one with the best mAP too
        if path != last:
            path.unlink()
    return ""
