"""The demo: makes its data, trains pcb_csalr on it through torchreid, and shows what training brought."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tabulate import tabulate

from csalr_plugin.demo_data import make_demo_data
from csalr_plugin.hosts.torchreid.config import Config, default_config
from csalr_plugin.hosts.torchreid.train import train

CONFIG = "configs/torchreid/pcb_demo_64x32_adam.yaml"


def run_demo(out: Path, seed: int = 0) -> dict[str, dict[str, float]]:
    """Run the demo in the folder `out`; each run trains in a new folder below it.

    Args:
        out: gets `data/` (made once) and `run-1/`, `run-2/`, ...
        seed: of the data and of the training.

    Returns:
        Results "before" and "after" training: mAP, "rank-1", "rank-5", "rank-10", from 0 to 1.

    Raises:
        UserError: when `out` cannot be written or holds something else.
    """
    started = time.monotonic()
    data = make_demo_data(out / "data", seed=seed)
    number = 1
    while (run := out / f"run-{number}").exists():
        number += 1

    def config(folder: Path, *overrides: Any) -> Config:
        settings = default_config()
        settings.merge_from_file(CONFIG)
        settings.merge_from_list(["data.root", str(data), "data.save_dir", str(folder), "train.seed", seed])
        settings.merge_from_list(list(overrides))
        return settings

    (target,) = config(run).data.targets
    results = {"before": train(config(run / "before", "test.evaluate", True))[target]}
    train(config(run))
    checkpoint = run / "model" / f"model.pth.tar-{config(run).train.max_epoch}"
    show = ("test.evaluate", True, "test.visrank", True, "model.load_weights", str(checkpoint))
    results["after"] = train(config(run / "after", *show))[target]

    columns = ("mAP", "rank-1", "rank-5", "rank-10")
    rows = [(f"{when} training", *(f"{result[one]:.1%}" for one in columns)) for when, result in results.items()]
    print("\n" + tabulate(rows, ("pcb_csalr on the demo data", *columns), stralign="right"))
    places = (
        ("checkpoint", checkpoint),
        ("TensorBoard log", f"tensorboard --logdir {run}"),
        ("ranked results", run / "after" / f"visrank_{target}"),
        ("time", f"{time.monotonic() - started:.0f} s"),
    )
    print("\n" + tabulate(places, tablefmt="plain"))
    return results
