"""SA, CSA and CSALR attention for person re-identification, as a plugin of re-ID frameworks.

``import csalr_plugin`` adds the eight architectures to the registry of the host that is imported, before or
after; without a host the blocks and the models are there all the same.
"""

from __future__ import annotations

from csalr_plugin.attention import CSALR, CompressedSelfAttention, SelfAttention, build_attention
from csalr_plugin.errors import UserError
from csalr_plugin.hosts import register_hosts
from csalr_plugin.models import MODEL_NAMES, PCB, build_model
from csalr_plugin.version import __version__

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

register_hosts()
