"""Resuming a training of fast-reid: settings, weights, optimizer state, and the learning rate of the next iteration.

A setting that the user gives now counts. Every other setting is taken from the checkpoint.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastreid
import torch
from fastreid.config import CfgNode, get_cfg
from fastreid.engine import defaults

from csalr_plugin.errors import UserError, shown
from csalr_plugin.files import make_writable_folder
from csalr_plugin.hosts.config import recordable, recorded_settings
from csalr_plugin.hosts.distributed import is_main, local_world_size, together
from csalr_plugin.hosts.fastreid.config import Config, add_csalr_config, default_settings, find_config
from csalr_plugin.hosts.folder import file_stem
from csalr_plugin.hosts.records import METRICS, differing, evaluation_folder, loader_workers
from csalr_plugin.hosts.resume import load_optimizer_state, replay_schedule
from csalr_plugin.hosts.script import replaced
from csalr_plugin.hosts.training import unwrapped
from csalr_plugin.models.weights import check_epoch, load_exactly, read_checkpoint, state_dict_of
from csalr_plugin.version import __version__

logger = logging.getLogger(__name__.replace("csalr_plugin.hosts.fastreid", "fastreid.csalr"))

# Settings that describe a run and not the training: its machine, its folders, its purpose. A checkpoint does not set
# them when a training is resumed.
_OF_THE_RUN = {
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.BACKBONE.PRETRAIN",
    "MODEL.BACKBONE.PRETRAIN_PATH",
    "MODEL.HEADS.NUM_CLASSES",  # fast-reid replaces 0 by the number of identities
    "DATALOADER.NUM_WORKERS",
    "CSALR.PRETRAINED_WEIGHTS",
    "CSALR.OVERWRITE",
    "CSALR.KEEP",
}

_host_default_setup = defaults.default_setup


def default_setup(cfg: CfgNode, args: Any) -> None:
    """Prepare a run as fast-reid's function does: log, random numbers, config file in OUTPUT_DIR.

    With ``--resume``, `cfg` first takes those settings from the checkpoint that the user has not given.

    Args:
        cfg: the settings; changed in place, also if they are frozen.
        args: the flags of the command line.

    Raises:
        UserError: OUTPUT_DIR cannot be written, or the checkpoint cannot be used.
    """
    with together():
        if not cfg.OUTPUT_DIR:
            raise UserError("config key 'OUTPUT_DIR' is empty; give the folder for checkpoints and logs.")
        if isinstance(cfg, Config):
            _choose_folder(cfg, getattr(args, "eval_only", False))
        if is_main():
            make_writable_folder(Path(cfg.OUTPUT_DIR), f"config key 'OUTPUT_DIR' {shown(cfg.OUTPUT_DIR)}")
        resumes = getattr(args, "resume", False) and not getattr(args, "eval_only", False)
        lines = take_settings(cfg) if resumes and isinstance(cfg, Config) else []
    if getattr(args, "config_file", ""):
        args.config_file = str(find_config(args.config_file))  # the host copies the file into the log
    with _long_records_in_file():
        _host_default_setup(cfg, args)
    if isinstance(cfg, Config):
        _describe(cfg)
    for line in lines:
        logger.info(line)


def _choose_folder(cfg: Config, evaluates: bool) -> None:
    """Set OUTPUT_DIR: by default it names model and data set, and an evaluation gets a subfolder of a training's."""
    name = cfg.OUTPUT_DIR
    if "OUTPUT_DIR" not in cfg.given and name == default_settings()["OUTPUT_DIR"]:
        name = os.path.join(name, f"{cfg.MODEL.META_ARCHITECTURE}_{'+'.join(map(file_stem, cfg.DATASETS.NAMES))}")
    if evaluates:
        name = str(evaluation_folder(Path(name).expanduser(), METRICS, "metrics.json", "last_checkpoint"))
    _assign(cfg, "OUTPUT_DIR", name)


def _assign(cfg: Config, key: str, value: Any) -> None:
    """Set a key of a config that may be frozen."""
    frozen = cfg.is_frozen()
    cfg.defrost()
    *path, leaf = key.split(".")
    node: Any = cfg
    for name in path:
        node = node[name]
    node[leaf] = value
    if frozen:
        cfg.freeze()


# Records of the host's set-up and of its models, which have hundreds of lines.
_LONG = ("Environment info:", "Command line arguments:", "Contents of args.config_file", "Running with full", "Model:")


def _is_short(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_LONG)


@contextmanager
def _long_records_in_file() -> Iterator[None]:
    """Set up fast-reid's log inside a with statement, so that its long records go to the log file alone."""
    host_set_up = defaults.setup_logger

    def set_up(*args: Any, **options: Any) -> logging.Logger:
        found: logging.Logger = host_set_up(*args, **options)
        for handler in found.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.addFilter(_is_short)
        return found

    with replaced(defaults, {"setup_logger": set_up}):
        yield


def _describe(cfg: Config) -> None:
    """Log the versions and the settings that differ from the defaults, and limit the workers of the data loader."""
    workers = loader_workers(
        cfg.DATALOADER.NUM_WORKERS,
        "DATALOADER.NUM_WORKERS",
        "DATALOADER.NUM_WORKERS" in cfg.given,
        local_world_size(),
        logger.info,
    )
    _assign(cfg, "DATALOADER.NUM_WORKERS", workers)
    changed = differing(cfg.leaves(), default_settings())
    logger.info(
        f"csalr_plugin {__version__}, fast-reid {fastreid.__version__}, torch {torch.__version__}\n"
        f"Settings that differ from fast-reid's defaults (all settings and the machine: {cfg.OUTPUT_DIR}/log.txt):\n"
        f"{changed}"
    )


def take_settings(cfg: Config) -> list[str]:
    """Take the settings that the user has not given from the last checkpoint in OUTPUT_DIR, if there is one.

    Returns:
        The lines for the log: the source of each setting on which the checkpoint and the user differ.

    Raises:
        UserError: the checkpoint cannot be used.
    """
    path = last_checkpoint(cfg.OUTPUT_DIR)
    if not path:
        return [f"--resume: OUTPUT_DIR {cfg.OUTPUT_DIR!r} holds no checkpoint; the training starts at epoch 0"]
    settings = recorded_settings(read_checkpoint(path))
    if not settings:
        return [f"{path} does not record its settings; those of this run count"]
    fresh = get_cfg()
    add_csalr_config(fresh)
    before = fresh.leaves()
    names = [key for key in training_keys(cfg) if key in before]
    frozen = cfg.is_frozen()
    cfg.defrost()
    lines = cfg.take_over(settings, names, before, f"Checkpoint {path!r}")
    if frozen:
        cfg.freeze()
    if settings.get("SOLVER.OPT", cfg.SOLVER.OPT) != cfg.SOLVER.OPT:
        raise UserError(
            f"config key 'SOLVER.OPT' is {cfg.SOLVER.OPT!r}, and {path} holds the state of {settings['SOLVER.OPT']}: "
            "resume with that optimizer, or start anew from its weights with MODEL.WEIGHTS and another OUTPUT_DIR."
        )
    cfg.set_resumes()
    return [f"Resuming from {path}", *lines]


def last_checkpoint(folder: str) -> str:
    """Return the path of the checkpoint that ``--resume`` goes on from, or an empty string.

    Raises:
        UserError: the file `last_checkpoint` in `folder` names no file.
    """
    tag = Path(folder) / "last_checkpoint"
    if not tag.is_file():
        return ""
    name = tag.read_text(encoding="utf-8", errors="replace").strip()
    path = os.path.join(folder, name)
    if not name or not os.path.isfile(path):
        others = sorted(file.name for file in Path(folder).glob("*.pth"))
        hint = f"write the name of one of these into it: {', '.join(others[-3:])}" if others else "there is none left"
        raise UserError(f"--resume: {str(tag)!r} names {shown(name)}, which is no checkpoint in this folder; {hint}.")
    return path


def training_settings(cfg: Config) -> dict[str, Any]:
    """Return the settings that a checkpoint records, ``{dotted key: value}``."""
    return recordable({key: cfg.lookup(key) for key in training_keys(cfg)})


def training_keys(cfg: Config) -> list[str]:
    """Return the settings that a checkpoint records."""
    return [key for key in cfg.leaves() if key not in _OF_THE_RUN]


def load_training(trainer: Any, path: str) -> None:
    """Load the state of a training from a checkpoint: weights, optimizer, learning rate, next epoch.

    Hyperparameters and the learning rate are those that the settings of `trainer` give at the next epoch.

    Args:
        trainer: fast-reid's `DefaultTrainer` before its training starts.
        path: of the checkpoint.

    Raises:
        UserError: the checkpoint cannot be read, or is of another network or optimizer.
    """
    checkpoint, network = read_checkpoint(path), unwrapped(trainer.model)
    if "epoch" not in checkpoint or "optimizer" not in checkpoint:
        missing = "epoch" if "epoch" not in checkpoint else "optimizer"
        raise UserError(
            f"--resume: {path!r} is no checkpoint of a training: it has no entry {missing!r}; start anew from its "
            "weights with MODEL.WEIGHTS."
        )
    trainer.start_epoch = check_epoch(checkpoint, path) + 1
    load_exactly(network, state_dict_of(checkpoint), path)
    load_optimizer_state(trainer.optimizer, checkpoint["optimizer"], path)
    if trainer.start_epoch < trainer.max_epoch:
        set_learning_rate(trainer)
    logger.info(f"Loaded {path}: {trainer.start_epoch} epochs are done")


def set_learning_rate(trainer: Any) -> None:
    """Take the schedulers of `trainer` to the learning rate at which the epoch `trainer.start_epoch` starts.

    They make as many steps as fast-reid's hook `LRScheduler` makes in the epochs before.
    """
    warmup, per_epoch = trainer.warmup_iters, trainer.iters_per_epoch
    if "warmup_sched" in trainer.scheduler:
        replay_schedule(trainer.scheduler["warmup_sched"], min(warmup, trainer.start_epoch * per_epoch))
    first = max(warmup // per_epoch, trainer.delay_epochs)  # epochs without a step
    replay_schedule(trainer.scheduler["lr_sched"], max(0, trainer.start_epoch - first))
