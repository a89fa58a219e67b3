"""torchreid's configuration with the plugin's node beside it: any case, checked, one line an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import csalr_plugin
from csalr_plugin.errors import UserError, suggest
from csalr_plugin.hosts import keys
from csalr_plugin.hosts.config import CheckedConfig
from csalr_plugin.hosts.keys import Check, integer, list_of, number, one_of

# The keys and defaults of the host's scripts/default_config.py, which its PyPI package leaves out.
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

# What the host's own keys may be, where their type alone says too little. The host finds most of these
# out late, after hours of training (ranks), or never (a mistyped transform is ignored).
HOST_CHECKS: dict[str, Check] = {
    "data.type": one_of("image", "video"),
    "data.workers": integer(0),
    "data.height": integer(1),
    "data.width": integer(1),
    "data.k_tfm": integer(1),
    "data.transforms": list_of(one_of("random_flip", "random_crop", "random_patch", "color_jitter", "random_erase")),
    "sampler.train_sampler": _SAMPLER,
    "sampler.train_sampler_t": _SAMPLER,
    "sampler.num_instances": integer(1),
    "video.sample_method": one_of("evenly", "random", "all"),
    "video.pooling_method": one_of("avg", "max"),
    "train.optim": one_of("adam", "amsgrad", "sgd", "rmsprop", "radam"),
    "train.lr": number(above=0),
    "train.weight_decay": number(0),
    "train.max_epoch": integer(0),
    "train.start_epoch": integer(0),
    "train.batch_size": integer(1),
    "train.fixbase_epoch": integer(0),
    "train.base_lr_mult": number(0),
    "train.lr_scheduler": one_of("single_step", "multi_step", "cosine"),
    "train.stepsize": list_of(integer(1)),
    "train.gamma": number(above=0),
    "train.print_freq": integer(1),
    "train.seed": integer(0),
    "loss.name": one_of("softmax", "triplet"),
    "test.batch_size": integer(1),
    "test.dist_metric": one_of("euclidean", "cosine"),
    "test.ranks": list_of(integer(1, 50)),
    "test.visrank_topk": integer(1),
}


def _below(node: str, *names: str) -> dict[str, str]:
    return {name: f"{node}.{name}" for name in names}


# Keyword arguments of the host's functions, and the key that each is read from.
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
    """torchreid's settings, all in small letters, and the plugin's node `csalr`.

    Every merge checks type and range at once; `validate` checks what needs several keys, or the host.
    """

    def in_case(self, key: str) -> str:
        """Return `key` in small letters."""
        return key.lower()

    def checked(self, key: str, value: Any, current: Any) -> Any:
        """Return `value` as the key's own check, or else the type that it has now, takes it."""
        return _check_for(key.lower(), current)(key, value)

    def merge_from_file(self, cfg_filename: str | Path) -> None:
        """Merge a YAML file: a path as it stands, or one below ``configs/`` of the plugin.

        Raises:
            UserError: for a file that is missing, not YAML or not a mapping, and as `merge_from_list`.
        """
        self.merge_from_other_cfg(_read_yaml(find_config(cfg_filename)))

    def keyword_arguments(self, table: Mapping[str, str]) -> dict[str, Any]:
        """Return the keyword arguments that one of this module's tables describes."""
        return {name: self.lookup(key) for name, key in table.items()}

    def validate(self) -> None:
        """Check every setting alone, against the others, and names against the host's registries.

        Raises:
            UserError: for the first setting that is not allowed, or when torchreid is not installed.
        """
        for key, value in self.leaves().items():
            self._assign(key, value)
        settings = self.leaves()
        ours = self.csalr
        keys.check_groups(ours.groups, ours.key_ratio, ours.stages)
        self._check_names(settings)
        if settings["loss.name"] == "triplet" and settings["train.batch_size"] < 2 * settings["sampler.num_instances"]:
            raise UserError(
                f"config key 'train.batch_size' is {settings['train.batch_size']}; it must be at least "
                f"{2 * settings['sampler.num_instances']}, twice 'sampler.num_instances': the triplet loss "
                "needs two identities in a batch."
            )

    def _check_names(self, settings: Mapping[str, Any]) -> None:
        # Imported late: a mistyped key is told before torch is loaded.
        from csalr_plugin.hosts.torchreid import dataset_names, model_registry

        models = tuple(model_registry())
        if settings["model.name"] not in models:
            raise UserError(_unknown("model.name", settings["model.name"], models))
        datasets = dataset_names(settings["data.type"])
        for key in ("data.sources", "data.targets"):
            for name in settings[key]:
                if name not in datasets:
                    raise UserError(_unknown(key, name, datasets))


_OUR_CHECKS = {f"csalr.{key.name}": key.check for key in keys.KEYS}


def _check_for(key: str, current: Any) -> Check:
    """The table's check, or else the type that the key has now."""
    return _OUR_CHECKS.get(key) or HOST_CHECKS.get(key) or _check_type(current)


def _check_type(current: Any) -> Check:
    if isinstance(current, bool):
        return keys.BOOLEAN
    if isinstance(current, int):
        return integer()
    if isinstance(current, float):
        return number()
    if isinstance(current, (list, tuple)):
        return list_of(_check_type(current[0]) if current else keys.TEXT)
    return keys.TEXT


def _unknown(key: str, name: str, allowed: Sequence[str]) -> str:
    return f"config key '{key}' is '{name}'; it must be one of {', '.join(allowed)}.{suggest(name, allowed)}"


def find_config(path: str | Path) -> Path:
    """Return the file that `path` names: as it stands, else the plugin's own copy below ``configs/``.

    Raises:
        UserError: there is no such file; the message lists the plugin's own.
    """
    given = Path(path)
    if given.is_file():
        return given
    own = _own_configs()
    name = given.as_posix()
    for root in own:
        if given.parts[:1] == ("configs",) and (root / Path(*given.parts[1:])).is_file():
            return root / Path(*given.parts[1:])
    found = sorted({f"configs/{file.relative_to(root).as_posix()}" for root in own for file in root.rglob("*.yaml")})
    hint = suggest(name, found) or (f" The plugin's own: {', '.join(found)}." if found else "")
    raise UserError(f"config file '{path}' does not exist; give the path of a .yaml file.{hint}")


def _own_configs() -> list[Path]:
    """Folders of the plugin's own configs: in an installed package, in a source checkout."""
    package = Path(csalr_plugin.__file__).resolve().parent
    folders = (package / "configs", package.parent / "configs")
    return [folder for folder in folders if (folder / "torchreid").is_dir()]


def _read_yaml(path: Path) -> Mapping[str, Any]:
    # yacs would run a .py file; no file that a user gives runs code.
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(f"config file '{path}' must be a .yaml or .yml file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or "not text"
        raise UserError(f"config file '{path}'{where} cannot be read as YAML: {reason}.") from None
    if not isinstance(content, Mapping):
        raise UserError(f"config file '{path}' must hold a mapping of config keys, such as 'model: {{name: pcb}}'.")
    return content


def default_config() -> Config:
    """Return torchreid's whole schema with its defaults, and the plugin's node `csalr`."""
    return with_plugin_keys(HOST_DEFAULTS)


def with_plugin_keys(host: Mapping[str, Any]) -> Config:
    """Return a `Config` of the host's settings and the plugin's node `csalr`."""
    return Config({**_plain(host), "csalr": keys.defaults()})


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) if isinstance(value, Mapping) else value for name, value in tree.items()}


_active: Config | None = None


def active_config() -> Config:
    """Return the config that models are built with: the one set last, else the default settings."""
    return default_config() if _active is None else _active


def set_active_config(config: Config | None) -> Config | None:
    """Set the config that the registry builds models with, None for the defaults; return the one before."""
    global _active
    previous, _active = _active, config
    return previous
