"""The report of a study: our numbers beside the paper's. Numbers of trainings that were not run stay empty."""

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

import matplotlib
from tabulate import tabulate

from csalr_plugin.files import write_json
from csalr_plugin.hosts.records import METRICS, read_metrics

from .ablation import HEADER, ablation_rows, describe_gates
from .attention_maps import explanation, heading, reconstruction_tables
from .folder import CONSOLE, COST, QUERIES, RESULT, RUN, STUDY, epochs_done, read_json
from .plan import paper

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

MARK = "*"
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:78em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.6em 0 1.4em;font-size:14px}
th,td{border-bottom:1px solid #ddd;padding:.25em .7em;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead th{border-bottom:2px solid #888}
img{max-width:100%}pre{background:#f5f5f5;padding:.8em;overflow-x:auto;font-size:12px}"""


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

    def table(self, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Append a table; cells are written as they are."""
        self.parts.append(("table", (list(header), [[str(cell) for cell in row] for row in rows])))

    def code(self, text: str) -> None:
        """Append preformatted text."""
        self.parts.append(("code", text))

    def picture(self, name: str, figure: Figure) -> None:
        """Append a figure and close it."""
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, format="png")
        plt.close(figure)
        self.parts.append(("picture", (name, buffer.getvalue())))


def write_report(out: Path) -> Path:
    """Write ``report.md``, ``.html``, ``.json`` and ``.csv`` of the study in `out`; return the path of the first.

    Raises:
        UserError: a file of the study is damaged.
    """
    trained = collect(out)
    datasets = [name for name in paper()["datasets"] if any(run.dataset == name for run in trained)]
    sections, records = [_summary(out, trained, datasets)], []
    for table in paper()["tables"]:
        section, found = _table(table, trained, datasets)
        sections.append(section)
        records += found
    section, ablation = _ablation(out, trained, datasets)
    sections += [section, _gates(out, trained)]
    section, found = _costs(out)
    sections += [section, _figure4(out), _curves(trained), _cost_against_accuracy(trained), _trainings(trained)]
    records += found
    _write(out, [section for section in sections if section.parts])
    write_json(out / "report.json", {"study": read_json(out / STUDY), "cells": records, "ablation": ablation})
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
    order = list(paper()["runs"])
    return sorted(found, key=lambda run: (run.dataset, order.index(run.name), run.seed))


def _summary(out: Path, trained: Sequence[Trained], datasets: Sequence[str]) -> Section:
    section = Section("The paper's tables, and ours")
    preset = read_json(out / STUDY)["preset"]
    finished = [run for run in trained if run.result]
    state = f"{len(finished)} of {len(trained)} trainings are done."
    if len(finished) < len(trained):
        state += " **This study is not finished.**"
    section.text(f"Preset `{preset}`. {state}")
    section.text(
        "Accuracies are in per cent; several seeds are given as mean ± standard deviation. *Difference*: ours minus "
        "the paper's. *Not run*: not trained here. *Epoch 3 of 10*: not finished. *Quoted*: the paper quotes this row "
        "from elsewhere."
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
    if left_out:
        section.text(f"Not run at all: {', '.join(left_out)}.")
    return section


def _record(
    table: str, row: str, dataset: str, metric: str, paper_value: Any, ours: Any, state: str, runs: Sequence[Trained]
) -> dict[str, Any]:
    values = [value for run in runs if (value := run.value(metric)) is not None]
    mean = statistics.fmean(values) if values else ours
    return {
        "table": table,
        "row": row,
        "dataset": dataset,
        "metric": metric,
        "ours": mean,
        "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
        "paper": paper_value,
        "difference": mean - paper_value if mean is not None and paper_value is not None else None,
        "papers_settings": not any(run.about["deviations"] for run in runs) if values else None,
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


def _difference(record: dict[str, Any], form: str = "+.1f") -> str:
    value = record["difference"]
    return "-" if value is None else f"{value:{form}}{'' if record['papers_settings'] else MARK}"


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def _table(name: str, trained: Sequence[Trained], datasets: Sequence[str]) -> tuple[Section, list[dict[str, Any]]]:
    table = paper()["tables"][name]
    section, records = Section(table["title"]), []
    columns = table["columns"]
    for dataset in datasets:
        rows, gains = [], []
        for row in table["rows"]:
            runs = [run for run in trained if run.name == row.get("run") and run.dataset == dataset]
            state = _state(runs) if "run" in row else "quoted"
            given = dict(zip(columns, row.get(dataset) or [None] * len(columns), strict=True))
            found = [_record(name, row["name"], dataset, one, given[one], None, state, runs) for one in columns]
            records += found
            cells = [(_cell(one), _number(one["paper"]), _difference(one)) for one in found]
            rows.append((row["name"], *(cell for three in cells for cell in three), state))
            if "baseline" in row:
                gains.append((row, runs, given))
        section.text(f"On `{dataset}`, the paper's **{paper()['datasets'][dataset]['title']}**:")
        shown = [word for one in columns for word in (one, "paper", "difference")]
        section.table(("", *shown, "trainings"), rows)
        if gained := [line for one in gains if (line := _gain(table, dataset, trained, *one))]:
            section.text("Gained over the same network without attention:")
            section.table(("", *(word for one in columns for word in (one, "paper"))), gained)
    return section, records


def _gain(
    table: dict[str, Any],
    dataset: str,
    trained: Sequence[Trained],
    row: dict[str, Any],
    runs: Sequence[Trained],
    given: dict[str, float | None],
) -> list[str] | None:
    """Return the gain of a row over its baseline, ours beside the paper's; None if either is not trained."""
    before = [run for run in trained if run.name == row["baseline"] and run.dataset == dataset and run.result]
    runs = [run for run in runs if run.result]
    if not before or not runs:
        return None
    reference = next(one for one in table["rows"] if one.get("run") == row["baseline"])
    theirs = dict(zip(table["columns"], reference.get(dataset) or [None] * len(given), strict=True))
    mark = MARK if any(run.about["deviations"] for run in [*before, *runs]) else ""
    cells = [row["name"]]
    for metric, value in given.items():
        ours = [statistics.fmean([run.value(metric) or 0.0 for run in some]) for some in (runs, before)]
        base = theirs[metric]
        cells += [f"{ours[0] - ours[1]:+.1f}{mark}", "-" if value is None or base is None else f"{value - base:+.1f}"]
    return cells


def _folder(out: Path, run: Trained) -> Path:
    return out / "runs" / f"{run.dataset}-{run.name}" / f"seed{run.seed}"


def _ablation(out: Path, trained: Sequence[Trained], datasets: Sequence[str]) -> tuple[Section, list[dict[str, Any]]]:
    """Return the section and the records of the ablation; both are empty unless its control is trained."""
    table = paper()["ablation"]
    section, records = Section(table["title"]), []
    names = [row["run"] for row in table["rows"]]
    for dataset in datasets:
        finished = [run for run in trained if run.dataset == dataset and run.name in names and run.result]
        if not any(run.name == "pcb-branches" for run in finished):
            continue
        folders = {name: [_folder(out, run) for run in finished if run.name == name] for name in names}
        rows = ablation_rows(table, folders)
        section.text(
            f"On `{dataset}`, {len(rows[0].precisions[0])} queries. Seeds are given as mean ± standard deviation. A "
            "row with gates set to 0 is the trained network of the row above it, without its attention at test time."
        )
        section.table(HEADER, [row.cells for row in rows])
        section.text(
            "Differences in mAP, in percentage points, paired by seed and query, with 95 % intervals of a bootstrap "
            "over both. A difference is bold where its interval leaves out 0."
        )
        differences = [(row.name, *one) for row in rows for one in row.differences.items()]
        section.table(
            ("", "compared with", "difference", "seeds", "queries"),
            [(name, other, one, one.seeds, one.queries) for name, other, one in differences],
        )
        if differences:
            section.picture(f"ablation-{dataset}.png", _draw_differences(differences))
        records += [
            {"dataset": dataset, "row": name, "baseline": other, **vars(one)} for name, other, one in differences
        ]
    return section, records


def _draw_differences(differences: Sequence[tuple[str, str, Any]]) -> Figure:
    figure, axis = plt.subplots(figsize=(9, 0.8 + 0.34 * len(differences)), layout="constrained")
    for line, (_, _, one) in enumerate(differences):
        colour = "tab:blue" if one.holds else "tab:gray"
        axis.plot((one.low, one.high), (line, line), color=colour, linewidth=2)
        axis.plot(one.mean, line, "o", color=colour)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(differences)), [f"{name} - {other}" for name, other, _ in differences], fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    one = differences[0][2]
    axis.set_xlabel("difference in mAP, percentage points, with 95 % interval")
    axis.set_title(f"{one.queries} queries, {one.seeds} seeds", fontsize=9)
    return figure


def _gates(out: Path, trained: Sequence[Trained]) -> Section:
    """List what each trained network loses when its gates are set to 0."""
    section = Section("Gates: each network with and without its attention at test time")
    lines = [
        describe_gates(f"{run.name}, {run.dataset}, seed {run.seed}", read_json(path))
        for run in trained
        if run.result and (path := _folder(out, run) / QUERIES).exists()
    ]
    if lines:
        section.code("\n".join(lines))
    return section


def _costs(out: Path) -> tuple[Section, list[dict[str, Any]]]:
    """Return the section and records of Table 5, from the results of ``csalr bench cost`` in the study's folder."""
    table = paper()["costs"]
    section, records, rows = Section(table["title"]), [], []
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
    section.table(("", *(word for one in table["columns"] for word in (one, "paper", "over PCB", "paper"))), rows)
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
    folder = out / "figure4"
    measured = sorted(folder.glob("*/*/reconstruction-*.json"))
    if not measured:
        section.text("not run")
        return section
    for path in measured:
        about = read_json(path)
        pictures = ", ".join(f"`{one.relative_to(out).as_posix()}`" for one in sorted(path.parent.glob("*.png")))
        section.text(
            f"`{about['model']}` on `{path.parent.parent.name}`: {pictures}. They show people and are not copied here."
        )
        section.text(heading(about))
        for caption, header, lines in reconstruction_tables(about["rows"]):
            section.text(caption)
            section.table(header, lines)
        for text in explanation(about["rows"]):
            section.text(text)
    return section


def _curves(trained: Sequence[Trained]) -> Section:
    """Plot the losses per epoch and the mAP per evaluation, one picture per dataset and table."""
    section = Section("Learning curves")
    if len({run.seed for run in trained}) > 1:
        section.text("Each line is one seed; the first seed of a training is darkest.")
    drawn: set[tuple[str, ...]] = set()
    for table, about in paper()["tables"].items():
        names = dict.fromkeys(row["run"] for row in about["rows"] if "run" in row)
        for dataset in dict.fromkeys(run.dataset for run in trained):
            runs = [run for run in trained if run.dataset == dataset and run.name in names and run.curves]
            key = (dataset, *(run.name for run in runs))
            if not runs or key in drawn:
                continue
            drawn.add(key)
            section.picture(f"curves-{table}-{dataset}", _draw_curves(f"{about['title']} ({dataset})", runs))
    return section


def _branches(line: dict[str, Any]) -> list[float]:
    """Return the losses of the supervision branches."""
    return [value for name, value in line.items() if name.startswith("L_DS")]


def _draw_curves(title: str, runs: Sequence[Trained]) -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), sharex=True, layout="constrained")
    names = list(dict.fromkeys(run.name for run in runs))
    for run in runs:
        number = names.index(run.name)
        first = run.seed == min(other.seed for other in runs if other.name == run.name)
        style = {"color": f"C{number % 10}", "alpha": 1.0 if first else 0.5, "linestyle": ("-", "--")[number // 10 % 2]}
        label = {"label": run.name} if first else {}
        epochs = [line["epoch"] for line in run.curves]
        axes[0].plot(epochs, [line.get("L_F", line["loss"]) for line in run.curves], marker=".", **style, **label)
        if any(map(_branches, run.curves)):
            axes[1].plot(epochs, [sum(_branches(line)) for line in run.curves], marker=".", **style)
        scores = [line for line in run.evaluations if line["dataset"] == run.dataset]
        axes[2].plot([line["epoch"] for line in scores], [100 * line["mAP"] for line in scores], marker="o", **style)
    for axis, ylabel in zip(
        axes, ("$L_F$, mean of the epoch", r"$\sum_i L_{DS_i}$, mean of the epoch", "mAP (%)"), strict=True
    ):
        axis.set(xlabel="epoch", ylabel=ylabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
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
        model = build_model(given["model.name"], given["data"]["identities"], pretrained=False, **keys).eval()
    return count_gmacs(model, given["data.height"], given["data.width"]), count_parameters(model) / 1e6


def _cost_against_accuracy(trained: Sequence[Trained]) -> Section:
    section = Section("Cost against accuracy")
    for dataset in dict.fromkeys(run.dataset for run in trained):
        points: dict[str, list[Trained]] = {}
        for run in trained:
            if run.dataset == dataset and run.result:
                points.setdefault(run.name, []).append(run)
        if not points:
            continue
        figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
        rows = []
        for number, (name, runs) in enumerate(points.items()):
            gmacs, parameters = _cost(json.dumps(runs[0].about["settings"], sort_keys=True))
            mean = statistics.fmean([run.value("mAP") or 0.0 for run in runs])
            mark = MARK if any(run.about["deviations"] for run in runs) else ""
            rows.append((name, f"{gmacs:.2f}", f"{parameters:.2f}", f"{mean:.1f}{mark}"))
            shape = "os^D"[number // 10 % 4]
            axis.scatter(gmacs, mean, color=f"C{number % 10}", marker=shape, s=3 * parameters, label=name)
        axis.set(xlabel="GMACs an image at test time", ylabel="mAP (%)", title=dataset)
        axis.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        section.picture(f"cost-{dataset}", figure)
        section.table(("", "GMACs an image", "parameters (M)", "mAP"), rows)
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
        branches = _branches(last)
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
    markdown, page = [], []
    for number, section in enumerate(sections):
        level = 2 if number else 1
        markdown.append(f"{'#' * level} {section.title}\n")
        page.append(f"<h{level}>{html.escape(section.title)}</h{level}>")
        for kind, content in section.parts:
            if kind == "text":
                markdown.append(f"{content}\n")
                page.append(f"<p>{_inline(content)}</p>")
            elif kind == "code":
                markdown.append(f"```\n{content}\n```\n")
                page.append(f"<pre>{html.escape(content)}</pre>")
            elif kind == "table":
                header, rows = content
                escaped = [[cell.replace("*", r"\*").replace("|", r"\|") for cell in row] for row in rows]
                markdown.append(tabulate(escaped, header, tablefmt="github", disable_numparse=True) + "\n")
                page.append(_html_table(header, rows))
            else:
                name, data = content
                pictures.mkdir(exist_ok=True)
                (pictures / f"{name}.png").write_bytes(data)
                markdown.append(f"![{name}](pictures/{name}.png)\n")
                uri = base64.b64encode(data).decode()
                page.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{uri}">')
    (out / "report.md").write_text("\n".join(markdown), encoding="utf-8")
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>csalr reproduce</title>'
    (out / "report.html").write_text(
        f"{head}<style>{_STYLE}</style></head><body>\n" + "\n".join(page) + "\n</body></html>\n", encoding="utf-8"
    )


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f"<th>{html.escape(one)}</th>" for one in header)
    lines = "\n".join("<tr>" + "".join(f"<td>{html.escape(one)}</td>" for one in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>\n{lines}\n</tbody></table>"


def _inline(text: str) -> str:
    """Convert Markdown's bold, italics and code, as used in this report, to HTML."""
    text = html.escape(text)
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"(?<![\w*])\*(?! )([^*]+?)\*", r"<i>\1</i>", text)
