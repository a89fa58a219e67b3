"""Train every attention for some iterations at the paper's learning rates, and report whether training is stable.

    python projects/stability/run.py --out stability --data demo=demo-output/data [--data NAME=ROOT ...]
        [--weights resnet50.pth] [KEY VALUE ...]

Each run takes a few minutes and writes a file. Runs with a file are not repeated, so the study can be stopped at any
time and started again. README.md beside this file explains the measurements.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torchreid
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from csalr_plugin.command_line import Parser, batch_argument, exit_code, path_argument, positive, side_argument
from csalr_plugin.errors import UserError, shown
from csalr_plugin.files import make_writable_folder, write_json
from csalr_plugin.hosts.torchreid import register, registered_name
from csalr_plugin.hosts.torchreid.config import LR_SCHEDULER, OPTIMIZER, Config, default_config, set_active_config
from csalr_plugin.hosts.torchreid.datasets import build_datamanager
from csalr_plugin.hosts.torchreid.optimizer import build_optimizer
from csalr_plugin.hosts.torchreid.train import build_engine
from csalr_plugin.models.weights import read_checkpoint, state_dict_of

# PCB is trained with two seeds: their difference is the noise level for the other models.
MODELS = (("pcb", 1), ("pcb", 2), ("pcb_sa", 1), ("pcb_csa", 1), ("pcb_csalr", 1))
END = 30  # iterations in the means "at the start" and "at the end"


def main() -> int:
    """Run the study with the arguments of the process; return its exit code: 0 if every run is stable, else 1.

    A user's mistake gives 2, Ctrl-C 130 (see `exit_code`).
    """
    stable = False

    def study() -> None:
        nonlocal stable
        stable = run_study(parse(sys.argv[1:]))

    return exit_code("stability", study) or int(not stable)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments.

    Raises:
        UserError: an argument cannot be used.
    """
    parser = Parser(prog="stability", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--data", action="append", required=True, metavar="NAME=ROOT", help="data root in market1501's layout"
    )
    parser.add_argument(
        "--weights", type=path_argument, metavar="PATH", help="ResNet-50 state dict (without it: random weights only)"
    )
    parser.add_argument("--iterations", type=positive, default=300, metavar="N", help="iterations of a run (300)")
    parser.add_argument("--height", type=side_argument, default=384, metavar="N", help="image height (384)")
    parser.add_argument("--width", type=side_argument, default=128, metavar="N", help="image width (128)")
    parser.add_argument("--batch-size", type=batch_argument, default=64, metavar="N", help="images per batch (64)")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="more config keys, such as csalr.amp bf16")
    options = parser.parse_args(argv)
    for item in options.data:
        if not re.fullmatch(r"[\w-]+=.+", item):
            raise UserError(f"--data {shown(item)} is not NAME=ROOT; for example demo=demo-output/data.")
    options.data = dict(item.split("=", 1) for item in options.data)
    return options


def run_study(options: argparse.Namespace) -> bool:
    """Run the missing trainings, then write the table and the picture; return whether every run is stable.

    Raises:
        UserError: a setting cannot be used, or the folder has results of other settings.
    """
    make_writable_folder(options.out, f"--out '{options.out}'")
    starts = ("random", "pretrained", "pretrained x10") if options.weights else ("random",)
    names = ("iterations", "height", "width", "batch_size", "overrides")
    settings = {name: getattr(options, name) for name in names}
    for (name, root), start, (model, seed) in itertools.product(options.data.items(), starts, MODELS):
        path = options.out / f"{name}-{start.replace(' ', '-')}-{model}-{seed}.json"
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))["settings"]
            differing = [key for key in settings if before[key] != settings[key]]
            if differing:
                raise UserError(
                    f"'{path}' is a run with {differing[0]} {before[differing[0]]}, not {settings[differing[0]]}; give "
                    "another --out."
                )
            continue
        result = {"data": name, "start": start, "model": model, "seed": seed, "settings": settings}
        write_json(path, result | train(options, root, start, model, seed))
    return report(options.out)


def train(options: argparse.Namespace, root: str, start: str, model_name: str, seed: int) -> dict[str, Any]:
    """Train one run; return each term of the loss per iteration, and the softmax saturation of the blocks."""
    model_name = registered_name(model_name)
    config = default_config()
    config.merge_from_file("configs/torchreid/pcb_384x128_sgd.yaml")
    overrides = {
        "model.name": model_name,
        "model.pretrained": False,
        "data.root": root,
        "data.height": options.height,
        "data.width": options.width,
        "data.workers": 0,
        "train.batch_size": options.batch_size,
        "train.seed": seed,
    }
    config.merge_from_list([item for pair in overrides.items() for item in pair] + options.overrides)
    config.use_gpu = torch.cuda.is_available()
    register()
    set_active_config(config)
    config.validate()
    torchreid.utils.set_random_seed(seed)
    datamanager = build_datamanager(config)
    model = torchreid.models.build_model(model_name, datamanager.num_train_pids, pretrained=False)
    if start != "random":
        state = state_dict_of(read_checkpoint(options.weights))
        model.load_state_dict(scale_stages(state, 10) if start.endswith("x10") else state, strict=False)
    return iterate(config, datamanager, model, options.iterations)


def iterate(config: Config, datamanager: Any, model: nn.Module, iterations: int) -> dict[str, Any]:
    """Train `model` with the plugin's engine at the learning rates of the first epoch."""
    if config.use_gpu:
        model = model.cuda()
    optimizer = build_optimizer(model, **config.keyword_arguments(OPTIMIZER))
    scheduler = torchreid.optim.build_lr_scheduler(optimizer, **config.keyword_arguments(LR_SCHEDULER))
    engine = build_engine(config, datamanager, model, optimizer, scheduler)
    engine.save_dir = Path(tempfile.gettempdir()) / "no-checkpoint-is-saved"
    curves: list[dict[str, float]] = []
    maps: list[dict[str, Any]] = []
    batches = itertools.chain.from_iterable(itertools.repeat(datamanager.train_loader))
    model.train()
    for iteration, batch in enumerate(tqdm(itertools.islice(batches, iterations), total=iterations, mininterval=5.0)):
        look = iteration % 25 == 0 or iteration == iterations - 1
        try:
            with diagnosing(model) if look else contextlib.nullcontext({}) as seen:
                curves.append(engine.iteration(batch, iteration))
        except UserError as error:
            return {"stopped": str(error), "curves": curves, "maps": maps}
        if look:
            maps.append({"iteration": iteration, **seen})
    return {"stopped": None, "curves": curves, "maps": maps}


@contextlib.contextmanager
def diagnosing(model: nn.Module) -> Iterator[dict[str, dict[str, float]]]:
    """Collect the output of each block's `diagnose` on the training batch, by stage."""
    seen: dict[str, dict[str, float]] = {}
    handles = []
    for stage, block in model.attention.items():

        def look(_: nn.Module, __: Any, output: Tensor, stage: str = stage, block: nn.Module = block) -> None:
            seen[stage] = block.diagnose(output.detach())

        handles.append(getattr(model, stage.replace("stage", "layer")).register_forward_hook(look))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def scale_stages(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Return the weights of the same ResNet-50 with the output of every stage multiplied by `factor`.

    Each residual branch and each shortcut is scaled at its last batch norm. The running statistics of the layers that
    read a scaled map are scaled too.
    """
    scaled = copy.deepcopy(state)
    for name, value in scaled.items():
        parts = name.split(".")
        if not parts[0].startswith("layer"):
            continue
        if parts[2:] in (
            ["bn3", "weight"],
            ["bn3", "bias"],
            ["downsample", "1", "weight"],
            ["downsample", "1", "bias"],
        ):
            value.mul_(factor)
        reads_scaled = parts[:2] != ["layer1", "0"] and parts[2] in ("bn1", "downsample")
        if reads_scaled and parts[-1] == "running_mean":
            value.mul_(factor)
        if reads_scaled and parts[-1] == "running_var":
            value.mul_(factor**2)
    return scaled


def report(out: Path) -> bool:
    """Write summary.md and curves.png from the runs in `out`; return whether every run is stable."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    by_key = {(run["data"], run["start"], run["model"], run["seed"]): run for run in runs}
    rows, sound = [], True
    for run in runs:
        verdict = judge(run, by_key)
        sound &= verdict == "stable"
        last = run["maps"][-1] if run["maps"] else {}
        stages = [value for stage, value in last.items() if stage != "iteration"]
        alphas = [value for name, value in (run["curves"] or [{}])[-1].items() if name.startswith("alpha")]
        rows.append(
            (
                f"{run['data']}, {run['start']}",
                f"{run['model']} (seed {run['seed']})",
                mean(run, "L_F", slice(0, END)),
                mean(run, "L_F", slice(-END, None)),
                ", ".join(f"{stage['largest_logit']:.1f}" for stage in stages),
                ", ".join(f"{stage['smallest_S_ii']:.0e}" for stage in stages if "smallest_S_ii" in stage),
                ", ".join(f"{alpha:+.3f}" for alpha in alphas),
                verdict,
            )
        )
    header = ("start", "model", "L_F first", "L_F last", "largest logit", "min S_ii", "alpha", "verdict")
    table = tabulate(rows, header, tablefmt="github", floatfmt=".2f")
    (out / "summary.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    draw(runs, out / "curves.png")
    return sound


def mean(run: dict[str, Any], term: str, part: slice) -> float:
    """Return the mean of a term over a part of the iterations of a run."""
    values = [row[term] for row in run["curves"][part]]
    return sum(values) / len(values) if values else math.nan


def judge(run: dict[str, Any], runs: dict[tuple[Any, ...], dict[str, Any]]) -> str:
    """Return "stable", or the reason why not.

    A run is not stable if it stopped, if a term of the loss does not fall, or if L_F exceeds PCB's by more than the
    difference between PCB's two seeds.
    """
    if run["stopped"]:
        return run["stopped"]
    terms = [name for name in run["curves"][0] if name.startswith("L_")]
    rising = [term for term in terms if not mean(run, term, slice(-END, None)) < mean(run, term, slice(0, END))]
    if rising:
        return f"{', '.join(rising)} not falling"
    baseline = [runs.get((run["data"], run["start"], "pcb", seed)) for seed in (1, 2)]
    if all(baseline) and run["model"] != "pcb":
        first, second = (mean(one, "L_F", slice(-END, None)) for one in baseline if one)
        above = mean(run, "L_F", slice(-END, None)) - max(first, second)
        if above > abs(first - second):
            return f"L_F {above:.2f} above PCB's; two seeds differ by {abs(first - second):.2f}"
    return "stable"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Plot L_F of every run, smoothed over END iterations, with one panel per data set and start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((run["data"], run["start"]) for run in runs))
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    for panel, axis in zip(panels, axes[0], strict=True):
        for run in runs:
            if (run["data"], run["start"]) == panel and run["curves"]:
                values = torch.tensor([row["L_F"] for row in run["curves"]])
                width = min(END, len(values))
                smooth = values.unfold(0, width, 1).mean(dim=1)
                style = "--" if run["seed"] == 2 else "-"
                axis.plot(range(width, len(values) + 1), smooth, style, label=f"{run['model']}, seed {run['seed']}")
        axis.set(title=", ".join(panel), xlabel="iteration", ylabel=f"$L_F$, mean of {END}")
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
