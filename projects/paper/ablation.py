"""The ablation: what attention adds to PCB and to deep supervision, with intervals over queries and seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap

from csalr_plugin.hosts.gates import closed_gates, evaluate, gates_of, in_words
from csalr_plugin.hosts.trained import load_trained

from .folder import QUERIES, read_json
from .plan import Run, read_dataset

CONVERGED = 95.0  # per cent of training images whose parts vote for the right identity
_RESAMPLES = 2000
CLOSED = "gates set to 0"


def measure_gates(run: Run, checkpoint: Path) -> dict[str, Any]:
    """Return the accuracy of each query with the gates as trained, and with every gate set to 0.

    No training is needed: a block whose gate is 0 is the identity.

    Args:
        run: the training, for its data set.
        checkpoint: its last checkpoint.

    Returns:
        "gates" by stage; "AP" and "hits" of each query as trained; and, for a network with attention, "AP_closed" and
        "hits_closed".

    Raises:
        UserError: the checkpoint or the data set cannot be used.
    """
    data = read_dataset(run.dataset, Path(run.config.data.root))
    query, gallery = ([item[:3] for item in subset] for subset in (data.query, data.gallery))
    trained = load_trained(checkpoint)
    if torch.cuda.is_available() and run.config.use_gpu:
        trained.network.cuda()
    found = evaluate(trained, query, gallery)
    gates = gates_of(trained.network)
    measured: dict[str, Any] = {"gates": gates, "AP": found.precisions.tolist(), "hits": found.hits.tolist()}
    if gates:
        with closed_gates(trained.network):
            closed = evaluate(trained, query, gallery)
        measured |= {"AP_closed": closed.precisions.tolist(), "hits_closed": closed.hits.tolist()}
    return measured


def describe_gates(name: str, measured: Mapping[str, Any]) -> str:
    """Return the line that a study prints for a finished training."""
    line = f"{name}: mAP {100 * statistics.fmean(measured['AP']):.1f} over {len(measured['AP'])} queries"
    if "AP_closed" in measured:
        closed, gates = 100 * statistics.fmean(measured["AP_closed"]), in_words(measured["gates"])
        line += f"; {closed:.1f} with every gate set to 0 (gates: {gates})"
    return line


@dataclass(frozen=True)
class Difference:
    """A paired difference of mAP, in percentage points.

    Attributes:
        mean: over queries and seeds.
        low, high: the 95 % interval.
        seeds, queries: the numbers that it rests on.
    """

    mean: float
    low: float
    high: float
    seeds: int
    queries: int

    @property
    def holds(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        text = f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"
        return f"**{text}**" if self.holds else text


def paired_difference(ours: NDArray[np.float64], baseline: NDArray[np.float64]) -> Difference:
    """Return the difference of two rows, paired by seed and query.

    The interval is a percentile bootstrap that draws seeds and queries independently, by `scipy.stats.bootstrap`. With
    one seed it draws queries alone, and says nothing about other seeds.

    Args:
        ours, baseline: average precisions from 0 to 1, (seeds, queries), of the same seeds and queries.
    """
    each = 100 * (ours - baseline)
    samples = [np.arange(size) for size in each.shape if size > 1]
    rows = np.arange(len(each))

    def mean(*chosen: NDArray[np.int_]) -> float:
        seeds, queries = chosen if len(chosen) == 2 else (rows, chosen[0])
        return float(each[np.ix_(seeds, queries)].mean())

    generator = np.random.default_rng(0)
    interval = bootstrap(
        samples, mean, n_resamples=_RESAMPLES, vectorized=False, method="percentile", rng=generator
    ).confidence_interval
    return Difference(float(each.mean()), float(interval.low), float(interval.high), *each.shape)


@dataclass(frozen=True)
class AblationRow:
    """A row of the ablation, over the seeds that are trained.

    Attributes:
        name: as the table names it.
        precisions: average precision of each seed and query, (seeds, queries).
        rank_1: of each seed, in per cent.
        accuracy: training accuracy of the last epoch of each seed, in per cent; empty for a row that is not trained.
        gates: of each seed, by stage.
        differences: from each baseline, by its name.
    """

    name: str
    precisions: NDArray[np.float64]
    rank_1: list[float]
    accuracy: list[float]
    gates: list[dict[str, float]]
    differences: dict[str, Difference]

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of the table: mAP, rank-1, training accuracy, largest |gate| and the number of seeds."""
        largest = [max(map(abs, gates.values())) for gates in self.gates if gates]
        reached = _spread(self.accuracy) + (
            " (not converged)" if self.accuracy and min(self.accuracy) < CONVERGED else ""
        )
        return (
            self.name,
            _spread([100 * float(row.mean()) for row in self.precisions]),
            _spread(self.rank_1),
            reached,
            _spread(largest, ".2f"),
            str(len(self.precisions)),
        )


HEADER = ("", "mAP", "rank-1", "training accuracy", "largest gate", "seeds")


def _spread(values: Sequence[float], form: str = ".1f") -> str:
    if not values:
        return ""
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def ablation_rows(table: Mapping[str, Any], folders: Mapping[str, Sequence[Path]]) -> list[AblationRow]:
    """Return the rows of the ablation that are trained, each with its paired differences.

    The row of each network with attention is followed by the same network with every gate set to 0.

    Args:
        table: the ablation of ``rows.yaml``.
        folders: of the finished trainings of each run, by its name.
    """
    names = {row["run"]: row["name"] for row in table["rows"]}
    found: dict[str, dict[int, dict[str, Any]]] = {
        run: {int(folder.name.removeprefix("seed")): _measured(folder) for folder in folders.get(run, ())}
        for run in names
    }
    rows = []
    for row in table["rows"]:
        ours = found[row["run"]]
        if not ours:
            continue
        differences = {
            names[baseline]: paired
            for baseline in row.get("baselines", ())
            if (paired := _paired(ours, "AP", found[baseline], "AP"))
        }
        each = [ours[seed] for seed in sorted(ours)]
        rows.append(_row(row["name"], each, "", [one["accuracy"] for one in each], differences))
        if "AP_closed" in each[0]:
            closed = _paired(ours, "AP_closed", ours, "AP")
            rows.append(_row(f"{row['name']}, {CLOSED}", each, "_closed", [], {row["name"]: closed} if closed else {}))
    return rows


def _measured(folder: Path) -> dict[str, Any]:
    from csalr_plugin.hosts.records import METRICS, read_metrics

    epochs, _ = read_metrics(folder / METRICS)
    return {**read_json(folder / QUERIES), "accuracy": float(epochs[-1]["acc"])}


def _row(
    name: str, each: Sequence[dict[str, Any]], suffix: str, accuracy: list[float], differences: dict[str, Difference]
) -> AblationRow:
    precisions = np.array([one[f"AP{suffix}"] for one in each])
    rank_1 = [100 * statistics.fmean(one[f"hits{suffix}"]) for one in each]
    gates = [{} if suffix else one["gates"] for one in each]
    return AblationRow(name, precisions, rank_1, accuracy, gates, differences)


def _paired(
    ours: Mapping[int, dict[str, Any]], key: str, baseline: Mapping[int, dict[str, Any]], other: str
) -> Difference | None:
    seeds = sorted(ours.keys() & baseline.keys())
    if not seeds:
        return None
    return paired_difference(
        np.array([ours[seed][key] for seed in seeds]), np.array([baseline[seed][other] for seed in seeds])
    )
