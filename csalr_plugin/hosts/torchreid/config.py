"""torchreid's configuration and the plugin's node `csalr`: keys in any case, every value checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import csalr_plugin
from csalr_plugin.errors import UserError, shown, suggest
from csalr_plugin.hosts import PREFIX, keys, plugin_model
from csalr_plugin.hosts.config import CheckedConfig, read_yaml
from csalr_plugin.hosts.folder import is_folder_name
from csalr_plugin.hosts.keys import FOLDER, MANY, PATH, TEXT, Check, integer, list_of, number, one_of
from csalr_plugin.models import MODEL_NAMES, split_attention

# The keys and defaults of the host's scripts/default_config.py, which its PyPI package does not contain.
HOST_DEFAULTS: dict[str, Any] = {
    "use_gpu": True,
    "model": {"name": "resnet50", "pretrained": True, "load_weights": "", "resume": ""},
    "data": {
        "type": "image",
        "root": "reid-data",
        "sources": ["market1501"],
        "targets": ["market1501"],
        "workers": 4,
        "split_id": 0,
        "height": 256,
        "width": 128,
        "combineall": False,
        "transforms": ["random_flip"],
        "k_tfm": 1,
        "norm_mean": [0.485, 0.456, 0.406],
        "norm_std": [0.229, 0.224, 0.225],
        "save_dir": "log",
        "load_train_targets": False,
    },
    "market1501": {"use_500k_distractors": False},
    "cuhk03": {"labeled_images": False, "classic_split": False, "use_metric_cuhk03": False},
    "sampler": {
        "train_sampler": "RandomSampler",
        "train_sampler_t": "RandomSampler",
        "num_instances": 4,
        "num_cams": 1,
        "num_datasets": 1,
    },
    "video": {"seq_len": 15, "sample_method": "evenly", "pooling_method": "avg"},
    "train": {
        "optim": "adam",
        "lr": 3e-4,
        "weight_decay": 5e-4,
        "max_epoch": 60,
        "start_epoch": 0,
        "batch_size": 32,
        "fixbase_epoch": 0,
        "open_layers": ["classifier"],
        "staged_lr": False,
        "new_layers": ["classifier"],
        "base_lr_mult": 0.1,
        "lr_scheduler": "single_step",
        "stepsize": [20],
        "gamma": 0.1,
        "print_freq": 20,
        "seed": 1,
    },
    "sgd": {"momentum": 0.9, "dampening": 0.0, "nesterov": False},
    "rmsprop": {"alpha": 0.99},
    "adam": {"beta1": 0.9, "beta2": 0.999},
    "loss": {
        "name": "softmax",
        "softmax": {"label_smooth": True},
        "triplet": {"margin": 0.3, "weight_t": 1.0, "weight_x": 0.0},
    },
    "test": {
        "batch_size": 100,
        "dist_metric": "euclidean",
        "normalize_feature": False,
        "ranks": [1, 5, 10, 20],
        "evaluate": False,
        "eval_freq": -1,
        "start_eval": 0,
        "rerank": False,
        "visrank": False,
        "visrank_topk": 10,
    },
}

_SAMPLER = one_of(
    "RandomSampler",
    "SequentialSampler",
    "RandomIdentitySampler",
    "RandomDomainSampler",
    "RandomDatasetSampler",
)


def _parse_period(value: Any) -> int:
    period: int = integer(-1, MANY).parse(value)
    if period == 0:
        raise ValueError
    return period


_ONE_VIEW = Check("1: torchreid's engines train on one view of an image", integer(1, 1).parse)
_PERIOD = Check("-1, which evaluates after the last epoch alone, or an integer of at least 1", _parse_period)

# Allowed values of the host's own keys whose type alone says too little. The host finds most of these mistakes late,
# after hours of training (ranks), or never (it ignores a mistyped transform).
HOST_CHECKS: dict[str, Check] = {
    "model.load_weights": PATH,
    "model.resume": PATH,
    "data.type": one_of("image", "video"),
    "data.root": FOLDER,
    "data.sources": list_of(TEXT, least=1),
    "data.targets": list_of(TEXT, least=1),
    "data.workers": integer(0, 1000),
    "data.split_id": integer(0, MANY),
    "data.height": integer(1, 10_000),
    "data.width": integer(1, 10_000),
    "data.k_tfm": _ONE_VIEW,
    "data.norm_mean": list_of(number(), 3),
    "data.norm_std": list_of(number(above=0), 3),
    "data.save_dir": FOLDER,
    "data.transforms": list_of(one_of("random_flip", "random_crop", "random_patch", "color_jitter", "random_erase")),
    "sampler.train_sampler": _SAMPLER,
    "sampler.train_sampler_t": _SAMPLER,
    "sampler.num_instances": integer(1, MANY),
    "sampler.num_cams": integer(1, MANY),
    "sampler.num_datasets": integer(1, MANY),
    "video.seq_len": integer(1, MANY),
    "video.sample_method": one_of("evenly", "random", "all"),
    "video.pooling_method": one_of("avg", "max"),
    "train.optim": one_of("adam", "amsgrad", "sgd", "rmsprop", "radam"),
    "train.lr": number(above=0),
    "train.weight_decay": number(0),
    "train.max_epoch": integer(1, MANY),
    "train.start_epoch": integer(0, MANY),
    "train.batch_size": integer(1, MANY),
    "train.fixbase_epoch": integer(0, MANY),
    "train.open_layers": list_of(TEXT, least=1),
    "train.base_lr_mult": number(0),
    "train.lr_scheduler": one_of("single_step", "multi_step", "cosine"),
    "train.stepsize": list_of(integer(1, MANY), least=1),
    "train.gamma": number(high=1, above=0),
    "train.print_freq": integer(1, MANY),
    "train.seed": integer(0, 2**32 - 1),  # NumPy's range
    "sgd.momentum": number(0, below=1),
    "sgd.dampening": number(0, 1),
    "rmsprop.alpha": number(above=0, below=1),
    "adam.beta1": number(0, below=1),
    "adam.beta2": number(0, below=1),
    "loss.name": one_of("softmax", "triplet"),
    "loss.triplet.margin": number(0),
    "loss.triplet.weight_t": number(0),
    "loss.triplet.weight_x": number(0),
    "test.batch_size": integer(1, MANY),
    "test.dist_metric": one_of("euclidean", "cosine"),
    "test.ranks": list_of(integer(1, 50), least=1),
    "test.eval_freq": _PERIOD,
    "test.start_eval": integer(0, MANY),
    "test.visrank_topk": integer(1, MANY),
}


def _below(node: str, *names: str) -> dict[str, str]:
    return {name: f"{node}.{name}" for name in names}


# Keyword arguments of the host's functions, and the config key of each.
_DATA = {
    **_below("data", "root", "sources", "targets", "height", "width", "transforms", "norm_mean", "norm_std"),
    **_below("data", "split_id", "combineall", "workers"),
    **_below("sampler", "train_sampler", "num_instances", "num_cams", "num_datasets"),
    "use_gpu": "use_gpu",
    "batch_size_train": "train.batch_size",
    "batch_size_test": "test.batch_size",
}
IMAGE_DATA = {
    **_DATA,
    **_below("data", "k_tfm", "load_train_targets"),
    **_below("sampler", "train_sampler_t"),
    "cuhk03_labeled": "cuhk03.labeled_images",
    "cuhk03_classic_split": "cuhk03.classic_split",
    "market1501_500k": "market1501.use_500k_distractors",
}
VIDEO_DATA = {**_DATA, **_below("video", "seq_len", "sample_method")}
OPTIMIZER = {
    **_below("train", "optim", "lr", "weight_decay", "staged_lr", "new_layers", "base_lr_mult"),
    "momentum": "sgd.momentum",
    "sgd_dampening": "sgd.dampening",
    "sgd_nesterov": "sgd.nesterov",
    "rmsprop_alpha": "rmsprop.alpha",
    "adam_beta1": "adam.beta1",
    "adam_beta2": "adam.beta2",
}
LR_SCHEDULER = _below("train", "lr_scheduler", "stepsize", "gamma", "max_epoch")
ENGINE_RUN = {
    **_below("train", "max_epoch", "start_epoch", "fixbase_epoch", "open_layers", "print_freq"),
    **_below("test", "start_eval", "eval_freq", "dist_metric", "normalize_feature", "ranks", "rerank"),
    **_below("test", "visrank", "visrank_topk"),
    "save_dir": "data.save_dir",
    "test_only": "test.evaluate",
    "use_metric_cuhk03": "cuhk03.use_metric_cuhk03",
}


class Config(CheckedConfig):
    """torchreid's settings, all in lower case, and the plugin's node `csalr`.

    Every merge checks type and range; `validate` checks combinations of keys, and names against the host's registries.
    """

    def in_case(self, key: str) -> str:
        """Return `key` in lower case."""
        return key.lower()

    def checked(self, key: str, value: Any, current: Any) -> Any:
        """Return `value` as parsed by the check of `key`, or by the type of `current` for a key without a check."""
        return _check_for(key.lower(), current)(key, value)

    def merge_from_file(self, cfg_filename: str | Path) -> None:
        """Merge a YAML file: the path itself, or one below ``configs/`` of the plugin.

        Raises:
            UserError: for a file that is missing, not YAML or not a mapping, and as `merge_from_list`.
        """
        self.merge_from_other_cfg(read_yaml(find_config(cfg_filename)))

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of every setting, ``{dotted key: value}``."""
        defaults: dict[str, Any] = self.__dict__["_defaults"]
        return defaults

    @property
    def origins(self) -> list[str]:
        """Lines for the log: the source of each setting on which the user and a resumed checkpoint differ."""
        lines: list[str] = self.__dict__.setdefault("_origins", [])
        return lines

    def keyword_arguments(self, table: Mapping[str, str]) -> dict[str, Any]:
        """Return the keyword arguments that one of this module's tables describes."""
        return {name: self.lookup(key) for name, key in table.items()}

    def validate(self) -> None:
        """Check every setting alone, combinations of settings, and names against the host's registries.

        Raises:
            UserError: for the first setting that is not allowed, or when torchreid is not installed.
        """
        for key, value in self.leaves().items():
            self._assign(key, value)
        settings = self.leaves()
        ours, name = self.csalr, settings["model.name"].removeprefix(PREFIX)
        attended = name not in MODEL_NAMES and split_attention(name)[1] != ""
        if not attended:
            keys.check_groups(ours.groups, ours.key_ratio, ours.stages)
        if attended and ours.stages != self.defaults["csalr.stages"]:
            raise UserError(
                f"config key 'csalr.stages' is {ours.stages}, and {name} is no PCB: name its layers with csalr.after."
            )
        if ours.after and not attended:
            give = "csalr.stages" if name in MODEL_NAMES else "a model with attention, such as osnet_x1_0_csalr"
            raise UserError(
                f"config key 'csalr.after' is {shown(ours.after)}, and {shown(name)} ignores it; give {give}."
            )
        _check_combinations(settings)
        self._check_names(settings)

    def _check_names(self, settings: Mapping[str, Any]) -> None:
        # Imported late, so that a mistyped key is reported before torch is loaded.
        from csalr_plugin.hosts.torchreid import dataset_names, model_registry

        models, name = model_registry(), settings["model.name"]
        if name not in models:
            # Not the names with attention, which are three times as many.
            listed = [one for one in models if plugin_model(models, one) in (None, *MODEL_NAMES)]
            raise UserError(
                f"config key 'model.name' is {shown(name)}; it must be one of {', '.join(listed)}, or a name of "
                f"torchreid followed by _sa, _csa or _csalr.{suggest(name, models)}"
            )
        datasets = dataset_names(settings["data.type"])
        for key in ("data.sources", "data.targets"):
            for name in settings[key]:
                if is_folder_name(name) and settings["data.type"] == "video":
                    raise UserError(f"config key '{key}' is '{name}', which has images, and data.type is 'video'.")
                if name not in datasets and not is_folder_name(name):
                    raise UserError(_unknown(key, name, datasets))


def _check_combinations(settings: Mapping[str, Any]) -> None:
    """Check settings that the host refuses by an assertion, or that make it train on nothing.

    Raises:
        UserError: for the first combination that is not allowed.
    """
    batch, instances = settings["train.batch_size"], settings["sampler.num_instances"]
    sampler, triplet = settings["sampler.train_sampler"], settings["loss.name"] == "triplet"

    def refuse(key: str, must: str) -> None:
        raise UserError(f"config key '{key}' is {shown(settings[key])}; it must be {must}.")

    if settings["data.type"] == "image" and batch < 2:
        refuse("train.batch_size", "at least 2: batch norm needs two images in training")
    if (triplet or sampler == "RandomIdentitySampler") and batch < instances:
        refuse("train.batch_size", f"at least {instances}, the value of 'sampler.num_instances'")
    if triplet and batch < 2 * instances:
        two = f"{2 * instances}, twice 'sampler.num_instances'"
        refuse("train.batch_size", f"at least {two}: the triplet loss needs two identities in a batch")
    for name, key in (("RandomDomainSampler", "sampler.num_cams"), ("RandomDatasetSampler", "sampler.num_datasets")):
        if sampler == name and batch % settings[key]:
            refuse("train.batch_size", f"a multiple of {settings[key]}, the value of '{key}'")
    if triplet and settings["loss.triplet.weight_t"] + settings["loss.triplet.weight_x"] == 0:
        refuse("loss.triplet.weight_t", "greater than 0 where 'loss.triplet.weight_x' is 0")
    if triplet and settings["loss.triplet.weight_x"] == 0 and settings["train.fixbase_epoch"]:
        refuse(
            "train.fixbase_epoch", "0 where 'loss.triplet.weight_x' is 0: the loss does not depend on the classifier"
        )
    if settings["train.optim"] == "sgd" and settings["sgd.nesterov"]:
        if settings["sgd.momentum"] == 0:
            refuse("sgd.momentum", "greater than 0 where 'sgd.nesterov' is True")
        if settings["sgd.dampening"]:
            refuse("sgd.dampening", "0 where 'sgd.nesterov' is True")
    if settings["test.visrank"] and not settings["test.evaluate"]:
        refuse("test.visrank", "False, unless test.evaluate True is given: only an evaluation draws ranked results")
    resumes, start, last = settings["model.resume"], settings["train.start_epoch"], settings["train.max_epoch"]
    if resumes and start:
        refuse("train.start_epoch", "0 together with 'model.resume', whose checkpoint says how many epochs are done")
    if settings["model.name"].startswith("pcb_rpp") and not settings["test.evaluate"]:
        keys.check_phases(
            "train.max_epoch", last, "csalr.rpp.pcb_epochs", settings["csalr.rpp.pcb_epochs"], settings["model.name"]
        )
    if start >= last and not settings["test.evaluate"]:
        refuse("train.start_epoch", f"less than 'train.max_epoch', {last}, or no epoch is trained")


_OUR_CHECKS = {f"csalr.{key.name}": key.check for key in keys.KEYS}


def _check_for(key: str, current: Any) -> Check:
    """Return the check of `key` from the tables, or else one for the type of `current`."""
    return _OUR_CHECKS.get(key) or HOST_CHECKS.get(key) or _check_type(current)


def _check_type(current: Any) -> Check:
    if isinstance(current, bool):
        return keys.BOOLEAN
    if isinstance(current, int):
        return integer()
    if isinstance(current, float):
        return number()
    if isinstance(current, (list, tuple)):
        return list_of(_check_type(current[0]) if current else TEXT)
    return TEXT


def _unknown(key: str, name: str, allowed: Sequence[str]) -> str:
    own = " or folder:PATH" if key.startswith("data.") else ""
    return f"config key '{key}' is {shown(name)}; it must be one of {', '.join(allowed)}{own}.{suggest(name, allowed)}"


# Settings that describe a run and not the training: its machine, its folders, its purpose. A checkpoint does not set
# them when a training is resumed.
_OF_THE_RUN = {
    "use_gpu",
    "model.load_weights",
    "model.pretrained",
    "model.resume",
    "data.root",
    "data.save_dir",
    "data.workers",
    "train.start_epoch",
    "test.evaluate",
    "test.visrank",
    "csalr.pretrained_weights",
    "csalr.compile",
    "csalr.keep",
    "csalr.overwrite",
}


def training_keys(config: Config) -> list[str]:
    """Return the settings that a resumed training takes from its checkpoint where the user gives none."""
    return [key for key in config.leaves() if key not in _OF_THE_RUN]


def find_config(path: str | Path) -> Path:
    """Return the file that `path` names: the path itself, or else the plugin's own file below ``configs/``.

    Raises:
        UserError: there is no such file; the message lists the plugin's own.
    """
    given = Path(path).expanduser()
    if os.path.isfile(given):  # False also for a name that is too long
        return given
    own = _own_configs()
    name = given.as_posix()
    for root in own:
        if given.parts[:1] == ("configs",) and os.path.isfile(root / Path(*given.parts[1:])):
            return root / Path(*given.parts[1:])
    found = sorted({f"configs/{file.relative_to(root).as_posix()}" for root in own for file in root.rglob("*.yaml")})
    hint = suggest(name, found) or (f" The plugin's own: {', '.join(found)}." if found else "")
    raise UserError(f"config file '{path}' does not exist; give the path of a .yaml file.{hint}")


def _own_configs() -> list[Path]:
    """Return the folders of the plugin's own configs: of an installed package and of a source checkout."""
    package = Path(csalr_plugin.__file__).resolve().parent
    folders = (package / "configs", package.parent / "configs")
    return [folder for folder in folders if (folder / "torchreid").is_dir()]


def default_config() -> Config:
    """Return all of torchreid's settings with their defaults, and the plugin's node `csalr`."""
    return with_plugin_keys(HOST_DEFAULTS)


def with_plugin_keys(host: Mapping[str, Any]) -> Config:
    """Return a `Config` of the host's settings and the plugin's node `csalr`."""
    config = Config({**_plain(host), "csalr": keys.defaults()})
    config.__dict__["_defaults"] = config.leaves()
    return config


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) if isinstance(value, Mapping) else value for name, value in tree.items()}


_active: Config | None = None


def active_config() -> Config:
    """Return the config that models are built with: the one that was set last, or else the default settings."""
    return default_config() if _active is None else _active


def set_active_config(config: Config | None) -> Config | None:
    """Set the config that the registry builds models with, None for the defaults; return the previous one."""
    global _active
    previous, _active = _active, config
    return previous
