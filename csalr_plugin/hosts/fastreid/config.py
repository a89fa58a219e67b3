"""fast-reid's configuration with the plugin's node beside it: any case, checked, one line an error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from fastreid.config import CfgNode
from fastreid.data.datasets import DATASET_REGISTRY
from fastreid.modeling.meta_arch import META_ARCH_REGISTRY

import csalr_plugin
from csalr_plugin.attention.batch_norm import world_size
from csalr_plugin.errors import UserError, suggest
from csalr_plugin.hosts import keys
from csalr_plugin.hosts.config import CheckedConfig
from csalr_plugin.hosts.folder import is_own
from csalr_plugin.hosts.keys import integer, list_of, number, one_of
from csalr_plugin.models import MODEL_NAMES

_OUR_CHECKS = {f"CSALR.{key.name.upper()}": key.check for key in keys.KEYS}

# What fast-reid's own keys may be, where their type alone says too little: those that it finds out late, or by an
# error without a name. Every other value is checked as fast-reid checks it, by the type of its default.
_HOST_CHECKS = {
    "MODEL.LOSSES.NAME": list_of(one_of("CrossEntropyLoss", "TripletLoss", "CircleLoss", "Cosface")),
    "DATALOADER.SAMPLER_TRAIN": one_of(
        "TrainingSampler",
        "NaiveIdentitySampler",
        "BalancedIdentitySampler",
        "SetReWeightSampler",
        "ImbalancedDatasetSampler",
    ),
    "DATALOADER.NUM_INSTANCE": integer(1),
    "DATALOADER.NUM_WORKERS": integer(0),
    "SOLVER.MAX_EPOCH": integer(1),
    "SOLVER.BASE_LR": number(above=0),
    "SOLVER.HEADS_LR_FACTOR": number(0),
    "SOLVER.SCHED": one_of("MultiStepLR", "CosineAnnealingLR"),
    "SOLVER.STEPS": list_of(integer(1)),
    "SOLVER.CHECKPOINT_PERIOD": integer(1),
    "SOLVER.IMS_PER_BATCH": integer(2),
    "TEST.EVAL_PERIOD": integer(1),
    "TEST.IMS_PER_BATCH": integer(1),
    "TEST.METRIC": one_of("cosine", "euclidean"),
}

IDENTITY_SAMPLERS = ("NaiveIdentitySampler", "BalancedIdentitySampler")

# Keys of the plugin that only another value than this one needs what fast-reid's loop does not do.
_LEFT_TO_THE_HOST = {
    "ACCUMULATE": (1, "fast-reid makes an optimizer step of every batch"),
    "COMPILE": (False, "fast-reid's loop calls the network with more than tensors"),
    "TENSORBOARD.MAPS_EVERY": (0, "fast-reid writes its own TensorBoard log"),
    "TENSORBOARD.PROJECTOR": (False, "fast-reid writes its own TensorBoard log"),
}


class Config(CheckedConfig, CfgNode):  # type: ignore[misc]  # fast-reid carries no types
    """fast-reid's settings, all in capitals, and the plugin's node `CSALR`.

    ``MODEL.NAME`` is taken for ``MODEL.META_ARCHITECTURE``, as in the plugin's other hosts.
    """

    def in_case(self, key: str) -> str:
        """Return `key` in capitals; MODEL.NAME is MODEL.META_ARCHITECTURE."""
        return "MODEL.META_ARCHITECTURE" if key.upper() == "MODEL.NAME" else key.upper()

    def checked(self, key: str, value: Any, current: Any) -> Any:
        """Return `value` as the plugin's check takes it or, for fast-reid's other keys, as fast-reid does."""
        name = self.in_case(key)
        if check := _OUR_CHECKS.get(name) or _HOST_CHECKS.get(name):
            given = check(key, value)
            return type(current)(given) if isinstance(current, (list, tuple)) else given
        value = self._decode_cfg_value(value)
        if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        pair = (type(value), type(current))
        if pair[0] is not pair[1] and pair not in ((list, tuple), (tuple, list)):
            wanted = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
            raise UserError(
                f"config key '{key}' is {value!r}; it must be {wanted.get(type(current), f'such as {current!r}')}."
            )
        return type(current)(value)

    def merge_from_file(self, cfg_filename: str | Path, allow_unsafe: bool = False) -> None:
        """Merge a YAML file and what it names as ``_BASE_``.

        Args:
            cfg_filename: its path.
            allow_unsafe: fast-reid's: it must stay False, for no file runs code.

        Raises:
            UserError: for a file that is missing or not YAML, and as `merge_from_list`.
        """
        path = str(cfg_filename)
        if not path or not Path(path).is_file():
            raise UserError(f"config file '{path}' does not exist; give the path of a .yml file with --config-file.")
        try:
            content = CfgNode.load_yaml_with_base(path)
        except FileNotFoundError as error:
            raise UserError(
                f"config file '{path}': the file '{error.filename}' that it names as _BASE_ does not exist; the path "
                "is taken from the folder of the file that names it."
            ) from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark else ""
            reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or "not text"
            raise UserError(f"config file '{path}'{where} cannot be read as YAML: {reason}.") from None
        except (AssertionError, TypeError, AttributeError):
            content = None
        if not isinstance(content, Mapping):
            raise UserError(
                f"config file '{path}' must hold a mapping of config keys, such as 'MODEL: {{META_ARCHITECTURE: pcb}}'."
            )
        self.merge_from_other_cfg(content)


def add_csalr_config(cfg: CfgNode) -> None:
    """Add the plugin's node `CSALR` with its defaults to fast-reid's settings, in place.

    From then on `cfg` takes keys in any case, checks each value when it is merged, and tells a mistake in one line.

    Args:
        cfg: from ``fastreid.config.get_cfg()``.
    """
    cfg.CSALR = CfgNode(_in_capitals(keys.defaults()))
    object.__setattr__(cfg, "__class__", Config)  # in place, as a project's add_NAME_config does; yacs refuses it


def _in_capitals(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name.upper(): _in_capitals(value) if isinstance(value, Mapping) else value for name, value in tree.items()}


def validate(cfg: CfgNode) -> None:
    """Check what needs several settings, fast-reid's registries, or is another's in this host.

    Raises:
        UserError: for the first setting that is not allowed.
    """
    ours = cfg.CSALR
    keys.check_groups(ours.GROUPS, ours.KEY_RATIO, tuple(ours.STAGES), node="CSALR")
    models = tuple(META_ARCH_REGISTRY._obj_map)
    _check_name("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, models)
    for key in ("SIZE_TRAIN", "SIZE_TEST"):
        size = cfg.INPUT[key]
        if cfg.MODEL.META_ARCHITECTURE in MODEL_NAMES and (len(size) != 2 or min(size) < 1):
            raise UserError(f"config key 'INPUT.{key}' is {size}; it must be two positive integers: height, width.")
    classes = {name: one for name, one in vars(torch.optim).items() if isinstance(one, type)}
    optimizers = [name for name, one in classes.items() if issubclass(one, torch.optim.Optimizer)]
    _check_name("SOLVER.OPT", cfg.SOLVER.OPT, tuple(sorted({*optimizers} - {"Optimizer"})))
    for key in ("NAMES", "TESTS"):
        for name in cfg.DATASETS[key]:
            if not is_own(name):
                _check_name(f"DATASETS.{key}", name, (*DATASET_REGISTRY._obj_map, "folder:PATH"))
    for key, (only, reason) in _LEFT_TO_THE_HOST.items():
        value: Any = ours
        for part in key.split("."):
            value = value[part]
        if value != only:
            raise UserError(f"config key 'CSALR.{key}' is {value}; inside fast-reid it must be {only}: {reason}.")
    if ours.AMP == "fp16":
        raise UserError(
            "config key 'CSALR.AMP' is 'fp16'; inside fast-reid set SOLVER.AMP.ENABLED True, which has the loss scale "
            "that fp16 needs, or CSALR.AMP bf16."
        )
    if cfg.SOLVER.AMP.ENABLED and not torch.cuda.is_available():
        raise UserError(
            "config key 'SOLVER.AMP.ENABLED' is True, and fast-reid's mixed precision needs CUDA, which is not there; "
            "set it to False, or CSALR.AMP bf16, which needs none."
        )
    if ours.SYNC_BATCH_NORM and cfg.MODEL.META_ARCHITECTURE not in MODEL_NAMES:
        raise UserError(
            f"config key 'CSALR.SYNC_BATCH_NORM' is True, and {cfg.MODEL.META_ARCHITECTURE} is fast-reid's own model; "
            "set it to False, and MODEL.BACKBONE.NORM and MODEL.HEADS.NORM to syncBN."
        )
    _check_shares(cfg, world_size())
    root = Path(os.environ.get("FASTREID_DATASETS", "datasets"))
    of_host = next((name for name in (*cfg.DATASETS.NAMES, *cfg.DATASETS.TESTS) if not is_own(name)), None)
    if of_host is not None and not root.is_dir():
        raise UserError(
            f"dataset root '{root}' is not a folder: set the environment variable FASTREID_DATASETS to the folder that "
            f"holds {of_host}, or give other data with DATASETS.NAMES and DATASETS.TESTS."
        )


def _check_shares(cfg: CfgNode, processes: int) -> None:
    """Check that each process has its share of every batch; the samplers would make smaller ones, or wait for ever."""
    batch = cfg.SOLVER.IMS_PER_BATCH
    if batch % processes or batch < 2 * processes:
        raise UserError(
            f"config key 'SOLVER.IMS_PER_BATCH' is {batch}, the images of all {processes} processes; it must be a "
            f"multiple of {processes}, at least {2 * processes}: give {max(2, -(-batch // processes)) * processes}."
        )
    share, sampler = batch // processes, cfg.DATALOADER.SAMPLER_TRAIN
    if sampler in IDENTITY_SAMPLERS and share % cfg.DATALOADER.NUM_INSTANCE:
        raise UserError(
            f"config key 'DATALOADER.NUM_INSTANCE' is {cfg.DATALOADER.NUM_INSTANCE}; {sampler} needs a divisor of "
            f"{share}, the images of a batch in each process: SOLVER.IMS_PER_BATCH {batch} shared among {processes}."
        )
    if processes > cfg.TEST.IMS_PER_BATCH:
        raise UserError(
            f"config key 'TEST.IMS_PER_BATCH' is {cfg.TEST.IMS_PER_BATCH}, less than the {processes} processes that "
            f"share it; give {processes} or more."
        )


def _check_name(key: str, name: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        raise UserError(
            f"config key '{key}' is '{name}'; it must be one of {', '.join(allowed)}.{suggest(name, allowed)}"
        )


def own_config(name: str) -> Path:
    """Return the plugin's own config file `name`, in an installed package or in a source checkout."""
    package = Path(csalr_plugin.__file__).resolve().parent
    folders = [folder / "projects" / "fastreid" / "configs" for folder in (package, package.parent)]
    return next(folder / name for folder in folders if folder.is_dir())
