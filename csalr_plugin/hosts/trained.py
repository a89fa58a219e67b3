"""The trained network of a checkpoint, built from the settings that the checkpoint records.

The plugin's own networks need no host. A network with another name is built by its host.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from csalr_plugin.errors import UserError
from csalr_plugin.extras import needs
from csalr_plugin.hosts import PREFIX
from csalr_plugin.hosts.keys import KEYS, TEXT, Check, integer, list_of, number
from csalr_plugin.models import MODEL_NAMES, build_model
from csalr_plugin.models.weights import (
    IDENTITY_LAYERS,
    load_state,
    read_checkpoint,
    recorded_network_settings,
    state_dict_of,
)

# Options of the networks. Groups and landmarks do not show in the shapes of the weights.
_OPTIONS = ("stages", "after", "key_ratio", "groups", "landmarks")
_INVISIBLE = {"groups": "2", "landmarks": "12,8"}
_SIDE = integer(1, 10_000)
_CHECKS: dict[str, Check] = {
    **{f"csalr.{key.name}": key.check for key in KEYS if key.name in _OPTIONS},
    "model.name": TEXT,
    "data.height": _SIDE,
    "data.width": _SIDE,
    "data.norm_mean": list_of(number(), 3),
    "data.norm_std": list_of(number(above=0), 3),
    "MODEL.META_ARCHITECTURE": TEXT,
    "INPUT.SIZE_TEST": list_of(_SIDE, 2),
    "MODEL.PIXEL_MEAN": list_of(number(), 3),
    "MODEL.PIXEL_STD": list_of(number(above=0), 3),
}
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLASSIFIER = re.compile(r"classifier|heads?\.weight")


@dataclass(frozen=True)
class Trained:
    """A trained network, with the facts about it that its checkpoint or the user gives.

    Attributes:
        network: takes normalised images (B, 3, H, W) and returns embeddings (B, D); in eval mode.
        model: its name.
        host: "torchreid" or "fastreid".
        size: height and width of the images, or None if neither says it.
        mean, std: of each channel, for pixels scaled to 0 to 1.
        sha256: of the checkpoint.
        tensors: the number of tensors that were loaded.
    """

    network: nn.Module
    model: str
    host: str
    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str
    tensors: int


def load_trained(
    path: str | Path, *, model: str = "", config_file: str = "", overrides: Sequence[str] = (), user: str = "csalr"
) -> Trained:
    """Build the network of a checkpoint, and load its weights.

    Args:
        path: a checkpoint of either host, or a bare state dict.
        model: the name of the network, if the checkpoint does not record it.
        config_file: a config file of the host.
        overrides: pairs ``[key, value, ...]`` of the host's configuration, for settings that are not recorded.
        user: the command, for the message about a missing host.

    Raises:
        UserError: the checkpoint cannot be read, is of another network than the one given, or does not record a
            setting that is not given either.
    """
    settings = TrainedSettings(path, config_file, overrides, user)
    name, source = settings.model(model), settings.source
    settings.check_options(name)
    options = settings.options()
    if name in MODEL_NAMES:
        options.pop("after", None)
        network: nn.Module = build_model(name, 1, pretrained=False, **options)
    else:
        with needs(settings.host, user):
            adapter = _adapter(settings.host)
            config = adapter.read_config(settings.recorded, config_file, overrides, source)
            config.merge_from_list([word for option in options.items() for word in (f"csalr.{option[0]}", option[1])])
            network = adapter.build_network(name, config, _number_of_identities(settings.state))
    report = load_state(network, settings.state, path)
    untrained = {one.split(".")[0] for one in report.left if not one.endswith("num_batches_tracked")}
    untrained -= {*IDENTITY_LAYERS, "_extra_state"}
    if untrained:
        raise UserError(
            f"{source} is of another network than {name}: it lacks {', '.join(sorted(untrained))}; name the model that "
            "it was trained with."
        )
    mean, std = settings.normalisation()
    return Trained(network.eval(), name, settings.host, settings.size(), mean, std, _sha256(path), len(report.loaded))


class TrainedSettings:
    """The settings of a trained network: those that the user gives, else those that its checkpoint records.

    Args:
        path, config_file, overrides, user: as for `load_trained`.

    Attributes:
        source: the checkpoint's name, for messages.
        host: "torchreid" or "fastreid".
        state: the weights.
        recorded: settings that the checkpoint records, ``{key in the host's spelling: value}``; not checked.
        network: settings that the weights themselves record.

    Raises:
        UserError: the checkpoint cannot be read or holds no weights, or a setting is not allowed.
    """

    def __init__(
        self, path: str | Path, config_file: str = "", overrides: Sequence[str] = (), user: str = "csalr"
    ) -> None:
        checkpoint, self.source = read_checkpoint(path), f"Checkpoint {str(path)!r}"
        self.state = state_dict_of(checkpoint)
        if not self.state:
            raise UserError(
                f"{self.source} holds no weights: give a checkpoint of torchreid or fast-reid, or a state dict."
            )
        settings, network = checkpoint.get("settings"), recorded_network_settings(self.state)
        self.recorded: dict[str, Any] = dict(settings) if isinstance(settings, Mapping) else {}
        self.network: dict[str, Any] = dict(network) if isinstance(network, Mapping) else {}
        self.host = _host_of(checkpoint, self.recorded, config_file)
        self._given: dict[str, Any] = {}
        if config_file or overrides:
            with needs(self.host, user):
                config = _adapter(self.host).read_config({}, config_file, overrides, "")
            self._given = {key: config.lookup(key) for key in config.given}

    def value(self, key: str) -> Any:
        """Return a setting in the host's spelling, or None if it is not known."""
        if key in self._given:
            return self._given[key]
        return self._checked(key, self.recorded[key]) if self.recorded.get(key) is not None else None

    def _checked(self, key: str, value: Any) -> Any:
        check = _CHECKS[key.lower() if key.startswith("CSALR.") else key]
        try:
            return check(key, value)
        except UserError as error:
            raise UserError(f"{self.source} records settings that are not allowed: {error}") from None

    def model(self, given: str = "") -> str:
        """Return the name of the network: `given`, else the name that is recorded.

        Raises:
            UserError: no name is known.
        """
        name = given or self.value("MODEL.META_ARCHITECTURE" if self.host == "fastreid" else "model.name")
        if not name and "head" in self.network:
            parts = (str(self.network.get("head")), str(self.network.get("attention")))
            name = "_".join(part for part in parts if part != "none")
        if not name:
            raise UserError(
                f"{self.source} does not record its model: give its name, for example one of {', '.join(MODEL_NAMES)}."
            )
        return str(name).removeprefix(PREFIX)  # the host in use here may have no model of this name

    def options(self) -> dict[str, Any]:
        """Return those options of the plugin's networks that are known."""
        options = {}
        for option in _OPTIONS:
            key = self._key(option)
            if option in self.network and key not in self._given:
                options[option] = self._checked(key, self.network[option])
            elif (value := self.value(key)) is not None:
                options[option] = tuple(value) if isinstance(value, list) else value
        return options

    def check_options(self, name: str) -> None:
        """Check that the options are known that do not show in the shapes of the weights of the network `name`.

        Raises:
            UserError: one is not known.
        """
        attends = any(one.startswith("attention.") for one in self.state)
        if not attends or self.network.get("attention") == "sa" or (not self.network and name.endswith("_sa")):
            return
        if unknown := [option for option in _INVISIBLE if option not in self.options()]:
            raise UserError(
                f"{self.source} does not record its {' and '.join(unknown)}: give those that it was trained with, such "
                f"as {' '.join(f'{self._key(option)} {_INVISIBLE[option]}' for option in unknown)}."
            )

    def _key(self, option: str) -> str:
        return f"CSALR.{option.upper()}" if self.host == "fastreid" else f"csalr.{option}"

    def size(self) -> tuple[int, int] | None:
        """Return height and width of the images, or None."""
        if self.host == "fastreid":
            size = self.value("INPUT.SIZE_TEST")
        else:
            size = self.value("data.height"), self.value("data.width")
        return None if size is None or None in size else (size[0], size[1])

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel, for pixels scaled to 0 to 1; by default ImageNet's."""
        keys = (
            ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD") if self.host == "fastreid" else ("data.norm_mean", "data.norm_std")
        )
        scale = 255 if self.host == "fastreid" else 1
        mean, std = (
            default if (value := self.value(key)) is None else tuple(one / scale for one in value)
            for key, default in zip(keys, _IMAGENET, strict=True)
        )
        return mean, std


def _adapter(host: str) -> Any:
    return importlib.import_module(f"csalr_plugin.hosts.{host}.trained")


def _host_of(checkpoint: Mapping[str, Any], recorded: Mapping[str, Any], config_file: str) -> str:
    """Return the host of a checkpoint. A bare state dict does not tell: its host is that of the config file."""
    if isinstance(checkpoint.get("model"), Mapping) or any(str(key).isupper() for key in recorded):
        return "fastreid"
    if config_file and "state_dict" not in checkpoint and os.path.isfile(os.path.expanduser(config_file)):
        with needs("torchreid", "a config file"):
            from csalr_plugin.hosts.config import read_yaml
        content = read_yaml(Path(config_file).expanduser())
        if {"_base_", "input", "solver", "datasets"} & {str(key).lower() for key in content}:
            return "fastreid"
    return "torchreid"


def _number_of_identities(state: Mapping[str, Tensor]) -> int:
    """Return the number of identities of the classifiers in `state`, or 1 if it has none."""
    rows = [one.shape[0] for name, one in state.items() if _CLASSIFIER.search(name) and one.dim() == 2]
    return int(rows[0]) if rows else 1


def _sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(os.path.expanduser(path), "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
