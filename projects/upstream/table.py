"""Fill the table of results in the texts of the pull requests from a study of `csalr reproduce`.

    csalr reproduce table1 --preset full --root DATA --dataset market1501 --out STUDY
    csalr reproduce table1 --preset full --root DATA --dataset dukemtmcreid --out STUDY
    python projects/upstream/table.py STUDY

Without a study, the table is empty, and says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csalr_plugin.command_line import Parser, exit_code, path_argument
from csalr_plugin.errors import UserError, first_line
from csalr_plugin.projects.paper.plan import paper

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
DATASETS = ("market1501", "dukemtmcreid")
METRICS = ("mAP", "rank-1")
EMPTY = "**This table is empty: the models have not been trained on Market-1501 and DukeMTMC-reID yet.**"
OTHER_SETTINGS = "`*`: trained with other settings than the paper's."


def render(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return the table in Markdown.

    Args:
        cells: the entry "cells" of the study's ``report.json``.
    """
    about = paper()
    found = {(one["row"], one["dataset"], one["metric"]): one for one in cells if one["table"] == "table1"}
    titles = [f"{about['datasets'][dataset]['title']} {metric}" for dataset in DATASETS for metric in METRICS]
    lines = [f"| | {' | '.join(titles)} | trainings |", f"|---|{'---|' * (len(titles) + 1)}"]
    texts = []
    for row in about["tables"]["table1"]["rows"]:
        if "run" not in row:  # quoted by the paper
            continue
        own = [found.get((row["name"], dataset, metric)) for dataset in DATASETS for metric in METRICS]
        texts += [_cell(one) for one in own]
        states = ", ".join(dict.fromkeys(one["state"] for one in own if one)) or "not run"
        lines.append(f"| {row['name']} | {' | '.join(texts[-len(titles) :])} | {states} |")
        columns = about["tables"]["table1"]["columns"]
        numbers = [row[dataset][columns.index(metric)] for dataset in DATASETS for metric in METRICS]
        lines.append(f"| the paper | {' | '.join(map(str, numbers))} | |")
    notes = [EMPTY] if set(texts) == {"-"} else []
    notes += [OTHER_SETTINGS] if any("*" in text for text in texts) else []
    return "\n".join([*(f"{note}\n" for note in notes), *lines])


def _cell(record: Mapping[str, Any] | None) -> str:
    if record is None or record["ours"] is None:
        return "-"
    deviation = "" if record["standard_deviation"] is None else f" ± {record['standard_deviation']:.1f}"
    return f"{record['ours']:.1f}{deviation}{'' if record['papers_settings'] else '*'}"


def fill(text: str, table: str) -> str:
    """Return `text` with `table` between the marks `BEGIN` and `END`."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str]) -> None:
    """Write the table into the texts of the pull requests, and print it.

    Raises:
        UserError: the study has no report.
    """
    parser = Parser(prog="table.py", description=first_line(__doc__ or ""))
    parser.add_argument("study", type=path_argument, nargs="?", help="folder of a study (none: an empty table)")
    study: Path | None = parser.parse_args(arguments).study
    cells = []
    if study is not None:
        try:
            cells = json.loads((study / "report.json").read_text(encoding="utf-8"))["cells"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{str(study / 'report.json')!r} is no report of a study ({first_line(error)}): write it with "
                f"csalr reproduce table1 --report --out {study}."
            ) from error
    table = render(cells)
    for path in sorted(HERE.glob("*/pcb_csalr.md")):
        path.write_text(fill(path.read_text(encoding="utf-8"), table), encoding="utf-8")
    print(table)


if __name__ == "__main__":
    sys.exit(exit_code("table.py", lambda: main(sys.argv[1:])))
