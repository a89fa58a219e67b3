"""The adapter for fast-reid, for its package on PyPI and for its repository.

Importing this package registers the PCB models in fast-reid's ``META_ARCH_REGISTRY``, lets its Baseline and MGN have
attention (MODEL.BACKBONE.WITH_CSALR), and patches fast-reid for today's Python and torch, and for machines without a
GPU; see the module `compat`.
"""

from __future__ import annotations

from csalr_plugin.hosts.fastreid import compat

compat.apply()  # before the imports below, which import parts of fast-reid

from csalr_plugin.hosts.fastreid import attended  # noqa: E402
from csalr_plugin.hosts.fastreid.config import add_csalr_config  # noqa: E402
from csalr_plugin.hosts.fastreid.meta_architecture import register  # noqa: E402
from csalr_plugin.hosts.fastreid.trainer import Trainer  # noqa: E402

__all__ = ["Trainer", "add_csalr_config", "register"]

register()
attended.register()
