"""The adapters, one package per host, and the registration of the plugin's models with a host.

A host that has a model of its own under one of the plugin's names keeps it, for example after it has merged the patch
in ``projects/upstream``. The plugin's model is then registered under the name with the prefix `PREFIX`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

__all__ = ["PREFIX", "add_models", "plugin_model", "register_hosts"]

PREFIX = "plugin_"
"""Prefix of the names of the plugin's models where the host has its own: ``plugin_pcb_csalr``."""

_MARK = "csalr_plugin_model"  # an attribute of an entry of a registry: the plugin's own name of the model


def add_models(host: str, registry: dict[str, Any], entries: Mapping[str, Callable[..., Any]]) -> None:
    """Add the plugin's models to the registry of a host. Further calls have no effect.

    A model of the host is never replaced: then the plugin's is added as `PREFIX` + name, and one warning says so.

    Args:
        host: name of the host, for the warning.
        registry: the models of the host by name; it is changed in place.
        entries: a function for each of the plugin's names, which builds the model.
    """
    yielded = []
    for name, entry in entries.items():
        if plugin_model(registry, name) == name:
            continue
        key = name
        if name in registry:
            key = PREFIX + name
            if key in registry:
                continue
            yielded.append(name)
        entry.__name__ = entry.__qualname__ = key
        setattr(entry, _MARK, name)
        registry[key] = entry
    if yielded:
        warnings.warn(
            f"{host} already has models named {', '.join(yielded)} and keeps them; csalr_plugin's are "
            f"{', '.join(PREFIX + name for name in yielded)}.",
            stacklevel=2,
        )


def plugin_model(registry: Mapping[str, Any], name: str) -> str | None:
    """Return the plugin's own name of the model that a host's registry has as `name`; None for a model of the host."""
    return getattr(registry.get(name), _MARK, None)


def register_hosts() -> None:
    """Register the models with torchreid: now if it is imported already, else right after its import.

    This imports no host, and does nothing where none is installed. It may be called again. fast-reid's registry is
    filled by the import of `csalr_plugin.hosts.fastreid`.
    """
    if hasattr(sys.modules.get("torchreid"), "models"):
        _register_torchreid()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


def _register_torchreid() -> None:
    from csalr_plugin.hosts.torchreid import register

    register()


class _RegisterAfterImport:
    """A finder of ``sys.meta_path``: it leaves the search to the other finders, and registers after the import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchreid":
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)  # old finders have none
            if finder is not self and find is not None and (spec := find(fullname, path, target)) is not None:
                _register_after(spec)
                return spec  # type: ignore[no-any-return]
        return None


def _register_after(spec: ModuleSpec) -> None:
    loader = spec.loader
    run = getattr(loader, "exec_module", None)
    if loader is None or run is None:  # a namespace package: a folder with the same name
        return

    def exec_module(module: ModuleType) -> None:
        with warnings.catch_warnings():
            # The PyPI package contains no Cython ranking, so the warning's advice to build it cannot be followed.
            warnings.filterwarnings("ignore", message="Cython evaluation")
            run(module)
        if module.__name__ == spec.name and hasattr(module, "models"):
            _register_torchreid()

    # Patch the loader instead of wrapping it, so that the module keeps its own loader and spec.
    loader.exec_module = exec_module  # type: ignore[method-assign]
