"""The cost of attention in a network: Table 5 of the paper and alternatives, in one alternating run.

PCB and its variants train and embed the same images in turn; every figure is also given as a change from PCB, beside
the paper's. README.md in projects/benchmark defines each figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from csalr_plugin.attention import AttentionBlock, set_fast
from csalr_plugin.command_line import argument, batch_argument, side_argument
from csalr_plugin.errors import UserError, shown, suggest
from csalr_plugin.hosts.keys import number
from csalr_plugin.models import STAGE_CHANNELS, build_model
from csalr_plugin.models.cost import count_gmacs, count_kept_bytes, count_parameters
from csalr_plugin.models.pcb import PCB

from .blocks import (
    Alternative,
    ConvolutionsOnly,
    Nystrom,
    nystrom_is_installed,
)
from .harness import (
    TOO_LARGE,
    Results,
    Sample,
    Statistic,
    add_common_arguments,
    alternate,
    as_percent,
    change,
    peak_bytes,
    prepare,
    pyplot,
    seconds,
    write_report,
)

NUM_CLASSES = 751  # as Market-1501 has
AMP_DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One row of the table: a model of the plugin's, or `pcb_csalr` with other blocks in CSALR's place.

    Attributes:
        label: as the table names it.
        model: name for `csalr_plugin.models.build_model`.
        groups: of its blocks.
        block: replaces CSALR.
        fast: whether blocks may use the compiled passes.
        recompute: whether plain blocks recompute in the backward pass.
        paper: Table 5's memory, MB an image, and FPS; None where it has no such row.
    """

    label: str
    model: str = "pcb_csalr"
    groups: int = 1
    block: type[Alternative] | None = None
    fast: bool = True
    recompute: bool = True
    paper: tuple[float, float] | None = None

    def build(self, gate: float) -> PCB:
        """The network of the row, from random weights, with every alpha at `gate`."""
        model = build_model(self.model, NUM_CLASSES, pretrained=False, groups=self.groups)
        if self.block is not None:
            for stage in model.attention:
                channels = STAGE_CHANNELS[int(stage.removeprefix("stage"))]
                model.attention[stage] = self.block(channels, groups=self.groups)
        for name, parameter in model.named_parameters():
            if name.endswith(".alpha"):
                nn.init.constant_(parameter, gate)
        for module in model.modules():
            if isinstance(module, AttentionBlock):
                module.recompute &= self.recompute
        return model


BASELINE = "pcb"
ROWS: Mapping[str, Row] = {
    BASELINE: Row("PCB", "pcb", paper=(137.64, 581.81)),
    "sa": Row("+ SA", "pcb_sa", paper=(300.68, 266.67)),
    "csa": Row("+ CSA, 2 groups", "pcb_csa", 2),
    "csalr-1": Row("+ CSALR, 1 group", groups=1, paper=(165.00, 507.93)),
    "csalr-2": Row("+ CSALR, 2 groups", groups=2, paper=(192.25, 460.43)),
    "csalr-4": Row("+ CSALR, 4 groups", groups=4, paper=(221.97, 418.30)),
    "csalr-8": Row("+ CSALR, 8 groups", groups=8, paper=(254.75, 380.95)),
    "plain-1": Row("+ CSALR, 1 group, plain", groups=1, fast=False),
    "plain-2": Row("+ CSALR, 2 groups, plain", groups=2, fast=False),
    "plain-8": Row("+ CSALR, 8 groups, plain", groups=8, fast=False),
    "keeping-1": Row("+ CSALR, 1 group, plain, keeping activations", groups=1, fast=False, recompute=False),
    "keeping-2": Row("+ CSALR, 2 groups, plain, keeping activations", groups=2, fast=False, recompute=False),
    "keeping-8": Row("+ CSALR, 8 groups, plain, keeping activations", groups=8, fast=False, recompute=False),
    "plain-csa": Row("+ CSA, 2 groups, plain", "pcb_csa", 2, fast=False),
    "convolutions": Row("+ 1x1 convolutions alone", groups=2, block=ConvolutionsOnly),
    "nystrom": Row("+ nystrom-attention", groups=1, block=Nystrom),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study's flags."""
    add_common_arguments(parser)
    parser.add_argument("--height", type=side_argument, metavar="N", help="image height (384; quick 256)")
    parser.add_argument("--width", type=side_argument, metavar="N", help="image width (128)")
    parser.add_argument("--batch-size", type=batch_argument, metavar="N", help="images, at least 2 (8; quick 2)")
    gate = argument(number(-10, 10))
    parser.add_argument("--gate", type=gate, default=0.1, metavar="ALPHA", help="value of every alpha (0.1)")
    parser.add_argument("--amp", choices=sorted(AMP_DTYPES), metavar="DTYPE", help="autocast to bf16 or fp16 (fp32)")
    parser.add_argument("--channels-last", action="store_true", help="networks and images in channels_last memory")
    parser.add_argument("--compile", action="store_true", help="networks through torch.compile")
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", help=f"these rows, beside {BASELINE}; of {', '.join(list(ROWS)[1:])}"
    )


def run(options: argparse.Namespace) -> None:
    """Measure the missing rounds, then write table and picture.

    Raises:
        UserError: for a flag that cannot be used, before anything is measured.
    """
    device = prepare(options)
    rows = chosen_rows(options.only)
    height, width = options.height or (256 if options.quick else 384), options.width or 128
    batch_size = options.batch_size or (2 if options.quick else 8)
    if batch_size < 2:
        raise UserError("--batch-size 1 is too small: batch norms train on 2 images at least.")
    execution = {"amp": options.amp, "channels_last": options.channels_last, "compile": options.compile}
    settings = {"height": height, "width": width, "batch_size": batch_size, "gate": options.gate, "rows": rows}
    settings |= {name: value for name, value in execution.items() if value}
    results = Results(options.out, "cost", {**settings, "threads": options.threads, "device": options.device})
    if len(results.rounds) < options.repeats:
        torch.manual_seed(0)
        images = torch.randn(batch_size, 3, height, width, device=device)
        contestants = {
            name: Contestant(ROWS[name].build(options.gate).to(device), images, ROWS[name].fast, **execution)
            for name in tqdm(rows, desc="building", unit="network")
        }
        for name in tqdm(rows, desc="counting", unit="network"):
            if name not in results.counts:
                results.counts[name] = contestants[name].count()
                results.save()
        alternate(results, {name: one.sample for name, one in contestants.items()}, options.repeats)
    results.summary = summarise(results)
    results.save()
    report(results)


def chosen_rows(only: Sequence[str] | None) -> list[str]:
    """Names of the rows to measure, in the table's order; PCB is always among them.

    Raises:
        UserError: for a row that there is not, or that needs a library that is not installed.
    """
    for name in only or ():
        if name not in ROWS:
            raise UserError(f"--only: unknown row {shown(name)}; allowed is {', '.join(ROWS)}.{suggest(name, ROWS)}")
    wanted = [name for name in ROWS if only is None or name in only or name == BASELINE]
    if "nystrom" in wanted and not nystrom_is_installed():
        how = "nystrom-attention is not installed; run: pip install 'csalr-plugin[bench]'."
        if only:
            raise UserError(f"--only nystrom: {how}")
        print(f"The row nystrom is left out: {how}")
        wanted.remove("nystrom")
    return wanted


class Contestant:
    """A network with all that it takes to train it for a step and to embed a batch.

    Args:
        model: on the device that it is measured on.
        images: (B, 3, H, W), on the same device.
        fast: whether attention blocks may use the compiled passes.
        amp: autocast to "bf16" or "fp16", the latter with a gradient scaler; None for fp32.
        channels_last: whether weights and images are in this memory format.
        compile: whether the network runs through `torch.compile`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        fast: bool = True,
        *,
        amp: str | None = None,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        layout = torch.channels_last if channels_last else torch.preserve_format
        self.model, self.images, self.fast = model.to(memory_format=layout), images.to(memory_format=layout), fast
        self.autocast = torch.autocast(images.device.type, AMP_DTYPES.get(amp or ""), enabled=amp is not None)
        self.scaler = torch.amp.GradScaler(images.device.type, enabled=amp == "fp16")  # type: ignore[attr-defined]
        # The counts of memory kept and operations are those of the network as it is written, also with `compile`.
        self.run = torch.compile(self.model) if compile else self.model
        self.labels = torch.arange(len(images), device=images.device) % NUM_CLASSES
        # So small a rate that no step takes the network anywhere, whatever its attention.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def train_step(self) -> None:
        """Forward, the sum of all cross entropies (Eq. 18), backward, SGD."""
        self.optimizer.zero_grad()
        with self.autocast:
            loss = torch.stack([F.cross_entropy(logits, self.labels) for logits in self.run(self.images)]).sum()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def embed(self) -> None:
        """Forward in eval mode."""
        with torch.inference_mode(), self.autocast:
            self.run(self.images)

    def sample(self) -> Sample:
        """Seconds of a step and of an embedding."""
        set_fast(self.fast)
        device = self.images.device
        self.model.train()
        train_seconds = seconds(self.train_step, device)
        self.optimizer.zero_grad()  # only one network has gradients at a time
        self.model.eval()
        return {"train_seconds": train_seconds, "eval_seconds": seconds(self.embed, device)}

    def count(self) -> dict[str, Any]:
        """Measure memory per image, operations and parameters, which need no repetition."""
        set_fast(self.fast)
        images, _, height, width = self.images.shape
        with self.autocast:
            kept = count_kept_bytes(self.model, height, width, batch_size=images)
        gmacs = count_gmacs(self.model, height, width)
        self.model.train()
        self.train_step()  # allocate the optimizer's state and the memory of a first step
        self.optimizer.zero_grad()
        peak = peak_bytes(self.train_step, self.images.device) / images
        self.optimizer.zero_grad()
        parameters = count_parameters(self.model)
        return {"kept_bytes": kept, "peak_bytes": peak, "gmacs": gmacs, "parameters": parameters}


def summarise(results: Results) -> dict[str, Any]:
    """Every row's figures: value, spread where it was timed, and change from PCB."""
    batch_size = results.identity["settings"]["batch_size"]
    summary: dict[str, Any] = {}
    for name in results.identity["settings"]["rows"]:
        figures: dict[str, Any] = {}
        for count, value in results.counts[name].items():
            figures[count] = {"value": value, "change": value / results.counts[BASELINE][count] - 1}
        for mode in ("train", "eval"):
            fps, baseline = (
                [batch_size / sample for sample in results.samples(one, f"{mode}_seconds")] for one in (name, BASELINE)
            )
            value, changed = Statistic.of(fps), change(fps, baseline)
            figures[f"{mode}_fps"] = {
                "value": value.median,
                "spread": value.spread,
                "change": changed.median,
                "change_spread": changed.spread,
            }
        summary[name] = figures
    return summary


def report(results: Results) -> None:
    """Write cost.md and cost.png."""
    header = (
        "network",
        "kept MB/image",
        "paper's MB/image",
        "peak MB/image",
        "train FPS",
        "eval FPS",
        "paper's FPS",
        "GMACs",
        "parameters (M)",
    )
    lines = []
    for name, figures in results.summary.items():
        baseline = name == BASELINE

        def counted(count: str, unit: float, figures: Any = figures, baseline: bool = baseline) -> str:
            value = f"{figures[count]['value'] / unit:.2f}"
            return value if baseline else f"{value} ({figures[count]['change']:+.1%})"

        def timed(speed: str, figures: Any = figures, baseline: bool = baseline) -> str:
            figure = figures[speed]
            value = str(Statistic(figure["value"], figure["spread"]))
            return (
                value if baseline else f"{value} ({as_percent(Statistic(figure['change'], figure['change_spread']))})"
            )

        memory, speed = (_paper(name, index) for index in (0, 1))
        lines.append(
            (
                ROWS[name].label,
                counted("kept_bytes", 1e6),
                memory,
                counted("peak_bytes", 1e6),
                timed("train_fps"),
                timed("eval_fps"),
                speed,
                counted("gmacs", 1),
                counted("parameters", 1e6),
            )
        )
    notes = (
        "in brackets the change from PCB: of medians' counts, and of FPS the median of the rounds' own changes",
        "± is half the distance of the quartiles; "
        f"'{TOO_LARGE}' stands for a change whose quartiles lie further apart than it is large",
        "kept: bytes kept from the forward for the backward pass; peak: the most that a training step holds beyond "
        "weights and optimizer; MB = 1e6 bytes; with --compile, kept is that of the network that is not compiled",
        "the paper's figures are its Table 5, on a GPU that it does not name",
    )
    table = tabulate(lines, header, tablefmt="github", disable_numparse=True)
    draw(results)
    write_report(results, "The cost of attention", table, notes)


def _paper(name: str, index: int) -> str:
    paper, baseline = ROWS[name].paper, ROWS[BASELINE].paper
    assert baseline is not None
    if paper is None:
        return ""
    value = f"{paper[index]:.2f}"
    return value if name == BASELINE else f"{value} ({paper[index] / baseline[index] - 1:+.1%})"


def draw(results: Results) -> None:
    """Bars of each row's change from PCB, the paper's as a mark on them."""
    names = [name for name in results.summary if name != BASELINE]
    if not names:
        names = [BASELINE]
    panels: list[tuple[str, str, int | None, Callable[[Any], float]]] = [
        ("kept_bytes", "memory kept for the backward pass", 0, lambda figure: 0.0),
        ("train_fps", "training, images a second", 1, lambda figure: figure["change_spread"] / 2),
        ("eval_fps", "embedding, images a second", 1, lambda figure: figure["change_spread"] / 2),
    ]
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(13, 1.5 + 0.36 * len(names)), sharey=True, layout="constrained"
    )
    for axis, (quantity, title, index, spread) in zip(axes, panels, strict=True):
        figures = [results.summary[name][quantity] for name in names]
        changes, errors = [100 * one["change"] for one in figures], [100 * spread(one) for one in figures]
        bars = axis.barh(
            range(len(names)), changes, xerr=errors if any(errors) else None, capsize=2, error_kw={"alpha": 0.6}
        )
        for name, bar, changed, error in zip(names, bars, changes, errors, strict=True):
            bar.set_color("tab:blue" if name.startswith("csalr") else "tab:gray")
            bar.set_alpha(0.2 if 2 * error > abs(changed) else 0.8)  # faint where the table refuses the change
        marks = [(row, ROWS[name].paper) for row, name in enumerate(names) if ROWS[name].paper]
        baseline = ROWS[BASELINE].paper
        if index is not None and baseline and names != [BASELINE]:
            values = [100 * (paper[index] / baseline[index] - 1) for _, paper in marks if paper]
            axis.plot(
                values, [row for row, _ in marks], "kD", markersize=5, fillstyle="none", label="the paper, Table 5"
            )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.grid(axis="x", alpha=0.3)
        axis.set(title=title, xlabel="change from PCB, %")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(loc="lower right", fontsize=8)
    axes[0].set_yticks(range(len(names)), [ROWS[name].label for name in names])
    axes[0].invert_yaxis()
    figure.savefig(results.path.with_suffix(".png"), dpi=120)
    pyplot().close(figure)
