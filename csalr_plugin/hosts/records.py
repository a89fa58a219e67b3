"""Records of a training in every host: metrics.jsonl, a line and a progress bar per epoch, checkpoints to keep.

An error while a record is written is one warning on the console, and never ends a training.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from csalr_plugin.errors import first_line
from csalr_plugin.models.weights import read_checkpoint

METRICS = "metrics.jsonl"
COLUMNS = 120
"""Longest line that a training prints."""
EVALUATION = "evaluation"
"""Subfolder of a training's folder for evaluations of its checkpoints."""
_MOST_EMBEDDINGS = 1000  # in the projector, which is a page in a browser


@contextmanager
def never_fatal(record: str) -> Iterator[None]:
    """Turn an error in the with statement into one line that names `record`."""
    try:
        yield
    except BrokenPipeError:  # the console is closed, as by "| head"
        raise
    except Exception as error:  # whatever it is, the training must go on
        print(f"Warning: {record} cannot be written ({first_line(error)}); the run goes on without.", file=sys.stderr)


class EpochRecord:
    """Collects the metrics of one epoch and shows a progress bar on a terminal.

    The metrics have the same names in every host: "loss", "L_F", "L_DS_stageN", "acc" in per cent, "accuracy_HEAD",
    "alpha_stageN", "lr_GROUP".

    Args:
        epoch: the number of the epoch, from 1.
        epochs: number of epochs of the training.
        batches: number of batches in an epoch.
        done: batches of the epoch that were trained before a checkpoint that was resumed.
        bar: whether to show the bar; it is never shown where the standard error is no terminal.
    """

    def __init__(self, epoch: int, epochs: int, batches: int, *, done: int = 0, bar: bool = True) -> None:
        self.epoch, self.epochs = epoch, epochs
        self.batches = 0
        self.rates: dict[str, float] = {}
        self._sums: dict[str, Any] = {}
        self._last: dict[str, float] = {}
        self._started = time.monotonic()
        self._bar = tqdm(
            total=batches,
            initial=done,
            desc=f"Epoch {epoch}/{epochs}",
            unit="batch",
            leave=False,
            dynamic_ncols=True,
            mininterval=0.5,
            disable=None if bar else True,  # None: only on a terminal
        )

    def count(self, values: Mapping[str, float | Tensor], last: Mapping[str, float] | None = None) -> None:
        """Add one batch.

        Args:
            values: metrics whose mean over the epoch counts; numbers, or scalars on any device.
            last: metrics whose last value counts, such as the gates.
        """
        self.batches += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._last |= last or {}
        if not self._bar.disable:
            shown_now = {name: self._sums[name] / self.batches for name in ("loss", "acc") if name in self._sums}
            self._bar.set_postfix({name: f"{float(value):.4g}" for name, value in shown_now.items()}, refresh=False)
            self._bar.update()

    def means(self) -> dict[str, Any]:
        """Return the means over the batches so far."""
        return {name: value / self.batches for name, value in self._sums.items()}

    def close(self) -> None:
        """Remove the progress bar."""
        self._bar.close()

    def line(self, means: Mapping[str, float]) -> dict[str, Any]:
        """Return the line of ``metrics.jsonl``.

        Args:
            means: the means over the batches and over all processes.
        """
        rates = {f"lr_{name}": rate for name, rate in self.rates.items()}
        seconds = round(time.monotonic() - self._started, 3)
        numbered = {"epoch": self.epoch, "batches": self.batches, "seconds": seconds}
        return {**numbered, **{name: float(value) for name, value in means.items()}, **self._last, **rates}


def epoch_line(line: Mapping[str, Any], epochs: int) -> str:
    """Return the text for the console about an epoch, at most `COLUMNS` characters.

    Args:
        line: the epoch's line of ``metrics.jsonl``.
        epochs: number of epochs of the training; the time that is left assumes that all take equally long.
    """
    branches = [value for name, value in line.items() if name.startswith("L_DS_")]
    gates = [value for name, value in line.items() if name.startswith("alpha_")]
    rate = next((line[name] for name in ("lr_new", "lr_all") if name in line), None)
    left = timedelta(seconds=round((epochs - line["epoch"]) * line["seconds"]))
    terms = f" (L_DS {sum(branches):.4g})" if branches else ""
    parts = [
        f"epoch {line['epoch']}/{epochs}: loss {line['loss']:.4g}",
        f"accuracy {line['acc']:.1f} %" if "acc" in line else "",
        f"gates {' '.join(f'{gate:.3f}' for gate in gates)}" if gates else "",
        f"lr {rate:.3g}" if rate is not None else "",
        f"{line['seconds']:.1f} s",
        f"{left} left" if left else "",
    ]
    text = ", ".join(filter(None, [parts[0] + terms, *parts[1:]]))
    return text if len(text) <= COLUMNS else ", ".join(filter(None, [parts[0], *parts[1:]]))[:COLUMNS]


def write_line(folder: Path, line: Mapping[str, Any]) -> None:
    """Append a line to the ``metrics.jsonl`` of a training."""
    path = folder / METRICS
    with never_fatal(repr(str(path))):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def forget_later(folder: Path, done: int) -> None:
    """Remove the lines of ``metrics.jsonl`` about epochs after `done`, which will be trained again or belong to an
    earlier training in the same folder."""
    path = folder / METRICS
    with never_fatal(repr(str(path))):
        if path.is_file():
            lines = [line for lines in read_metrics(path) for line in lines if line["epoch"] <= done]
            text = "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: int(line["epoch"])))
            if text != path.read_text(encoding="utf-8", errors="replace"):
                unfinished = path.with_name(f".{path.name}.unfinished")
                unfinished.write_text(text, encoding="utf-8")
                os.replace(unfinished, path)


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the lines of epochs and those of evaluations in a ``metrics.jsonl``, by epoch; a missing file has none.

    If an epoch has several lines, the last one counts: the epoch was trained again after a stop. Incomplete lines are
    left out.
    """
    epochs: dict[int, dict[str, Any]] = {}
    evaluations: dict[tuple[int, str], dict[str, Any]] = {}
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if not isinstance(line, dict) or not isinstance(line.get("epoch"), int):
                continue
            if "dataset" in line:
                evaluations[line["epoch"], str(line["dataset"])] = line
            else:
                epochs[line["epoch"]] = line
    return [epochs[key] for key in sorted(epochs)], [evaluations[key] for key in sorted(evaluations)]


def mean_precision(evaluations: Sequence[Mapping[str, Any]]) -> float:
    """Return the best mAP of an epoch so far, the mean over its datasets, from 0 to 1; -1 without an evaluation.

    Args:
        evaluations: lines of evaluations in ``metrics.jsonl``.
    """
    by_epoch: dict[int, list[float]] = {}
    for line in evaluations:
        if isinstance(line.get("mAP"), (int, float)):
            by_epoch.setdefault(int(line["epoch"]), []).append(float(line["mAP"]))
    return max((sum(values) / len(values) for values in by_epoch.values()), default=-1.0)


class Checkpoints:
    """The checkpoints that a training keeps: the newest ones by number, and a copy of the best one.

    Files that an earlier training wrote are never removed.

    Args:
        keep: number of the newest checkpoints to keep, or "all".
    """

    def __init__(self, keep: str) -> None:
        self.keep = None if keep == "all" else int(keep)
        self._written: list[Path] = []

    def add(self, path: Path) -> None:
        """Record that `path` was written, and remove the oldest checkpoints beyond the number to keep."""
        self._written = [*(one for one in self._written if one != path), path]
        while self.keep is not None and len(self._written) > self.keep:
            self._written.pop(0).unlink(missing_ok=True)


def copy_file(path: Path, copy: Path) -> None:
    """Copy a complete file to `copy`, as a hard link where the file system has them, in one step."""
    unfinished = copy.with_name(f".{copy.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(path, unfinished)
    except OSError:  # no hard links there
        shutil.copyfile(path, unfinished)
    os.replace(unfinished, copy)


def about_checkpoint(path: str) -> dict[str, Any]:
    """Return the entries of a results file about the evaluated checkpoint: "checkpoint" and its "epoch".

    Args:
        path: the checkpoint; empty for initial weights, which have no epoch. The epoch counts completed epochs, and is
            None where the file has none.
    """
    checkpoint = read_checkpoint(path) if path and os.path.isfile(os.path.expanduser(path)) else {}
    epoch = checkpoint.get("epoch")
    if type(epoch) is int and "model" in checkpoint:  # fast-reid's, which counts epochs from 0
        epoch += 1
    return {"checkpoint": path or None, "epoch": epoch if type(epoch) is int else None}


def evaluation_folder(folder: Path, *marks: str) -> Path:
    """Return the folder for the files of an evaluation, so that it never changes those of a training.

    Args:
        folder: the folder that the user named.
        marks: names of files that a training writes.

    Returns:
        `folder`, or its subfolder `evaluation` if it holds a training.
    """
    return folder / EVALUATION if any((folder / mark).exists() for mark in marks) else folder


def changed_settings(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that differ from the defaults, as text.

    Args:
        settings, defaults: ``{dotted key: value}``.
    """

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, (list, tuple)) else value

    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value) or "''"

    changed = {key for key, value in settings.items() if key not in defaults or plain(value) != plain(defaults[key])}
    return {key: text(value) for key, value in settings.items() if key in changed}


def differing(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return the settings that differ from the defaults, as wrapped lines for the console; see `changed_settings`."""
    pairs = [f"{key} {value}".replace(" ", "\0") for key, value in changed_settings(settings, defaults).items()]
    wrapped = textwrap.fill(
        ",  ".join(pairs) or "none",
        width=COLUMNS,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapped.replace("\0", " ")


def loader_workers(workers: int, key: str, given: bool, processes: int, tell: Callable[[str], object]) -> int:
    """Return the number of worker processes of a data loader: at most one per CPU core, unless the user gave it.

    Args:
        workers: the setting.
        key: its key, for the message.
        given: whether the user gave the setting.
        processes: training processes on this machine.
        tell: prints or logs a line.
    """
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # torch's warning about the same
    cores = max(1, len(os.sched_getaffinity(0)) // processes) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if given or cores is None or workers <= cores:
        return workers
    tell(f"{key} {workers} is more than the CPU cores here: {cores} worker processes load the images")
    return cores


def phase_line(epoch: int, epochs: int, pcb_epochs: int, part_classifier_epochs: int, starts: bool) -> str:
    """Return the announcement of the phase of refined part pooling that begins with an epoch, or an empty string.

    Args:
        epoch: counted from 0.
        epochs, pcb_epochs, part_classifier_epochs: length of the training and of its first two phases.
        starts: whether the training starts or resumes at this epoch; then the phase is announced in any case.
    """
    alone = pcb_epochs + part_classifier_epochs
    phases = (
        (0, pcb_epochs, "PCB with six stripes, before refined part pooling"),
        (pcb_epochs, alone, "refined part pooling begins, only the part classifier trains"),
        (alone, epochs, "refined part pooling, all layers train"),
    )
    for first, last, text in phases:
        if first <= epoch < last and (starts or epoch == first):
            return f"Epochs {first + 1} to {min(last, epochs)}: {text}"
    return ""


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the rate of each parameter group: "attention", "gate", and the host's "backbone" and "new", or "all"."""
    rates = {group["role"]: group["lr"] for group in optimizer.param_groups if "role" in group}
    host = [group["lr"] for group in optimizer.param_groups if "role" not in group]
    names = ("backbone", "new") if len(host) == 2 else ("all",)
    return {**dict(zip(names, host, strict=False)), **rates}


def show_embeddings(
    writer: Any, dataset: str, embeddings: Tensor, identities: Iterable[object], cameras: Iterable[object], epoch: int
) -> None:
    """Write embeddings (N, width) to the projector of a TensorBoard writer, at most 1000, in 64 dimensions."""
    given = embeddings[:_MOST_EMBEDDINGS]
    # 12288 numbers per query would make files of 100 MB and more; 64 principal directions keep the neighbours.
    left, size, _ = torch.pca_lowrank(given, q=min(64, *given.shape))
    labels = [[str(one) for one in pair] for pair in zip(identities, cameras, strict=True)][: len(given)]
    writer.add_embedding(left * size, labels, metadata_header=["identity", "camera"], global_step=epoch, tag=dataset)
    writer.flush()
