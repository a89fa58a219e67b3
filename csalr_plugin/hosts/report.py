"""The report of a training: one HTML page with curves, gates, learning rates, results, ranked queries and settings."""

from __future__ import annotations

import base64
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from csalr_plugin.hosts.records import METRICS, changed_settings, mean_precision, read_metrics
from csalr_plugin.version import __version__

REPORT = "report.html"
_NAMES = {"acc": "all parts"}


def write_report(
    folder: Path,
    *,
    host: str,
    model: str,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any],
    checkpoints: Sequence[str],
) -> Path:
    """Write ``report.html`` from the files of a training. The page is one file and needs no network.

    Args:
        folder: the folder of the training, with ``metrics.jsonl`` and ``ranked_*.png``.
        host: the name and version of the host.
        model: the name of the model.
        settings, defaults: the settings of the training and of the host, ``{dotted key: value}``.
        checkpoints: names of the checkpoints that the training kept.

    Returns:
        The path of the page.
    """
    epochs, evaluations = read_metrics(folder / METRICS)
    environment = Environment(
        loader=PackageLoader("csalr_plugin.hosts", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        model=model,
        host=host,
        version=__version__,
        command=command_line(),
        folder=str(folder),
        epochs=epochs,
        facts=_facts(epochs, evaluations),
        results=_results(evaluations),
        charts=[chart for draw in _CHARTS if (chart := draw(epochs, evaluations))],
        ranked=[(path.stem.removeprefix("ranked_"), _jpeg(path)) for path in sorted(folder.glob("ranked_*.png"))],
        settings=changed_settings(settings, defaults),
        checkpoints=checkpoints,
    )
    path = folder / REPORT
    path.write_text(page, encoding="utf-8")
    return path


def command_line() -> str:
    """Return the command that started this process, as a user types it."""
    words = sys.orig_argv
    if len(words) > 1 and Path(words[1]).name == "csalr":
        words = ["csalr", *words[2:]]
    elif words:
        words = [Path(words[0]).name, *words[1:]]
    return shlex.join(words)


def _facts(epochs: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the main numbers of a training as pairs of a name and a value."""
    facts = []
    if evaluations:
        last = [line for line in evaluations if line["epoch"] == evaluations[-1]["epoch"]]
        for line in last:
            facts.append((f"mAP on {line['dataset']}", f"{line['mAP']:.1%}"))
            if "rank-1" in line:
                facts.append((f"rank-1 on {line['dataset']}", f"{line['rank-1']:.1%}"))
        if len({line["epoch"] for line in evaluations}) > 1:
            facts.append(("best mAP", f"{mean_precision(evaluations):.1%}"))
    if epochs:
        facts.append(("epochs", str(epochs[-1]["epoch"])))
        facts.append(("seconds an epoch", f"{sum(line['seconds'] for line in epochs) / len(epochs):.1f}"))
        facts.append(("last loss", f"{epochs[-1]['loss']:.4g}"))
    return facts


def _results(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return header and rows of the table of results, and the rows with the best mAP of each dataset."""
    names = list(
        dict.fromkeys(name for line in evaluations for name in line if name == "mAP" or name.startswith("rank"))
    )
    best: dict[str, float] = {}
    for line in evaluations:
        best[line["dataset"]] = max(best.get(line["dataset"], -1.0), line["mAP"])
    rows = [
        {
            "cells": [line["dataset"], line["epoch"], *(f"{line[name]:.1%}" if name in line else "" for name in names)],
            "best": line["mAP"] == best[line["dataset"]],
        }
        for line in evaluations
    ]
    return {"header": ["dataset", "epoch", *names], "rows": rows}


def _jpeg(path: Path) -> str:
    """Return a picture as the content of a data URL."""
    content = BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(content, "JPEG", quality=85)
    return base64.b64encode(content.getvalue()).decode()


Lines = Sequence[Mapping[str, Any]]


def _chart(title: str, ylabel: str, lines: Lines, names: Mapping[str, str], *, log: bool = False) -> Markup | None:
    """Draw metrics over the epochs as an SVG picture; None if no line has one of them."""
    present = {name: label for name, label in names.items() if any(name in line for line in lines)}
    if not present:
        return None
    figure = Figure(figsize=(5.6, 3.3))
    axis = figure.add_axes((0.13, 0.14, 0.6, 0.76))  # an automatic layout takes as long as the drawing
    for number, (name, label) in enumerate(present.items()):
        points = [(line["epoch"], line[name]) for line in lines if name in line]
        (curve,) = axis.plot(*zip(*points, strict=True), markersize=4, label=textwrap.fill(label, 18))
        curve.set(linestyle=("-", "--", "-.", ":")[number % 4], marker="o" if len(points) < 16 else "")
    axis.set(title=title, xlabel="epoch", ylabel=ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log and all(line[name] > 0 for name in present for line in lines if name in line):
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.3, frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    content = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Title": title})
    text = content.getvalue()
    return Markup(text[text.index("<svg") :])


def _named(lines: Lines, prefix: str, *first: str) -> dict[str, str]:
    """Return the metrics that begin with `prefix`, after those of `first`, and their labels."""
    found = dict.fromkeys(name for line in lines for name in line if name.startswith(prefix))
    return {name: _NAMES.get(name) or _spaced(name.removeprefix(prefix)) for name in (*first, *found)}


def _spaced(name: str) -> str:
    """Return the name of a block or head with a space before its number."""
    return re.sub(r"(?<=[a-z])(?=\d)", " ", name)


def _loss(epochs: Lines, _: Lines) -> Markup | None:
    names = {name: f"branch {label}" for name, label in _named(epochs, "L_DS_").items()}
    return _chart("Loss (Eq. 18)", "loss", epochs, {"loss": "sum", "L_F": "L_F", **names})


def _accuracy(epochs: Lines, _: Lines) -> Markup | None:
    return _chart("Accuracy on training batches", "per cent", epochs, _named(epochs, "accuracy_", "acc"))


def _gates(epochs: Lines, _: Lines) -> Markup | None:
    return _chart("Gates alpha of the attention blocks", "alpha", epochs, _named(epochs, "alpha_"))


def _rates(epochs: Lines, _: Lines) -> Markup | None:
    return _chart("Learning rates", "learning rate", epochs, _named(epochs, "lr_"), log=True)


def _precision(_: Lines, evaluations: Lines) -> Markup | None:
    if len({line["epoch"] for line in evaluations}) < 2:
        return None
    several = len({line["dataset"] for line in evaluations}) > 1
    per_cent: list[dict[str, Any]] = []
    for line in evaluations:
        found = {name: 100 * line[name] for name in ("mAP", "rank-1") if name in line}
        named = {f"{name} {line['dataset']}" if several else name: value for name, value in found.items()}
        per_cent.append({"epoch": line["epoch"], **named})
    names = dict.fromkeys(name for line in per_cent for name in line if name != "epoch")
    return _chart("Evaluations", "per cent", per_cent, {name: name for name in names})


_CHARTS: tuple[Callable[[Lines, Lines], Markup | None], ...] = (_precision, _loss, _accuracy, _gates, _rates)
