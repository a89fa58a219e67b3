"""fast-reid's trainer with what blocks, gates and refined parts need; all else is the host's."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastreid.config import CfgNode
from fastreid.data import build as host_data
from fastreid.engine import DefaultTrainer, defaults
from fastreid.engine.train_loop import HookBase
from fastreid.solver import build_optimizer
from fastreid.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from csalr_plugin.attention.batch_norm import synchronise, world_size
from csalr_plugin.errors import UserError
from csalr_plugin.hosts.distributed import gathered, is_lost, one_first, share_buffers, together
from csalr_plugin.hosts.fastreid.config import IDENTITY_SAMPLERS, validate
from csalr_plugin.hosts.fastreid.datasets import check_data, check_target, data_root
from csalr_plugin.hosts.fastreid.launch import gone
from csalr_plugin.hosts.script import replaced
from csalr_plugin.hosts.training import keep_freed_memory, unwrapped
from csalr_plugin.models import PCB, RefinedPCB, recipe
from csalr_plugin.models.cost import count_gmacs, count_parameters

# Children of the plugin's networks that have no ImageNet weights.
_NEW_LAYERS = ("conv5", "classifier", "part_classifier", "attention", "supervision")

logger = logging.getLogger(__name__.replace("csalr_plugin.hosts.fastreid", "fastreid.csalr"))


class Trainer(DefaultTrainer):  # type: ignore[misc]  # fast-reid carries no types
    """fast-reid's `DefaultTrainer` for any of its models, with the plugin's training for the plugin's.

    Args:
        cfg: fast-reid's settings after `add_csalr_config`.

    Raises:
        UserError: for anything that the user gave and that cannot be used, before training starts.
    """

    told_to_stop = False  # by a signal

    def __init__(self, cfg: CfgNode) -> None:
        with together():
            validate(cfg)
            check_data(cfg)
        with replaced(defaults, {"DistributedDataParallel": partial(_in_several_processes, cfg)}):
            super().__init__(cfg)
        network = unwrapped(self.model)
        if not next(network.parameters()).is_cuda:
            keep_freed_memory()
        self.warm_up = recipe.WarmUp(self.optimizer, cfg.CSALR.WARMUP)
        if isinstance(network, PCB):
            clip = _ClipGradients(network, cfg.CSALR.CLIP_GRADIENT)
            self.optimizer.register_step_pre_hook(clip)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """The host's loader, from the dataset root that the environment names now, not when it was imported.

        Raises:
            UserError: the training images do not fill one batch, or their identities one of an identity sampler's.
        """
        host_data._root = data_root()
        loader = super().build_train_loader(cfg)
        if len(loader.dataset) < cfg.SOLVER.IMS_PER_BATCH:
            raise UserError(
                f"config key 'SOLVER.IMS_PER_BATCH' is {cfg.SOLVER.IMS_PER_BATCH}, more than the "
                f"{len(loader.dataset)} training images of {', '.join(cfg.DATASETS.NAMES)}; give a smaller batch."
            )
        identities = cfg.SOLVER.IMS_PER_BATCH // cfg.DATALOADER.NUM_INSTANCE
        if cfg.DATALOADER.SAMPLER_TRAIN in IDENTITY_SAMPLERS and loader.dataset.num_classes < identities:
            raise UserError(  # else the sampler looks for them for ever
                f"config key 'DATALOADER.NUM_INSTANCE' is {cfg.DATALOADER.NUM_INSTANCE}, so a batch of "
                f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} has {identities} identities, more than the "
                f"{loader.dataset.num_classes} of {', '.join(cfg.DATASETS.NAMES)}; give a smaller batch."
            )
        return loader

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """The host's loader, from the dataset root that the environment names now, not when it was imported.

        Raises:
            UserError: the data set is missing or empty, or no query has a match in its gallery.
        """
        host_data._root = data_root()
        check_target(cfg, dataset_name)
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
        model: nn.Module = one_first(partial(super().build_model, cfg))
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
        """Build the host's optimizer; new layers, blocks and gates of a plugin model have learning rates of their own.

        With r = SOLVER.BASE_LR the backbone learns at r and new layers at h = r * SOLVER.HEADS_LR_FACTOR. Blocks and
        supervision branches learn at h * CSALR.ATTENTION_LR, gates at h * CSALR.GATE_LR; see `recipe.assign_role`.
        """
        optimizer, parameters = build_optimizer(cfg, model)
        if not isinstance(model, PCB):
            return optimizer, parameters
        role_of = recipe.parameter_roles(model)
        new = {parameter for name, parameter in model.named_parameters() if name.split(".")[0] in _NEW_LAYERS}
        # The host makes a group for each parameter. Groups with the same settings are merged: torch steps them at once.
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for group in optimizer.param_groups:
            parameter = group["params"][0]
            if parameter in new:
                group["lr"] *= cfg.SOLVER.HEADS_LR_FACTOR
            rates = {"attention_lr": cfg.CSALR.ATTENTION_LR, "gate_lr": cfg.CSALR.GATE_LR}
            recipe.assign_role(group, role_of[parameter], **rates)
            kind = (role_of[parameter], parameter in new)
            alike = (kind, group["lr"], group["weight_decay"], group["freeze_status"])
            if alike in groups:
                groups[alike]["params"] += group["params"]
            else:
                groups[alike] = group
        optimizer.param_groups[:] = list(groups.values())
        return optimizer, parameters

    def build_hooks(self) -> list[HookBase]:
        """The host's hooks and, for a model with refined parts, the phases of its training before them."""
        network = unwrapped(self.model)
        phases = [RefinedParts(network, self.cfg.CSALR.RPP)] if isinstance(network, RefinedPCB) else []
        return [*phases, *super().build_hooks()]

    def resume_or_load(self, resume: bool = True) -> None:
        """The host's; a folder with an earlier training's checkpoints is not written into without being told.

        Raises:
            UserError: there is such a folder, or a checkpoint cannot be used.
        """
        with together():
            if not resume and self.checkpointer.has_checkpoint() and not self.cfg.CSALR.OVERWRITE:
                raise UserError(
                    f"OUTPUT_DIR '{self.cfg.OUTPUT_DIR}' holds an earlier training's checkpoints: give another folder, "
                    "go on with --resume, or replace them with CSALR.OVERWRITE True."
                )
            super().resume_or_load(resume)
        if len(epochs := set(gathered(self.start_epoch))) > 1:
            raise UserError(
                f"--resume: the machines would go on from different epochs ({', '.join(map(str, sorted(epochs)))}); "
                f"OUTPUT_DIR '{self.cfg.OUTPUT_DIR}' must be a folder that all of them share."
            )

    def train(self) -> Any:
        """The host's training; one that is done already is only evaluated.

        Raises:
            UserError: for a loss or gradient that is not finite, an image that does not decode, or a process that is
                gone.
        """
        if self.start_epoch >= self.max_epoch:
            return self.test(self.cfg, self.model)
        if world_size() > 1:
            # When one process dies, torchrun tells the others to stop, before they have noticed it themselves.
            signal.signal(signal.SIGTERM, self._stop)
        loop_logger = logging.getLogger("fastreid.engine.train_loop")
        loop_logger.addFilter(_without_trace)
        try:
            return super().train()
        except RuntimeError as error:
            if is_lost(error):
                raise gone(self.checkpointer.get_checkpoint_file()) from error
            raise
        finally:
            loop_logger.removeFilter(_without_trace)

    def _stop(self, *_: object) -> None:
        self.told_to_stop = True  # seen at the next step: no checkpoint is left half written

    def after_train(self) -> None:
        """The host's, which may evaluate; not after an error, for the other processes do not come."""
        if world_size() == 1 or sys.exc_info()[0] is None:
            super().after_train()

    def run_step(self) -> None:
        """One step of the host's, with the warm-up of blocks and gates."""
        if self.told_to_stop:
            raise gone(self.checkpointer.get_checkpoint_file())
        wrong, cause = "", None
        try:
            with self.warm_up.at(self.iter):
                super().run_step()
        except (FloatingPointError, _GradientError) as error:
            wrong, cause = ", ".join(str(error).splitlines()[1:]) or str(error), error
        with together():  # the first process alone looks at the loss
            if wrong:
                raise UserError(self._not_finite(wrong)) from cause

    def _not_finite(self, what: str) -> str:
        last = self.checkpointer.get_checkpoint_file()
        where = f"the last checkpoint is {last}, go on from it with --resume and" if last else "start anew with"
        return (
            f"Training stopped at epoch {self.epoch + 1}, iteration {self.iter + 1}: {what}; {where} a lower "
            "SOLVER.BASE_LR, CSALR.ATTENTION_LR or CSALR.CLIP_GRADIENT."
        )

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module) -> Any:
        """The host's evaluation of the first process's model, its results also in OUTPUT_DIR/results.json."""
        share_buffers(model)
        results = super().test(cfg, model)
        if comm.is_main_process() and cfg.OUTPUT_DIR:
            folder = Path(cfg.OUTPUT_DIR)
            folder.mkdir(parents=True, exist_ok=True)
            numbers = json.dumps(results, indent=2, default=float)
            (folder / "results.json").write_text(numbers + "\n", encoding="utf-8")
        return results


def _in_several_processes(cfg: CfgNode, model: nn.Module, device_ids: list[int], **options: Any) -> nn.Module:
    """What the host calls for torch's wrapper, which takes device_ids with a GPU only."""
    if cfg.CSALR.SYNC_BATCH_NORM:
        synchronise(model)
    on_gpu = next(model.parameters()).is_cuda
    # Phases of refined parts freeze layers; without cross entropy no loss reaches the classifiers.
    unused = isinstance(model, RefinedPCB) or "CrossEntropyLoss" not in cfg.MODEL.LOSSES.NAME
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # of the host's options
        return DistributedDataParallel(
            model, device_ids=device_ids if on_gpu else None, find_unused_parameters=unused, **options
        )


class _GradientError(ArithmeticError):
    """A gradient is not finite; the weights are those from before the step."""


class _ClipGradients:
    """Clips each block's gradient before the optimizer's step; mixed precision has unscaled it by then."""

    def __init__(self, network: PCB, limit: float) -> None:
        self.network, self.limit = network, limit

    def __call__(self, *_: Any) -> None:
        norm = float(recipe.clip_gradients(self.network, self.limit))
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
        phase = recipe.begin_epoch(
            self.network,
            self.trainer.epoch,
            pcb_epochs=self.settings.PCB_EPOCHS,
            part_classifier_epochs=self.settings.PART_CLASSIFIER_EPOCHS,
        )
        alone = phase is recipe.Phase.PART_CLASSIFIER
        for name, child in self.network.named_children():
            opened = not alone or name == "part_classifier"
            child.train(opened)
            child.requires_grad_(opened)


def _without_trace(record: logging.LogRecord) -> bool:
    """Whether the host's log takes a record: not the stack trace of what is told in one line."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not (isinstance(error, UserError) or is_lost(error))
