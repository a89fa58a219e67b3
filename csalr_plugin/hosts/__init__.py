"""The adapters, one package per host, and the registration of the plugin's models with a host."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

__all__ = ["register_hosts"]


def register_hosts() -> None:
    """Register the models with torchreid: now if it is imported already, else right after its import.

    This imports no host, and does nothing where none is installed. It may be called again. fast-reid's registry is
    filled by the import of `csalr_plugin.hosts.fastreid`.

    Raises:
        UserError: a host that is imported already has another model with one of the plugin's names.
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
