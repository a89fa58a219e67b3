"""The command `csalr attention-maps`: full attention maps beside the compressed ones (Figure 4), and their error."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from tabulate import tabulate
from torch import Tensor, nn
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
from csalr_plugin.errors import UserError, shown, suggest
from csalr_plugin.files import make_writable_folder, write_json
from csalr_plugin.hosts import keys
from csalr_plugin.hosts.gates import gates_of, read_batch
from csalr_plugin.hosts.images import read_image
from csalr_plugin.hosts.torchreid import register, registered_name
from csalr_plugin.hosts.torchreid.arguments import Arguments, config_from_arguments, parse_arguments
from csalr_plugin.hosts.torchreid.config import Config, set_active_config
from csalr_plugin.hosts.torchreid.train import build_model
from csalr_plugin.hosts.trained import load_trained
from csalr_plugin.models.inspect import block_inputs
from csalr_plugin.models.recipe import attention_blocks

from .plan import HERE, read_dataset, split_overrides

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# Points (across, down) as fractions of the image: roughly the head, the chest and a knee.
POINTS = ((0.5, 0.12), (0.5, 0.38), (0.42, 0.75))
GRIDS = ((6, 4), (12, 4), (12, 8), (24, 8))  # 24 to 192 points, as in Table 2
GROUPS = (1, 2, 4, 8)  # as in Table 3
PATCHES = (12, 8)  # landmarks for the maps of SA, and patches for the agreement of CSA
PANELS = ("full", "compressed", "difference")
FORMATS = ("png", "pdf", "svg")
PERFECT, UNIFORM, ONE_ROW = "full map (perfect)", "uniform", "one row for all queries"
POOLED_KEYS, POOLED_QUERIES = "pooled keys", "pooled queries"
KEYS_AVERAGED, QUERIES_AVERAGED = "full map, averaged over key patches", "full map, averaged over query patches"
_COLOURS = ("tab:red", "tab:cyan", "tab:green", "tab:orange", "tab:purple", "tab:olive")


@dataclass(frozen=True)
class Network:
    """A network in eval mode and its image preprocessing.

    Attributes:
        model: the network.
        name: its name, such as "pcb_csalr".
        size: height and width of the images.
        mean, std: of each channel, for pixels scaled to 0 to 1.
        source: the origin of the weights and, where it is not the checkpoint, of the size; for titles.
        checkpoint: path of the checkpoint, None for initial weights.
    """

    model: nn.Module
    name: str
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    source: str = "initial weights"
    checkpoint: Path | None = None

    @property
    def blocks(self) -> dict[str, AttentionBlock]:
        """The attention blocks by name: "stage1", ..."""
        return attention_blocks(self.model)

    @property
    def gates(self) -> dict[str, float]:
        """The gate alpha of each block by name."""
        return gates_of(self.model)

    @property
    def title(self) -> str:
        """Model, weights and image size in words."""
        return f"{self.name}, {self.source}, images of {self.size[0]}x{self.size[1]}"

    def images(self, paths: Sequence[Path | str]) -> Tensor:
        """Read and normalise images like the host at test time: (B, 3, H, W)."""
        return read_batch(paths, self.size, self.mean, self.std).to(next(self.model.parameters()).device)


def main(argv: Sequence[str]) -> None:
    """``csalr attention-maps``.

    Raises:
        UserError: an argument cannot be used, an image cannot be read, or the checkpoint does not fit the model.
    """
    given, arguments = _parse(argv)
    config = _config(arguments)
    make_writable_folder(given.out, f"--out '{given.out}'")
    paths = given.image or _some_queries(given.dataset, given.root, given.queries)
    for path in given.image or ():
        read_image(path)  # before the network is built
    if given.checkpoint:
        network = load_network(given.checkpoint, arguments, use_gpu=config.use_gpu)
    else:
        network = initial_network(config)
    print(network.title)
    if given.report:
        print(write_reconstruction(given.out, network, len(paths), reconstruction(network, paths)))
        return
    options = {"grid": given.grid, "panels": given.panels, "colours": given.colours, "smooth": given.smooth}
    for path in paths:
        for target in draw(network, path, given.out, points=given.points or POINTS, formats=given.formats, **options):
            print(target)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Arguments]:
    parser = Parser(
        prog="csalr attention-maps",
        usage="csalr attention-maps --out DIR (--image FILE ... | --root DATA [--dataset NAME] [--queries N])\n"
        "       [--checkpoint FILE] [--points X,Y ...] [--grid] [--panels PANEL ...] [--colours NAME] [--smooth]\n"
        "       [--formats FORMAT ...] [--report] [KEY VALUE ...]",
        description="Draw, for points of each image, the full attention map of each block's own queries and keys "
        "(SA's formula)\nbeside the map of the block's factors, with the relative error.",
        epilog="Model, image size and settings are those that the checkpoint records. KEY VALUE: config keys as in "
        "'csalr train',\nfor settings that it does not record. Without a checkpoint, model.name, model.pretrained and "
        "csalr.pretrained_weights\nset the initial network.\n\n"
        "examples:\n  csalr attention-maps --checkpoint log/model/model.pth.tar-100 --image person.jpg \\\n"
        "    --points 0.5,0.1 0.4,0.6 --grid --out maps\n"
        "  csalr attention-maps --checkpoint log/model/model.pth.tar-100 --root reid-data --queries 20 --report \\\n"
        "    --out maps",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=path_argument, required=True, metavar="DIR", help="folder of the pictures")
    add("--image", type=path_argument, nargs="+", metavar="FILE", help="images to draw")
    add("--root", type=path_argument, metavar="DATA", help="folder of the datasets")
    add("--dataset", default="market1501", metavar="NAME", help="dataset of the queries (market1501)")
    add("--queries", type=positive, default=3, metavar="N", help="number of queries (3)")
    add("--checkpoint", type=path_argument, metavar="FILE", help="checkpoint of either host")
    add("--points", nargs="+", metavar="X,Y", help="across and down, from 0 to 1 (head, chest, knee)")
    add("--grid", action="store_true", help="draw the grid of landmarks over the maps")
    panels = f"maps to draw: {', '.join(PANELS)} (full compressed)"
    add("--panels", nargs="+", default=list(PANELS[:2]), metavar="PANEL", help=panels)
    add("--colours", default="inferno", metavar="NAME", help="colour map of matplotlib (inferno)")
    add("--smooth", action="store_true", help="interpolate between positions, in place of one square per position")
    add("--formats", nargs="+", default=["png"], metavar="FORMAT", help=f"{', '.join(FORMATS)} (png)")
    add("--report", action="store_true", help="draw no maps: measure the error of map and output")
    words, overrides = split_overrides(argv)
    given, rest = parser.parse_known_args(words)
    for values, allowed, name in (
        (given.panels, PANELS, "--panels"),
        (given.formats, FORMATS, "--formats"),
        ([given.colours], tuple(matplotlib.colormaps), "--colours"),
    ):
        if wrong := next((value for value in values if value not in allowed), None):
            known = "a colour map of matplotlib" if name == "--colours" else f"one of {', '.join(allowed)}"
            raise UserError(f"{name} {shown(wrong)} must be {known}.{suggest(wrong, allowed)}")
    if bool(given.image) == bool(given.root):
        raise UserError("give either images with --image, or a dataset's folder with --root.")
    names = [path.stem for path in given.image or ()]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise UserError(f"--image: two images are called {shown(twice)} and would overwrite one PNG; use two --out.")
    given.points = [_point(text) for text in given.points or ()]
    return given, parse_arguments([*rest, *overrides], "csalr attention-maps")


def _config(arguments: Arguments) -> Config:
    """Return the settings of the arguments over the full preset with the model pcb_csalr."""
    file = arguments.config_file or str(HERE / "presets" / "full.yaml")
    overrides = ["model.name", "pcb_csalr", *arguments.overrides]
    return config_from_arguments(Arguments(**vars(arguments) | {"config_file": file, "overrides": overrides}))


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


def load_network(checkpoint: Path, arguments: Arguments | None = None, *, use_gpu: bool = True) -> Network:
    """Build the network of a checkpoint, with the settings that it records.

    Args:
        checkpoint: of either host.
        arguments: settings that the checkpoint does not record, or that replace its own, such as the image size.
        use_gpu: whether to use a GPU if there is one.

    Raises:
        UserError: the checkpoint cannot be read, a setting is not known, or the network has no attention.
    """
    given = arguments or Arguments()
    trained = load_trained(
        checkpoint, config_file=given.config_file, overrides=given.overrides, user="csalr attention-maps"
    )
    source, size = checkpoint.name, trained.size
    if size is None:
        full = _config(Arguments()).data
        size = (full.height, full.width)
        source += ", which does not record its image size"
    network = Network(trained.network, trained.model, size, trained.mean, trained.std, source, checkpoint)
    return _ready(network, use_gpu)


def initial_network(config: Config) -> Network:
    """Build the network of `config` with its initial weights.

    Raises:
        UserError: the network has no attention, or its backbone's weights cannot be loaded.
    """
    data = config.data
    register()
    previous = set_active_config(config)
    try:
        name = registered_name(config.model.name)
        model = build_model(name, 2, pretrained=config.model.pretrained, use_gpu=False).eval()
    finally:
        set_active_config(previous)
    network = Network(model, config.model.name, (data.height, data.width), data.norm_mean, data.norm_std)
    return _ready(network, config.use_gpu)


def _ready(network: Network, use_gpu: bool) -> Network:
    """Check that a network has attention, and move it to the GPU if there is one."""
    if not network.blocks:
        raise UserError(f"'{network.name}' has no attention; give a model with attention, such as pcb_csalr.")
    if torch.cuda.is_available() and use_gpu:
        network.model.cuda()
    return network


# Pictures


def draw(
    network: Network,
    path: Path,
    out: Path,
    *,
    points: Sequence[tuple[float, float]] = POINTS,
    grid: bool = False,
    panels: Sequence[str] = PANELS[:2],
    colours: str = "inferno",
    smooth: bool = False,
    formats: Sequence[str] = FORMATS[:1],
) -> list[Path]:
    """Draw Figure 4 for an image: one row per block with the image and, for each point, the maps of the panels.

    The maps are means over the groups. The maps of a point share one scale, from 0 to the largest weight of the full
    map, which is written below it. The error below a compressed map is that of the point's row in all groups.

    Args:
        network: the network with attention.
        path: the image.
        out: the folder of the pictures ``NAME.png``, ...
        points: (across, down) as fractions of the image.
        grid: draw the borders of the landmarks' patches.
        panels: some of `PANELS`; "difference" is \\|compressed - full\\|.
        colours: a colour map of matplotlib.
        smooth: interpolate between positions.
        formats: some of `FORMATS`.

    Returns:
        The paths of the pictures.
    """
    inputs = block_inputs(network.model, network.images([path]))
    picture = np.asarray(read_image(str(path)).resize(network.size[::-1]))
    height, width = picture.shape[:2]
    columns = 1 + len(panels) * len(points)
    title = f"{network.title}: {path.name}"
    size = (max(1.35 * columns + 1.0, 0.085 * len(title)), (1.2 * height / width + 0.65) * len(inputs) + 0.9)
    figure, axes = plt.subplots(len(inputs), columns, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(f"{title}\nattention of a marked position, mean over the groups", fontsize=10)
    for line, (stage, x) in zip(axes, inputs.items(), strict=True):
        block, (rows, cols) = network.blocks[stage], x.shape[-2:]
        places = [(int(down * rows), int(across * cols)) for across, down in points]
        indices = torch.tensor([row * cols + column for row, column in places], device=x.device)
        maps = maps_of(block, x, rows=indices)
        line[0].imshow(picture)
        line[0].set_ylabel(f"{stage}: {rows}x{cols} positions\ngate {block.alpha.item():+.4f}", fontsize=9)
        for number, (row, column) in enumerate(places):
            colour = _COLOURS[number % len(_COLOURS)]
            centre = ((column + 0.5) / cols * width, (row + 0.5) / rows * height)
            line[0].plot(*centre, "o", color=colour, markeredgecolor="white", markersize=7)
            full, compressed = (
                one[0, :, number].mean(dim=0).reshape(rows, cols).cpu() for one in (maps.full, maps.compressed)
            )
            largest = float(full.max())
            error = Maps(maps.full[:, :, [number]], maps.compressed[:, :, [number]]).error()
            shown_as = {
                "full": (full, "full", f"largest {largest:.2%}"),
                "compressed": (compressed, _label(block), f"error {error:.1%}"),
                "difference": ((compressed - full).abs(), f"|{_label(block)} - full|", ""),
            }
            first = 1 + len(panels) * number
            for axis, panel in zip(line[first : first + len(panels)], panels, strict=True):
                values, title, below = shown_as[panel]
                _show(axis, picture, values, largest, colour, centre, colours, smooth)
                axis.set_title(title, fontsize=9)
                axis.set_xlabel(below, fontsize=8)
        if grid and not isinstance(block, CompressedSelfAttention):
            for axis in line:
                _draw_grid(axis, landmark_grid(block, x), width, height)
        for axis in line:
            axis.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), colours)
    bar = figure.colorbar(scale, ax=axes, fraction=0.015, aspect=50, shrink=0.7, pad=0.01)
    bar.set_label("attention weight / largest weight of the full map", fontsize=9)
    out.mkdir(parents=True, exist_ok=True)
    targets = [out / f"{path.stem}.{ending}" for ending in dict.fromkeys(formats)]
    for target in targets:
        figure.savefig(target, dpi=200)
    plt.close(figure)
    return targets


def _label(block: AttentionBlock) -> str:
    return "CSA" if isinstance(block, CompressedSelfAttention) else "CSALR"


def _show(
    axis: Axes,
    picture: np.ndarray,
    values: Tensor,
    largest: float,
    colour: str,
    centre: tuple[float, float],
    colours: str,
    smooth: bool,
) -> None:
    height, width = picture.shape[:2]
    axis.imshow(picture.mean(axis=2), cmap="gray")
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    interpolation = "bilinear" if smooth else "nearest"
    axis.imshow(values, cmap=colours, vmin=0, vmax=largest, alpha=0.7, extent=extent, interpolation=interpolation)
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


# Measurement


@torch.no_grad()
def reconstruction(network: Network, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Measure the error of compressed maps, and of the outputs that they produce, over images.

    Each map is compared with the full map of the same groups, and its output with the output O = map V of the full
    map, for the V of the block. At the block's own points and groups these maps are measured:

    - the full map itself, a uniform map, and the full map's mean row for all queries: the range of the measures;
    - CSALR's map, which pools the queries of a patch, up to a correction, and keeps every key;
    - two controls: `POOLED_QUERIES`, softmax(P Q' K^T), and `POOLED_KEYS`, softmax(Q (P K')^T);
    - the full map averaged over query patches and over key patches: the smallest error of a map that is constant there.

    CSALR's map and the pooled keys are also measured with the points of Table 2 and the groups of Table 3. For CSA,
    only its own factors are measured, for which its bases were learned.

    Returns:
        One row per case: "map", "stage", "positions", "points" (landmarks; None for a map without), "groups", "error"
        (relative Frobenius error over all positions of all images), "output_error" (the same of O), "agreement"
        (fraction of positions with the same most attended patch as in the full map, for the patches of the block's own
        landmarks; of several equal patches in a map, each counts with its share) and "below_floor" (for CSALR, the
        fraction of landmarks with S_ii below the floor of the block, whose rows differ from the formula; else None).
    """
    sums: dict[tuple[Any, ...], list[float]] = {}
    for path in tqdm(paths, desc="Attention maps", unit="image", mininterval=2.0):
        for stage, x in block_inputs(network.model, network.images([path])).items():
            block = network.blocks[stage]
            n = x.shape[-2] * x.shape[-1]
            patches = landmark_grid(block, x).membership(torch.float64)
            V = block.project("value", x, {}).flatten(1, 2).double()  # 1, C, n
            for groups, full, candidates in _cases(block, x):
                values = V.reshape(1, groups, -1, n).mT  # 1, groups, n, c
                output, best = full @ values, _most_attended(full, patches)  # output: O
                for name, points, candidate, below_floor in candidates:
                    top = _most_attended(candidate, patches)
                    found = (
                        torch.linalg.vector_norm(candidate - full) ** 2,
                        torch.linalg.vector_norm(full) ** 2,
                        torch.linalg.vector_norm(candidate @ values - output) ** 2,
                        torch.linalg.vector_norm(output) ** 2,
                        ((top & best).sum(-1) / top.sum(-1)).double().mean(),
                        math.nan if below_floor is None else below_floor,
                        1.0,
                    )
                    total = sums.setdefault((name, stage, n, points, groups), [0.0] * len(found))
                    total[:] = [before + float(value) for before, value in zip(total, found, strict=True)]
    names = ("map", "stage", "positions", "points", "groups")
    return [
        dict(zip(names, key, strict=True))
        | {
            "error": math.sqrt(difference / full),
            "output_error": math.sqrt(output_difference / whole) if whole else 0.0,
            "agreement": agreement / count,
            "below_floor": None if math.isnan(below_floor) else below_floor / count,
        }
        for key, (difference, full, output_difference, whole, agreement, below_floor, count) in sums.items()
    ]


def _most_attended(attention: Tensor, patches: Tensor) -> Tensor:
    """Return which patches have the largest weight of a row: (1, groups, rows, n) -> (1, groups, rows, patches)."""
    shares = attention @ patches
    return shares >= shares.amax(dim=-1, keepdim=True) * (1 - 1e-9)


# The name of a map, its points, the map (1, groups, n, n), and the fraction of landmarks with S_ii below the floor.
_Case: TypeAlias = "tuple[str, int | None, Tensor, float | None]"


def _cases(block: AttentionBlock, x: Tensor) -> Iterator[tuple[int, Tensor, Iterator[_Case]]]:
    """Yield the groups, their full map (1, groups, n, n), and the maps to compare with it."""
    if isinstance(block, CompressedSelfAttention):
        maps = maps_of(block, x)
        own = ("CSA", len(block.bases) // block.groups, maps.compressed, None)
        yield block.groups, maps.full, iter([own, *_bounds(maps.full)])
        return
    own_grid = block.landmarks if isinstance(block, CSALR) else PATCHES
    fits = [count for count in GROUPS if block.key_channels % count == 0 and block.channels % count == 0]
    for count in dict.fromkeys((block.groups, *fits)):
        Q, K = queries_and_keys(block, x, count)
        full = full_map(Q, K)
        grids = dict.fromkeys((own_grid, *GRIDS)) if count == block.groups else (own_grid,)
        yield count, full, _candidates(Q, K, full, x, tuple(grids), count == block.groups)


def _candidates(
    Q: Tensor, K: Tensor, full: Tensor, x: Tensor, grids: Sequence[tuple[int, int]], controls: bool
) -> Iterator[_Case]:
    for number, wanted in enumerate(grids):
        grid, points = LandmarkGrid(x.shape[-2], x.shape[-1], wanted, x.device), wanted[0] * wanted[1]
        floor = CSALR.self_attention_floor
        own = (grid.pool(Q).mT @ grid.pool(K)).softmax(-1).diagonal(dim1=-2, dim2=-1)  # S_ii: 1, groups, m
        yield "CSALR", points, csalr_map(Q, K, grid, floor=floor), (own < floor).double().mean().item()
        if number == 0 and controls:
            yield POOLED_QUERIES, points, full_map(grid.pool(Q)[..., grid.landmark_of], K), None
        yield POOLED_KEYS, points, pooled_key_map(Q, K, grid), None
        if number == 0 and controls:
            yield QUERIES_AVERAGED, points, grid.pool(full.mT)[..., grid.landmark_of].mT, None
            yield KEYS_AVERAGED, points, grid.pool(full)[..., grid.landmark_of], None
    yield from _bounds(full)


def _bounds(full: Tensor) -> Iterator[_Case]:
    yield ONE_ROW, None, full.mean(dim=-2, keepdim=True).expand_as(full), None
    yield UNIFORM, None, torch.full_like(full, 1 / full.shape[-1]), None
    yield PERFECT, None, full, None


def write_reconstruction(out: Path, network: Network, images: int, rows: Sequence[dict[str, Any]]) -> str:
    """Write ``reconstruction-MODEL.json``, ``.csv`` and ``.png``, and return tables and explanation as text."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"reconstruction-{network.name}.json"
    about = {
        "model": network.name,
        "checkpoint": str(network.checkpoint) if network.checkpoint else None,
        "title": network.title,
        "image_size": list(network.size),
        "images": images,
        "gates": network.gates,
    }
    write_json(path, {**about, "rows": rows})
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure = draw_reconstruction(f"{network.title}; {_images(images)}", rows)
    figure.savefig(path.with_suffix(".png"), dpi=200)
    plt.close(figure)
    parts = [heading(about)]
    for caption, header, lines in reconstruction_tables(rows):
        parts.append(f"{caption}\n\n{tabulate(lines, header, disable_numparse=True)}")
    parts += [text.replace("*", "") for text in explanation(rows)]
    return "\n\n".join([*parts, f"{path}, and beside it .csv and .png"])


def heading(about: dict[str, Any]) -> str:
    """Return the measured network, the number of images and the gates in one line.

    Args:
        about: the content of ``reconstruction-MODEL.json``.
    """
    gates = ", ".join(f"{name} {gate:+.4f}" for name, gate in about["gates"].items())
    return f"{about['title']}; {_images(about['images'])}; gates: {gates}."


def _images(count: int) -> str:
    return f"{count} image{'s' if count != 1 else ''}"


def reconstruction_tables(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return caption, header and lines of two tables: all maps at the block's own setting, and all settings.

    Args:
        rows: the result of `reconstruction`.
    """
    own_points, own_groups = rows[0]["points"], rows[0]["groups"]
    positions = {row["stage"]: row["positions"] for row in rows}
    stages = [f"{stage} ({count} positions)" for stage, count in positions.items()]
    cells = {
        (row["map"], row["points"], row["groups"], row["stage"]): (
            f"{row['error']:.1%} / {row['output_error']:.1%} / {row['agreement']:.1%}"
        )
        for row in rows
    }

    def line(name: str, points: int | None, groups: int) -> list[str]:
        return [cells.get((name, points, groups, stage), "-") for stage in positions]

    order = (PERFECT, "CSALR", "CSA", POOLED_QUERIES, POOLED_KEYS, QUERIES_AVERAGED, KEYS_AVERAGED, ONE_ROW, UNIFORM)
    found = {row["map"]: row["points"] for row in reversed(rows) if row["groups"] == own_groups}
    kinds = [[name, *line(name, found[name], own_groups)] for name in order if name in found]
    measures = "map error / output error / same most attended patch"
    own = f"{own_points} points and {_groups(own_groups)}"
    tables = [(f"{measures}, with {own}:", ["map", *stages], kinds)]
    settings = dict.fromkeys((row["map"], row["points"], row["groups"]) for row in rows)
    compared = [one for one in settings if one[0] in ("CSALR", POOLED_KEYS, UNIFORM)]
    if len({one[1:] for one in compared if one[1]}) > 1:
        compared.sort(key=lambda one: (order.index(one[0]), one[2] != own_groups, one[1] or 0, one[2]))
        lines = [
            [name, str(points or "-"), str(groups), *line(name, points, groups)] for name, points, groups in compared
        ]
        tables.append((f"{measures}, by points and groups:", ["map", "points", "groups", *stages], lines))
    return tables


def _groups(count: int) -> str:
    return f"{count} group{'s' if count != 1 else ''}"


def explanation(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the meaning of the measured errors, paragraph by paragraph, with their numbers.

    Args:
        rows: the result of `reconstruction`.
    """
    own_points, own_groups = rows[0]["points"], rows[0]["groups"]
    larger = [row for row in rows if row["positions"] > own_points]
    parts = [
        "*Map error*: relative Frobenius error from the full map. *Output error*: the same for O = map V with the V of "
        "the block. Each of them is 0 % for a perfect map. *Same most attended patch*: of the patches of the block's "
        "own landmarks."
    ]
    own_rows = [row for row in rows if row["points"] == own_points and row["groups"] == own_groups]
    exact = [row for row in own_rows if row["map"] == "CSALR" and row["positions"] <= own_points]
    if exact:
        stages = ", ".join(f"{row['stage']}: {row['positions']}" for row in exact)
        parts.append(
            f"With {own_points} points every position is a landmark where a map has no more positions ({stages}). "
            "CSALR is then exact, except for the floor of S_ii."
        )
    floors = ", ".join(f"{row['stage']} {row['below_floor']:.1%}" for row in own_rows if row["map"] == "CSALR")
    if floors:
        parts.append(
            f"The block raises each S_ii below {CSALR.self_attention_floor:g} to that floor, for a bounded inverse. It "
            f"does so for this fraction of the landmarks: {floors}."
        )
    if not larger:
        return parts
    stage = max(larger, key=lambda row: int(row["positions"]))["stage"]
    here = [row for row in larger if row["stage"] == stage]
    own = {
        row["map"]: row for row in reversed(here) if row["groups"] == own_groups and row["points"] in (None, own_points)
    }

    def of(name: str, measure: str = "error") -> str:
        return f"{own[name][measure]:.1%}"

    parts.append(
        f"Range, at {stage} with {own_points} points and {_groups(own_groups)}: a uniform map has a map error of "
        f"{of(UNIFORM)} and an output error of {of(UNIFORM, 'output_error')}. The best map with one row for all "
        f"queries has {of(ONE_ROW)} and {of(ONE_ROW, 'output_error')}. A map that compresses well is far below both."
    )
    if "CSALR" not in own:
        return parts
    pooled, compressed = own[POOLED_KEYS], own["CSALR"]
    at_peak = "win" if pooled["agreement"] > compressed["agreement"] else "lose"
    on_map = "win" if pooled["error"] < compressed["error"] else "lose"
    parts += [
        f"Against CSALR, pooled keys {at_peak} at the peak and {on_map} on the map. They keep every query, and give "
        "all positions of a patch one weight. CSALR keeps every key and pools the queries: positions of a patch share "
        "one row, up to a correction. The full map itself, averaged over query patches, has an error of "
        f"{of(QUERIES_AVERAGED)}, and averaged over key patches {of(KEYS_AVERAGED)}; no map that is constant there has "
        f"less. CSALR has {of('CSALR')}, pooled keys {of(POOLED_KEYS)}, pooled queries {of(POOLED_QUERIES)}. The most "
        "attended patch depends on the query, and not on the weights within the patch: pooled keys find it for "
        f"{of(POOLED_KEYS, 'agreement')} of the positions, CSALR for {of('CSALR', 'agreement')}, pooled queries for "
        f"{of(POOLED_QUERIES, 'agreement')}.",
        "The network uses O alone. Weight that moves within a patch changes O only as much as V differs there: the "
        f"full map averaged over key patches has an output error of {of(KEYS_AVERAGED, 'output_error')}, over query "
        f"patches {of(QUERIES_AVERAGED, 'output_error')}. CSALR has {of('CSALR', 'output_error')}, pooled keys "
        f"{of(POOLED_KEYS, 'output_error')}, a uniform map {of(UNIFORM, 'output_error')}.",
    ]
    by_points = _series(here, "CSALR", "points", own_groups)
    by_groups = _series(here, "CSALR", "groups", own_points)
    flat = _series(here, UNIFORM, "groups", None)
    for name, series in (("points", by_points), ("groups", by_groups)):
        (low, first), (high, last) = series[0], series[-1]
        parts.append(
            f"From {low} to {high} {name}, CSALR's map error goes from {first['error']:.1%} to {last['error']:.1%} and "
            f"its output error from {first['output_error']:.1%} to {last['output_error']:.1%}."
        )
    parts[-1] += (
        f" That of a uniform map goes from {flat[0][1]['error']:.1%} to {flat[-1][1]['error']:.1%} too: a group's dot "
        "products have fewer channels, so its full map is flatter."
    )
    return parts


def _series(
    rows: Sequence[dict[str, Any]], name: str, varied: str, other: int | None
) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows of a map over "points" or "groups", sorted, where the other one of them is `other`."""
    fixed = "groups" if varied == "points" else "points"
    return sorted(
        ((row[varied], row) for row in rows if row["map"] == name and row[fixed] == other), key=lambda pair: pair[0]
    )


def draw_reconstruction(title: str, rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw map error and output error over points and over groups, one line of plots per stage.

    Args:
        title: the measured network and the number of images.
        rows: the result of `reconstruction`.
    """
    own_points, own_groups = rows[0]["points"], rows[0]["groups"]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure, axes = plt.subplots(
        len(stages), 2, figsize=(10, 2.6 * len(stages) + 0.8), squeeze=False, sharey="row", layout="constrained"
    )
    for line, stage in zip(axes, stages, strict=True):
        here = [row for row in rows if row["stage"] == stage]
        for axis, varied, other in zip(line, ("points", "groups"), (own_groups, own_points), strict=True):
            for colour, name in zip(("C0", "C1", "0.5"), (rows[0]["map"], POOLED_KEYS, UNIFORM), strict=True):
                series = _series(here, name, varied, None if name == UNIFORM and varied == "groups" else other)
                for measure, style, label in (("error", "-", "map"), ("output_error", "--", "output")):
                    values = [100 * row[measure] for _, row in series]
                    text = f"{name}: {label}"
                    if name == UNIFORM and varied == "points":
                        axis.axhline(values[0], color=colour, linestyle=style, label=text)
                    elif series:
                        axis.plot([x for x, _ in series], values, style, marker="o", color=colour, label=text)
            ticks = sorted({row[varied] for row in here if row[varied]})
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            fixed = _groups(own_groups) if varied == "points" else f"{own_points} points"
            axis.set(
                xlabel=f"{varied} ({fixed})",
                ylim=(0, 105 * max(1.0, *(max(row["error"], row["output_error"]) for row in here))),
            )
        line[0].set_ylabel(f"{stage}, {here[0]['positions']} positions\nrelative error (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(f"{title}\nerror of compressed attention maps and of their outputs", fontsize=10)
    return figure


def figure4(checkpoint: Path, root: Path, out: Path, dataset: str, queries: int = 3, measured: int = 8) -> None:
    """Draw Figure 4 for a finished training and some queries of its dataset, unless that is done already.

    Args:
        checkpoint: of the training.
        root: the folder of the datasets.
        out: the folder of the pictures and of the measured errors.
        dataset: the dataset of the queries.
        queries: number of queries to draw.
        measured: number of queries to measure the errors on.
    """
    network = load_network(checkpoint)
    done = out / f"reconstruction-{network.name}.json"
    if done.exists() and done.stat().st_mtime >= checkpoint.stat().st_mtime:
        return
    paths = _some_queries(dataset, root, measured)
    for path in paths[:queries]:
        draw(network, path, out)
    write_reconstruction(out, network, len(paths), reconstruction(network, paths))
