"""The failing case of each patch: a use of the host that fails without the patch and works with it.

    PYTHONPATH=CHECKOUT python projects/upstream/cases.py HOST/NAME ...

runs cases in the folder of a checkout of the host, and prints a line for each. The exit code is 0 if all of them work.
The cases use the host alone, without csalr_plugin. GPUs are hidden, so that the results are the same on every machine.
"""

from __future__ import annotations

import collections
import collections.abc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CASES: dict[str, Callable[[], None]] = {}


def case(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a function as the case of the patch `name`, for example "torchreid/fast-ranking"."""

    def add(function: Callable[[], None]) -> Callable[[], None]:
        CASES[name] = function
        return function

    return add


# torchreid


@case("torchreid/pcb_csalr")
def build_pcb_csalr() -> None:
    """The registry of torchreid has the model; with the weights of a PCB, its embeddings are those of the PCB."""
    import torch
    import torchreid

    model, pcb = (torchreid.models.build_model(name, 5, pretrained=False).eval() for name in ("pcb_csalr", "pcb_p6"))
    missing, unexpected = model.load_state_dict(pcb.state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing} == {"attention", "supervision"} and not unexpected
    images = torch.rand(2, 3, 64, 32)
    assert torch.equal(model(images), pcb(images))


@case("torchreid/pcb_rpp")
def build_pcb_rpp() -> None:
    """The registry of torchreid has the model, and the weights of a trained PCB load into it."""
    import torchreid

    model = torchreid.models.build_model("pcb_rpp", 5, pretrained=False)
    pcb = torchreid.models.build_model("pcb_p6", 5, pretrained=False)
    missing, unexpected = model.load_state_dict(pcb.state_dict(), strict=False)
    assert missing == ["part_classifier.weight", "part_classifier.bias"] and not unexpected


@case("torchreid/checkpoint-loading")
def load_own_checkpoint() -> None:
    """A checkpoint that torchreid saved can be loaded again, and a file that runs code is still refused."""
    import numpy as np
    import torch
    import torchreid

    with tempfile.TemporaryDirectory() as folder:
        state: dict[str, Any] = {"state_dict": {"weight": torch.ones(2)}, "epoch": 1, "rank1": np.float64(0.5)}
        torchreid.utils.save_checkpoint(state, folder)
        loaded = torchreid.utils.load_checkpoint(str(Path(folder) / "model.pth.tar-1"))
        assert loaded["rank1"] == 0.5 and loaded["state_dict"]["weight"].tolist() == [1, 1]

        path = Path(folder) / "harmful.pth"
        torch.save({"state_dict": _Harmful()}, path)
        try:
            torchreid.utils.load_checkpoint(str(path))
        except Exception as error:
            assert "Unsupported" in str(error), error
        else:
            raise AssertionError("a checkpoint ran code")


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of the checkpoint",)


@case("torchreid/fast-ranking")
def rank_in_the_time_of_some_sorts() -> None:
    """The Python ranking takes the time of a few sorts of its distances, and its result is that of the definition."""
    import numpy as np
    import torchreid

    random = np.random.RandomState(0)
    queries, gallery = 30, 15_000
    distances = random.rand(queries, gallery).astype(np.float32)
    query_ids, query_cameras = random.randint(0, 50, queries), random.randint(0, 6, queries)
    gallery_ids, gallery_cameras = random.randint(0, 50, gallery), random.randint(0, 6, gallery)
    best = {"sort": float("inf"), "ranking": float("inf")}
    for _ in range(3):
        start = time.perf_counter()
        order = np.argsort(distances, axis=1)
        best["sort"] = min(best["sort"], time.perf_counter() - start)
        start = time.perf_counter()
        cmc, mean_ap = torchreid.metrics.evaluate_rank(
            distances, query_ids, gallery_ids, query_cameras, gallery_cameras, use_cython=False
        )
        best["ranking"] = min(best["ranking"], time.perf_counter() - start)
    precisions = []
    for query in range(queries):
        row = order[query]
        kept = (gallery_ids[row] != query_ids[query]) | (gallery_cameras[row] != query_cameras[query])
        places = np.flatnonzero((gallery_ids[row] == query_ids[query])[kept])
        precisions.append(np.mean(np.arange(1, len(places) + 1) / (places + 1)))
    assert abs(mean_ap - np.mean(precisions)) < 1e-12 and len(cmc) == 50
    ratio = best["ranking"] / best["sort"]
    assert ratio < 30, f"the ranking takes {ratio:.0f} times as long as sorting its distances"


@case("torchreid/config-options")
def give_options_after_the_data_sets() -> None:
    """Config options after -s, -t and --transforms reach the config, and the names before them stay."""
    with tempfile.TemporaryDirectory() as folder:
        # The empty data set ends the script after it has printed its config, before it would download anything.
        (Path(folder) / "market1501" / "Market-1501-v15.09.15").mkdir(parents=True)
        words = ["--root", folder, "--transforms", "random_flip", "data.height", "100", "-s", "market1501", "-t"]
        words += ["market1501", "use_gpu", "False", "train.max_epoch", "3", "data.save_dir", folder]
        done = subprocess.run([sys.executable, "scripts/main.py", *words], capture_output=True, text=True)
    for line in ("height: 100", "max_epoch: 3", "sources: ['market1501']", "targets: ['market1501']"):
        assert line in done.stdout, f"the config of main.py {' '.join(words[2:10])} ... has no {line!r}"
    assert "transforms: ['random_flip']" in done.stdout


# fast-reid


def _import_mapping() -> None:
    """Let the host import ``collections.Mapping``, which another patch mends."""
    vars(collections)["Mapping"] = collections.abc.Mapping


@case("fastreid/pcb_csalr")
def build_meta_architecture() -> None:
    """The registry of fast-reid builds the meta-architecture with the patch's own config file."""
    _import_mapping()
    from fastreid.config import get_cfg
    from fastreid.modeling.meta_arch import build_model

    cfg = get_cfg()
    cfg.merge_from_file("configs/Market1501/pcb_csalr_R50.yml")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.PRETRAIN", "False", "MODEL.HEADS.NUM_CLASSES", "5"])
    build_model(cfg)


@case("fastreid/mapping-import")
def import_data_and_evaluation() -> None:
    """The packages that need ``Mapping`` can be imported."""
    import fastreid.data
    import fastreid.evaluation  # noqa: F401


@case("fastreid/zero-grad")
def step_changes_the_weights() -> None:
    """A step of the trainer changes the weights by the gradient of its own batch alone."""
    _import_mapping()
    import torch
    from fastreid.config import get_cfg
    from fastreid.engine.train_loop import SimpleTrainer
    from fastreid.solver import build_optimizer
    from fastreid.utils.events import EventStorage

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 1)

        def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.linear(batch).sum()}

    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.OPT", "SGD", "SOLVER.BASE_LR", "1.0", "SOLVER.MOMENTUM", "0.0"])
    cfg.merge_from_list(["SOLVER.WEIGHT_DECAY", "0.0", "SOLVER.WEIGHT_DECAY_BIAS", "0.0"])
    model = Model()
    optimizer, wrapper = build_optimizer(cfg, model)
    trainer = SimpleTrainer(model, [torch.ones(1, 2)] * 2, optimizer, wrapper)
    with EventStorage():
        for step in range(2):
            before = model.linear.weight.detach().clone()
            trainer.iter = step
            trainer.run_step()
            change = (before - model.linear.weight.detach()).flatten()
            right = torch.allclose(change, torch.ones(2))
            assert right, f"step {step + 1} changed the weights by {change.tolist()}, not by [1.0, 1.0]"


@case("fastreid/cpu-loader")
def load_batches_without_cuda() -> None:
    """The loader yields every batch on a machine without CUDA, twice, and can be shut down."""
    _import_mapping()
    import torch
    from fastreid.data.data_utils import DataLoaderX

    loader = DataLoaderX(0, dataset=[{"images": torch.tensor(i)} for i in range(4)], batch_size=2, pin_memory=True)
    for _ in range(2):
        assert [batch["images"].tolist() for batch in loader] == [[0, 1], [2, 3]]
    loader.shutdown()


def main(names: Sequence[str]) -> int:
    """Run cases, print ``NAME: works`` or ``NAME: the error`` for each, and return the exit code."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    failed = False
    for name in names:
        try:
            CASES[name]()
            print(f"{name}: works", flush=True)
        except Exception as error:
            failed = True
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            print(f"{name}: {type(error).__name__}: {lines[0]}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
