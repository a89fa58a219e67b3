"""SA, CSA and CSALR attention for person re-identification, as a plugin of re-ID frameworks.

``import csalr_plugin`` adds the eight architectures to the model registry of an installed host, whichever of the two
is imported first. The blocks and the models need no host.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from csalr_plugin.hosts import register_hosts
from csalr_plugin.version import __version__

if TYPE_CHECKING:
    from csalr_plugin.attention import CSALR, CompressedSelfAttention, SelfAttention, build_attention
    from csalr_plugin.errors import UserError
    from csalr_plugin.models import MODEL_NAMES, PCB, build_model
    from csalr_plugin.models.attach import attach, detach

__all__ = [
    "CSALR",
    "MODEL_NAMES",
    "PCB",
    "CompressedSelfAttention",
    "SelfAttention",
    "UserError",
    "__version__",
    "attach",
    "build_attention",
    "build_model",
    "detach",
]

_MODULES = {
    "MODEL_NAMES": "models",
    "PCB": "models",
    "UserError": "errors",
    "attach": "models.attach",
    "build_model": "models",
    "detach": "models.attach",
}


def __getattr__(name: str) -> Any:
    # Import on first use: torch takes seconds, which `csalr --help` and a mistyped key need not wait for.
    if name in __all__:
        return getattr(importlib.import_module(f"csalr_plugin.{_MODULES.get(name, 'attention')}"), name)
    raise AttributeError(f"module 'csalr_plugin' has no attribute {name!r}")


register_hosts()
