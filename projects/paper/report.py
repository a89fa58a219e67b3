"""The report of a study: our numbers beside the paper's, with the queries and seeds that they rest on.

Numbers of trainings that were not run stay empty. Only the preset `full` prints a difference to a number of the paper,
and `smoke` prints no accuracy.
"""

from __future__ import annotations

import base64
import csv
import functools
import html
import io
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib
from tabulate import tabulate

from csalr_plugin.files import write_json
from csalr_plugin.hosts.records import METRICS, read_metrics

from .ablation import HEADER, ablation_rows, describe_gates
from .attention_maps import draw_reconstruction, explanation, heading, reconstruction_tables
from .folder import CONSOLE, COST, QUERIES, RESULT, RUN, STUDY, epochs_done, read_json
from .plan import is_dataset, paper, tables_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

MARK = "*"
_BOLD = "\x02"  # before a cell that is printed bold
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:78em;padding:0 1em;color:#222}
.scroll{overflow-x:auto;margin:.6em 0 1.4em}table{border-collapse:collapse;font-size:14px}
th,td{border-bottom:1px solid #ddd;padding:.25em .7em;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}
thead th{border-bottom:2px solid #888}
th.text,td.text{text-align:left;white-space:normal;min-width:20em}
figure{margin:1em 0}figcaption{font-size:13px;color:#555}
img{max-width:100%}pre{background:#f5f5f5;padding:.8em;overflow-x:auto;font-size:12px}nav ul{columns:2 18em}
code{overflow-wrap:anywhere}"""


@dataclass(frozen=True)
class Scope:
    """The part of a study that its report shows.

    Attributes:
        preset: the preset of the study.
        targets: the targets that were asked for, such as "table1".
    """

    preset: str
    targets: tuple[str, ...]

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that were asked for, in the paper's order."""
        asked = {table for target in self.targets for table in tables_of(target)}
        return tuple(table for table in paper()["tables"] if table in asked)

    @property
    def ablation(self) -> bool:
        """Whether the ablation was asked for."""
        return "ablation" in self.targets

    @property
    def costs(self) -> bool:
        """Whether Table 5 was asked for."""
        return bool({"table5", "all"} & set(self.targets))

    @property
    def figure4(self) -> bool:
        """Whether Figure 4 was asked for."""
        return bool({"figure4", "all"} & set(self.targets))

    @property
    def accuracies(self) -> bool:
        """Whether the report prints accuracies."""
        return self.preset != "smoke"

    @property
    def differences(self) -> bool:
        """Whether the report prints differences to the paper's numbers."""
        return self.preset == "full"


@dataclass(frozen=True)
class Trained:
    """A training of the study: planned, begun or finished.

    Attributes:
        name, dataset, seed: identify the training.
        epochs: number of epochs to train.
        done: number of epochs that are trained.
        begun: whether the training was started.
        about: the content of the file ``run.json``.
        result: the content of the file ``result.json``; None until the training is finished.
        curves: the metrics of each epoch.
        evaluations: the metrics of each evaluation.
    """

    name: str
    dataset: str
    seed: int
    epochs: int
    done: int
    begun: bool
    about: dict[str, Any]
    result: dict[str, Any] | None
    curves: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def state(self) -> str:
        """ "done", "epoch 3 of 10", or "not run"."""
        if self.result:
            return "done"
        return f"epoch {self.done} of {self.epochs}" if self.begun else "not run"

    def value(self, metric: str) -> float | None:
        """Return a metric in per cent, or None."""
        value = self.result["results"].get(metric) if self.result else None
        return None if value is None else 100 * float(value)


@dataclass
class Section:
    """A section of the report: text, tables and pictures in order."""

    title: str
    parts: list[tuple[str, Any]] = field(default_factory=list)

    def text(self, text: str) -> None:
        """Append a paragraph."""
        self.parts.append(("text", text))

    def table(self, header: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> None:
        """Append a table; cells are written as they are. A table with a caption is exported to LaTeX too."""
        if caption:
            self.text(f"{caption}:")
        self.parts.append(("table", (list(header), [[str(cell) for cell in row] for row in rows], caption)))

    def code(self, text: str) -> None:
        """Append preformatted text."""
        self.parts.append(("code", text))

    def picture(self, name: str, figure: Figure) -> None:
        """Append a figure and close it."""
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, format="png")
        plt.close(figure)
        self.parts.append(("picture", (name, buffer.getvalue())))

    def link(self, caption: str, path: str) -> None:
        """Append a picture that stays in its own file, at `path` relative to the report."""
        self.parts.append(("link", (caption, path)))


def write_report(out: Path, target: str = "") -> Path:
    """Write ``report.md``, ``.html``, ``.tex``, ``.json`` and ``.csv`` of the study in `out`; return the first path.

    Args:
        out: the folder of the study.
        target: a target to show beside those that the study was asked for.

    Raises:
        UserError: a file of the study is damaged.
    """
    study = read_json(out / STUDY)
    scope = Scope(study["preset"], tuple(dict.fromkeys([*study.get("targets", []), *([target] if target else [])])))
    trained = collect(out)
    datasets = [name for name in paper()["datasets"] if any(run.dataset == name for run in trained)]
    sections, records = [_summary(scope, trained, datasets)], []
    for table in scope.tables:
        section, found = _table(table, scope, trained, datasets)
        sections.append(section)
        records += found
    if scope.ablation:
        section, ablation = _ablation(scope, out, trained, datasets)
        sections.append(section)
    else:
        ablation = []
    if scope.costs:
        section, found = _costs(scope, out)
        sections.append(section)
        records += found
    if scope.figure4:
        sections.append(_figure4(out))
    sections += [
        _gates(scope, out, trained),
        _curves(scope, trained),
        _cost_against_accuracy(scope, trained),
        _trainings(trained),
    ]
    _write(out, [section for section in sections if section.parts])
    write_json(out / "report.json", {"study": study, "cells": records, "ablation": ablation})
    with (out / "report.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(_record("", "", "", "", None, None, "", [])))
        writer.writeheader()
        writer.writerows(records)
    return out / "report.md"


def collect(out: Path) -> list[Trained]:
    """Return every training that a study plans, sorted by dataset, name and seed."""
    found = []
    for marker in sorted((out / "runs").glob(f"*/seed*/{RUN}")):
        folder, about = marker.parent, read_json(marker)
        result = read_json(folder / RESULT) if (folder / RESULT).exists() else None
        curves, evaluations = read_metrics(folder / METRICS)
        given = (about["name"], about["dataset"], about["seed"], about["epochs"])
        done, begun = epochs_done(folder), (folder / CONSOLE).exists()
        found.append(Trained(*given, done, begun, about, result, curves, evaluations))
    order = {name: number for number, name in enumerate(paper()["runs"])}
    return sorted(found, key=lambda run: (run.dataset, order.get(run.name, len(order)), run.seed))


def basis(runs: Sequence[Trained]) -> str:
    """Return the number of queries and of seeds that results rest on, such as "200 queries, 2 seeds".

    Seeds are those of finished trainings; if none is finished, those that are planned.
    """
    queries = {run.about["settings"]["data"].get("query") for run in runs} - {None}
    seeds = {run.seed for run in runs if run.result} or {run.seed for run in runs}
    numbers = [f"{count} {'query' if count == 1 else 'queries'}" for count in sorted(queries)]
    return ", ".join([*numbers, f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}"])


def source(dataset: str, runs: Sequence[Trained]) -> str:
    """Return the name of the data that `runs` were trained on, which is the dataset's own only for its own images."""
    if all(is_dataset(dataset, run.about["settings"]["data"]) for run in runs):
        return dataset
    return f"other data in the layout of {dataset}"


def _about(scope: Scope, dataset: str, runs: Sequence[Trained]) -> str:
    """Return the data, preset, queries and seeds of `runs`, for a title."""
    return f"{source(dataset, runs)}, preset {scope.preset}, {basis(runs)}"


def _bases(trained: Sequence[Trained], datasets: Sequence[str], names: Iterable[str] | None = None) -> str:
    """Return the basis of each dataset, such as "market1501: 200 queries, 2 seeds"."""
    wanted = None if names is None else set(names)
    chosen = {
        dataset: [run for run in trained if run.dataset == dataset and (wanted is None or run.name in wanted)]
        for dataset in datasets
    }
    return "; ".join(f"{source(dataset, runs)}: {basis(runs)}" for dataset, runs in chosen.items() if runs)


def _summary(scope: Scope, trained: Sequence[Trained], datasets: Sequence[str]) -> Section:
    given = _bases(trained, datasets)
    title = paper()["ablation"]["title"] if scope.targets == ("ablation",) else "The paper's tables, and ours"
    section = Section(f"{title} (preset {scope.preset}{f'; {given}' if given else ''})")
    finished = [run for run in trained if run.result]
    state = f"{len(finished)} of {len(trained)} trainings are done."
    if len(finished) < len(trained):
        state += " **This study is not finished.**"
    section.text(f"Preset `{scope.preset}`. {state}")
    if not scope.accuracies:
        section.text(
            "The preset `smoke` checks that every row trains, evaluates and reaches this report. Its networks learn "
            "nothing in seconds, so no accuracy is printed."
        )
    else:
        section.text(
            "Accuracies are in per cent; several seeds are given as mean ± standard deviation. *Not run*: not trained "
            "here. *Epoch 3 of 10*: not finished. *Quoted*: the paper quotes this row from elsewhere. **Bold**: the "
            "largest value of a column. It may be chance: the queries and seeds of each table are in its title."
        )
        section.text(
            "*Difference*: ours minus the paper's, where the settings are the paper's."
            if scope.differences
            else f"The preset `{scope.preset}` does not train as the paper does, so no difference to it is printed."
        )
    marked = [run for run in trained if run.about["deviations"]]
    if marked:
        section.text(
            f"Marked `{MARK}`: **trained with other settings than the paper's** (section 4.2), so its number is not "
            "reproduced."
        )
        shared = [
            line for line in marked[0].about["deviations"] if all(line in run.about["deviations"] for run in marked)
        ]
        lines = [("every marked training", line) for line in shared]
        for run in marked:
            own = [line for line in run.about["deviations"] if line not in shared]
            lines += [(f"{run.name}, {run.dataset}", line) for line in own]
        section.table(("training", "difference from the paper's settings"), dict.fromkeys(lines))
    left_out = [about["title"] for name, about in paper()["datasets"].items() if name not in datasets]
    if left_out and scope.tables:
        section.text(f"Not run at all: {', '.join(left_out)}.")
    return section


def _record(
    table: str,
    row: str,
    dataset: str,
    metric: str,
    paper_value: Any,
    ours: Any,
    state: str,
    runs: Sequence[Trained],
    *,
    compared: bool = False,
) -> dict[str, Any]:
    values = [value for run in runs if (value := run.value(metric)) is not None]
    mean = statistics.fmean(values) if values else ours
    as_published = not any(run.about["deviations"] for run in runs) if values else None
    comparable = compared and as_published and mean is not None and paper_value is not None
    return {
        "table": table,
        "row": row,
        "dataset": dataset,
        "metric": metric,
        "ours": mean,
        "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
        "paper": paper_value,
        "difference": mean - paper_value if comparable else None,
        "papers_settings": as_published,
        "state": state,
    }


def _state(runs: Sequence[Trained]) -> str:
    if not runs:
        return "not run"
    if all(run.result for run in runs):
        return f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    if len(runs) == 1:
        return runs[0].state
    return ", ".join(f"seed {run.seed}: {run.state}" for run in runs)


def _cell(record: dict[str, Any]) -> str:
    """Return our number with its mark, or the reason why there is none."""
    if record["ours"] is None:
        return "-" if record["state"].endswith(("seed", "seeds")) else record["state"]
    spread = record["standard_deviation"]
    return (
        f"{record['ours']:.1f}{'' if spread is None else f' ± {spread:.1f}'}{'' if record['papers_settings'] else MARK}"
    )


def _bold_largest(rows: Sequence[list[str]], values: Sequence[Sequence[float | None]], columns: Sequence[int]) -> None:
    """Mark the largest value of each column, if there are at least two.

    Args:
        rows: the cells of the table, changed in place.
        values: the values of a row, one per entry of `columns`.
        columns: the columns of the cells.
    """
    for number, column in enumerate(columns):
        given = [row[number] for row in values]
        largest = max((value for value in given if value is not None), default=None)
        if sum(value is not None for value in given) > 1:
            for row, value in zip(rows, given, strict=True):
                if value is not None and value == largest:
                    row[column] = _BOLD + row[column]


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def _table(
    name: str, scope: Scope, trained: Sequence[Trained], datasets: Sequence[str]
) -> tuple[Section, list[dict[str, Any]]]:
    table = paper()["tables"][name]
    columns, runs_of = table["columns"], {row["run"] for row in table["rows"] if "run" in row}
    given = _bases(trained, datasets, runs_of) if scope.accuracies else ""
    section, records = Section(table["title"] + (f" ({given})" if given else "")), []
    words = ("", "paper", "difference") if scope.differences else ("", "paper")
    for dataset in datasets:
        here = [run for run in trained if run.dataset == dataset and run.name in runs_of]
        rows: list[list[str]] = []
        values, seeds, gains = [], [], []
        for row in table["rows"]:
            runs = [run for run in here if run.name == row.get("run")]
            state = _state(runs) if "run" in row else "quoted"
            published = dict(zip(columns, row.get(dataset) or [None] * len(columns), strict=True))
            shown_runs = runs if scope.accuracies else []
            found = [
                _record(
                    name,
                    row["name"],
                    dataset,
                    one,
                    published[one],
                    None,
                    state,
                    shown_runs,
                    compared=scope.differences,
                )
                for one in columns
            ]
            records += found
            if not scope.accuracies:
                if "run" in row:
                    rows.append([row["name"], "trained" if runs and all(run.result for run in runs) else state])
                continue
            cells = [(_cell(one), _number(one["paper"]), _number(one["difference"], "+.1f")) for one in found]
            rows.append([row["name"], *(cell for three in cells for cell in three[: len(words)]), state])
            values.append([value for one in found for value in (one["ours"], one["paper"])])
            seeds.append(max(one["seeds"] for one in found))
            if "baseline" in row and (gain := _gain(table, scope, dataset, here, row, published)):
                gains.append(gain)
        title = paper()["datasets"][dataset]["title"]
        if not scope.accuracies:
            section.table(("", "trainings"), rows, f"{table['title']}: trainings on {dataset}")
            continue
        for mine, count in zip(values, seeds, strict=True):
            if count < max(seeds):  # compare only means over the same number of seeds
                mine[::2] = [None] * len(columns)
        places = [1 + len(words) * index + place for index in range(len(columns)) for place in (0, 1)]
        _bold_largest(rows, values, places)
        data, about = source(dataset, here), f"preset {scope.preset}, {basis(here)}" if here else "not run"
        shown = [word or one for one in columns for word in words]
        section.table(("", *shown, "trainings"), rows, f"{table['title']}, on {data} (paper: {title}); {about}")
        if gains:
            header = [word for one in columns for word in ((one, "paper") if scope.differences else (one,))]
            caption = f"Gained over the same network without attention, on {data}; {about}, paired by seed"
            section.table(("", *header), gains, caption)
    return section, records


def _gain(
    table: dict[str, Any],
    scope: Scope,
    dataset: str,
    trained: Sequence[Trained],
    row: dict[str, Any],
    published: dict[str, float | None],
) -> list[str] | None:
    """Return the gain of a row over its baseline with the same seeds; None if no seed of both is trained.

    With several seeds it is mean ± standard deviation of the differences. The paper's gain stands beside it where the
    settings are the paper's.
    """
    after, before = (
        {run.seed: run for run in trained if run.name == name and run.result} for name in (row["run"], row["baseline"])
    )
    seeds = sorted(after.keys() & before.keys())
    if not seeds:
        return None
    reference = next(one for one in table["rows"] if one.get("run") == row["baseline"])
    theirs = dict(zip(table["columns"], reference.get(dataset) or [None] * len(published), strict=True))
    deviates = any(run.about["deviations"] for seed in seeds for run in (after[seed], before[seed]))
    cells = [row["name"]]
    for metric, value in published.items():
        gains = [(after[seed].value(metric) or 0.0) - (before[seed].value(metric) or 0.0) for seed in seeds]
        spread = f" ± {statistics.stdev(gains):.1f}" if len(gains) > 1 else ""
        cells.append(f"{statistics.fmean(gains):+.1f}{spread}{MARK if deviates else ''}")
        if scope.differences:
            base = theirs[metric]
            cells.append("-" if value is None or base is None or deviates else f"{value - base:+.1f}")
    return cells


def _ablation(
    scope: Scope, out: Path, trained: Sequence[Trained], datasets: Sequence[str]
) -> tuple[Section, list[dict[str, Any]]]:
    """Return the section and the records of the ablation."""
    table = paper()["ablation"]
    names = {row["run"]: row["name"] for row in table["rows"]}
    given = _bases(trained, datasets, names) if scope.accuracies else ""
    section, records = Section(table["title"] + (f" ({given})" if given else "")), []
    for dataset in datasets:
        here = [run for run in trained if run.dataset == dataset and run.name in names]
        if not scope.accuracies:
            states = [(name, _state([one for one in here if one.name == run])) for run, name in names.items()]
            section.table(("", "trainings"), states, f"{table['title']}: trainings on {dataset}")
            continue
        finished = [run for run in here if run.result and (_folder(out, run) / QUERIES).exists()]
        if not finished:
            section.text(f"On `{dataset}`: no training is finished.")
            continue
        rows = ablation_rows(
            table, {name: [_folder(out, run) for run in finished if run.name == name] for name in names}
        )
        about = _about(scope, dataset, here)
        section.table(HEADER, [row.cells for row in rows], f"{table['title']}, on {about}")
        section.text(
            "Seeds are given as mean ± standard deviation. A row with gates set to 0 is the trained network of the row "
            "above it, without its attention at test time."
        )
        differences = [(row.name, *one) for row in rows for one in row.differences.items()]
        section.table(
            ("", "compared with", "difference", "seeds", "queries"),
            [
                (name, other, f"{_BOLD if one.holds else ''}{str(one).strip('*')}", one.seeds, one.queries)
                for name, other, one in differences
            ],
            f"Differences in mAP in percentage points with 95 % intervals, on {about}",
        )
        section.text(
            "Differences are paired by seed and query; the intervals are of a bootstrap over both, and with one seed "
            "over queries alone. A difference is bold where its interval leaves out 0."
        )
        if differences:
            section.picture(f"ablation-{dataset}", _draw_differences(f"{table['title']}\n{about}", differences))
        records += [
            {"dataset": dataset, "row": name, "baseline": other, **vars(one)} for name, other, one in differences
        ]
    return section, records


def _draw_differences(title: str, differences: Sequence[tuple[str, str, Any]]) -> Figure:
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.34 * len(differences)), layout="constrained")
    for line, (_, _, one) in enumerate(differences):
        colour = "tab:blue" if one.holds else "tab:gray"
        axis.plot((one.low, one.high), (line, line), color=colour, linewidth=2)
        axis.plot(one.mean, line, "o", color=colour)
    axis.axvline(0, color="black", linewidth=0.8)
    labels = [f"{name} - {other}\n{one.seeds} seed{'s' if one.seeds > 1 else ''}" for name, other, one in differences]
    axis.set_yticks(range(len(differences)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("difference in mAP, percentage points, with 95 % interval")
    figure.suptitle(title, fontsize=10)
    return figure


def _folder(out: Path, run: Trained) -> Path:
    return out / "runs" / f"{run.dataset}-{run.name}" / f"seed{run.seed}"


def _gates(scope: Scope, out: Path, trained: Sequence[Trained]) -> Section:
    """List the accuracy that each trained network loses when its gates are set to 0."""
    section = Section("Gates: each network with and without its attention at test time")
    lines = [
        describe_gates(f"{run.name}, {run.dataset}, seed {run.seed}", read_json(path))
        for run in trained
        if run.result and (path := _folder(out, run) / QUERIES).exists()
    ]
    if lines and scope.accuracies:
        section.code("\n".join(lines))
    return section


def _costs(scope: Scope, out: Path) -> tuple[Section, list[dict[str, Any]]]:
    """Return the section and records of Table 5, from the results of ``csalr bench cost`` in the study's folder."""
    table = paper()["costs"]
    section, records, rows = Section(f"{table['title']} (preset {scope.preset})"), [], []
    path = out / COST
    measured = read_json(path) if path.exists() else {}
    figures = {"MB an image": ("kept_bytes", 1e6), "images a second": ("eval_fps", 1.0)}
    ours = {
        row["bench"]: [measured["summary"][row["bench"]][figure]["value"] / unit for figure, unit in figures.values()]
        for row in table["rows"]
        if row["bench"] in measured.get("summary", {})
    }
    first = table["rows"][0]
    for row in table["rows"]:
        cells: list[str] = []
        for index, (metric, value) in enumerate(zip(table["columns"], row["paper"], strict=True)):
            mine = ours[row["bench"]][index] if row["bench"] in ours else None
            state = "not run" if mine is None else "measured"
            record = _record("table5", row["name"], "", metric, value, mine, state, [])
            record["papers_settings"] = None if mine is None else False
            records.append(record)
            cells += [_cell(record), f"{value:.2f}"]
            if row is first:
                cells += ["", ""]
            else:
                base = ours[first["bench"]][index] if first["bench"] in ours else None
                cells.append("-" if mine is None or base is None else f"{mine / base - 1:+.1%}{MARK}")
                cells.append(f"{value / first['paper'][index] - 1:+.1%}")
        rows.append((row["name"], *cells))
    header = ("", *(word for one in table["columns"] for word in (one, "paper", "over PCB", "paper")))
    section.table(header, rows, f"{table['title']}; preset {scope.preset}")
    if measured:
        settings = ", ".join(
            f"{name} {_plain(value)}" for name, value in measured["settings"].items() if name != "rows"
        )
        section.text(
            f"Marked `{MARK}`: measured with {settings}, on {_plain(measured['machine'])}; the paper names neither its "
            "device nor its batch size. Memory: bytes that the forward pass keeps for the backward pass. Speed: "
            "embedding at test time."
        )
    return section, records


def _plain(value: Any) -> str:
    return ", ".join(f"{name} {one}" for name, one in value.items()) if isinstance(value, dict) else str(value)


def _figure4(out: Path) -> Section:
    section = Section("Figure 4: attention maps")
    measured = sorted((out / "figure4").glob("*/*/reconstruction-*.json"))
    if not measured:
        section.text("not run")
        return section
    section.text(
        "The photographs of the dataset stay in their files in `figure4/`, which this report shows and does not copy. "
        "Read the licence of the dataset before you pass them on."
    )
    for path in measured:
        about = read_json(path)
        dataset = path.parent.parent.name
        section.text(f"**On {dataset}: {heading(about)}**")
        for picture in sorted(path.parent.glob("*.png")):
            if picture.stem != path.stem:
                caption = f"{about['model']} on {dataset}: {picture.stem}"
                section.link(caption, picture.relative_to(out).as_posix())
        section.picture(
            f"figure4-{about['model']}-{dataset}",
            draw_reconstruction(f"{about['title']}; {dataset}, {about['images']} queries", about["rows"]),
        )
        for caption, header, lines in reconstruction_tables(about["rows"]):
            section.table(header, lines, f"{about['model']} on {dataset}, {about['images']} queries: {caption[:-1]}")
        for text in explanation(about["rows"]):
            section.text(text)
    return section


def _asked(scope: Scope) -> dict[str, tuple[str, dict[str, str]]]:
    """Return the title and the names of the runs of each table that was asked for, the ablation included."""
    tables = {name: paper()["tables"][name] for name in scope.tables or (["table1"] if scope.figure4 else [])}
    tables |= {"ablation": paper()["ablation"]} if scope.ablation else {}
    return {
        name: (about["title"], {row["run"]: row["name"] for row in about["rows"] if "run" in row})
        for name, about in tables.items()
    }


def _names(scope: Scope) -> dict[str, str]:
    """Return a name of each run that was asked for, which tells all of them apart."""
    names: dict[str, str] = {}
    for table, (_, rows) in _asked(scope).items():
        prefix = "" if table in ("table1", "ablation") else "PCB + CSALR, "
        for run, name in rows.items():
            names.setdefault(run, "PCB" if run == "pcb" else prefix + name)
    return names


def _curves(scope: Scope, trained: Sequence[Trained]) -> Section:
    """Plot the losses per epoch and the mAP per evaluation, one picture per dataset and table."""
    section = Section("Learning curves")
    if len({run.seed for run in trained}) > 1:
        section.text("Each line is one seed; the first seed of a training is darkest.")
    drawn: set[tuple[str, ...]] = set()
    for table, (title, names) in _asked(scope).items():
        for dataset in dict.fromkeys(run.dataset for run in trained):
            runs = [run for run in trained if run.dataset == dataset and run.name in names and run.curves]
            key = (dataset, *(run.name for run in runs))
            if not runs or key in drawn:
                continue
            drawn.add(key)
            about = f"{title}\n{_about(scope, dataset, runs)}"
            section.picture(f"curves-{table}-{dataset}", _draw_curves(about, runs, names, scope.accuracies))
    return section


def _branches(run: Trained, line: dict[str, Any]) -> list[float]:
    """Return the losses of the supervision branches in an epoch; none for branches of weight 0, which do not learn."""
    if not run.about["settings"].get("csalr.supervision_weight", 1.0):
        return []
    return [value for name, value in line.items() if name.startswith("L_DS")]


def _draw_curves(title: str, runs: Sequence[Trained], names: dict[str, str], accuracies: bool) -> Figure:
    columns = 3 if accuracies else 2
    figure, axes = plt.subplots(1, columns, figsize=(2.5 + 4.2 * columns, 4.4), layout="constrained")
    shown = list(dict.fromkeys(run.name for run in runs))
    for run in runs:
        number = shown.index(run.name)
        first = run.seed == min(other.seed for other in runs if other.name == run.name)
        style = {"color": f"C{number % 10}", "alpha": 1.0 if first else 0.5, "linestyle": ("-", "--")[number // 10 % 2]}
        label = {"label": names[run.name]} if first else {}
        epochs = [line["epoch"] for line in run.curves]
        axes[0].plot(epochs, [line.get("L_F", line["loss"]) for line in run.curves], marker=".", **style, **label)
        if any(_branches(run, line) for line in run.curves):
            axes[1].plot(epochs, [sum(_branches(run, line)) for line in run.curves], marker=".", **style)
        if accuracies:
            scores = [line for line in run.evaluations if line["dataset"] == run.dataset]
            steps, values = [line["epoch"] for line in scores], [100 * line["mAP"] for line in scores]
            axes[2].plot(steps, values, marker="o", **style)
    titles = ("$L_F$, mean of the epoch", "$L_{DS}$, sum of the branches", "mAP (%)")
    last = max(run.epochs for run in runs)
    for axis, text in zip(axes, titles, strict=False):
        axis.set(xlabel="epoch", title=text, xlim=(1 - 0.03 * last, 1.03 * last))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if not axis.lines:
            axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center", color="0.5")
            axis.set_yticks([])
    figure.suptitle(title, fontsize=11)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


@functools.cache
def _cost(settings: str) -> tuple[float, float]:
    """Return the GMACs per image and the millions of parameters of the network of a training's settings."""
    import torch

    from csalr_plugin.models import build_model
    from csalr_plugin.models.cost import count_gmacs, count_parameters

    given = json.loads(settings)
    keys = {name: given[f"csalr.{name}"] for name in ("groups", "landmarks", "stages", "key_ratio")}
    with torch.device("meta"):
        keys["landmarks"] = tuple(keys["landmarks"])
        keys["plain_supervision"] = given.get("csalr.plain_supervision", False)
        model = build_model(given["model.name"], given["data"]["identities"], pretrained=False, **keys).eval()
    return count_gmacs(model, given["data.height"], given["data.width"]), count_parameters(model) / 1e6


def _cost_against_accuracy(scope: Scope, trained: Sequence[Trained]) -> Section:
    section = Section("Cost against accuracy")
    names = _names(scope)
    for dataset in dict.fromkeys(run.dataset for run in trained):
        points: dict[str, list[Trained]] = {}
        for run in trained:
            if run.dataset == dataset and run.result and run.name in names:
                points.setdefault(run.name, []).append(run)
        if not points or not scope.accuracies:
            continue
        about = _about(scope, dataset, [run for runs in points.values() for run in runs])
        figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
        rows = []
        for number, (name, runs) in enumerate(points.items()):
            gmacs, parameters = _cost(json.dumps(runs[0].about["settings"], sort_keys=True))
            mean = statistics.fmean([run.value("mAP") or 0.0 for run in runs])
            mark = MARK if any(run.about["deviations"] for run in runs) else ""
            rows.append((names[name], f"{gmacs:.2f}", f"{parameters:.2f}", f"{mean:.1f}{mark}"))
            shape = "os^D"[number // 10 % 4]
            axis.scatter(gmacs, mean, color=f"C{number % 10}", marker=shape, s=3 * parameters, label=names[name])
        axis.set(xlabel="GMACs an image at test time", ylabel="mAP (%)", title=f"Cost against accuracy\n{about}")
        axis.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        section.picture(f"cost-{dataset}", figure)
        header = ("", "GMACs an image", "parameters (M)", "mAP")
        section.table(header, rows, f"Cost against accuracy, on {about}")
    if section.parts:
        section.text("The area of a marker is the number of parameters, including those that only training needs.")
    return section


def _trainings(trained: Sequence[Trained]) -> Section:
    """List the state and final metrics of each training, its versions and machine, and its command."""
    section = Section("Trainings")
    if not trained:
        return section
    rows = []
    for run in trained:
        last = run.curves[-1] if run.curves else {}
        gates = ", ".join(f"{value:+.3f}" for key, value in last.items() if key.startswith("alpha"))
        branches = _branches(run, last)
        seconds = sum(line["seconds"] for line in run.curves)
        ended = (_number(last.get("L_F"), ".2f"), _number(sum(branches) if branches else None, ".2f"), gates or "-")
        rows.append((f"{run.name}, {run.dataset}", run.seed, run.state, f"{seconds / 60:.1f}", *ended))
    header = ("training", "seed", "state", "minutes", "L_F at the end", "sum L_DS", "gates alpha, by stage")
    section.table(header, rows)
    finished = [run for run in trained if run.result]
    versions = dict.fromkeys(_plain(run.result["versions"]) for run in finished if run.result)
    machines = dict.fromkeys(_plain(run.result["machine"]) for run in finished if run.result)
    section.text("Versions: " + ("; ".join(versions) or "no training is finished"))
    section.text("Machine: " + ("; ".join(machines) or "no training is finished"))
    section.text("Commands of the single trainings:")
    section.code("\n".join(run.about["command"] for run in trained))
    settings = trained[0].about["settings"]
    same = {
        key: value for key, value in settings.items() if all(run.about["settings"].get(key) == value for run in trained)
    }
    section.text("Settings that all trainings share:")
    section.code("\n".join(f"{key}: {value}" for key, value in same.items()))
    return section


def _write(out: Path, sections: Sequence[Section]) -> None:
    pictures = out / "pictures"
    markdown, page, latex = [], [], []
    for number, section in enumerate(sections):
        level = 2 if number else 1
        markdown.append(f"{'#' * level} {section.title}\n")
        page.append(f'<h{level} id="{_anchor(section.title)}">{html.escape(section.title)}</h{level}>')
        for kind, content in section.parts:
            if kind == "text":
                markdown.append(f"{content}\n")
                page.append(f"<p>{_inline(content)}</p>")
            elif kind == "code":
                markdown.append(f"```\n{content}\n```\n")
                page.append(f"<pre>{html.escape(content)}</pre>")
            elif kind == "table":
                header, rows, caption = content
                markdown.append(_markdown_table(header, rows) + "\n")
                page.append(_html_table(header, rows))
                if caption:
                    latex.append(_latex_table(header, rows, caption))
            elif kind == "link":
                caption, path = content
                markdown.append(f"![{caption}]({quote(path)})\n")
                image = f'<img loading="lazy" alt="{html.escape(caption)}" src="{html.escape(quote(path))}">'
                page.append(f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>")
            else:
                name, data = content
                pictures.mkdir(exist_ok=True)
                (pictures / f"{name}.png").write_bytes(data)
                markdown.append(f"![{name}](pictures/{name}.png)\n")
                uri = base64.b64encode(data).decode()
                page.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{uri}">')
        if number == 0:
            links = [(other.title, _anchor(other.title)) for other in sections[1:]]
            markdown.append("\n".join(f"- [{title}](#{anchor})" for title, anchor in links) + "\n")
            items = "".join(f'<li><a href="#{anchor}">{html.escape(title)}</a></li>' for title, anchor in links)
            page.append(f'<nav aria-label="Contents"><ul>{items}</ul></nav>')
    (out / "report.md").write_text("\n".join(markdown), encoding="utf-8")
    (out / "report.tex").write_text(_LATEX + "\n".join(latex), encoding="utf-8")
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(sections[0].title)}</title><style>{_STYLE}</style></head>"
    )
    (out / "report.html").write_text(f"{head}<body>\n" + "\n".join(page) + "\n</body></html>\n", encoding="utf-8")


def _anchor(title: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        escaped = text.replace("*", r"\*").replace("|", r"\|")
        return f"**{escaped.removeprefix(_BOLD)}**" if text.startswith(_BOLD) else escaped

    return tabulate([[cell(one) for one in row] for row in rows], header, tablefmt="github", disable_numparse=True)


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # A column with sentences is aligned to the left, and wraps.
    kinds = [' class="text"' if any(len(row[i]) > 60 for row in rows) else "" for i in range(len(header))]

    def cell(text: str, kind: str) -> str:
        plain = html.escape(text.removeprefix(_BOLD))
        return f"<td{kind}><b>{plain}</b></td>" if text.startswith(_BOLD) else f"<td{kind}>{plain}</td>"

    heads = "".join(f"<th{kind}>{html.escape(one)}</th>" for one, kind in zip(header, kinds, strict=True))
    lines = "\n".join("<tr>" + "".join(map(cell, row, kinds)) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>\n{lines}\n</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


_LATEX = r"""% Tables of the report, for a document with \usepackage{booktabs}. Wide ones fit with \usepackage{graphicx}
% and \resizebox{\linewidth}{!}{...} around the tabular.
"""


def _latex_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Return a table environment with booktabs rules."""

    def cell(text: str) -> str:
        return rf"\textbf{{{_latex(text.removeprefix(_BOLD))}}}" if text.startswith(_BOLD) else _latex(text)

    lines = [" & ".join(map(cell, row)) + r" \\" for row in rows]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            " & ".join(map(_latex, header)) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex(text: str) -> str:
    """Escape the characters that LaTeX reads as commands."""
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(one, f"\\{one}" if one in "&%$#_{}" else one) for one in text)


def _inline(text: str) -> str:
    """Convert Markdown's bold, italics and code, as used in this report, to HTML."""
    text = html.escape(text)
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"(?<![\w*])\*(?! )([^*]+?)\*", r"<i>\1</i>", text)
