"""The study: which trainings the paper's tables need, each in a folder of its own, stopped and gone on with at will."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from tqdm import tqdm

from csalr_plugin.errors import UserError, suggest
from csalr_plugin.files import write_json
from csalr_plugin.hosts.torchreid.arguments import Parser, config_from_arguments, parse_arguments
from csalr_plugin.hosts.torchreid.config import Config, default_config
from csalr_plugin.version import __version__

HERE = Path(__file__).parent
TARGETS = ("table1", "table2", "table3", "table4", "table5", "figure4", "all")
PRESETS = ("full", "small", "smoke")
STUDY, RUN, RESULT, COST = "study.json", "run.json", "result.json", "cost/cost.json"
CONSOLE = "console.log"
INTERRUPTED = 130  # how `csalr train` ends after Ctrl-C
# Of smoke's drawings: the fewest people and images that train two batches and rank ten.
SMOKE_DATA = {"train_identities": 4, "test_identities": 4, "train_images": 4, "gallery_images": 3, "distractors": 4}
# Keys that change neither what is trained nor what it scores.
_INDIFFERENT = re.compile(
    r"use_gpu|data\.(root|save_dir|workers)|train\.print_freq|test\.(batch_size|eval_freq|start_eval|visrank\w*)"
    r"|model\.(resume|load_weights)|csalr\.(overwrite|pretrained_weights|tensorboard\.\w+)"
)
_IMAGENET_V1 = "0676ba61"  # how torchvision's ResNet50_Weights.IMAGENET1K_V1 begins, in SHA-256


@functools.cache
def paper() -> dict[str, Any]:
    """The rows of the paper, from ``rows.yaml``: "runs", "datasets", "tables" and "costs"."""
    content: dict[str, Any] = yaml.safe_load((HERE / "rows.yaml").read_text(encoding="utf-8"))
    return content


@dataclass(frozen=True)
class Options:
    """What a study is asked for; see ``csalr reproduce --help``."""

    target: str
    out: Path
    root: Path | None = None
    dataset: str = "market1501"
    preset: str = "small"
    only: tuple[str, ...] = ()
    seeds: int = 1
    weights: Path | None = None
    dry_run: bool = False
    report: bool = False
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One training: a run of ``rows.yaml`` on a dataset with a seed.

    Attributes:
        arguments: those of ``csalr train``.
        settings: what it is trained with, in full; a folder made with other settings is left alone.
        deviations: what of that is not the paper's, in words; empty for the paper's settings.
    """

    name: str
    dataset: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    config: Config = field(compare=False)
    settings: dict[str, Any] = field(compare=False)
    deviations: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command that trains it alone."""
        return shlex.join(["csalr", "train", *self.arguments])

    @property
    def epochs(self) -> int:
        """How many epochs it is trained for."""
        return int(self.config.train.max_epoch)


def main(argv: Sequence[str]) -> None:
    """``csalr reproduce``.

    Raises:
        UserError: for arguments, data or a folder that cannot be used, before anything is trained or overwritten; and
            at the end, when a training stopped.
    """
    options = _parse(argv)
    if options.target == "figure4" and options.only:
        raise UserError("--only names rows of a table; figure4 needs none.")
    if options.report:
        report(options.out)
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
        description="Train what a table or figure of the paper needs, and report our numbers beside the paper's in "
        "DIR/report.md and report.html.\nA study that was stopped goes on where it was; what is done is not trained "
        "again.",
        epilog="TARGET: " + ", ".join(TARGETS) + "\n"
        "KEY VALUE: config keys as of 'csalr train', for every row.\n\n"
        "examples:\n  csalr reproduce all --preset smoke --out smoke\n"
        "  csalr reproduce table1 --root reid-data --dataset cuhk03 --preset full --out study\n"
        "  csalr reproduce table1 --root reid-data --preset small --only pcb pcb_csalr --seeds 2 \\\n"
        "    --weights resnet50.pth --out study",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="TARGET", help="what to reproduce")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the study")
    parser.add_argument("--root", type=Path, metavar="DATA", help="folder of the datasets; smoke draws its own without")
    parser.add_argument(
        "--dataset", default="market1501", metavar="NAME", help=f"{', '.join(paper()['datasets'])} (market1501)"
    )
    parser.add_argument("--preset", default="small", metavar="NAME", help=f"{', '.join(PRESETS)} (small)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ROW", help="train these rows alone, such as pcb_csalr"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train each row with seeds 1 to N (1)")
    parser.add_argument("--weights", type=Path, metavar="PATH", help="ResNet-50 state dict to start from")
    parser.add_argument(
        "--report", action="store_true", help="train nothing: write the report of what is in DIR by now"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the training commands alone")
    words, overrides = split_overrides(argv)
    given, rest = parser.parse_known_args(words)
    for value, allowed, what in (
        (given.target, TARGETS, "target"),
        (given.preset, PRESETS, "--preset"),
        (given.dataset, tuple(paper()["datasets"]), "--dataset"),
    ):
        if value not in allowed:
            raise UserError(f"{what} '{value}' must be one of {', '.join(allowed)}.{suggest(value, allowed)}")
    if given.seeds < 1:
        raise UserError(f"--seeds is {given.seeds}; it must be at least 1.")
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


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words without, and with only, the pairs KEY VALUE; a flag that takes several words would swallow them."""
    known = default_config().leaves()
    flags: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        if word.lower() in known:
            overrides += [word, *itertools.islice(words, 1)]
        else:
            flags.append(word)
    return flags, overrides


def tables_of(target: str) -> tuple[str, ...]:
    """The tables of trainings that a target asks for."""
    every = tuple(paper()["tables"])
    return every if target == "all" else (target,) if target in every else ()


def run_names(target: str) -> tuple[str, ...]:
    """The runs that a target needs, each once, in the paper's order."""
    names = [row["run"] for table in tables_of(target) for row in paper()["tables"][table]["rows"] if "run" in row]
    if target in ("figure4", "all"):
        names.append("pcb_csalr")
    return tuple(dict.fromkeys(names))


def plan(options: Options) -> list[Run]:
    """The trainings that a study needs, seed by seed, so that every row has a first number early.

    Raises:
        UserError: for a row that the target has not, settings that are not allowed, or a dataset that is not there.
    """
    names = run_names(options.target)
    for name in options.only:
        if name not in names:
            known = f"it must be one of {', '.join(names)}" if names else f"{options.target} trains none"
            raise UserError(f"--only '{name}' is no row of {options.target}; {known}.{suggest(name, names)}")
    chosen = [name for name in names if not options.only or name in options.only]
    if not chosen:
        return []
    root = _root(options)
    counts = dataset_counts(options.dataset, root) if root.exists() or not options.dry_run else {}
    weights = _weights(options)
    return [_run(options, name, seed, root, counts, weights) for seed in range(1, options.seeds + 1) for name in chosen]


def _root(options: Options) -> Path:
    if options.root is not None:
        return options.root.expanduser()
    if options.preset != "smoke":
        raise UserError(
            f"--root is missing: the preset {options.preset} trains on a dataset; give the folder it is in."
        )
    if options.dataset != "market1501":
        raise UserError(
            f"the preset smoke draws its own data in the layout of market1501, which does not fit --dataset "
            f"{options.dataset}; leave --dataset out, or give --root."
        )
    root = options.out / "data"
    if not options.dry_run:
        from csalr_plugin.demo_data import make_demo_data

        make_demo_data(root, **SMOKE_DATA)
    return root


def _weights(options: Options) -> str:
    """The identity of the weights given: the start of the file's SHA-256, or "" for none."""
    if options.weights is None:
        return ""
    try:
        with options.weights.expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:8]
    except OSError as error:
        raise UserError(f"--weights '{options.weights}' cannot be read ({error.strerror}); give a file.") from None


def _run(options: Options, name: str, seed: int, root: Path, counts: dict[str, int], weights: str) -> Run:
    folder = options.out / "runs" / f"{options.dataset}-{name}" / f"seed{seed}"
    row = [word for key, value in paper()["runs"][name].items() for word in (key, _as_word(value))]
    given = ["model.pretrained", "True", "csalr.pretrained_weights", str(options.weights)] if options.weights else []

    def arguments(preset: str, *more: str) -> list[str]:
        data = ["--config-file", str(HERE / "presets" / f"{preset}.yaml"), "-s", options.dataset, "-t", options.dataset]
        return [*data, "--root", str(root), *more, *row, "train.seed", str(seed), "data.save_dir", str(folder)]

    words = arguments(options.preset, *given, *options.overrides)
    config = _config(tuple(words))
    start = weights or ("torchvision" if config.model.pretrained else "random")
    settings = {**_leaves(config), "weights": start, "data": counts}
    settings = json.loads(json.dumps(settings))
    as_published = {**_leaves(_config(tuple(arguments("full")))), "weights": "torchvision", "data": counts}
    deviations = _deviations(settings, json.loads(json.dumps(as_published)), options.dataset)
    return Run(name, options.dataset, seed, folder, tuple(words), config, settings, deviations)


@functools.cache
def _config(words: tuple[str, ...]) -> Config:
    return config_from_arguments(parse_arguments(words, "csalr reproduce"))


def _leaves(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.leaves().items() if not _INDIFFERENT.fullmatch(key)}


def _as_word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _deviations(settings: dict[str, Any], published: dict[str, Any], dataset: str) -> tuple[str, ...]:
    """What of `settings` is not the paper's, in words."""
    found = []
    for key, value in settings.items():
        if key in ("data", "weights", "train.seed") or value == published.get(key):
            continue
        # A schedule's keys without a meaning of their own follow from what is named already.
        found.append(f"{key} {_as_word(value)} (paper: {_as_word(published.get(key))})")
    if settings["weights"] not in ("torchvision", _IMAGENET_V1):
        what = "random" if settings["weights"] == "random" else f"of a file, SHA-256 {settings['weights']}..."
        found.append(f"backbone weights {what} (paper: ImageNet)")
    known = paper()["datasets"][dataset]
    counts = settings["data"]
    for count, wanted in known.items():
        allowed = wanted if isinstance(wanted, list) else [wanted]
        if count != "title" and counts.get(count) not in allowed:
            found.append(
                f"the dataset is not {known['title']}: {counts.get('training', '?')} training images of "
                f"{counts.get('identities', '?')} identities (paper: {known['training']} of {known['identities']})"
            )
            break
    return tuple(found)


def dataset_counts(name: str, root: Path) -> dict[str, int]:
    """How many identities and images the dataset under `root` has.

    Raises:
        UserError: as :func:`read_dataset`, or a subset has no images.
    """
    data = read_dataset(name, root)
    sizes = {"training": len(data.train), "query": len(data.query), "gallery": len(data.gallery)}
    for subset, size in sizes.items():
        if not size:
            raise UserError(f"dataset {name} in --root '{root}' has no {subset} images; put them there.")
    return {"identities": len({item[1] for item in data.train}), **sizes}


def read_dataset(name: str, root: Path) -> Any:
    """The host's own dataset `name` under `root`, with its lists `train`, `query` and `gallery`.

    Raises:
        UserError: it is not known or not there, or the handler cannot read it. Nothing is downloaded.
    """
    from csalr_plugin.hosts.torchreid import dataset_names, host

    names = dataset_names("image")
    if name not in names:
        raise UserError(f"--dataset '{name}' must be one of {', '.join(names)}.{suggest(name, names)}")
    handler = vars(host().data.datasets)["__image_datasets"][name]
    place = root / (handler.dataset_dir or "")
    if not place.is_dir():
        raise UserError(f"dataset {name} is not in --root '{root}': {place} is missing; put the dataset there.")
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return handler(root=str(root), mode="train", verbose=False)
    except Exception as error:  # a handler raises anything on a folder that is not what it expects
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"dataset {name} in --root '{root}' cannot be read ({reason}); see 'csalr train'.") from None


def study(options: Options) -> None:
    """Train what is missing of a plan, then write the report.

    Raises:
        UserError: see :func:`main`.
    """
    with _locked(options):
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
        failures: list[str] = []
        try:
            failures = _train_all(options, runs)
            if options.target in ("table5", "all"):
                failures += _measure(options)
            if options.target in ("figure4", "all") and not failures:
                _draw_figure4(options, runs)
        finally:
            report(options.out)
    if failures:
        raise UserError(f"{'; '.join(failures)}. The report says what is done; the same command goes on from there.")


def _bench(options: Options) -> list[str]:
    """The command that measures Table 5, at the preset's image size."""
    data = _config(("--config-file", str(HERE / "presets" / f"{options.preset}.yaml"), *options.overrides)).data
    rows = [row["bench"] for row in paper()["costs"]["rows"][1:]]
    words = ["bench", "cost", "--out", str((options.out / COST).parent), "--only", *rows]
    words += ["--height", str(data.height), "--width", str(data.width)]
    return [*words, *(["--quick", "--repeats", "1", "--threads", "1"] if options.preset == "smoke" else [])]


def _measure(options: Options) -> list[str]:
    """Measure Table 5 unless that is done; return why it is not done then."""
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
    """Figure 4 from the trained CSALR, and the same errors for CSA where that is trained too."""
    from .attention_maps import figure4

    names = ("pcb_csalr", "pcb_csa") if options.target == "all" else ("pcb_csalr",)
    for run in runs:
        if run.seed == 1 and run.name in names:
            figure4(run.config, run.folder, options.out / "figure4" / run.dataset / run.name, run.dataset)


def report(out: Path) -> None:
    """Write the report of what is in `out` by now.

    Raises:
        UserError: `out` holds no study, or one of another version.
    """
    from .report import write_report

    _check_version(out)
    path = write_report(out)
    print(f"report: {path}, and beside it report.html, report.json, report.csv")


@contextlib.contextmanager
def _locked(options: Options) -> Iterator[None]:
    """The study's folder, made or known as one, and no other study in it."""
    out, marker = options.out, options.out / STUDY
    try:
        if not marker.exists() and out.exists() and any(path.name != ".lock" for path in out.iterdir()):
            raise UserError(f"--out '{out}' holds something that is no study; give a new or an empty folder.")
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"--out '{out}' is in use by another study; wait for it, stop it, or give another folder."
        ) from None
    except OSError as error:
        raise UserError(f"--out '{out}' cannot be written ({error.strerror}); give another folder.") from None
    try:
        if not marker.exists():
            write_json(marker, {"version": __version__, "preset": options.preset})
        preset = _check_version(out).get("preset")
        if preset != options.preset:
            raise UserError(
                f"--out '{out}' is a study with the preset {preset}; give another folder for {options.preset}."
            )
        yield
    finally:
        lock.release()


def _check_version(out: Path) -> dict[str, Any]:
    """What the marker of the study in `out` says, if this version made it."""
    if not (out / STUDY).exists():
        raise UserError(f"--out '{out}' holds no study; give the folder of one.")
    marker = read_json(out / STUDY)
    if marker.get("version") != __version__:
        raise UserError(
            f"--out '{out}' was made by csalr_plugin {marker.get('version')}, this is {__version__}; give another "
            "folder, or go on with that version."
        )
    return marker


def _begun(run: Run) -> bool:
    return (run.folder / RESULT).exists() or newest_checkpoint(run.folder) is not None


def _mark_planned(run: Run) -> None:
    """Say in the run's folder what it is, so that a report knows what a study has still to train."""
    if not _begun(run) or not (run.folder / RUN).exists():
        run.folder.mkdir(parents=True, exist_ok=True)
        marker = {"version": __version__, "settings": run.settings, "command": run.command, "epochs": run.epochs}
        marker |= {"name": run.name, "dataset": run.dataset, "seed": run.seed, "deviations": run.deviations}
        write_json(run.folder / RUN, marker)


def _check_folder(run: Run) -> None:
    """Leave a folder alone that holds another training than `run`."""
    marker = run.folder / RUN
    if not marker.exists():
        if (run.folder / "model").exists():
            raise UserError(
                f"'{run.folder}' holds checkpoints that are no study's; move them away, or give another --out."
            )
        return
    if not _begun(run):
        return  # planned, and nothing trained yet
    theirs = read_json(marker).get("settings", {})
    differing = [key for key in {**theirs, **run.settings} if theirs.get(key) != run.settings.get(key)]
    if differing:
        key = differing[0]
        raise UserError(
            f"'{run.folder}' was trained with other settings ({key} {_as_word(theirs.get(key))}, now "
            f"{_as_word(run.settings.get(key))}); give another --out, or the settings that it was trained with."
        )


def _check_weights(options: Options, runs: Sequence[Run]) -> None:
    """Read, or download once, the backbone's weights before the first training does."""
    left = [run for run in runs if not (run.folder / RESULT).exists() and run.config.model.pretrained]
    if left:
        from csalr_plugin.models import build_model

        build_model("pcb", 2, pretrained=True, pretrained_weights=left[0].config.csalr.pretrained_weights)


def _train_all(options: Options, runs: Sequence[Run]) -> list[str]:
    """Train what is not done; return a line for each training that stopped."""
    left = [run for run in runs if not (run.folder / RESULT).exists()]
    if not runs:
        return []
    print(f"{len(runs)} trainings, {len(runs) - len(left)} of them done before; in {options.out / 'runs'}")
    failures = []
    done = sum(run.epochs for run in runs) - sum(run.epochs - epochs_done(run.folder) for run in left)
    with tqdm(total=sum(run.epochs for run in runs), initial=done, unit="epoch", mininterval=1.0) as progress:
        for run in left:
            progress.set_description(f"{run.name}, seed {run.seed}")
            reason = train(run, progress)
            if reason:
                failures.append(f"{run.name}, seed {run.seed}: {reason}")
                tqdm.write(f"{run.name}, seed {run.seed} stopped: {reason}", file=sys.stderr)
    return failures


def train(run: Run, progress: Any) -> str:
    """Train a run, from its newest checkpoint if there is one, as a process of its own; return why it stopped, or "".

    A process of its own gives all its memory back, and one that is killed leaves the study whole.
    """
    words = [sys.executable, "-m", "csalr_plugin", "train", *run.arguments]
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
            # The terminal's Ctrl-C reached the training too; a second signal would cost it its checkpoint.
            tqdm.write("Stopping after this batch; once more stops at once.", file=sys.stderr)
            try:
                child.wait()
            except KeyboardInterrupt:
                child.terminate()
                child.wait()
            raise
    if child.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if child.returncode:
        return _last_line(run.folder / CONSOLE, child.returncode)
    return _conclude(run)


def _last_line(log: Path, code: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = next((line for line in reversed(lines) if line.startswith("csalr: error: ")), "")
    return said.removeprefix("csalr: error: ").rstrip(".") or f"exit code {code}, see {log}"


def _conclude(run: Run) -> str:
    """Write the marker of a training that is done, and remove the checkpoints before its last."""
    found = read_json(run.folder / f"results_{run.dataset}.json")
    if found.get("epoch") != run.epochs:
        return f"its results are of epoch {found.get('epoch')}, not of {run.epochs}; see {run.folder / CONSOLE}"
    from csalr_plugin.hosts.torchreid.monitor import METRICS, read_metrics

    epochs, _ = read_metrics(run.folder / METRICS)
    results = {name: value for name, value in found.items() if name == "mAP" or name.startswith("rank-")}
    about = {"version": __version__, "versions": versions(), "machine": machine(), "epochs": run.epochs}
    seconds = round(sum(epoch["seconds"] for epoch in epochs))
    finished = time.strftime("%Y-%m-%d %H:%M:%S %z")
    write_json(run.folder / RESULT, {**about, "training_seconds": seconds, "finished": finished, "results": results})
    last = newest_checkpoint(run.folder)
    for path in (run.folder / "model").glob("model.pth.tar-*"):
        if path != last:
            path.unlink()
    return ""


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a training's folder with the most epochs, and batches of the next, behind it."""
    found = []
    for path in (folder / "model").glob("model.pth.tar-*"):
        if match := re.fullmatch(r"model\.pth\.tar-(\d+)(?:-batch(\d+))?", path.name):
            found.append((int(match[1]), int(match[2] or 0), path))
    return max(found)[2] if found else None


def epochs_done(folder: Path) -> int:
    """How many epochs of a training are done, by its newest checkpoint."""
    newest = newest_checkpoint(folder)
    match = re.match(r"model\.pth\.tar-(\d+)", newest.name) if newest else None
    return int(match[1]) if match else 0


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of the study's.

    Raises:
        UserError: it is damaged or missing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{path}' cannot be read ({error}); it is a study's: restore it, or give another --out."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"'{path}' is not what a study writes; restore it, or give another --out.")
    return content


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("torch", "torchvision", "torchreid", "numpy")
    return {"csalr_plugin": __version__, "python": platform.python_version(), **{one: version(one) for one in packages}}


@functools.cache
def machine() -> str:
    """The machine in one line: processor, cores, GPUs, system."""
    import torch

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        processor = models[0] if models else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cards = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    gpus = ", ".join(cards) or "no GPU"
    return f"{processor}, {cores} cores, {gpus}, {platform.system()} {platform.release()}"
