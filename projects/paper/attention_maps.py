"""The command `csalr attention-maps`: full attention maps beside those of the factors (Figure 4), and their error."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from tqdm import tqdm

from csalr_plugin.attention import AttentionBlock, CompressedSelfAttention, LandmarkGrid
from csalr_plugin.attention.csalr import CSALR
from csalr_plugin.attention.maps import (
    Maps,
    csalr_map,
    full_map,
    maps_of,
    pooled_key_map,
    queries_and_keys,
)
from csalr_plugin.command_line import Parser, path_argument, positive
from csalr_plugin.errors import UserError, shown
from csalr_plugin.files import make_writable_folder, write_json
from csalr_plugin.hosts import keys
from csalr_plugin.hosts.images import read_image
from csalr_plugin.hosts.torchreid import register
from csalr_plugin.hosts.torchreid.arguments import config_from_arguments, parse_arguments
from csalr_plugin.hosts.torchreid.config import Config, set_active_config
from csalr_plugin.hosts.torchreid.train import build_model
from csalr_plugin.models.inspect import block_inputs
from csalr_plugin.models.recipe import attention_blocks
from csalr_plugin.models.weights import load_weights

from .folder import newest_checkpoint
from .plan import HERE, read_dataset, split_overrides

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Points (across, down) as fractions of the image: roughly the head, the chest and a knee.
POINTS = ((0.5, 0.12), (0.5, 0.38), (0.42, 0.75))
GRIDS = ((6, 4), (12, 4), (12, 8), (24, 8))  # 24 to 192 points, as in Table 2
GROUPS = (1, 2, 4, 8)  # as in Table 3
PATCHES = (12, 8)  # grid of patches for "agreement", the same for every setting
_COLOURS = ("tab:red", "tab:cyan", "tab:green", "tab:orange", "tab:purple", "tab:olive")


@dataclass(frozen=True)
class Network:
    """A network in eval mode and its image preprocessing.

    Attributes:
        model: the network.
        blocks: its attention blocks by stage: "stage1", ...
        name: the name of the model, such as "pcb_csalr".
        config: the settings of the image size and the normalisation.
    """

    model: nn.Module
    blocks: dict[str, AttentionBlock]
    name: str
    config: Config

    def images(self, paths: Sequence[Path | str]) -> Tensor:
        """Read and normalise images like the host at test time: (B, 3, H, W)."""
        data = self.config.data
        size = (data.height, data.width)
        images = [TF.to_tensor(read_image(str(path)).resize(size[::-1], Image.Resampling.BILINEAR)) for path in paths]
        device = next(self.model.parameters()).device
        return TF.normalize(torch.stack(images), data.norm_mean, data.norm_std).to(device)


def main(argv: Sequence[str]) -> None:
    """``csalr attention-maps``.

    Raises:
        UserError: an argument cannot be used, an image cannot be read, or the checkpoint does not fit the model.
    """
    given, config = _parse(argv)
    make_writable_folder(given.out, f"--out '{given.out}'")
    paths = given.image or _some_queries(given.dataset, given.root, given.queries)
    for path in given.image or ():
        read_image(path)  # before the network is built
    network = load_network(config, given.checkpoint)
    if given.report:
        rows = reconstruction(network, paths)
        print(write_reconstruction(given.out, network, given.checkpoint, len(paths), rows))
        return
    for path in paths:
        print(draw(network, path, given.out, points=given.points or POINTS, grid=given.grid))


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    parser = Parser(
        prog="csalr attention-maps",
        usage="csalr attention-maps --out DIR (--image FILE ... | --root DATA [--dataset NAME] [--queries N])\n"
        "       [--checkpoint FILE] [--points X,Y ...] [--grid] [--report] [KEY VALUE ...]",
        description="Draw, for points of each image, the full attention map of each block's own queries and keys "
        "(SA's formula)\nbeside the map of the block's factors, with the relative error. Each image gives one PNG.",
        epilog="KEY VALUE: config keys as in 'csalr train', over the full preset: model.name, data.height, ...\n"
        "Without a checkpoint, model.pretrained and csalr.pretrained_weights set the initial weights.\n\n"
        "example:\n  csalr attention-maps --checkpoint log/model/model.pth.tar-100 --image person.jpg \\\n"
        "    --points 0.5,0.1 0.4,0.6 --grid --out maps MODEL.NAME pcb_csalr",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder of the pictures")
    parser.add_argument("--image", type=path_argument, nargs="+", metavar="FILE", help="images to draw")
    parser.add_argument("--root", type=path_argument, metavar="DATA", help="folder of the datasets")
    parser.add_argument("--dataset", default="market1501", metavar="NAME", help="dataset of the queries (market1501)")
    parser.add_argument("--queries", type=positive, default=3, metavar="N", help="number of queries (3)")
    parser.add_argument("--checkpoint", type=path_argument, metavar="FILE", help="checkpoint of the model MODEL.NAME")
    parser.add_argument("--points", nargs="+", metavar="X,Y", help="across and down, from 0 to 1 (head, chest, knee)")
    parser.add_argument("--grid", action="store_true", help="draw the grid of landmarks over the maps")
    parser.add_argument("--report", action="store_true", help="draw nothing: measure the error by landmarks and groups")
    words, overrides = split_overrides(argv)
    given, rest = parser.parse_known_args(words)
    if bool(given.image) == bool(given.root):
        raise UserError("give either images with --image, or a dataset's folder with --root.")
    names = [path.stem for path in given.image or ()]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise UserError(f"--image: two images are called {shown(twice)} and would overwrite one PNG; use two --out.")
    given.points = [_point(text) for text in given.points or ()]
    preset = ["--config-file", str(HERE / "presets" / "full.yaml"), "model.name", "pcb_csalr"]
    return given, config_from_arguments(parse_arguments([*preset, *rest, *overrides], "csalr attention-maps"))


def _point(text: str) -> tuple[float, float]:
    try:
        across, down = (keys.number(0, below=1).parse(part) for part in text.split(","))
    except (ValueError, OverflowError):
        raise UserError(f"--points {shown(text)} must be X,Y with both from 0 to below 1, such as 0.5,0.3.") from None
    return across, down


def _some_queries(dataset: str, root: Path, count: int) -> list[Path]:
    """Return the paths of `count` queries of a dataset, evenly spaced."""
    queries = read_dataset(dataset, root).query
    step = max(1, len(queries) // count)
    return [Path(item[0]) for item in queries[::step][:count]]


def load_network(config: Config, checkpoint: Path | None) -> Network:
    """Build the model of `config` with the weights of a checkpoint.

    Raises:
        UserError: the model has no attention, or the checkpoint does not fit it or has no attention blocks.
    """
    name = config.model.name
    register()
    previous = set_active_config(config)
    try:
        model = build_model(name, 2, pretrained=config.model.pretrained and checkpoint is None, use_gpu=False).eval()
    finally:
        set_active_config(previous)
    if not attention_blocks(model):
        raise UserError(f"model.name '{name}' has no attention; give a model with attention, such as pcb_csalr.")
    if checkpoint is not None:
        left = load_weights(model, checkpoint).left
        if any(one.startswith("attention.") for one in left):
            raise UserError(
                f"Checkpoint '{checkpoint}' has no attention blocks, which '{name}' needs; give the checkpoint of a "
                "training with attention, and its model.name and csalr keys."
            )
    if torch.cuda.is_available() and config.use_gpu:
        model = model.cuda()
    blocks = attention_blocks(model)
    return Network(model, blocks, name, config)


def draw(
    network: Network,
    path: Path,
    out: Path,
    *,
    points: Sequence[tuple[float, float]] = POINTS,
    grid: bool = False,
) -> Path:
    """Draw Figure 4 for an image: one row per stage with the image and, for each point, the full and compressed map.

    The maps are means over the groups. The error below a map is that of the point's row in all groups. Both maps of a
    point share one colour scale, from 0 to the largest value of the full map.

    Args:
        network: the network with attention.
        path: the image.
        out: the folder of the picture ``NAME.png``.
        points: (across, down) as fractions of the image.
        grid: draw the borders of the landmarks' patches.

    Returns:
        The path of the picture.
    """
    images = network.images([path])
    inputs = block_inputs(network.model, images)
    picture = np.asarray(read_image(str(path)).resize((network.config.data.width, network.config.data.height)))
    height, width = picture.shape[:2]
    columns = 1 + 2 * len(points)
    size = (1.35 * columns, (1.2 * height / width + 0.55) * len(inputs) + 0.3)
    figure, axes = plt.subplots(len(inputs), columns, figsize=size, squeeze=False, layout="constrained")
    for line, (stage, x) in zip(axes, inputs.items(), strict=True):
        block, (rows, cols) = network.blocks[stage], x.shape[-2:]
        places = [(int(down * rows), int(across * cols)) for across, down in points]
        indices = torch.tensor([row * cols + column for row, column in places], device=x.device)
        maps = maps_of(block, x, rows=indices)
        line[0].imshow(picture)
        line[0].set_ylabel(f"{stage}, {rows}x{cols}")
        for number, (row, column) in enumerate(places):
            colour = _COLOURS[number % len(_COLOURS)]
            centre = ((column + 0.5) / cols * width, (row + 0.5) / rows * height)
            line[0].plot(*centre, "o", color=colour, markeredgecolor="white", markersize=7)
            pair = [one[0, :, number].mean(dim=0).reshape(rows, cols).cpu() for one in (maps.full, maps.compressed)]
            error = Maps(maps.full[:, :, [number]], maps.compressed[:, :, [number]]).error()
            for axis, values, title in zip(line[1 + 2 * number :], pair, ("full", _label(block)), strict=False):
                _show(axis, picture, values, float(pair[0].max()), colour, centre)
                axis.set_title(title, fontsize=9)
            line[2 + 2 * number].set_xlabel(f"error {error:.1%}", fontsize=9)
        if grid and not isinstance(block, CompressedSelfAttention):
            for axis in line:
                _draw_grid(axis, landmark_grid(block, x), width, height)
        for axis in line:
            axis.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{path.stem}.png"
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def _label(block: AttentionBlock) -> str:
    return "CSA" if isinstance(block, CompressedSelfAttention) else "CSALR"


def _show(
    axis: Axes, picture: np.ndarray, values: Tensor, largest: float, colour: str, centre: tuple[float, float]
) -> None:
    height, width = picture.shape[:2]
    axis.imshow(picture.mean(axis=2), cmap="gray")
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(values, cmap="inferno", vmin=0, vmax=largest, alpha=0.7, extent=extent, interpolation="nearest")
    axis.plot(*centre, "o", color="none", markeredgecolor=colour, markersize=7, markeredgewidth=1.5)
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=2)


def landmark_grid(block: AttentionBlock, x: Tensor) -> LandmarkGrid:
    """Return the grid of the drawn factors: the block's own, or (12, 8) for SA."""
    wanted = block.landmarks if isinstance(block, CSALR) else PATCHES
    return LandmarkGrid(x.shape[-2], x.shape[-1], wanted, x.device)


def _draw_grid(axis: Axes, grid: LandmarkGrid, width: int, height: int) -> None:
    for size, parts, extent, line in (
        (grid.height, grid.rows, height, axis.axhline),
        (grid.width, grid.columns, width, axis.axvline),
    ):
        for part in range(1, parts):
            first = math.ceil(part * size / parts)  # position i belongs to landmark floor(i parts / size)
            line(first / size * extent - 0.5, color="white", linewidth=0.5, alpha=0.8)


def reconstruction(network: Network, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Measure the error of the compressed maps over images, by stage, landmarks and groups.

    For CSALR and SA blocks, measure the map of CSALR's factors and, as a control, the map of pooled keys: with the
    landmarks of Table 2 at the block's own groups, and with the groups of Table 3 at its own landmarks. Each is
    compared with the full map of the same groups. For CSA, measure only its own factors, which its bases were
    learned for.

    Returns:
        One row per case: "map", "stage", "points" (landmarks), "groups", "error" (relative Frobenius error over all
        positions of all images) and "agreement" (fraction of positions with the same most attended patch as in the
        full map).
    """
    sums: dict[tuple[str, str, int, int], list[float]] = {}
    for path in tqdm(paths, desc="Attention maps", unit="image", mininterval=2.0):
        for stage, x in block_inputs(network.model, network.images([path])).items():
            block = network.blocks[stage]
            patches = LandmarkGrid(x.shape[-2], x.shape[-1], PATCHES, x.device).membership(torch.float64)
            for name, points, groups, maps in _settings(block, x):
                difference = torch.linalg.vector_norm(maps.compressed - maps.full) ** 2
                shares = [one @ patches for one in (maps.full, maps.compressed)]  # 1, groups, n, patches
                there = shares[0].gather(-1, shares[1].argmax(dim=-1, keepdim=True))
                agrees = there >= shares[0].amax(dim=-1, keepdim=True) * (1 - 1e-9)  # equal patches agree
                values = (
                    difference,
                    torch.linalg.vector_norm(maps.full) ** 2,
                    agrees.double().mean(),
                    1.0,
                )
                total = sums.setdefault((name, stage, points, groups), [0.0] * 4)
                total[:] = [before + float(value) for before, value in zip(total, values, strict=True)]
    return [
        {
            "map": name,
            "stage": stage,
            "points": points,
            "groups": groups,
            "error": math.sqrt(difference / full),
            "agreement": agreement / count,
        }
        for (name, stage, points, groups), (difference, full, agreement, count) in sums.items()
    ]


def _settings(block: AttentionBlock, x: Tensor) -> Iterable[tuple[str, int, int, Maps]]:
    if isinstance(block, CompressedSelfAttention):
        yield "CSA", len(block.bases) // block.groups, block.groups, maps_of(block, x)
        return
    own = block.landmarks if isinstance(block, CSALR) else PATCHES
    groups = [count for count in dict.fromkeys((block.groups, *GROUPS)) if block.key_channels % count == 0]
    with torch.no_grad():
        for count in groups:
            Q, K = queries_and_keys(block, x, count)
            full = full_map(Q, K)
            for wanted in dict.fromkeys((own, *GRIDS)) if count == block.groups else (own,):
                grid = LandmarkGrid(x.shape[-2], x.shape[-1], wanted, x.device)
                points = wanted[0] * wanted[1]
                yield "CSALR", points, count, Maps(full, csalr_map(Q, K, grid, floor=CSALR.self_attention_floor))
                yield "pooled keys", points, count, Maps(full, pooled_key_map(Q, K, grid))


def write_reconstruction(
    out: Path, network: Network, checkpoint: Path | None, images: int, rows: Sequence[dict[str, Any]]
) -> str:
    """Write ``reconstruction-MODEL.json`` and ``.csv``, and return the table as text."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"reconstruction-{network.name}.json"
    about = {"model": network.name, "checkpoint": str(checkpoint) if checkpoint else None, "images": images}
    write_json(path, {**about, "rows": rows})
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return tabulate(*reconstruction_table(rows)[::-1], disable_numparse=True) + f"\n\n{path}"


def reconstruction_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of a table: one line per map, points and groups, with error and agreement by stage."""
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        cell = f"{row['error']:.1%} / {row['agreement']:.1%}"
        lines.setdefault((row["map"], row["points"], row["groups"]), {})[row["stage"]] = cell
    ordered = sorted(lines.items(), key=lambda item: item[0])
    header = ["map", "points", "groups", *(f"{stage}: error / patch agrees" for stage in stages)]
    return header, [[*map(str, key), *(cells.get(stage, "-") for stage in stages)] for key, cells in ordered]


def figure4(config: Config, folder: Path, out: Path, dataset: str, queries: int = 3, measured: int = 8) -> None:
    """Draw Figure 4 for a finished training and some queries of its dataset, unless that is done already.

    Args:
        config: the settings of the training.
        folder: the folder of the training, with its checkpoint.
        out: the folder of the pictures and of the measured errors.
        dataset: the dataset of the queries.
        queries: number of queries to draw.
        measured: number of queries to measure the errors on.
    """
    checkpoint = newest_checkpoint(folder)
    done = out / f"reconstruction-{config.model.name}.json"
    if checkpoint is None or (done.exists() and done.stat().st_mtime >= checkpoint.stat().st_mtime):
        return
    network = load_network(config, checkpoint)
    paths = _some_queries(dataset, Path(config.data.root), measured)
    for path in paths[:queries]:
        draw(network, path, out, grid=False)
    write_reconstruction(out, network, checkpoint, len(paths), reconstruction(network, paths))
