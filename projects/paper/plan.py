"""The trainings that a target of the paper needs: its rows, their settings, and how these differ from the paper's."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import re
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from csalr_plugin.errors import UserError, first_line, shown, suggest
from csalr_plugin.hosts.torchreid.arguments import config_from_arguments, parse_arguments
from csalr_plugin.hosts.torchreid.config import Config, default_config

HERE = Path(__file__).parent
TARGETS = ("table1", "table2", "table3", "table4", "table5", "figure4", "ablation", "all")
PRESETS = ("full", "small", "drawn", "smoke")
# The smallest drawn data set for `smoke` that trains two batches and ranks ten images.
SMOKE_DATA = {"train_identities": 4, "test_identities": 4, "train_images": 4, "gallery_images": 3, "distractors": 4}
# The drawn data set of `drawn`: PCB alone reaches about half of the mAP that is possible.
DRAWN_DATA = {"cast": 0.35, "test_identities": 100}
# Config keys that change neither the trained network nor its scores.
_INDIFFERENT = re.compile(
    r"use_gpu|data\.(root|save_dir|workers)|train\.print_freq|test\.(batch_size|eval_freq|start_eval|visrank\w*)"
    r"|model\.(resume|load_weights)|csalr\.(overwrite|pretrained_weights|tensorboard\.\w+)"
)
_IMAGENET_V1 = "0676ba61"  # first digits of the SHA-256 of torchvision's ResNet50_Weights.IMAGENET1K_V1


@functools.cache
def paper() -> dict[str, Any]:
    """Return the content of ``rows.yaml``: "runs", "datasets", "tables" and "costs" of the paper."""
    content: dict[str, Any] = yaml.safe_load((HERE / "rows.yaml").read_text(encoding="utf-8"))
    return content


@dataclass(frozen=True)
class Options:
    """The options of a study; see ``csalr reproduce --help``."""

    target: str
    out: Path
    root: Path | None = None
    dataset: str = "market1501"
    preset: str = "small"
    only: tuple[str, ...] = ()
    seeds: int = 1
    jobs: int = 1
    weights: Path | None = None
    dry_run: bool = False
    report: bool = False
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One training: a run of ``rows.yaml`` on a dataset with a seed.

    Attributes:
        arguments: the arguments of ``csalr train``.
        settings: all settings that affect the result; a folder with other settings is never written into.
        deviations: the settings that differ from the paper's, in words; empty for the paper's own.
    """

    name: str
    dataset: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    config: Config = field(compare=False)
    settings: dict[str, Any] = field(compare=False)
    deviations: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command that trains this run on its own."""
        return shlex.join(["csalr", "train", *self.arguments])

    @property
    def epochs(self) -> int:
        """The number of epochs of the training."""
        return int(self.config.train.max_epoch)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate flags from the pairs KEY VALUE, which a flag that takes several words would swallow.

    Returns:
        The words that are not part of a pair, and the pairs as a flat list.
    """
    known = default_config().leaves()
    flags: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        if word.lower() in known:
            overrides += [word, *itertools.islice(words, 1)]
        else:
            flags.append(word)
    return flags, overrides


def tables_of(target: str) -> tuple[str, ...]:
    """Return the tables that a target needs trainings for."""
    every = tuple(paper()["tables"])
    return every if target == "all" else (target,) if target in every else ()


def run_names(target: str) -> tuple[str, ...]:
    """Return the names of the runs that a target needs, each once, in the paper's order."""
    names = [row["run"] for table in tables_of(target) for row in paper()["tables"][table]["rows"] if "run" in row]
    if target in ("figure4", "all"):
        names.append("pcb_csalr")
    if target == "ablation":
        names = [row["run"] for row in paper()["ablation"]["rows"]]
    return tuple(dict.fromkeys(names))


def plan(options: Options) -> list[Run]:
    """Return the trainings of a study: all rows with seed 1 first, so that every row has a result early.

    Raises:
        UserError: a row does not belong to the target, a setting is not allowed, or the dataset is missing.
    """
    names = run_names(options.target)
    for name in options.only:
        if name not in names:
            known = f"it must be one of {', '.join(names)}" if names else f"{options.target} trains none"
            raise UserError(f"--only {shown(name)} is not a row of {options.target}; {known}.{suggest(name, names)}")
    chosen = [name for name in names if not options.only or name in options.only]
    if not chosen:
        return []
    root = _root(options)
    counts = dataset_counts(options.dataset, root) if root.exists() or not options.dry_run else {}
    weights = _weights(options)
    return [_run(options, name, seed, root, counts, weights) for seed in range(1, options.seeds + 1) for name in chosen]


def _root(options: Options) -> Path:
    if options.root is not None:
        return options.root
    if options.preset not in ("smoke", "drawn"):
        raise UserError(
            f"--root is missing: the preset {options.preset} trains on a dataset; give the folder it is in."
        )
    if options.dataset != "market1501":
        raise UserError(
            f"the preset {options.preset} draws its own data in the layout of market1501, which does not fit --dataset "
            f"{options.dataset}; leave --dataset out, or give --root."
        )
    root = options.out / "data"
    if not options.dry_run:
        from csalr_plugin.demo_data import make_demo_data

        settings: dict[str, Any] = SMOKE_DATA if options.preset == "smoke" else DRAWN_DATA
        make_demo_data(root, **settings)
    return root


def _weights(options: Options) -> str:
    """Return the first digits of the SHA-256 of the weights file; "" without one."""
    if options.weights is None:
        return ""
    try:
        return hashlib.sha256(options.weights.read_bytes()).hexdigest()[:8]
    except OSError as error:
        raise UserError(f"--weights '{options.weights}' cannot be read ({error.strerror}); give a file.") from None


def _run(options: Options, name: str, seed: int, root: Path, counts: dict[str, int], weights: str) -> Run:
    folder = options.out / "runs" / f"{options.dataset}-{name}" / f"seed{seed}"
    row = [word for key, value in paper()["runs"][name].items() for word in (key, as_word(value))]
    given = ["model.pretrained", "True", "csalr.pretrained_weights", str(options.weights)] if options.weights else []

    def arguments(preset: str, *more: str) -> list[str]:
        data = ["--config-file", str(HERE / "presets" / f"{preset}.yaml"), "-s", options.dataset, "-t", options.dataset]
        return [*data, "--root", str(root), *more, *row, "train.seed", str(seed), "data.save_dir", str(folder)]

    words = arguments(options.preset, *given, *options.overrides)
    config = config_of(tuple(words))
    start = weights or ("torchvision" if config.model.pretrained else "random")
    settings = {**_leaves(config), "weights": start, "data": counts}
    settings = json.loads(json.dumps(settings))
    as_published = {**_leaves(config_of(tuple(arguments("full")))), "weights": "torchvision", "data": counts}
    deviations = _deviations(settings, json.loads(json.dumps(as_published)), options.dataset)
    return Run(name, options.dataset, seed, folder, tuple(words), config, settings, deviations)


@functools.cache
def config_of(words: tuple[str, ...]) -> Config:
    """Return the config that arguments of ``csalr train`` make."""
    return config_from_arguments(parse_arguments(words, "csalr reproduce"))


def _leaves(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.leaves().items() if not _INDIFFERENT.fullmatch(key)}


def as_word(value: Any) -> str:
    """Return a config value as one word of a command line."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _deviations(settings: dict[str, Any], published: dict[str, Any], dataset: str) -> tuple[str, ...]:
    """Describe the settings that differ from the published ones."""
    found = []
    for key, value in settings.items():
        if key in ("data", "weights", "train.seed") or value == published.get(key):
            continue
        found.append(f"{key} {as_word(value)} (paper: {as_word(published.get(key))})")
    if settings["weights"] not in ("torchvision", _IMAGENET_V1):
        source = "random" if settings["weights"] == "random" else f"of a file, SHA-256 {settings['weights']}..."
        found.append(f"backbone weights {source} (paper: ImageNet)")
    counts = settings["data"]
    if not is_dataset(dataset, counts):
        known = paper()["datasets"][dataset]
        found.append(
            f"the dataset is not {known['title']}: {counts.get('training', '?')} training images of "
            f"{counts.get('identities', '?')} identities (paper: {known['training']} of {known['identities']})"
        )
    return tuple(found)


def is_dataset(name: str, counts: Mapping[str, int]) -> bool:
    """Return whether data with these counts of images and identities are the dataset of section 4.1."""
    known = {count: wanted for count, wanted in paper()["datasets"][name].items() if count != "title"}
    return all(counts.get(one) in (wanted if isinstance(wanted, list) else [wanted]) for one, wanted in known.items())


def dataset_counts(name: str, root: Path) -> dict[str, int]:
    """Return the number of identities and of images of a dataset: "identities", "training", "query", "gallery".

    Raises:
        UserError: as `read_dataset`, or a subset has no images.
    """
    data = read_dataset(name, root)
    sizes = {"training": len(data.train), "query": len(data.query), "gallery": len(data.gallery)}
    for subset, size in sizes.items():
        if not size:
            raise UserError(f"dataset {name} in --root '{root}' has no {subset} images; put them there.")
    return {"identities": len({item[1] for item in data.train}), **sizes}


def read_dataset(name: str, root: Path) -> Any:
    """Read a dataset with torchreid's own handler; it has the lists `train`, `query` and `gallery`.

    Raises:
        UserError: the dataset is unknown or missing, or the handler cannot read it. Nothing is downloaded.
    """
    from csalr_plugin.hosts.torchreid import dataset_names, host

    names = dataset_names("image")
    if name not in names:
        raise UserError(f"--dataset {shown(name)} must be one of {', '.join(names)}.{suggest(name, names)}")
    handler = vars(host().data.datasets)["__image_datasets"][name]
    place = root / (handler.dataset_dir or "")
    if not place.is_dir():
        raise UserError(f"dataset {name} is not in --root '{root}': {place} is missing; put the dataset there.")
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return handler(root=str(root), mode="train", verbose=False)
    except Exception as error:  # a handler may raise any exception on a folder that it does not expect
        raise UserError(
            f"dataset {name} in --root '{root}' cannot be read ({first_line(error)}); see 'csalr train'."
        ) from None
