"""SA, CSA and CSALR attention for person re-identification, as a plugin of re-ID frameworks.

``import csalr_plugin`` adds the eight architectures to the registry of the host that is imported, before or
after; without a host the blocks and the models are there all the same.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from csalr_plugin.errors import UserError
from csalr_plugin.hosts import register_hosts
from csalr_plugin.version import __version__

if TYPE_CHECKING:
    from csalr_plugin.attention import CSALR, CompressedSelfAttention, SelfAttention, build_attention
    from csalr_plugin.models import MODEL_NAMES, PCB, build_model

__all__ = [
    "CSALR",
    "MODEL_NAMES",
    "PCB",
    "CompressedSelfAttention",
    "SelfAttention",
    "UserError",
    "__version__",
    "build_attention",
    "build_model",
]


def __getattr__(name: str) -> Any:
    # Imported at first use: torch takes seconds, which `csalr --help` and a mistyped key need not wait for.
    if name in __all__:
        package = "models" if name in ("MODEL_NAMES", "PCB", "build_model") else "attention"
        return getattr(importlib.import_module(f"csalr_plugin.{package}"), name)
    raise AttributeError(f"module 'csalr_plugin' has no attribute {name!r}")


register_hosts()
