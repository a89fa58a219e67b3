"""Records of a training: ``metrics.jsonl``, and TensorBoard's curves, attention maps and embeddings.

Nothing here can end a training: an error while a record is written is one line on the console.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard.writer import SummaryWriter

from csalr_plugin.attention.maps import maps_of
from csalr_plugin.errors import first_line
from csalr_plugin.hosts import distributed
from csalr_plugin.models import PCB, recipe
from csalr_plugin.models.inspect import block_inputs

METRICS = "metrics.jsonl"
_MOST_EMBEDDINGS = 1000  # in the projector, which is a page in a browser
_MAP_IMAGES = 2


@contextmanager
def never_fatal(record: str) -> Iterator[None]:
    """Turn an error in the with statement into one line that names `record`."""
    try:
        yield
    except Exception as error:  # whatever it is, the training must go on
        print(f"Warning: {record} cannot be written ({first_line(error)}); the run goes on without.", file=sys.stderr)


class Logger:
    """A console that also writes to a log file, in place of the host's `Logger`.

    A log file that cannot be written is one warning; a console that is closed, as in ``csalr train | head``, raises
    BrokenPipeError once.

    Args:
        fpath: the log file; None writes to the console alone.
    """

    def __init__(self, fpath: str | Path | None = None) -> None:
        self.console: Any = sys.stdout
        self.file: Any = None
        if fpath is not None:
            with self._warning(str(fpath)):
                Path(fpath).parent.mkdir(parents=True, exist_ok=True)
                self.file = Path(fpath).open("w", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, text: str) -> int:
        """Write `text` to both."""
        self._call("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush both."""
        self._call("flush")

    def close(self) -> None:
        """Close the file, and leave the console open."""
        file, self.file = self.file, None
        if file is not None:
            with self._warning(file.name):
                file.close()

    def _call(self, method: str, *args: str) -> None:
        file, self.file = self.file, None
        if file is not None:
            with self._warning(file.name):
                getattr(file, method)(*args)
                self.file = file
        console, self.console = self.console, None
        if console is not None:
            getattr(console, method)(*args)
            self.console = console

    def _warning(self, name: str) -> AbstractContextManager[None]:
        return never_fatal(f"the log file {name!r}")


class Writer:
    """A TensorBoard writer that raises no errors: the first one is one line, and nothing more is written.

    Args:
        folder: of the log; None writes nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._writer: SummaryWriter | None = None
        if folder is not None:
            with never_fatal("the TensorBoard log"):
                self._writer = SummaryWriter(log_dir=str(folder))

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return a method of the writer."""

        def write(*args: Any, **kwargs: Any) -> None:
            writer, self._writer = self._writer, None
            if writer is not None:
                with never_fatal("the TensorBoard log"):
                    getattr(writer, name)(*args, **kwargs)
                    self._writer = writer

        return write


class Monitor:
    """Collects an engine's metrics: one line per epoch and one per evaluation.

    The lines of ``metrics.jsonl`` are JSON. A resumed training appends to them, and the last line of an epoch counts
    (see :func:`read_metrics`). TensorBoard gets each head's accuracy and each group's learning rate of every epoch.

    Args:
        engine: an engine of ``plugin_engine``. It is only read, except that it gets a `writer` if it has none.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._sums: dict[str, Any] = defaultdict(float)
        self._last: dict[str, float] = {}
        self._batches = 0
        self._rates: dict[str, float] = {}
        self._started = time.monotonic()

    def start_epoch(self) -> None:
        """Reset the sums, and note the learning rates, which the host changes at the end of an epoch."""
        self._sums.clear()
        self._last, self._batches, self._started = {}, 0, time.monotonic()
        self._rates = learning_rates(self.engine.optimizer)

    def count(self, summary: dict[str, float], logits: Sequence[Tensor] | Tensor, identities: Tensor) -> None:
        """Add one batch.

        Args:
            summary: the terms of its loss, and the gates.
            logits: (B, num_classes) of each head.
            identities: (B,).
        """
        self._batches += 1
        for name, value in summary.items():
            if name.startswith("alpha"):
                self._last[name] = value
            else:
                self._sums[name] += value
        network = self.engine.network
        outputs, branches = recipe.split_logits(network, logits)
        kind = "part" if isinstance(network, PCB) else "head"
        heads = {f"{kind}{number}": output for number, output in enumerate(outputs, start=1)} | branches
        for name, head in heads.items():
            # A tensor: a Python number would wait for the device.
            self._sums[f"accuracy_{name}"] += 100 * (head.detach().argmax(dim=1) == identities).float().mean()

    def end_epoch(self) -> None:
        """Write the epoch's line, and its curves and attention maps in TensorBoard."""
        if not self._batches:  # the whole epoch was trained before the checkpoint that was resumed
            return
        engine = self.engine
        means = distributed.means({name: value / self._batches for name, value in self._sums.items()})
        if not distributed.is_main():
            return
        rates = {f"lr_{name}": rate for name, rate in self._rates.items()}
        seconds = round(time.monotonic() - self._started, 3)
        epoch = {"epoch": engine.epoch + 1, "batches": self._batches, "seconds": seconds}
        self._write({**epoch, **means, **self._last, **rates})
        if engine.writer is None:
            return
        for name, value in {**means, **rates}.items():
            if name.startswith(("accuracy_", "lr_")):
                engine.writer.add_scalar(f"Epoch/{name}", value, engine.epoch + 1)
        every = engine.settings.tensorboard.maps_every
        if every and (engine.epoch + 1) % every == 0 and engine.blocks:
            with never_fatal("pictures of the attention maps"):
                self._show_maps()

    def evaluated(
        self, dataset: str, results: dict[str, float], embeddings: Tensor, identities: np.ndarray, cameras: np.ndarray
    ) -> None:
        """Write an evaluation's line; with `csalr.tensorboard.projector` show the queries' embeddings, (N, width)."""
        engine = self.engine
        self._write({"epoch": engine.epoch + 1, "dataset": dataset, **results})
        if engine.settings.tensorboard.projector:
            with never_fatal("the embeddings in TensorBoard's projector"):
                self._show_embeddings(dataset, embeddings[:_MOST_EMBEDDINGS], identities, cameras)

    def _show_embeddings(self, dataset: str, shown: Tensor, identities: np.ndarray, cameras: np.ndarray) -> None:
        engine = self.engine
        if engine.writer is None:
            engine.writer = Writer(engine.save_dir)
        # 12288 numbers per query would make files of 100 MB and more; 64 principal directions keep the neighbours.
        left, size, _ = torch.pca_lowrank(shown, q=min(64, *shown.shape))
        labels = [list(map(str, pair)) for pair in zip(identities[: len(shown)], cameras[: len(shown)], strict=True)]
        engine.writer.add_embedding(
            left * size, labels, metadata_header=["identity", "camera"], global_step=engine.epoch + 1, tag=dataset
        )
        engine.writer.flush()

    def _write(self, line: dict[str, Any]) -> None:
        path = Path(self.engine.save_dir) / METRICS
        with never_fatal(repr(str(path))):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    @torch.no_grad()
    def _show_maps(self) -> None:
        """Show each stage's full map beside CSALR's, for the first queries and the middle position."""
        engine = self.engine
        target = next(iter(engine.test_loader.values()))["query"].dataset
        samples = [target[index]["img"] for index in range(min(_MAP_IMAGES, len(target)))]
        frames = [sample[0] if sample.dim() == 4 else sample for sample in samples]  # the first frame of a video
        images = torch.stack(frames).to(next(engine.network.parameters()).device)
        training = engine.network.training
        engine.network.eval()
        try:
            for stage, x in block_inputs(engine.network, images).items():
                height, width = x.shape[-2:]
                middle = torch.tensor([height // 2 * width + width // 2], device=x.device)
                maps = maps_of(engine.blocks[stage], x, rows=middle)
                pictures = [one.mean(dim=1).reshape(len(x), 1, height, width) for one in (maps.full, maps.compressed)]
                peak = pictures[0].amax(dim=(1, 2, 3), keepdim=True)
                side_by_side = torch.cat([(one / peak).clamp(0, 1) for one in pictures], dim=3)  # B, 1, H, 2 W
                shown = F.interpolate(side_by_side.float(), scale_factor=images.shape[-2] / height)
                engine.writer.add_images(f"Maps/{stage}_full_and_csalr", shown, engine.epoch + 1)
        finally:
            engine.network.train(training)


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the rate of each parameter group: "attention", "gate", and the host's "backbone" and "new", or "all"."""
    rates = {group["role"]: group["lr"] for group in optimizer.param_groups if "role" in group}
    host = [group["lr"] for group in optimizer.param_groups if "role" not in group]
    names = ("backbone", "new") if len(host) == 2 else ("all",)
    return {**dict(zip(names, host, strict=False)), **rates}


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the lines of epochs and those of evaluations in a ``metrics.jsonl``, by epoch; a missing file has none.

    If an epoch has several lines, the last one counts: the epoch was trained again after a stop. Incomplete lines are
    left out.
    """
    epochs: dict[int, dict[str, Any]] = {}
    evaluations: dict[tuple[int, str], dict[str, Any]] = {}
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if not isinstance(line, dict) or not isinstance(line.get("epoch"), int):
                continue
            if "dataset" in line:
                evaluations[line["epoch"], str(line["dataset"])] = line
            else:
                epochs[line["epoch"]] = line
    return [epochs[key] for key in sorted(epochs)], [evaluations[key] for key in sorted(evaluations)]
