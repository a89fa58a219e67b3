"""Adapters, one package a host, and the registration of the plugin's models with whichever is imported."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_hosts"]


def register_hosts() -> None:
    """Register the models with every supported host: at once if it is imported, else when it will be.

    Imports no host, and does nothing where none is installed. May be called again.

    Raises:
        UserError: a host that is already imported has a model of its own under one of the plugin's names.
    """
    if hasattr(sys.modules.get("torchreid"), "models"):
        _register_torchreid()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


def _register_torchreid() -> None:
    from csalr_plugin.hosts.torchreid import register

    register()


class _RegisterAfterImport(MetaPathFinder):
    """Lets the other finders find the host, and registers as soon as its package has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchreid":
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)  # an old finder may lack it
            if finder is not self and find is not None and (spec := find(fullname, path, target)) is not None:
                _register_after(spec)
                return spec  # type: ignore[no-any-return]
        return None


def _register_after(spec: ModuleSpec) -> None:
    loader = spec.loader
    run = getattr(loader, "exec_module", None)
    if loader is None or run is None:  # a namespace package: a folder that happens to bear the name
        return

    def exec_module(module: ModuleType) -> None:
        with warnings.catch_warnings():
            # The PyPI package has no Cython ranking to build; the advice to build it helps nobody.
            warnings.filterwarnings("ignore", message="Cython evaluation")
            run(module)
        if module.__name__ == spec.name and hasattr(module, "models"):
            _register_torchreid()

    # On the loader itself, not around it, so that the module keeps its own loader and spec.
    loader.exec_module = exec_module  # type: ignore[method-assign]
