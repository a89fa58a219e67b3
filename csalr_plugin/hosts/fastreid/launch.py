"""fast-reid's `launch` and flags for any number of processes, with GPUs or without.

fast-reid starts several processes only with CUDA, and by pickling `main_func`, which a script that `csalr run` executes
does not allow. Here the command itself is started again, once for each process.
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


def default_argument_parser() -> argparse.ArgumentParser:
    """fast-reid's flags, and ``--num-processes``."""
    parser: argparse.ArgumentParser = defaults.default_argument_parser()
    parser.add_argument(
        "--num-processes", type=int, default=1, metavar="N", help="processes on this machine where there is no GPU (1)"
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
    """Call ``main_func(*args)`` in every process of a training.

    A process that torchrun started calls it at once, and so does the only one of its training. Else this process starts
    its own command again in each of the others, so call it from a script. The arguments are those of fast-reid's.

    Args:
        main_func: what each process calls.
        num_gpus_per_machine: processes where there is CUDA, a GPU each.
        num_machines, machine_rank: how many machines there are, and which this one is, from 0.
        dist_url: "tcp://HOST:PORT" of the first machine; unused for one machine.
        args: of `main_func`; the `num_processes` of one of them is how many there are where there is no GPU.

    Raises:
        UserError: so many cannot be started, or anything that the user gave to `main_func` cannot be used.
        SystemExit: a process that was started ended with an error, which it has told.
    """
    if "LOCAL_WORLD_SIZE" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        _join(lambda: main_func(*args), use_gpu=num_gpus_per_machine > 0)
        return
    without_gpu = next((one.num_processes for one in args if hasattr(one, "num_processes")), 1)
    processes = _processes(num_gpus_per_machine, without_gpu)
    if not 0 <= machine_rank < num_machines:
        raise UserError(
            f"--machine-rank {machine_rank} is no machine's number: those of --num-machines {num_machines} are 0 to "
            f"{num_machines - 1}."
        )
    if processes * num_machines == 1:
        main_func(*args)
        return
    if num_gpus_per_machine == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # MODEL.DEVICE is cuda by default, and all would share one GPU
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))  # torchrun's is 1
    command = [sys.executable, *sys.orig_argv[1:]]
    if code := run_under_torchrun(command, processes, num_machines, machine_rank, dist_url or ""):
        sys.exit(code)


def _processes(gpus: int, without_gpu: int) -> int:
    """How many processes this machine has, by ``--num-gpus`` and ``--num-processes``."""
    if without_gpu < 1:
        raise UserError(f"--num-processes {without_gpu} must be a positive integer.")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus > max(there, 1):  # one is fast-reid's default, GPU or not
        raise UserError(
            f"--num-gpus {gpus}: this machine has {there} GPUs; give as many at most, or --num-gpus 0 and "
            "--num-processes N."
        )
    if there and gpus and without_gpu > 1:
        raise UserError(
            f"--num-processes {without_gpu} is for a training without GPUs, and --num-gpus is {gpus}: give "
            "--num-gpus 0, or leave --num-processes out."
        )
    return gpus if there and gpus else without_gpu


def _join(main: Callable[[], Any], use_gpu: bool) -> None:
    """Call `main` as one of several processes; what several of them find wrong is told by one."""
    try:
        with process_group(use_gpu, backend="nccl"):  # for which fast-reid tests by this name
            comm._LOCAL_PROCESS_GROUP, _ = distributed.new_subgroups(int(os.environ["LOCAL_WORLD_SIZE"]))
            main()
    except KeyboardInterrupt:
        if is_main():
            raise
        sys.exit(130)
    except (UserError, RuntimeError) as error:
        # torchrun stops it when another process ends, and it has something to say first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cause = error.__cause__
        if is_lost(error):
            error, cause = gone(), error
        if isinstance(error, UserError) and _is_anothers(error):
            sys.exit(2)
        raise error from cause


def gone(checkpoint: str = "") -> UserError:
    """The one line about a training that lost a process.

    Args:
        checkpoint: the last one's path, if there is one.
    """
    then = f"the last checkpoint is {checkpoint}, go on from it with --resume" if checkpoint else "start it anew"
    return UserError(f"Training stopped, for one of its processes is gone or was told to stop; {then}.")


def _is_anothers(error: UserError) -> bool:
    """Whether another process tells of the same error: the first one, where it finds it too."""
    if isinstance(error, SharedError):
        return not is_main()
    name = str(error)
    try:
        # Not by a collective operation: the others may be in another one.
        store = distributed.distributed_c10d._get_default_store()
        if is_main():
            store.set(name, "")
            return False
        for _ in range(20):
            if store.check([name]):
                return True
            time.sleep(0.1)
        return bool(store.add(f"others: {name}", 1) > 1)
    except (RuntimeError, ValueError):  # the processes have not met, or their store is gone
        return False
