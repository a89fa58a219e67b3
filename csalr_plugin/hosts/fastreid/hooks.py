"""Hooks and writers of the training loop: trained layers, records of epochs, and writers that cannot end a training."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fastreid.config import CfgNode
from fastreid.engine import hooks
from fastreid.engine.train_loop import HookBase
from fastreid.utils.events import EventWriter
from torch import nn

from csalr_plugin.errors import UserError, first_line, shown, suggest
from csalr_plugin.hosts.maps import map_pictures
from csalr_plugin.hosts.records import (
    EpochRecord,
    epoch_line,
    forget_later,
    never_fatal,
    phase_line,
    write_line,
)
from csalr_plugin.models import PCB, RefinedPCB, recipe

logger = logging.getLogger(__name__.replace("csalr_plugin.hosts.fastreid", "fastreid.csalr"))

# Names in MODEL.FREEZE_LAYERS for the plugin's networks. fast-reid's own configs name the parts of its networks so.
_PARTS = {
    "backbone": ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"),
    "heads": ("conv5", "classifier", "part_classifier"),
}


class TrainedLayers(HookBase):  # type: ignore[misc]  # fast-reid carries no types
    """Freezes the layers that MODEL.FREEZE_LAYERS names, and sets the phases of refined part pooling (section 4.2).

    A frozen layer gets no gradient, and its batch norm uses and keeps its running statistics. fast-reid's own
    `LayerFreeze` ends at the first evaluation, and starts again when a training is resumed.

    Args:
        network: the network, without the wrapper for several processes.
        cfg: fast-reid's settings: MODEL.FREEZE_LAYERS, SOLVER.FREEZE_ITERS and, for a `RefinedPCB`, CSALR.RPP.

    Raises:
        UserError: MODEL.FREEZE_LAYERS names no layer of the network, or all of them.
    """

    def __init__(self, network: nn.Module, cfg: CfgNode) -> None:
        self.network, self.phases = network, cfg.CSALR.RPP
        self.epochs: int = cfg.SOLVER.MAX_EPOCH
        self.trainable = {parameter for parameter in network.parameters() if parameter.requires_grad}
        self.iterations: int = cfg.SOLVER.FREEZE_ITERS if cfg.MODEL.FREEZE_LAYERS else 0
        self.patterns = frozen_layers(network, cfg.MODEL.FREEZE_LAYERS)
        self.alone = False
        if cfg.MODEL.FREEZE_LAYERS and not self.iterations:
            logger.warning(
                f"MODEL.FREEZE_LAYERS {list(cfg.MODEL.FREEZE_LAYERS)} freezes nothing: SOLVER.FREEZE_ITERS is 0"
            )

    def before_epoch(self) -> None:
        """Set the layers that train in the epoch that begins. An evaluation has set all of them to training mode."""
        phase = recipe.begin_epoch(
            self.network,
            self.trainer.epoch,
            pcb_epochs=self.phases.PCB_EPOCHS,
            part_classifier_epochs=self.phases.PART_CLASSIFIER_EPOCHS,
        )
        self.alone = phase is recipe.Phase.PART_CLASSIFIER
        if isinstance(self.network, RefinedPCB):
            lengths = (self.epochs, self.phases.PCB_EPOCHS, self.phases.PART_CLASSIFIER_EPOCHS)
            starts = self.trainer.epoch == self.trainer.start_epoch
            if line := phase_line(self.trainer.epoch, *lengths, starts=starts):
                logger.info(line)
        self._apply()

    def before_step(self) -> None:
        """Open the frozen layers after SOLVER.FREEZE_ITERS iterations."""
        if self.iterations and self.trainer.iter == self.iterations:
            self._apply()

    def _apply(self) -> None:
        frozen = self.trainer.iter < self.iterations
        counts = {True: 0, False: 0}
        for name, module in self.network.named_modules():
            if not name:
                continue
            trains = not (self.alone and name.split(".")[0] != "part_classifier")
            trains &= not (frozen and any(pattern.match(name + ".") for pattern in self.patterns))
            module.training = trains
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(trains and parameter in self.trainable)
                counts[trains] += 1
        if frozen and self.trainer.iter == self.trainer.start_iter:
            total = sum(counts.values())
            logger.info(f"Freezing {counts[False]} of {total} weights for the first {self.iterations} iterations")
        if self.iterations and self.trainer.iter == self.iterations:
            logger.info(f"Training the layers that were frozen for {self.iterations} iterations")


def frozen_layers(network: nn.Module, names: Sequence[str]) -> list[re.Pattern[str]]:
    """Return the patterns of the layers that MODEL.FREEZE_LAYERS names; each matches the start of a parameter's name.

    Args:
        network: the network.
        names: of layers, such as "layer1" or "layer4.2.conv3". As in fast-reid, a name is a regular expression. In
            the plugin's networks "backbone" means the ResNet-50, and "heads" the part reduction and classifiers.

    Raises:
        UserError: a name matches no layer, or all names together match every layer.
    """
    parameters = [name for name, _ in network.named_parameters()]
    patterns = []
    for name in names:
        layers = _PARTS.get(name, (name,)) if isinstance(network, PCB) else (name,)
        try:
            pattern = re.compile(rf"(?:{'|'.join(layers)})\.")
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"config key 'MODEL.FREEZE_LAYERS' has {shown(name)}, which is no regular expression ({error}); give "
                "names of layers, such as layer1."
            ) from None
        if not any(map(pattern.match, parameters)):
            children = [child for child, module in network.named_children() if any(True for _ in module.parameters())]
            allowed = [*(_PARTS if isinstance(network, PCB) else ()), *children]
            paths = [path for path, _ in network.named_modules() if path]
            raise UserError(
                f"config key 'MODEL.FREEZE_LAYERS' has {shown(name)}, which is no layer of this network; give some of "
                f"{', '.join(allowed)}, or layers inside them.{suggest(name, dict.fromkeys([*allowed, *paths]))}"
            )
        patterns.append(pattern)
    if patterns and all(any(pattern.match(name) for pattern in patterns) for name in parameters):
        raise UserError("config key 'MODEL.FREEZE_LAYERS' names every layer, so nothing would train; leave some out.")
    return patterns


class MetricsWriter(hooks.PeriodicWriter):  # type: ignore[misc]
    """fast-reid's `PeriodicWriter`, which also writes the results of the last evaluation of a training.

    fast-reid writes the metrics of the last iteration before that evaluation, and afterwards regards the iteration as
    written.
    """

    def after_step(self) -> None:
        """Write the metrics every `period` iterations, except at the end of an epoch: `after_epoch` writes them."""
        if (self.trainer.iter + 1) % self.trainer.iters_per_epoch:
            super().after_step()

    def after_train(self) -> None:
        """Write the results of an evaluation after the training, and close the writers."""
        for writer in self._writers:
            writer.write()
        self.close()

    def close(self) -> None:
        """Close the writers."""
        super().after_train()


class Records(HookBase):  # type: ignore[misc]
    """Writes a line per epoch to the log and to ``metrics.jsonl``, and attention maps to TensorBoard.

    The names of the metrics are those of the plugin's training in torchreid; see `EpochRecord`.

    Args:
        network: the network, without the wrapper for several processes.
        cfg: fast-reid's settings.
        queries: returns the first query images, (B, 3, H, W), RGB from 0 to 255.
    """

    def __init__(self, network: nn.Module, cfg: Any, queries: Callable[[], torch.Tensor]) -> None:
        self.network, self.queries = network, queries
        self.folder, self.maps_every = Path(cfg.OUTPUT_DIR), cfg.CSALR.TENSORBOARD.MAPS_EVERY
        self.record: EpochRecord | None = None
        self._images: torch.Tensor | None = None

    def before_train(self) -> None:
        """Remove the metrics of epochs that are trained now."""
        forget_later(self.folder, self.trainer.start_epoch)

    def before_epoch(self) -> None:
        """Start the record of an epoch."""
        trainer = self.trainer
        self.record = EpochRecord(trainer.epoch + 1, trainer.max_epoch, trainer.iters_per_epoch)
        self.record.rates = {}
        for group in trainer.optimizer.param_groups:
            self.record.rates.setdefault(_role(group), group["lr"])

    def after_step(self) -> None:
        """Add the metrics of an iteration."""
        assert self.record is not None
        latest = {
            name: value for name, (value, step) in self.trainer.storage.latest().items() if step == self.trainer.iter
        }
        values = {
            _NAMES.get(name, name.removeprefix("loss_")): value for name, value in latest.items() if "loss" in name
        }
        values = {f"L_{name}" if name.startswith("DS_") else name: value for name, value in values.items()}
        if "cls_accuracy" in latest:
            values["acc"] = 100 * latest["cls_accuracy"]
        self.record.count(values)

    def after_epoch(self) -> None:
        """Write the line of an epoch."""
        assert self.record is not None
        self.record.close()
        gates = {
            f"alpha_{name}": float(block.alpha.detach())
            for name, block in recipe.attention_blocks(self.network).items()
        }
        line = {**self.record.line(self.record.means()), **gates}
        logger.info(epoch_line(line, self.trainer.max_epoch))
        write_line(self.folder, line)
        number = self.trainer.epoch + 1
        if self.maps_every and number % self.maps_every == 0 and gates:
            with never_fatal("pictures of the attention maps"):
                self._images = images = self.queries() if self._images is None else self._images
                for stage, pictures in map_pictures(self.network, images, images / 255).items():
                    for place, picture in enumerate(pictures, start=1):
                        self.trainer.storage.put_image(f"Maps/{stage}/query{place}", picture)

    def after_train(self) -> None:
        """Remove the progress bar, also after an error."""
        if self.record is not None:
            self.record.close()


# Names of fast-reid's losses in metrics.jsonl.
_NAMES = {"total_loss": "loss", "loss_F": "L_F"}
# Children of the plugin's networks that have no ImageNet weights.
NEW_LAYERS = ("conv5", "classifier", "part_classifier", "attention", "supervision")


def _role(group: dict[str, Any]) -> str:
    """Return the name of a parameter group: "attention", "gate", "new" or "backbone"; fast-reid's "heads" is "new"."""
    if "role" in group:
        return str(group["role"])
    child = str(group["param_names"][0]).split(".")[0]
    return "new" if child in (*NEW_LAYERS, "heads") else "backbone"


class SafeWriter(EventWriter):  # type: ignore[misc]
    """A writer of metrics whose errors are one warning in the log, so that a full disk does not end a training.

    Args:
        writer: fast-reid's writer.
    """

    def __init__(self, writer: EventWriter) -> None:
        self.writer, self.warned = writer, False

    def write(self) -> None:
        """Write the metrics of the current iteration."""
        self._try(self.writer.write)

    def close(self) -> None:
        """Close the output."""
        self._try(self.writer.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BrokenPipeError:  # the console is closed, as by "| head -3"
            raise
        except Exception as error:  # of any kind: it does not concern the weights
            if not self.warned:
                name, reason = type(self.writer).__name__, getattr(error, "strerror", None) or first_line(error)
                logger.warning(f"{name} cannot write the metrics ({reason}); the training goes on")
            self.warned = True
