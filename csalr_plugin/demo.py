"""The demo: draws a data set, trains pcb and pcb_csalr on it alike through a host, and prints their accuracy."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from typing import Any, TypeAlias

from tabulate import tabulate

from csalr_plugin.demo_data import FOLDER, make_demo_data
from csalr_plugin.files import make_writable_folder
from csalr_plugin.hosts.folder import PREFIX, FolderData, file_stem, read_folder_data
from csalr_plugin.hosts.gates import closed_gates, evaluate, gates_of, in_words
from csalr_plugin.hosts.trained import load_trained

MODELS = ("pcb", "pcb_csalr")
CONFIG = "configs/torchreid/pcb_demo_64x32_adam.yaml"
FASTREID_CONFIG = "pcb_demo_64x32_adam.yml"

Results: TypeAlias = "dict[str, dict[str, float]]"


def run_demo(out: Path, seed: int = 0, host: str = "torchreid") -> Results:
    """Run the demo in the folder `out`; each run trains in a new folder below it.

    Args:
        out: gets `data/` (made once) and `run-1/`, `run-2/`, ...
        seed: of the data and of the training.
        host: "torchreid" or "fastreid".

    Returns:
        Results by the row of the table: each model "untrained" and trained, and pcb_csalr with its gates set to 0.
        Each has mAP, "rank-1", "rank-5" and "rank-10", from 0 to 1; gates set to 0 have the first two.

    Raises:
        UserError: `out` cannot be written or holds something else, or the host is not installed.
    """
    importlib.import_module(f"csalr_plugin.hosts.{host}").register()  # a missing host is an error before any drawing
    make_writable_folder(out, f"--out '{out}'")
    started = time.monotonic()
    data = f"{PREFIX}{make_demo_data(out / 'data', seed=seed) / FOLDER}"
    number = 1
    while (run := out / f"run-{number}").exists():
        number += 1
    in_host = _in_fastreid if host == "fastreid" else _in_torchreid
    dataset = read_folder_data(data)
    results: Results = {}
    places: dict[str, Any] = {}
    for model in MODELS:
        results[f"{model}, untrained"], results[model], checkpoint = in_host(model, data, run / model, seed)
        places[f"checkpoint of {model}"] = checkpoint
        if closed := _closed(checkpoint, dataset):
            results[f"{model}, gates set to 0"], places[f"gates of {model}"] = closed

    columns = ("mAP", "rank-1", "rank-5", "rank-10")
    rows = [
        (name, *(f"{result[one]:.1%}" if one in result else "" for one in columns)) for name, result in results.items()
    ]
    print("\n" + tabulate(rows, (f"{len(dataset.images['query'])} queries, one seed", *columns), stralign="right"))
    ranked = run / MODELS[-1] / f"ranked_{file_stem(data)}.png"
    if ranked.exists():
        places["ranked results"] = ranked
    places |= {"TensorBoard log": f"tensorboard --logdir {run}", "time": f"{time.monotonic() - started:.0f} s"}
    print("\n" + tabulate(places.items(), tablefmt="plain"))
    return results


def _closed(checkpoint: Path, dataset: FolderData) -> tuple[dict[str, float], str] | None:
    """Return the accuracy with every gate set to 0, and the gates in words; None for a model without attention."""
    trained = load_trained(checkpoint)
    gates = gates_of(trained.network)
    if not gates:
        return None
    with closed_gates(trained.network):
        found = evaluate(trained, dataset.items("query"), dataset.items("gallery"))
    return {"mAP": found.mean_precision, "rank-1": found.rank_1}, in_words(gates)


def _in_torchreid(model: str, data: str, run: Path, seed: int) -> tuple[dict[str, float], dict[str, float], Path]:
    from csalr_plugin.hosts.torchreid import registered_name
    from csalr_plugin.hosts.torchreid.config import Config, default_config
    from csalr_plugin.hosts.torchreid.train import train

    def config(folder: Path, *overrides: Any) -> Config:
        settings = default_config()
        settings.merge_from_file(CONFIG)
        settings.merge_from_list(["model.name", registered_name(model), "data.sources", [data], "data.targets", [data]])
        settings.merge_from_list(["data.save_dir", str(folder), "train.seed", seed])
        settings.merge_from_list(list(overrides))
        return settings

    before = train(config(run / "before", "test.evaluate", True))[data]
    after = train(config(run))[data]
    return before, after, run / "model" / f"model.pth.tar-{config(run).train.max_epoch}"


def _in_fastreid(model: str, data: str, run: Path, seed: int) -> tuple[dict[str, float], dict[str, float], Path]:
    from csalr_plugin.hosts.fastreid import Trainer, add_csalr_config
    from csalr_plugin.hosts.fastreid.config import own_config

    # isort: split
    from fastreid.config import get_cfg
    from fastreid.engine import default_setup
    from fastreid.utils.env import seed_all_rng

    cfg = get_cfg()
    add_csalr_config(cfg)
    cfg.merge_from_file(own_config(FASTREID_CONFIG))
    cfg.MODEL.META_ARCHITECTURE = model
    cfg.DATASETS.NAMES = cfg.DATASETS.TESTS = (data,)
    cfg.OUTPUT_DIR = str(run)
    default_setup(cfg, argparse.Namespace())
    seed_all_rng(seed)
    trainer = Trainer(cfg)
    untrained = cfg.clone()
    untrained.OUTPUT_DIR = str(run / "before")
    percent = Trainer.test(untrained, trainer.model), trainer.train()
    before, after = (
        {name.lower().replace("map", "mAP"): value / 100 for name, value in result.items()} for result in percent
    )
    return before, after, run / "model_final.pth"
