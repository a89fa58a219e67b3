"""Time and memory of one block against the number of positions, and the fitted exponents.

A block runs a training pass, forward and backward, over maps of increasing size. SA is measured until a pass would need
more than half of the memory or take longer than --limit. README.md in projects/benchmark explains the fits.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from csalr_plugin.attention import AttentionBlock, build_attention
from csalr_plugin.command_line import argument, batch_argument, positive
from csalr_plugin.errors import UserError
from csalr_plugin.hosts.keys import integer
from csalr_plugin.models.cost import kept_bytes

from ..environment import total_memory
from .harness import (
    Results,
    Sample,
    Statistic,
    add_common_arguments,
    alternate,
    fit_exponent,
    peak_bytes,
    prepare,
    pyplot,
    seconds,
    write_report,
)

POSITIONS = (192, 768, 3072, 12288, 49152)
QUICK_POSITIONS = (192, 768, 3072, 12288)
LINEAR = 1.1  # exponents up to here count as linear
# Time is fitted on the largest sizes only: on small maps, a pass is mostly constant overhead.
TIMED_SIZES = 3


@dataclass(frozen=True)
class Curve:
    """One block of the study: its attention, landmarks (or bases) and groups."""

    label: str
    attention: str
    landmarks: tuple[int, int] = (12, 8)
    groups: int = 1

    def build(self, channels: int) -> AttentionBlock:
        """Build the block for maps of `channels` channels."""
        return build_attention(self.attention, channels, groups=self.groups, landmarks=self.landmarks)


CURVES: Mapping[str, Curve] = {
    "sa": Curve("SA", "sa"),
    "csa": Curve("CSA, 96 bases, 2 groups", "csa", groups=2),
    "csalr-24-2": Curve("CSALR, 24 landmarks, 2 groups", "csalr", (6, 4), 2),
    "csalr-48-2": Curve("CSALR, 48 landmarks, 2 groups", "csalr", (12, 4), 2),
    "csalr-96-2": Curve("CSALR, 96 landmarks, 2 groups", "csalr", (12, 8), 2),
    "csalr-192-2": Curve("CSALR, 192 landmarks, 2 groups", "csalr", (24, 8), 2),
    "csalr-96-1": Curve("CSALR, 96 landmarks, 1 group", "csalr", (12, 8), 1),
    "csalr-96-4": Curve("CSALR, 96 landmarks, 4 groups", "csalr", (12, 8), 4),
    "csalr-96-8": Curve("CSALR, 96 landmarks, 8 groups", "csalr", (12, 8), 8),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the study."""
    add_common_arguments(parser)
    channels = argument(integer(32, 8192))
    parser.add_argument("--channels", type=channels, default=256, metavar="N", help="C of the block, by 32 (256)")
    parser.add_argument("--batch-size", type=batch_argument, default=1, metavar="N", help="maps a batch (1)")
    parser.add_argument(
        "--positions",
        type=positive,
        nargs="+",
        metavar="N",
        help=f"sizes, each 192 times a square ({' '.join(map(str, POSITIONS))}; quick up to {QUICK_POSITIONS[-1]})",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="SECONDS", help="leave out passes that would take longer (60; quick 3)"
    )


def run(options: argparse.Namespace) -> None:
    """Run the missing measurements, then write the table and the picture.

    Raises:
        UserError: an option cannot be used; this is checked before any measurement.
    """
    device = prepare(options)
    positions = sorted(set(options.positions or (QUICK_POSITIONS if options.quick else POSITIONS)))
    for n in positions:
        map_size(n)
    if len(positions) < 2:
        raise UserError(f"--positions {positions[0]} is one size: give at least two, to fit an exponent.")
    if options.channels % 32:
        raise UserError(f"--channels {options.channels} must be a multiple of 32: 8 groups share a quarter of them.")
    settings = {
        "channels": options.channels,
        "batch_size": options.batch_size,
        "positions": positions,
        "limit_seconds": options.limit or (3 if options.quick else 60),
        "threads": options.threads,
        "device": options.device,
    }
    results = Results(options.out, "scale", settings)
    if len(results.rounds) < options.repeats:
        torch.manual_seed(0)
        passes = {
            case_name(curve, n): Pass(block, n, options.batch_size)
            for curve, block in ((name, one.build(options.channels).to(device)) for name, one in CURVES.items())
            for n in positions
        }
        explore(results, passes, positions, device)
        fitting = {name: one.sample for name, one in passes.items() if "left_out" not in results.counts[name]}
        alternate(results, fitting, options.repeats)
    results.summary = summarise(results)
    results.save()
    report(results)


def map_size(n: int) -> tuple[int, int]:
    """Return height and width, in the ratio 3 to 1, of a map with n positions.

    Raises:
        UserError: n is not 192 times a square number.
    """
    factor = math.isqrt(n // 192)
    if n < 192 or 192 * factor**2 != n:
        raise UserError(f"--positions {n} is not 192 times a square: allowed is 192, 768, 1728, 3072, ...")
    return 24 * factor, 8 * factor


def case_name(curve: str, n: int) -> str:
    """Return the name of a case in the results."""
    return f"{curve}/{n}"


class Pass:
    """The training pass of a block over maps of n positions; the maps exist only during a measurement.

    Args:
        block: the block, on the device of the measurement.
        n: number of positions of a map.
        batch_size: number of maps.
    """

    def __init__(self, block: AttentionBlock, n: int, batch_size: int) -> None:
        self.block, self.n, self.batch_size = block.train(), n, batch_size

    def inputs(self, device: torch.device) -> Tensor:
        """Return random maps (B, C, H, W) that require a gradient, like the output of a stage."""
        shape = (self.batch_size, self.block.channels, *map_size(self.n))
        return torch.randn(shape, device=device, requires_grad=True)

    def sample(self) -> Sample:
        """Measure the seconds of a forward and backward pass."""
        device = next(self.block.parameters()).device
        x = self.inputs(device)
        gradient = torch.randn_like(x)
        taken = seconds(functools.partial(self.forward_and_backward, x, gradient), device)
        self.block.zero_grad()
        return {"seconds": taken}

    def forward_and_backward(self, x: Tensor, gradient: Tensor) -> None:
        """Run the pass."""
        self.block(x).backward(gradient)

    def count(self) -> dict[str, float]:
        """Measure the bytes per map that are kept without recomputing, and the peak memory per map."""
        device = next(self.block.parameters()).device
        # On the meta device nothing is computed. On a GPU the kernels decide which tensors are kept.
        place = device if device.type == "cuda" else torch.device("meta")
        kept = kept_bytes(copy.deepcopy(self.block).to(place).set_recompute(False), self.inputs(place))
        x = self.inputs(device)
        gradient = torch.randn_like(x)
        peak = peak_bytes(functools.partial(self.forward_and_backward, x, gradient), device)
        self.block.zero_grad()
        return {"kept_bytes": kept / self.batch_size, "peak_bytes": peak / self.batch_size}


def explore(results: Results, passes: Mapping[str, Pass], positions: list[int], device: torch.device) -> None:
    """Measure the memory of every case, from the smallest size up, and leave out those that do not fit."""
    budget = total_memory(device) / 2
    limit = results.identity["settings"]["limit_seconds"]
    with tqdm(total=len(passes), desc="counting", unit="case") as progress:
        for curve in CURVES:
            for index, n in enumerate(positions):
                name = case_name(curve, n)
                progress.update()
                if name in results.counts:
                    continue
                smaller = [(size, results.counts[case_name(curve, size)]) for size in positions[:index]]
                reason = why_left_out(n, smaller, passes[name].batch_size, limit, budget)
                if reason is None:
                    try:
                        # Twice, because the first pass may include the setup of a library.
                        first = min(passes[name].sample()["seconds"] for _ in range(2))
                        results.counts[name] = {"first_pass_seconds": first, **passes[name].count()}
                    except torch.OutOfMemoryError:
                        reason = "out of memory"
                        torch.cuda.empty_cache()
                if reason is not None:
                    results.counts[name] = {"left_out": reason}
                results.save()


def why_left_out(
    n: int, smaller: list[tuple[int, dict[str, Any]]], batch_size: int, limit: float, budget: float
) -> str | None:
    """Return the reason for leaving out a case, estimated from smaller sizes of its curve, or None to measure it."""
    for _, counts in smaller:
        if "left_out" in counts:
            return str(counts["left_out"])
    if not smaller:
        return None

    def expected(figure: str) -> float:
        size, last = smaller[-1]
        exponent = 1.0
        if len(smaller) > 1:
            before, counts = smaller[-2]
            exponent = min(2.0, max(1.0, math.log(last[figure] / counts[figure]) / math.log(size / before)))
        return float(last[figure] * (n / size) ** exponent)

    if expected("first_pass_seconds") > limit:
        return f"over {limit:g} s"
    if batch_size * expected("peak_bytes") > budget:
        return f"over {budget / 1e9:.0f} GB"
    return None


def summarise(results: Results) -> dict[str, Any]:
    """Return the measured sizes of each curve, their costs and the fitted exponents."""
    summary: dict[str, Any] = {}
    for curve in CURVES:
        counts = {n: results.counts[case_name(curve, n)] for n in results.identity["settings"]["positions"]}
        sizes = [n for n in counts if "left_out" not in counts[n]]
        left_out = {str(n): counts[n]["left_out"] for n in counts if "left_out" in counts[n]}
        figures: dict[str, Any] = {"positions": sizes, "left_out": left_out}
        samples = {n: results.samples(case_name(curve, n), "seconds") for n in sizes}
        figures["seconds"] = [Statistic.of(samples[n]).__dict__ for n in sizes]
        for figure in ("kept_bytes", "peak_bytes"):
            figures[figure] = [counts[n][figure] for n in sizes]
        if len(sizes) > 1:
            large = sizes[-TIMED_SIZES:]
            fits = [fit_exponent(large, costs) for costs in zip(*(samples[n] for n in large), strict=True)]
            figures["time_exponent"] = Statistic.of(fits).__dict__
            figures["kept_exponent"] = fit_exponent(sizes, figures["kept_bytes"])
            figures["peak_exponent"] = fit_exponent(large, figures["peak_bytes"][-TIMED_SIZES:])
        summary[curve] = figures
    return summary


def report(results: Results) -> None:
    """Write scale.md and scale.png."""
    positions = results.identity["settings"]["positions"]

    def table(figure: str, unit: float, exponent: str) -> str:
        lines = []
        for curve, figures in results.summary.items():
            by_size = dict(zip(figures["positions"], figures[figure], strict=True))
            cells = [_cell(by_size[n], unit) if n in by_size else f"({figures['left_out'][str(n)]})" for n in positions]
            lines.append((CURVES[curve].label, *cells, _cell(figures.get(exponent), 1)))
        return tabulate(lines, ("block", *map(str, positions), "exponent"), tablefmt="github", disable_numparse=True)

    tables = (
        f"Milliseconds of a training pass over n positions:\n\n{table('seconds', 1e-3, 'time_exponent')}",
        f"MB a map kept for the backward pass:\n\n{table('kept_bytes', 1e6, 'kept_exponent')}",
        f"Peak MB a map:\n\n{table('peak_bytes', 1e6, 'peak_exponent')}",
    )
    notes = (
        verdict(results.summary),
        f"the exponents of time and peak memory are fitted on the {TIMED_SIZES} largest sizes, that of kept memory on "
        "all sizes; ± is half the interquartile range over the rounds",
        "in brackets: not measured, because a pass would exceed that limit",
    )
    draw(results)
    write_report(results, "How a block's cost grows with the positions", "\n\n".join(tables), notes)


def _cell(value: Any, unit: float) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return str(Statistic(value["median"] / unit, value["spread"] / unit))
    return f"{value / unit:.3g}"


def verdict(summary: Mapping[str, Any]) -> str:
    """Return whether CSALR grew linearly, and its largest exponents, in words."""
    ours = [figures for curve, figures in summary.items() if curve.startswith("csalr") and "kept_exponent" in figures]
    if not ours:
        return "CSALR was measured at fewer than two sizes: no exponent"
    time = max(figures["time_exponent"]["median"] for figures in ours)
    kept = max(figures["kept_exponent"] for figures in ours)
    linear = "linear" if max(time, kept) <= LINEAR else "NOT linear"
    return f"CSALR's largest exponents: {time:.2f} of time, {kept:.2f} of kept memory; {linear} (at most {LINEAR})"


def draw(results: Results) -> None:
    """Plot time, kept memory and peak memory against n, with logarithmic axes and guide lines n and n^2.

    The bars of the time are half the interquartile range over the rounds, as in the table.
    """
    panels = (
        ("seconds", "time of a training pass", "ms", 1e-3),
        ("kept_bytes", "kept for the backward pass", "MB a map", 1e6),
        ("peak_bytes", "peak memory", "MB a map", 1e6),
    )
    positions = results.identity["settings"]["positions"]
    figure, axes = pyplot().subplots(1, len(panels), figsize=(15, 5.6), layout="constrained")
    for axis, (figure_name, title, unit, size) in zip(axes, panels, strict=True):
        for curve, figures in results.summary.items():
            timed = figure_name == "seconds"
            values = [(one["median"] if timed else one) / size for one in figures[figure_name]]
            spreads = [one["spread"] / 2 / size for one in figures[figure_name]] if timed else None
            style = {"sa": "ks-", "csa": "k^:"}.get(curve, "o-" if curve.endswith("-2") else "o--")
            label = CURVES[curve].label if curve in CURVES else curve
            axis.errorbar(figures["positions"], values, spreads, fmt=style, label=label, markersize=4, capsize=3)
        axis.set(xscale="log", yscale="log", xlabel="positions n", ylabel=unit, title=title)
        _draw_guides(axis, positions)
        axis.set_xticks(positions, map(str, positions))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    settings = results.identity["settings"]
    figure.suptitle(
        f"{settings['channels']} channels, {settings['batch_size']} map a batch, {settings['device']}. Bars: half the "
        "interquartile range. Kept memory: without recomputing; a block that recomputes keeps its input alone.",
        fontsize=9,
    )
    figure.savefig(results.path.with_suffix(".png"), dpi=150)
    pyplot().close(figure)


def _draw_guides(axis: Any, positions: Sequence[int]) -> None:
    """Draw lines of slope n and n^2 from the lower left corner of the curves."""
    low, high = axis.get_ylim()
    start = low * 1.15
    for power in (1, 2):
        ends = [start * (n / positions[0]) ** power for n in positions]
        axis.plot(positions, ends, color="0.6", linewidth=1, linestyle=(0, (2, 3)), zorder=0)
        inside = [(n, end) for n, end in zip(positions, ends, strict=True) if end < high] or [(positions[0], start)]
        name = "n" if power == 1 else "n²"
        axis.annotate(name, inside[-1], xytext=(4, -4), textcoords="offset points", color="0.4", fontsize=9, va="top")
    axis.set_ylim(low, high)
