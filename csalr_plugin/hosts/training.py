"""Helpers of training that every host needs: unwrapping a parallel model, freed memory, causes of a failure."""

from __future__ import annotations

import ctypes
import time
from contextlib import suppress

import torch
from torch import nn

# Types of the errors that `machine_failure` knows. A loader's killed worker is torch's RuntimeError, or a broken
# connection if a batch was being fetched from it.
MACHINE_FAILURES = (RuntimeError, MemoryError, ConnectionResetError, ConnectionRefusedError, EOFError)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside a DataParallel or DistributedDataParallel, or the model itself."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model


def keep_freed_memory() -> None:
    """Make the C library keep freed memory, in this process and from now on.

    glibc returns each block above 32 MB to the system, which then provides it again page by page: on a CPU 4 % of a
    training step (384x128, batch 8). Results do not depend on it. torch keeps a GPU's memory by itself.
    """
    trim_threshold, most_mapped = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(most_mapped, 0)
        library.mallopt(trim_threshold, 2**31 - 1)


def machine_failure(error: BaseException) -> str:
    """Describe an error of the machine, such as lack of memory or a killed worker; empty for other errors.

    After a lost connection to a loader's worker it waits up to a second for torch's report of the worker's death.
    """
    text = str(error)
    lost = _is_lost_connection(error)
    if lost:
        # torch's handler of SIGCHLD raises a RuntimeError wherever this process is, for example in saving a checkpoint.
        with suppress(RuntimeError):
            time.sleep(1)
    if lost or "DataLoader worker (pid" in text or "shared memory(shm)" in text:
        return (
            "a data loader's worker process was killed, often for lack of memory or of shared memory (/dev/shm); a "
            "smaller data.workers (DATALOADER.NUM_WORKERS) takes less"
        )
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in text:
        return (
            "memory is exhausted; a smaller batch takes less, and in torchreid csalr.accumulate makes one optimizer "
            "step of several batches"
        )
    return ""


def _is_lost_connection(error: BaseException) -> bool:
    """Return whether `error` is a lost connection to a loader's worker."""
    if isinstance(error, EOFError):
        return not error.args  # a file's EOFError has a message
    return isinstance(error, (ConnectionResetError, ConnectionRefusedError))


def single_image_batch(error: BaseException) -> bool:
    """Return whether `error` is a batch norm's, for a training batch with one value per channel."""
    return isinstance(error, ValueError) and "more than 1 value per channel" in str(error)
