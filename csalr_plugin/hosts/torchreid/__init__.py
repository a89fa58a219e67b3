"""The torchreid adapter, for its PyPI package and its repository."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from csalr_plugin.extras import needs
from csalr_plugin.hosts import PREFIX, add_models, plugin_model

__all__ = ["dataset_names", "host", "model_registry", "register", "registered_name"]


def host() -> ModuleType:
    """Import and return the package torchreid.

    Raises:
        MissingExtraError: torchreid, or a package that it needs and does not declare, is not installed.
    """
    with needs("torchreid", "csalr_plugin"):
        return importlib.import_module("torchreid")


def register() -> None:
    """Add the plugin's models to torchreid's registry, and correct torchreid for today's torch (see `compat`).

    These are the PCB models, and each model of torchreid with attention (see `zoo`). It may be called again. Each model
    is built with the settings of the active config's node `csalr`, by default those of the paper.

    A model of torchreid itself keeps its name; see `csalr_plugin.hosts.add_models`.

    Raises:
        UserError: torchreid is not installed.
    """
    from csalr_plugin.hosts.torchreid import compat, zoo
    from csalr_plugin.models import MODEL_NAMES

    compat.apply()
    registry = _registry()
    own = {name: _entry(name) for name in MODEL_NAMES}
    add_models("torchreid", registry, {**zoo.entries(registry), **own})  # "pcb_rpp_sa" stays ours if a host has pcb_rpp


def model_registry() -> dict[str, Callable[..., Any]]:
    """Return torchreid's own dictionary of models, including those of the plugin.

    Raises:
        UserError: torchreid is not installed.
    """
    register()
    return _registry()


def registered_name(name: str) -> str:
    """Return the name in torchreid's registry of the plugin's model `name`: with `PREFIX` if torchreid has its own.

    The plugin's own studies build their models by this name. Every other name is returned as it is.
    """
    registry = model_registry()
    return PREFIX + name if plugin_model(registry, PREFIX + name) == name else name


def dataset_names(kind: str) -> tuple[str, ...]:
    """Return the names of torchreid's datasets; `kind` is "image" or "video".

    Raises:
        UserError: torchreid is not installed.
    """
    return tuple(vars(host().data.datasets)[f"__{kind}_datasets"])


def _registry() -> dict[str, Callable[..., Any]]:
    registry: dict[str, Callable[..., Any]] = vars(host().models)["__model_factory"]
    return registry


def _entry(name: str) -> Callable[..., Any]:
    def build(num_classes: int, loss: str = "softmax", pretrained: bool = True, **_: Any) -> Any:
        # The host also passes use_gpu, which these models do not need.
        from csalr_plugin.hosts.torchreid.config import active_config
        from csalr_plugin.models import build_model

        settings = active_config().csalr
        return build_model(
            name,
            num_classes,
            loss=loss,
            pretrained=pretrained,
            pretrained_weights=settings.pretrained_weights,
            groups=settings.groups,
            landmarks=settings.landmarks,
            stages=settings.stages,
            key_ratio=settings.key_ratio,
            plain_supervision=settings.plain_supervision,
        )

    return build
