"""The demo: draws a data set, trains pcb_csalr on it through a host, and prints the accuracy before and after."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from typing import Any, TypeAlias

from tabulate import tabulate

from csalr_plugin.demo_data import FOLDER, make_demo_data
from csalr_plugin.files import make_writable_folder
from csalr_plugin.hosts.folder import PREFIX, file_stem

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
        Results "before" and "after" training: mAP, "rank-1", "rank-5", "rank-10", from 0 to 1.

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
    results, places = in_host(data, run, seed)

    columns = ("mAP", "rank-1", "rank-5", "rank-10")
    rows = [(f"{when} training", *(f"{result[one]:.1%}" for one in columns)) for when, result in results.items()]
    print("\n" + tabulate(rows, ("pcb_csalr on the demo data", *columns), stralign="right"))
    places |= {"TensorBoard log": f"tensorboard --logdir {run}", "time": f"{time.monotonic() - started:.0f} s"}
    print("\n" + tabulate(places.items(), tablefmt="plain"))
    return results


def _in_torchreid(data: str, run: Path, seed: int) -> tuple[Results, dict[str, Any]]:
    from csalr_plugin.hosts.torchreid.config import Config, default_config
    from csalr_plugin.hosts.torchreid.train import train

    def config(folder: Path, *overrides: Any) -> Config:
        settings = default_config()
        settings.merge_from_file(CONFIG)
        settings.merge_from_list(["data.sources", [data], "data.targets", [data]])
        settings.merge_from_list(["data.save_dir", str(folder), "train.seed", seed])
        settings.merge_from_list(list(overrides))
        return settings

    results = {"before": train(config(run / "before", "test.evaluate", True))[data]}
    train(config(run))
    checkpoint = run / "model" / f"model.pth.tar-{config(run).train.max_epoch}"
    show = ("test.evaluate", True, "test.visrank", True, "model.load_weights", str(checkpoint))
    results["after"] = train(config(run / "after", *show))[data]
    return results, {"checkpoint": checkpoint, "ranked results": run / "after" / f"ranked_{file_stem(data)}.png"}


def _in_fastreid(data: str, run: Path, seed: int) -> tuple[Results, dict[str, Any]]:
    from csalr_plugin.hosts.fastreid import Trainer, add_csalr_config
    from csalr_plugin.hosts.fastreid.config import own_config

    # isort: split
    from fastreid.config import get_cfg
    from fastreid.engine import default_setup
    from fastreid.utils.env import seed_all_rng

    cfg = get_cfg()
    add_csalr_config(cfg)
    cfg.merge_from_file(own_config(FASTREID_CONFIG))
    cfg.DATASETS.NAMES = cfg.DATASETS.TESTS = (data,)
    cfg.OUTPUT_DIR = str(run)
    default_setup(cfg, argparse.Namespace())
    seed_all_rng(seed)
    trainer = Trainer(cfg)
    untrained = cfg.clone()
    untrained.OUTPUT_DIR = str(run / "before")
    percent = {"before": Trainer.test(untrained, trainer.model), "after": trainer.train()}
    results = {
        when: {name.lower().replace("map", "mAP"): value / 100 for name, value in result.items()}
        for when, result in percent.items()
    }
    return results, {"checkpoint": run / "model_final.pth"}
