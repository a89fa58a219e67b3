"""The models of torchreid, the same with CSALR, and the plugin's PCB models: size, operations, speed, and accuracy.

A second table has the figures with CSALR as ratios to those without. Every model embeds the same images in turn. With
--root, -s and --weights the host's data manager and evaluator add mAP and rank-1. README.md in projects/benchmark
explains each figure.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from csalr_plugin.command_line import batch_argument, path_argument, side_argument
from csalr_plugin.errors import UserError, shown, suggest
from csalr_plugin.hosts.folder import is_folder_name
from csalr_plugin.hosts.torchreid.zoo import FIXED_SIZES
from csalr_plugin.models import MODEL_NAMES, split_attention
from csalr_plugin.models.cost import count_gmacs, count_parameters

from .harness import (
    Results,
    Sample,
    Statistic,
    add_common_arguments,
    alternate,
    prepare,
    pyplot,
    seconds,
    write_report,
)

HOST_MODELS = (
    "resnet50",
    "resnet50_fc512",
    "pcb_p6",
    "mlfn",
    "hacnn",
    "osnet_x1_0",
    "osnet_ain_x1_0",
    "mobilenetv2_x1_0",
)
TWINS = {f"{name}_csalr": name for name in HOST_MODELS}  # a host's model with attention, and the plain one
MODELS = (*(one for twin, name in TWINS.items() for one in (name, twin)), *MODEL_NAMES)
NUM_CLASSES = 751  # as Market-1501 has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the study."""
    add_common_arguments(parser)
    parser.add_argument("--height", type=side_argument, default=256, metavar="N", help="image height (256; hacnn: 160)")
    parser.add_argument("--width", type=side_argument, default=128, metavar="N", help="image width (128; hacnn: 64)")
    parser.add_argument("--batch-size", type=batch_argument, metavar="N", help="images a batch (16; quick 4)")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help=f"these models, of {', '.join(MODELS)}")
    parser.add_argument("--root", type=path_argument, metavar="DIR", help="folder of the datasets, for mAP and rank-1")
    parser.add_argument("-s", "--sources", nargs="+", metavar="NAME", help="datasets that --weights were trained on")
    parser.add_argument("-t", "--targets", nargs="+", metavar="NAME", help="datasets to evaluate on (the sources)")
    parser.add_argument("--weights", nargs="+", default=[], metavar="MODEL=PATH", help="checkpoints to evaluate")


def run(options: argparse.Namespace) -> None:
    """Run the missing measurements, then write the table and the picture.

    Raises:
        UserError: an option cannot be used; this is checked before any measurement.
    """
    from csalr_plugin.hosts.torchreid import model_registry

    model_registry()  # a missing host is an error before anything is measured
    device = prepare(options)
    names = [name for name in MODELS if not options.only or name in options.only]
    for name in options.only or ():
        if name not in MODELS:
            raise UserError(
                f"--only: unknown model {shown(name)}; allowed is {', '.join(MODELS)}.{suggest(name, MODELS)}"
            )
    if options.height < 64 or options.width < 32:
        raise UserError(f"--height {options.height} --width {options.width} is too small: 64 and 32 at least.")
    weights = checkpoints(options, names)
    batch_size = options.batch_size or (4 if options.quick else 16)
    settings = {
        "height": options.height,
        "width": options.width,
        "batch_size": batch_size,
        "models": names,
        "threads": options.threads,
        "device": options.device,
    }
    results = Results(options.out, "zoo", settings)
    if len(results.rounds) < options.repeats:
        torch.manual_seed(0)
        entries = {
            name: Entry(build(name).to(device), image_size(name, options.height, options.width), batch_size)
            for name in tqdm(names, desc="building", unit="model")
        }
        for name in tqdm(names, desc="counting", unit="model"):
            if "gmacs" not in results.counts.get(name, {}):
                results.counts[name] = entries[name].count()
                results.save()
        alternate(results, {name: one.sample for name, one in entries.items()}, options.repeats)
    evaluate(results, options, weights)
    results.summary = summarise(results)
    results.save()
    report(results)


def checkpoints(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Path]:
    """Return the checkpoint of each model in --weights.

    Raises:
        UserError: for a word that is no MODEL=PATH, an unknown model, a missing file, or data that is not named.
    """
    found: dict[str, Path] = {}
    for word in options.weights:
        name, equals, text = word.partition("=")
        if not equals or not text:
            raise UserError(f"--weights {shown(word)} is not MODEL=PATH; for example pcb_csalr=model.pth.tar-100.")
        if name not in names:
            allowed = f"it must be one of {', '.join(names)}.{suggest(name, names)}"
            raise UserError(f"--weights: model {shown(name)} is not measured; {allowed}")
        try:
            found[name] = path_argument(text)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--weights {shown(word)}: {error}; give the path of a checkpoint.") from None
        if not found[name].is_file():
            raise UserError(f"--weights {shown(word)}: {shown(text)} is not a file; give the path of a checkpoint.")
    datasets = [*(options.sources or ()), *(options.targets or ())]
    if found and not (options.sources and (options.root or all(map(is_folder_name, datasets)))):
        raise UserError("--weights needs the data to evaluate on: add --root DIR and -s NAME, or -s folder:PATH.")
    if options.root and not found:
        raise UserError("--root is for mAP and rank-1: add --weights MODEL=PATH.")
    return found


def image_size(name: str, height: int, width: int) -> tuple[int, int]:
    """Return the image height and width for a model; HACNN accepts one size only."""
    return FIXED_SIZES.get(split_attention(name)[0], (height, width))


def build(name: str) -> nn.Module:
    """Build a model of torchreid's registry, which has the plugin's too, with random weights."""
    from csalr_plugin.hosts.torchreid import model_registry, registered_name

    warnings.filterwarnings("ignore", module=r"torchreid\.")  # of functions that today's torch calls otherwise
    build_entry = model_registry()[registered_name(name)]
    model: nn.Module = build_entry(num_classes=NUM_CLASSES, loss="softmax", pretrained=False, use_gpu=False)
    return model.eval()


class Entry:
    """A model and the size of its images.

    Args:
        model: the model in eval mode, on the device of the measurement.
        size: height and width of the images.
        batch_size: number of images in the batch.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int], batch_size: int) -> None:
        self.model, self.size, self.batch_size = model, size, batch_size
        self.device = next(model.parameters()).device

    def embed(self, images: Tensor) -> Tensor:
        """Compute the embeddings (B, width) of images (B, 3, H, W)."""
        with torch.inference_mode():
            embeddings: Tensor = self.model(images)
        return embeddings

    def sample(self) -> Sample:
        """Measure the seconds for a single image and for the batch."""
        images = torch.randn(self.batch_size, 3, *self.size, device=self.device)
        one, many = (functools.partial(self.embed, part) for part in (images[:1], images))
        return {"latency_seconds": seconds(one, self.device), "batch_seconds": seconds(many, self.device)}

    def count(self) -> dict[str, Any]:
        """Count parameters, operations, the width of the embedding and the bytes of a checkpoint."""
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        return {
            "size": list(self.size),
            "parameters": count_parameters(self.model),
            "gmacs": count_gmacs(self.model, *self.size),
            "embedding": self.embed(torch.zeros(1, 3, *self.size, device=self.device)).shape[1],
            "checkpoint_bytes": len(file.getbuffer()),
        }


def evaluate(results: Results, options: argparse.Namespace, weights: dict[str, Path]) -> None:
    """Add mAP and rank-1 of each checkpoint, by torchreid's data manager and evaluator.

    Raises:
        UserError: for data or weights that cannot be used.
    """
    for name, path in tqdm(weights.items(), desc="evaluating", unit="model", disable=not weights):
        targets = options.targets or options.sources
        asked = {
            "weights": str(path.resolve()),
            "changed": path.stat().st_mtime,
            "root": str(options.root),
            "sources": options.sources,
            "targets": targets,
        }
        if results.counts[name].get("evaluated") != asked:
            results.counts[name]["accuracy"] = accuracy(results, options, name, path, targets)
            results.counts[name]["evaluated"] = asked
            results.save()


def accuracy(
    results: Results, options: argparse.Namespace, name: str, path: Path, targets: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return mAP and rank-1, from 0 to 1, of one checkpoint on each target."""
    from csalr_plugin.hosts.torchreid import registered_name
    from csalr_plugin.hosts.torchreid.config import default_config
    from csalr_plugin.hosts.torchreid.train import train

    height, width = results.counts[name]["size"]
    config = default_config()
    overrides = {
        "model.name": registered_name(name),
        "model.pretrained": False,
        "model.load_weights": str(path),
        "data.root": str(options.root or "."),
        "data.sources": list(options.sources),
        "data.targets": list(targets),
        "data.height": height,
        "data.width": width,
        "data.workers": options.threads,
        "data.save_dir": str(options.out / "evaluation" / name),
        "test.evaluate": True,
        "use_gpu": options.device == "cuda",
    }
    config.merge_from_list([item for pair in overrides.items() for item in pair])
    with contextlib.redirect_stdout(io.StringIO()):  # the output is also in the log in save_dir
        found = train(config)
    return {
        target: {figure: float(figures[figure]) for figure in ("mAP", "rank-1")} for target, figures in found.items()
    }


def summarise(results: Results) -> dict[str, Any]:
    """Return the numbers of the table for each model."""
    summary: dict[str, Any] = {}
    batch_size = results.identity["settings"]["batch_size"]
    for name in results.identity["settings"]["models"]:
        latency = Statistic.of(results.samples(name, "latency_seconds"))
        throughput = Statistic.of([batch_size / sample for sample in results.samples(name, "batch_seconds")])
        counts = {figure: value for figure, value in results.counts[name].items() if figure != "evaluated"}
        summary[name] = {**counts, "latency_seconds": latency.__dict__, "images_per_second": throughput.__dict__}
        if (plain := TWINS.get(name)) in results.identity["settings"]["models"]:
            summary[name]["ratios"] = ratios(results, name, str(plain))
    return summary


def ratios(results: Results, name: str, plain: str) -> dict[str, Any]:
    """Return the figures of a model with attention as ratios to those of the plain model, times round by round."""
    found: dict[str, Any] = {
        figure: results.counts[name][figure] / results.counts[plain][figure] for figure in ("parameters", "gmacs")
    }
    for figure, sample in (("latency", "latency_seconds"), ("throughput", "batch_seconds")):
        pairs = zip(results.samples(name, sample), results.samples(plain, sample), strict=True)
        statistic = Statistic.of([own / other if figure == "latency" else other / own for own, other in pairs])
        found[figure] = statistic.__dict__
    return found


def report(results: Results) -> None:
    """Write zoo.md and zoo.png."""
    targets = list(dict.fromkeys(target for row in results.summary.values() for target in row.get("accuracy", ())))
    header = [
        "model",
        "image",
        "parameters (M)",
        "GMACs",
        "embedding",
        "latency (ms)",
        "images/s",
        "checkpoint (MB)",
        *(f"{target} {figure}" for target in targets for figure in ("mAP", "rank-1")),
    ]
    lines = []
    for name, row in results.summary.items():
        latency, throughput = (Statistic(**row[figure]) for figure in ("latency_seconds", "images_per_second"))
        found = row.get("accuracy", {})
        lines.append(
            (
                name,
                "x".join(map(str, row["size"])),
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['gmacs']:.2f}",
                str(row["embedding"]),
                str(Statistic(1e3 * latency.median, 1e3 * latency.spread)),
                str(throughput),
                f"{row['checkpoint_bytes'] / 1e6:.1f}",
                *(
                    f"{found[one][figure]:.1%}" if one in found else ""
                    for one in targets
                    for figure in ("mAP", "rank-1")
                ),
            )
        )
    notes = (
        "GMACs are of one image, every matrix product counted; parameters and checkpoint are those of training, its "
        f"classifiers for {NUM_CLASSES} identities included; MB = 1e6 bytes",
        "latency is that of one image, images/s that of a batch; ± is half the distance of the quartiles",
        "accuracy, where it is given, is that of the weights given, through the host's evaluator",
    )
    draw(results, targets)
    table = tabulate(lines, header, tablefmt="github", disable_numparse=True)
    if compared := ratio_rows(results.summary):
        header = ["with CSALR / without", "parameters", "GMACs", "latency", "images/s"]
        table += "\n\n" + tabulate(compared, header, tablefmt="github", disable_numparse=True)
    write_report(results, "The host's models and the plugin's", table, notes)


def ratio_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each model with attention whose plain model was measured too."""
    return [
        (
            TWINS[name],
            *(f"{row['ratios'][figure]:.2f}" for figure in ("parameters", "gmacs")),
            *(str(Statistic(**row["ratios"][figure])) for figure in ("latency", "throughput")),
        )
        for name, row in summary.items()
        if "ratios" in row
    ]


def draw(results: Results, targets: Sequence[str]) -> None:
    """Plot bars of each model's operations, latency and throughput, and of its mAP if measured.

    A bar of a measured time has an error bar of half the interquartile range, and its label is the cell of the table.
    """
    names = list(results.summary)
    panels: list[tuple[str, Callable[[Any], float | Statistic]]] = [
        ("GMACs an image", lambda row: row["gmacs"]),
        ("latency of one image, ms", lambda row: _scaled(row["latency_seconds"], 1e3)),
        ("images a second, in a batch", lambda row: _scaled(row["images_per_second"], 1)),
    ]
    for target in targets:
        panels.append((f"mAP on {target}, %", functools.partial(_mean_precision, target)))
    size = (3.6 * len(panels) + 1.6, 1.6 + 0.3 * len(names))
    figure, axes = pyplot().subplots(1, len(panels), figsize=size, sharey=True, layout="constrained")
    ours = [name not in HOST_MODELS for name in names]
    for axis, (title, value) in zip(axes, panels, strict=True):
        found = [value(results.summary[name]) for name in names]
        values = [one.median if isinstance(one, Statistic) else one for one in found]
        spreads = [one.spread / 2 if isinstance(one, Statistic) else 0.0 for one in found]
        colours = ["tab:blue" if own else "tab:gray" for own in ours]
        axis.barh(
            range(len(names)), values, xerr=spreads if any(spreads) else None, color=colours, alpha=0.8, capsize=2
        )
        for place, (one, middle, spread) in enumerate(zip(found, values, spreads, strict=True)):
            if not math.isnan(middle):
                text = str(one) if isinstance(one, Statistic) else f"{one:.3g}"
                end = (middle + spread, place)
                axis.annotate(text, end, (4, 0), textcoords="offset points", va="center", fontsize=8)
        axis.margins(x=0.3)
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.3)
        axis.set(title=title)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.supxlabel("blue: this plugin; grey: torchreid; error bars: half the interquartile range", fontsize=9)
    figure.savefig(results.path.with_suffix(".png"), dpi=150)
    pyplot().close(figure)


def _scaled(figure: dict[str, float], factor: float) -> Statistic:
    return Statistic(factor * figure["median"], factor * figure["spread"])


def _mean_precision(target: str, row: dict[str, Any]) -> float:
    return 100 * row["accuracy"][target]["mAP"] if target in row.get("accuracy", {}) else float("nan")
