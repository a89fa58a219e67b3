"""fast-reid's `launch` and its flags, for any number of processes, with GPUs or without.

fast-reid starts several processes only with CUDA. It pickles `main_func`, which is impossible in a script that
`csalr run` executes. This module runs the whole command again in each process instead.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastreid.engine import defaults
from fastreid.utils import comm
from torch import distributed

from csalr_plugin.errors import SharedError, UserError
from csalr_plugin.hosts.distributed import is_lost, is_main, process_group, run_under_torchrun

_MOST_PROCESSES = 256


def default_argument_parser() -> argparse.ArgumentParser:
    """Return the parser of fast-reid's flags, with the flag ``--num-processes``."""
    parser: argparse.ArgumentParser = defaults.default_argument_parser()
    parser.add_argument(
        "--num-processes", type=int, default=1, metavar="N", help="processes on a machine without GPUs (default 1)"
    )
    return parser


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: Sequence[Any] = (),
) -> None:
    """Call ``main_func(*args)`` in every process of a run.

    A process that torchrun started, and the only process of a run, call it at once. Otherwise this process runs its own
    command again in the required number of new processes, so `launch` must be called from a script.

    Args:
        main_func: the function to call.
        num_gpus_per_machine: number of processes on a machine with CUDA; each has its own GPU.
        num_machines: number of machines.
        machine_rank: number of this machine, from 0.
        dist_url: "tcp://HOST:PORT" of the first machine; unused for one machine.
        args: arguments of `main_func`. On a machine without GPUs, the attribute `num_processes` of one of them is the
            number of processes.

    Raises:
        UserError: the processes cannot be started, or `main_func` raised it.
        SystemExit: a new process ended with an error, which it has printed.
    """
    if "LOCAL_WORLD_SIZE" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        _join(lambda: main_func(*args), use_gpu=num_gpus_per_machine > 0)
        return
    without_gpu = next((one.num_processes for one in args if hasattr(one, "num_processes")), 1)
    processes = _processes(num_gpus_per_machine, without_gpu)
    if num_machines < 1:
        raise UserError(f"--num-machines {num_machines} must be a positive integer.")
    if not 0 <= machine_rank < num_machines:
        raise UserError(
            f"--machine-rank {machine_rank} must be from 0 to {num_machines - 1}: --num-machines is {num_machines}."
        )
    if processes * num_machines == 1:
        main_func(*args)
        return
    if num_gpus_per_machine == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # MODEL.DEVICE is cuda by default: all would share one GPU
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))  # torchrun's is 1
    command = [sys.executable, *sys.orig_argv[1:]]
    if code := run_under_torchrun(command, processes, num_machines, machine_rank, dist_url or ""):
        sys.exit(code)


def _processes(gpus: int, without_gpu: int) -> int:
    """Return the number of processes on this machine, from ``--num-gpus`` and ``--num-processes``."""
    if not 1 <= without_gpu <= _MOST_PROCESSES:
        raise UserError(f"--num-processes {without_gpu} must be an integer from 1 to {_MOST_PROCESSES}.")
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not 0 <= gpus <= max(available, 1):  # fast-reid's default is 1, also on a machine without a GPU
        raise UserError(
            f"--num-gpus {gpus}: this machine has {available} GPUs; give a number up to that, or --num-gpus 0 and "
            "--num-processes N."
        )
    if available and gpus and without_gpu > 1:
        raise UserError(
            f"--num-processes {without_gpu} is for a training without GPUs, and --num-gpus is {gpus}: give "
            "--num-gpus 0, or leave out --num-processes."
        )
    return gpus if available and gpus else without_gpu


def _join(main: Callable[[], Any], use_gpu: bool) -> None:
    """Call `main` as one of several processes. If several of them raise the same error, one of them reports it."""
    try:
        with process_group(use_gpu, backend="nccl"):  # fast-reid compares the backend with this name
            comm._LOCAL_PROCESS_GROUP, _ = distributed.new_subgroups(int(os.environ["LOCAL_WORLD_SIZE"]))
            main()
    except KeyboardInterrupt:
        if is_main():
            raise
        sys.exit(130)
    except (UserError, RuntimeError) as error:
        # torchrun stops this process when another one ends; it must report its error before.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cause = error.__cause__
        if is_lost(error):
            error, cause = gone(), error
        if isinstance(error, UserError) and _reported_by_another(error):
            sys.exit(2)
        raise error from cause


def gone(checkpoint: str = "") -> UserError:
    """Return the error of a training in which a process has ended.

    Args:
        checkpoint: path of the last checkpoint; empty if there is none.
    """
    then = f"the last checkpoint is {checkpoint}, go on from it with --resume" if checkpoint else "start it anew"
    return UserError(f"Training stopped because one of its processes has ended or was told to stop; {then}.")


def _reported_by_another(error: UserError) -> bool:
    """Return whether another process reports the same error. The first process reports it if it has found it."""
    if isinstance(error, SharedError):
        return not is_main()
    name = str(error)
    try:
        # Not by a collective operation: the other processes may be inside a different one.
        store = distributed.distributed_c10d._get_default_store()
        if is_main():
            store.set(name, "")
            return False
        for _ in range(20):
            if store.check([name]):
                return True
            time.sleep(0.1)
        return bool(store.add(f"others: {name}", 1) > 1)
    except (RuntimeError, ValueError):  # the processes are not connected, or not any more
        return False
