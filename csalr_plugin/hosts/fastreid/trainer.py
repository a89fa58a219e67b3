"""fast-reid's trainer with what blocks, gates and refined parts need; all else is the host's."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from fastreid.config import CfgNode
from fastreid.data import build as host_data
from fastreid.data import data_utils
from fastreid.data.datasets import DATASET_REGISTRY
from fastreid.engine import DefaultTrainer
from fastreid.engine.train_loop import HookBase
from fastreid.solver import build_optimizer
from fastreid.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from csalr_plugin.errors import UserError
from csalr_plugin.hosts.data import decode_all
from csalr_plugin.hosts.fastreid.config import validate
from csalr_plugin.hosts.training import WarmUp, clip_gradients
from csalr_plugin.models import PCB, RefinedPCB
from csalr_plugin.models.cost import count_gmacs, count_parameters

logger = logging.getLogger(__name__.replace("csalr_plugin.hosts.fastreid", "fastreid.csalr"))


class Trainer(DefaultTrainer):  # type: ignore[misc]  # fast-reid carries no types
    """fast-reid's `DefaultTrainer` for any of its models, with the plugin's training for the plugin's.

    Args:
        cfg: fast-reid's settings after `add_csalr_config`.

    Raises:
        UserError: for anything that the user gave and that cannot be used, before training starts.
    """

    def __init__(self, cfg: CfgNode) -> None:
        validate(cfg)
        check_data(cfg)
        super().__init__(cfg)
        network = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        self.warm_up = WarmUp(self.optimizer, cfg.CSALR.WARMUP)
        if isinstance(network, PCB):
            clip = _ClipGradients(network, cfg.CSALR.CLIP_GRADIENT)
            self.optimizer.register_step_pre_hook(clip)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """The host's loader, from the dataset root that the environment names now, not when it was imported.

        Raises:
            UserError: the training images do not fill one batch.
        """
        host_data._root = _root()
        loader = super().build_train_loader(cfg)
        if len(loader.dataset) < cfg.SOLVER.IMS_PER_BATCH:
            raise UserError(
                f"config key 'SOLVER.IMS_PER_BATCH' is {cfg.SOLVER.IMS_PER_BATCH}, more than the "
                f"{len(loader.dataset)} training images of {', '.join(cfg.DATASETS.NAMES)}; give a smaller batch."
            )
        return loader

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """The host's loader, from the dataset root that the environment names now, not when it was imported."""
        host_data._root = _root()
        return super().build_test_loader(cfg, dataset_name)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The host's model on the device that there is, its cost in the log in place of its layers.

        Raises:
            UserError: for settings that are not allowed.
        """
        validate(cfg)
        if str(cfg.MODEL.DEVICE).startswith("cuda") and not torch.cuda.is_available():
            logger.info("There is no CUDA: MODEL.DEVICE becomes cpu")
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.DEVICE = "cpu"
        model: nn.Module = super().build_model(cfg)
        if isinstance(model, PCB):
            gmacs = count_gmacs(model.eval(), *cfg.INPUT.SIZE_TEST)
            model.train()
            logger.info(
                f"{cfg.MODEL.META_ARCHITECTURE}: {count_parameters(model) / 1e6:.2f} million parameters, "
                f"{gmacs:.2f} GMACs an image at test time"
            )
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        """The host's optimizer; what is new in a plugin model, its blocks and its gates have their own rates.

        With r = SOLVER.BASE_LR the backbone learns at r and what is new at h = r * SOLVER.HEADS_LR_FACTOR; blocks and
        supervision branches at h * CSALR.ATTENTION_LR, and gates at h * CSALR.GATE_LR and without weight decay: a
        gate's gradient is a sum over all positions, and a gate that is decayed never opens.
        """
        optimizer, parameters = build_optimizer(cfg, model)
        if not isinstance(model, PCB):
            return optimizer, parameters
        role_of = {id(parameter): _role(name) for name, parameter in model.named_parameters()}
        factors = {
            "backbone": 1.0,
            "new": cfg.SOLVER.HEADS_LR_FACTOR,
            "attention": cfg.SOLVER.HEADS_LR_FACTOR * cfg.CSALR.ATTENTION_LR,
            "gate": cfg.SOLVER.HEADS_LR_FACTOR * cfg.CSALR.GATE_LR,
        }
        # The host has a group for each parameter: those alike become one, which torch steps at once.
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for group in optimizer.param_groups:
            role = role_of[id(group["params"][0])]
            group["lr"] *= factors[role]
            if role == "gate":
                group["weight_decay"] = 0.0
            if role in ("attention", "gate"):
                group["role"] = role
            alike = (role, group["lr"], group["weight_decay"], group["freeze_status"])
            if alike in groups:
                groups[alike]["params"] += group["params"]
            else:
                groups[alike] = group
        optimizer.param_groups[:] = list(groups.values())
        return optimizer, parameters

    def build_hooks(self) -> list[HookBase]:
        """The host's hooks and, for a model with refined parts, the phases of its training before them."""
        network = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        phases = [RefinedParts(network, self.cfg.CSALR.RPP)] if isinstance(network, RefinedPCB) else []
        return [*phases, *super().build_hooks()]

    def resume_or_load(self, resume: bool = True) -> None:
        """The host's; a folder with an earlier training's checkpoints is not written into without being told.

        Raises:
            UserError: there is such a folder, or a checkpoint cannot be used.
        """
        if not resume and self.checkpointer.has_checkpoint() and not self.cfg.CSALR.OVERWRITE:
            raise UserError(
                f"OUTPUT_DIR '{self.cfg.OUTPUT_DIR}' holds an earlier training's checkpoints: give another folder, go "
                "on with --resume, or replace them with CSALR.OVERWRITE True."
            )
        super().resume_or_load(resume)

    def train(self) -> Any:
        """The host's training; one that is done already is only evaluated.

        Raises:
            UserError: for a loss or gradient that is not finite, or an image that does not decode.
        """
        if self.start_epoch >= self.max_epoch:
            return self.test(self.cfg, self.model)
        loop_logger = logging.getLogger("fastreid.engine.train_loop")
        loop_logger.addFilter(_without_trace)
        try:
            return super().train()
        finally:
            loop_logger.removeFilter(_without_trace)

    def run_step(self) -> None:
        """One step of the host's, with the warm-up of blocks and gates."""
        try:
            with self.warm_up.at(self.iter):
                super().run_step()
        except FloatingPointError as error:
            terms = ", ".join(str(error).splitlines()[1:])
            raise UserError(self._not_finite(terms or "the loss is not finite")) from error
        except _GradientError as error:
            raise UserError(self._not_finite(str(error))) from error

    def _not_finite(self, what: str) -> str:
        last = self.checkpointer.get_checkpoint_file()
        where = f"the last checkpoint is {last}, go on from it with --resume and" if last else "start anew with"
        return (
            f"Training stopped at epoch {self.epoch + 1}, iteration {self.iter + 1}: {what}; {where} a lower "
            "SOLVER.BASE_LR, CSALR.ATTENTION_LR or CSALR.CLIP_GRADIENT."
        )

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module) -> Any:
        """The host's evaluation, its results also in OUTPUT_DIR/results.json."""
        results = super().test(cfg, model)
        if comm.is_main_process() and cfg.OUTPUT_DIR:
            folder = Path(cfg.OUTPUT_DIR)
            folder.mkdir(parents=True, exist_ok=True)
            numbers = json.dumps(results, indent=2, default=float)
            (folder / "results.json").write_text(numbers + "\n", encoding="utf-8")
        return results


def _role(name: str) -> str:
    """What a parameter of a plugin model is for its learning rate."""
    child = name.split(".")[0]
    if child == "attention" and name.endswith(".alpha"):
        return "gate"
    if child in ("attention", "supervision"):
        return "attention"
    return "new" if child in ("conv5", "classifier", "part_classifier") else "backbone"


class _GradientError(ArithmeticError):
    """A gradient is not finite; the weights are those from before the step."""


class _ClipGradients:
    """Clips each block's gradient before the optimizer's step; mixed precision has unscaled it by then."""

    def __init__(self, network: PCB, limit: float) -> None:
        self.network, self.limit = network, limit

    def __call__(self, *_: Any) -> None:
        norm = float(clip_gradients(self.network, self.limit))
        if not math.isfinite(norm):
            raise _GradientError(f"gradient norm = {norm}")


class RefinedParts(HookBase):  # type: ignore[misc]
    """The phases of refined part pooling (section 4.2): PCB, the part classifier alone, all together.

    Args:
        network: the model.
        settings: node CSALR.RPP: PCB_EPOCHS and PART_CLASSIFIER_EPOCHS.
    """

    def __init__(self, network: RefinedPCB, settings: CfgNode) -> None:
        self.network, self.settings = network, settings

    def before_epoch(self) -> None:
        """Open and freeze layers for the epoch that begins."""
        refined_epoch = self.trainer.epoch - self.settings.PCB_EPOCHS
        self.network.refining = refined_epoch >= 0
        alone = 0 <= refined_epoch < self.settings.PART_CLASSIFIER_EPOCHS
        for name, child in self.network.named_children():
            opened = not alone or name == "part_classifier"
            child.train(opened)
            child.requires_grad_(opened)


def _root() -> str:
    return os.environ.get("FASTREID_DATASETS", "datasets")


def check_data(cfg: CfgNode) -> None:
    """Check that every dataset is there, and decode its images once, before training starts.

    Raises:
        UserError: for a dataset that is missing or empty, or an image that does not decode.
    """
    paths: dict[str, None] = {}
    for name in dict.fromkeys([*cfg.DATASETS.NAMES, *cfg.DATASETS.TESTS]):
        try:
            dataset = DATASET_REGISTRY.get(name)(root=_root())
            images = {
                "training": dataset.train if name in cfg.DATASETS.NAMES else None,
                "query": dataset.query if name in cfg.DATASETS.TESTS else None,
                "gallery": dataset.gallery if name in cfg.DATASETS.TESTS else None,
            }
        except (RuntimeError, OSError, AssertionError, ValueError, IndexError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"FASTREID_DATASETS '{_root()}': dataset {name} cannot be read ({reason}); put the images where "
                "fast-reid's handler looks for them, for Market1501 in "
                "ROOT/Market-1501-v15.09.15/{bounding_box_train,query,bounding_box_test}."
            ) from error
        for subset, items in images.items():
            if items is not None and not items:
                raise UserError(f"FASTREID_DATASETS '{_root()}': dataset {name} has no {subset} images.")
            paths |= dict.fromkeys(item[0] for item in items or ())
    if comm.is_main_process():
        decode_all(paths, data_utils.read_image)


def _without_trace(record: logging.LogRecord) -> bool:
    """Whether the host's log takes a record: not the stack trace of a user's mistake, which is told in one line."""
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))
