"""The log of a training, and TensorBoard's curves, attention maps and embeddings.

An error while a record is written is one line on the console, and never ends a training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from csalr_plugin.hosts import distributed
from csalr_plugin.hosts.maps import map_pictures
from csalr_plugin.hosts.records import (
    EpochRecord,
    differing,
    epoch_line,
    forget_later,
    learning_rates,
    never_fatal,
    show_embeddings,
    write_line,
)
from csalr_plugin.hosts.torchreid.config import active_config
from csalr_plugin.models import PCB, recipe

_MAP_IMAGES = 2


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

    def to_file(self, text: str) -> None:
        """Write a line to the log file alone."""
        console, self.console = self.console, None
        self._call("write", text + "\n")
        self.console = console

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


class ScriptLogger(Logger):
    """The log of the host's train script, which prints all settings and the machine: they go to the log file alone."""

    def write(self, text: str) -> int:
        """Write `text`, with the settings that differ from the defaults on the console."""
        if not text.startswith(("Show configuration", "** System info **")) or self.file is None:
            return super().write(text)
        self.to_file(text)
        config = active_config()
        if text.startswith("Show configuration"):
            return super().write(
                f"Settings that differ from the defaults:\n{differing(config.leaves(), config.defaults)}"
            )
        return super().write(f"(the machine: {self.file.name})")


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
    """Writes the metrics of an engine: one line per epoch on the console and in ``metrics.jsonl``, and TensorBoard.

    A resumed training appends to ``metrics.jsonl``. TensorBoard gets each head's accuracy and each group's learning
    rate of every epoch.

    Args:
        engine: an engine of ``plugin_engine``. It is only read, except that it gets a `writer` if it has none.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._record: EpochRecord | None = None

    def begin(self, done: int) -> None:
        """Start a training of which `done` epochs are trained: remove the metrics of later epochs."""
        if distributed.is_main():
            forget_later(Path(self.engine.save_dir), done)

    def start_epoch(self, done: int = 0) -> None:
        """Start the record of an epoch, and note the learning rates, which the host changes at the end of an epoch.

        Args:
            done: batches of the epoch that were trained before the checkpoint that was resumed.
        """
        engine = self.engine
        batches = len(engine.train_loader)
        self._record = EpochRecord(engine.epoch + 1, engine.max_epoch, batches, done=done, bar=distributed.is_main())
        self._record.rates = learning_rates(engine.optimizer)

    def count(self, summary: dict[str, float], logits: Sequence[Tensor] | Tensor, identities: Tensor) -> None:
        """Add one batch.

        Args:
            summary: the terms of its loss, the accuracy in per cent, and the gates.
            logits: (B, num_classes) of each head.
            identities: (B,).
        """
        if self._record is None:  # a batch outside of an epoch
            return
        gates = {name: value for name, value in summary.items() if name.startswith("alpha")}
        values: dict[str, float | Tensor] = {name: value for name, value in summary.items() if name not in gates}
        network = self.engine.network
        outputs, branches = recipe.split_logits(network, logits)
        kind = "part" if isinstance(network, PCB) else "head"
        heads = {f"{kind}{number}": output for number, output in enumerate(outputs, start=1)} | branches
        for name, head in heads.items():
            # A tensor: a Python number would wait for the device.
            values[f"accuracy_{name}"] = 100 * (head.detach().argmax(dim=1) == identities).float().mean()
        self._record.count(values, gates)

    def close_epoch(self) -> None:
        """Remove the progress bar, also after an error."""
        if self._record is not None:
            self._record.close()

    def end_epoch(self) -> None:
        """Print and write the epoch's line, and its curves and attention maps in TensorBoard."""
        record, engine = self._record, self.engine
        if record is None or not record.batches:  # all its batches were trained before the checkpoint was resumed
            return
        means = distributed.means(record.means())
        if not distributed.is_main():
            return
        line = record.line(means)
        print(epoch_line(line, engine.max_epoch))
        write_line(Path(engine.save_dir), line)
        if engine.writer is None:
            return
        for name, value in line.items():
            if name.startswith(("accuracy_", "lr_")):
                engine.writer.add_scalar(f"Epoch/{name}", value, engine.epoch + 1)
        every = engine.settings.tensorboard.maps_every
        if every and (engine.epoch + 1) % every == 0 and engine.blocks:
            with never_fatal("pictures of the attention maps"):
                self._show_maps()

    def evaluated(self, dataset: str, results: dict[str, float]) -> None:
        """Write the line of an evaluation of a training."""
        write_line(Path(self.engine.save_dir), {"epoch": self.engine.epoch + 1, "dataset": dataset, **results})

    def show_embeddings(
        self, dataset: str, embeddings: Tensor, identities: np.ndarray, cameras: np.ndarray, epoch: int
    ) -> None:
        """Show embeddings (N, width) of queries in TensorBoard's projector."""
        with never_fatal("the embeddings in TensorBoard's projector"):
            if self.engine.writer is None:
                self.engine.writer = Writer(self.engine.save_dir)
            show_embeddings(self.engine.writer, dataset, embeddings, identities, cameras, epoch)

    def _show_maps(self) -> None:
        """Show the photograph, each stage's full map and its compressed map of the first queries."""
        engine = self.engine
        target = next(iter(engine.test_loader.values()))["query"].dataset
        samples = [target[index]["img"] for index in range(min(_MAP_IMAGES, len(target)))]
        frames = [sample[0] if sample.dim() == 4 else sample for sample in samples]  # the first frame of a video
        images = torch.stack(frames)  # B, 3, H, W
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in engine.normalisation)
        device = next(engine.network.parameters()).device
        for stage, pictures in map_pictures(engine.network, images.to(device), images * std + mean).items():
            engine.writer.add_images(f"Maps/{stage}", pictures, engine.epoch + 1)
