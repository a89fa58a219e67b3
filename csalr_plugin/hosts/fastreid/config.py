"""fast-reid's configuration and the plugin's node `CSALR`: keys in any case, every value checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fastreid.config import CfgNode, get_cfg
from fastreid.config.config import BASE_KEY
from fastreid.data.datasets import DATASET_REGISTRY
from fastreid.modeling.backbones import BACKBONE_REGISTRY
from fastreid.modeling.heads import REID_HEADS_REGISTRY
from fastreid.modeling.meta_arch import META_ARCH_REGISTRY

import csalr_plugin
from csalr_plugin.attention.batch_norm import world_size
from csalr_plugin.errors import UserError, shown, suggest
from csalr_plugin.hosts import keys
from csalr_plugin.hosts.config import CheckedConfig, flatten, read_yaml
from csalr_plugin.hosts.fastreid.attended import check_attention
from csalr_plugin.hosts.fastreid.datasets import data_root
from csalr_plugin.hosts.fastreid.meta_architecture import is_plugin_model
from csalr_plugin.hosts.fastreid.ranges import IDENTITY_SAMPLERS, check_of
from csalr_plugin.hosts.folder import is_folder_name
from csalr_plugin.hosts.keys import TEXT
from csalr_plugin.models import ATTENTIONS

_OUR_CHECKS = {
    **{f"CSALR.{key.name.upper()}": key.check for key in keys.KEYS},
    "CSALR.ATTENTION": keys.one_of(*ATTENTIONS),  # torchreid has it in the names of its models
    "MODEL.BACKBONE.WITH_CSALR": keys.BOOLEAN,
}

# Keys of the plugin that fast-reid's training loop does not support: the value they must have, and the reason.
_UNSUPPORTED = {
    "ACCUMULATE": (1, "fast-reid makes an optimizer step of every batch"),
    "COMPILE": (False, "fast-reid's loop calls the network with more than tensors"),
}


class Config(CheckedConfig, CfgNode):  # type: ignore[misc]  # fast-reid carries no types
    """fast-reid's settings, all in capitals, and the plugin's node `CSALR`.

    ``MODEL.NAME`` is another name of ``MODEL.META_ARCHITECTURE``, as in the plugin's other hosts.
    """

    @property
    def resumes(self) -> bool:
        """Whether the training resumes from a checkpoint, so that it needs no pretrained weights."""
        return bool(self.__dict__.get("_resumes", False))

    def set_resumes(self) -> None:
        """Record that the training resumes from a checkpoint. This is not a setting: it is not written to a file."""
        self.__dict__["_resumes"] = True

    def in_case(self, key: str) -> str:
        """Return `key` in capitals; MODEL.NAME is MODEL.META_ARCHITECTURE."""
        return "MODEL.META_ARCHITECTURE" if key.upper() == "MODEL.NAME" else key.upper()

    def checked(self, key: str, value: Any, current: Any) -> Any:
        """Return `value` as parsed by the check of `key`; a key without a check is parsed by fast-reid."""
        name = self.in_case(key)
        if check := _OUR_CHECKS.get(name) or check_of(name, current):
            given = check(key, value)
            return type(current)(given) if isinstance(current, (list, tuple)) else given
        value = self._decode_cfg_value(value)
        if type(value) is not type(current) and not {type(value), type(current)} <= {list, tuple}:
            raise UserError(f"config key {shown(key)} is {shown(value)}; it must be such as {current!r}.")
        return type(current)(value)

    def merge_from_file(self, cfg_filename: str | Path, allow_unsafe: bool = False) -> None:
        """Merge a YAML file and, before it, the file that its key ``_BASE_`` names.

        Args:
            cfg_filename: path of the file, or name of one of the plugin's own; see `find_config`.
            allow_unsafe: has no effect; a config file never runs code.

        Raises:
            UserError: a file is missing, is not YAML or names itself as its base; and the errors of `merge_from_list`.
        """
        contents: list[Mapping[str, Any]] = []
        path, seen = find_config(cfg_filename), set[Path]()
        while path.resolve() not in seen:
            seen.add(path.resolve())
            content = dict(read_yaml(path))
            base = content.pop(BASE_KEY, None)
            contents.append(content)
            if base is None:
                break
            named_by, path = path, path.parent / Path(TEXT(BASE_KEY, base)).expanduser()
            if not os.path.isfile(path):
                raise UserError(
                    f"config file {shown(str(named_by))}: its _BASE_ {shown(str(path))} does not exist; a relative "
                    "path starts at the folder of the config file."
                )
        else:
            raise UserError(f"config file {shown(str(path))} is its own _BASE_; remove that line.")
        for content in reversed(contents):
            self.merge_from_other_cfg(content)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge pairs ``[key, value, key, value, ...]``; a value may be text, as on the command line.

        Raises:
            UserError: for a flag after a key, a file in place of a key, an unknown key (with the nearest names), a
                value that is not allowed, or a key without a value.
        """
        words = [str(word) for word in cfg_list]
        if flag := next((word for word in words if word.startswith("--")), ""):
            raise UserError(f"flag {shown(flag)} stands after a config key; give the flags before the first key.")
        if words and (words[0].endswith(".pth") or os.path.isfile(words[0])):
            raise UserError(
                f"{shown(words[0])} is not a config key. --resume takes no file: it resumes from the last checkpoint "
                "in OUTPUT_DIR. To start from the weights of a file, give MODEL.WEIGHTS and the file."
            )
        super().merge_from_list(cfg_list)


def add_csalr_config(cfg: CfgNode) -> None:
    """Add the node `CSALR` and MODEL.BACKBONE.WITH_CSALR with their defaults to fast-reid's settings, in place.

    `cfg` then accepts keys in any case and checks every value that is merged.

    Args:
        cfg: the settings from ``fastreid.config.get_cfg()``.
    """
    cfg.CSALR = CfgNode({"ATTENTION": "csalr", **_in_capitals(keys.defaults())})
    cfg.MODEL.BACKBONE.WITH_CSALR = False
    cfg.CSALR.KEEP = "all"  # SOLVER.CHECKPOINT_PERIOD sets which epochs are saved
    # In place, as the function add_NAME_config of each project of fast-reid; yacs refuses a plain assignment.
    object.__setattr__(cfg, "__class__", Config)


@cache
def default_settings() -> Mapping[str, Any]:
    """Return the defaults of fast-reid and of the node `CSALR`, ``{dotted key: value}``."""
    cfg = get_cfg()
    add_csalr_config(cfg)
    return dict(flatten(cfg))


def _in_capitals(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name.upper(): _in_capitals(value) if isinstance(value, Mapping) else value for name, value in tree.items()}


def validate(cfg: CfgNode) -> None:
    """Check combinations of settings, names against fast-reid's registries, and settings that the host lacks.

    Raises:
        UserError: for the first setting that is not allowed.
    """
    ours = cfg.CSALR
    check_network(cfg)
    of_plugin = is_plugin_model(cfg.MODEL.META_ARCHITECTURE)
    if cfg.TEST.PRECISE_BN.ENABLED and not is_folder_name(cfg.TEST.PRECISE_BN.DATASET):
        _check_name("TEST.PRECISE_BN.DATASET", cfg.TEST.PRECISE_BN.DATASET, DATASET_REGISTRY, "folder:PATH")
    for key in ("SIZE_TRAIN", "SIZE_TEST"):
        size = cfg.INPUT[key]
        if of_plugin and (len(size) != 2 or min(size) < 1):
            raise UserError(f"config key 'INPUT.{key}' is {size}; it must be two positive integers: height, width.")
    _check_optimizer(cfg)
    for key in ("NAMES", "TESTS"):
        for name in cfg.DATASETS[key]:
            if not is_folder_name(name):
                _check_name(f"DATASETS.{key}", name, DATASET_REGISTRY, "folder:PATH")
    for key, (only, reason) in _UNSUPPORTED.items():
        value: Any = ours
        for part in key.split("."):
            value = value[part]
        if value != only:
            raise UserError(f"config key 'CSALR.{key}' is {value}; in fast-reid it must be {only}: {reason}.")
    if ours.AMP == "fp16":
        raise UserError(
            "config key 'CSALR.AMP' is 'fp16'; in fast-reid set SOLVER.AMP.ENABLED True, which has the loss scale that "
            "fp16 needs, or CSALR.AMP bf16."
        )
    if cfg.SOLVER.AMP.ENABLED and not torch.cuda.is_available():
        raise UserError(
            "config key 'SOLVER.AMP.ENABLED' is True, and fast-reid's mixed precision needs CUDA, which this machine "
            "lacks; set it to False, or set CSALR.AMP bf16, which does not need CUDA."
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and cfg.MODEL.DEVICE.startswith("cuda:") and int(cfg.MODEL.DEVICE.removeprefix("cuda:")) >= gpus:
        raise UserError(
            f"config key 'MODEL.DEVICE' is '{cfg.MODEL.DEVICE}'; the last GPU of this machine is cuda:{gpus - 1}."
        )
    if ours.SYNC_BATCH_NORM and not of_plugin and not cfg.MODEL.BACKBONE.WITH_CSALR:
        raise UserError(
            f"config key 'CSALR.SYNC_BATCH_NORM' is True, and {cfg.MODEL.META_ARCHITECTURE} is fast-reid's own model; "
            "set it to False, and MODEL.BACKBONE.NORM and MODEL.HEADS.NORM to syncBN."
        )
    _check_shares(cfg, world_size())
    root = Path(data_root())
    of_host = next((name for name in (*cfg.DATASETS.NAMES, *cfg.DATASETS.TESTS) if not is_folder_name(name)), None)
    if of_host is not None and not root.is_dir():
        raise UserError(
            f"dataset root '{root}' is not a folder: set the environment variable FASTREID_DATASETS to the folder that "
            f"holds {of_host}, or give other data with DATASETS.NAMES and DATASETS.TESTS."
        )


def check_network(cfg: CfgNode) -> None:
    """Check the groups, the names of the network's parts against fast-reid's registries, and its attention.

    Raises:
        UserError: for the first setting that is not allowed.
    """
    ours = cfg.CSALR
    if not cfg.MODEL.BACKBONE.WITH_CSALR:  # or the blocks check the channels of their own layers
        keys.check_groups(ours.GROUPS, ours.KEY_RATIO, tuple(ours.STAGES), node="CSALR")
    _check_name("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY)
    if not is_plugin_model(cfg.MODEL.META_ARCHITECTURE):
        _check_name("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY)
        _check_name("MODEL.HEADS.NAME", cfg.MODEL.HEADS.NAME, REID_HEADS_REGISTRY)
    check_attention(cfg)


def _check_optimizer(cfg: CfgNode) -> None:
    _check_name("SOLVER.OPT", cfg.SOLVER.OPT, usable_optimizers())
    if cfg.SOLVER.OPT == "SGD" and cfg.SOLVER.NESTEROV and not cfg.SOLVER.MOMENTUM:
        raise UserError(
            "config key 'SOLVER.MOMENTUM' is 0, and SOLVER.NESTEROV True needs a momentum; give one such as 0.9."
        )


@cache
def usable_optimizers() -> tuple[str, ...]:
    """Return the names of the optimizers of torch that can train a convolution in fast-reid's loop."""

    def can_train(optimizer: Any) -> bool:
        weight = torch.nn.Parameter(torch.zeros(1, 1, 1, 1))
        weight.grad = torch.ones_like(weight)
        try:
            optimizer([{"params": [weight], "lr": 0.001, "weight_decay": 0.0}], lr=0.001).step()
        except Exception:  # the type of the error depends on the optimizer
            return False
        return True

    optimizers = {name: one for name, one in vars(torch.optim).items() if isinstance(one, type)}
    return tuple(name for name in sorted(optimizers) if can_train(optimizers[name]))


def _check_shares(cfg: CfgNode, processes: int) -> None:
    """Check that the processes can share each batch equally. The samplers would make smaller batches or never end."""
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


def _check_name(key: str, name: str, registry: Any, *more: str) -> None:
    """Check that `name` is in a registry of fast-reid or a tuple of names, or one of `more`."""
    allowed = (*(registry if isinstance(registry, tuple) else registry._obj_map), *more)
    if name not in allowed:
        raise UserError(
            f"config key '{key}' is {shown(name)}; it must be one of {', '.join(allowed)}.{suggest(name, allowed)}"
        )


def find_config(path: str | Path) -> Path:
    """Return the file that `path` names: the path itself, or else the plugin's own file of that name.

    The plugin's own files are found by their bare name and as ``projects/fastreid/configs/NAME`` in every folder.

    Raises:
        UserError: there is no such file; the message lists the plugin's own.
    """
    given = Path(path).expanduser()
    if str(path) and os.path.isfile(given):  # False also for a name that is too long
        return given
    own = {file.name: file for file in sorted(own_config("").glob("*.yml"))}
    if given.name in own and given.parent.as_posix() in (".", "projects/fastreid/configs"):
        return own[given.name]
    raise UserError(
        f"config file {shown(str(path))} does not exist; give a .yml file with --config-file, or the name of one of "
        f"the plugin's own: {', '.join(own)}.{suggest(given.name, own)}"
    )


def own_config(name: str) -> Path:
    """Return the plugin's own config file `name`, in an installed package or in a source checkout."""
    package = Path(csalr_plugin.__file__).resolve().parent
    folders = [folder / "projects" / "fastreid" / "configs" for folder in (package, package.parent)]
    return next(folder / name for folder in folders if folder.is_dir())
