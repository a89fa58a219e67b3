"""The plugin inside fast-reid, its PyPI package and its repository alike.

Importing this package registers the eight architectures in fast-reid's ``META_ARCH_REGISTRY`` and mends what
fast-reid lacks on today's torch, Python and CPU.
"""

from __future__ import annotations

from csalr_plugin.hosts.fastreid import compat

compat.apply()  # before anything else here imports a part of fast-reid

from csalr_plugin.hosts.fastreid.config import add_csalr_config  # noqa: E402
from csalr_plugin.hosts.fastreid.meta_architecture import register  # noqa: E402
from csalr_plugin.hosts.fastreid.trainer import Trainer  # noqa: E402

__all__ = ["Trainer", "add_csalr_config", "register"]

register()
