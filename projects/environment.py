"""The machine and the software versions that the results of a study depend on."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from csalr_plugin.version import __version__

_PACKAGES = ("torch", "torchvision", "numpy", "torchreid")


def machine() -> dict[str, str | int | float]:
    """Return the processor, the available cores, the memory, the GPUs and the system of this machine."""
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gb": round(total_memory(torch.device("cpu")) / 1e9, 1),
        "gpu": ", ".join(f"{gpu.name} ({gpu.total_memory / 1e9:.1f} GB)" for gpu in gpus) or "none",
        "system": f"{platform.system()} {platform.machine()}",
    }


def total_memory(device: torch.device) -> int:
    """Return the memory of a device in bytes; that of a CPU is the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def versions() -> dict[str, str | None]:
    """Return the versions of csalr_plugin, Python, CUDA and the packages in use; None for one that is missing."""
    found: dict[str, str | None] = {
        "csalr_plugin": __version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    names: list[str] = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()
