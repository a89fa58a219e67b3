"""Training one model in several processes, started by torchrun or a launcher that sets the same variables.

torchrun's environment variables give each process its rank. With CUDA each process has its own GPU and gradients are
exchanged by NCCL; without CUDA everything is exchanged by gloo. An error in one process ends all of them. An error that
every process finds is printed once.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_gather

from csalr_plugin.attention.batch_norm import world_size
from csalr_plugin.errors import SharedError, UserError, first_line, shown
from csalr_plugin.hosts.keys import integer

__all__ = [
    "GlobalDropout",
    "collect_rows",
    "draw_as_one",
    "embeddings_of_all",
    "free_port",
    "from_main",
    "gathered",
    "is_lost",
    "is_main",
    "local_rank",
    "local_world_size",
    "means",
    "numbers",
    "one_first",
    "process_group",
    "rank",
    "rows_of",
    "run_under_torchrun",
    "share_buffers",
    "together",
    "world_size",
]

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=30)  # for example while the first process re-ranks


def rank() -> int:
    """Return this process's rank, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Return whether this process is the one that prints, logs and saves."""
    return rank() == 0


def local_rank() -> int:
    """Return this process's rank on its machine, from 0."""
    return _variable("LOCAL_RANK") if world_size() > 1 else 0


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return max(1, _variable("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1


@contextmanager
def process_group(use_gpu: bool, backend: str = "cpu:gloo,cuda:nccl") -> Iterator[None]:
    """Join the other processes that torchrun started, inside a with statement; a single process does nothing.

    Inside the with statement only the first process writes to the console; errors of the others are still printed.

    Args:
        use_gpu: whether to compute on this process's GPU, if there is CUDA.
        backend: the backend of torch.distributed with a GPU; without a GPU it is gloo.

    Raises:
        UserError: the processes cannot connect, or there are more processes on this machine than GPUs.
    """
    if _variable("WORLD_SIZE", 1) == 1:
        yield
        return
    gpu = use_gpu and torch.cuda.is_available()
    number = _variable("LOCAL_RANK")
    if gpu and number >= (count := torch.cuda.device_count()):
        raise UserError(
            f"torchrun started process {number} on a machine with {count} GPUs, and each process needs one: give "
            f"--nproc-per-node {count}, or use_gpu False."
        )
    if gpu:
        torch.cuda.set_device(number)
    try:
        distributed.init_process_group(backend if gpu else "gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and the processes cannot connect "
            f"({first_line(error)}): start them with torchrun, and several machines with the same --rdzv-endpoint."
        ) from error
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        if is_main():
            yield
        else:
            warnings.simplefilter("ignore")
            with redirect_stdout(nowhere):
                yield
    # Not after an error: the other processes may not take part.
    distributed.destroy_process_group()


def _variable(name: str, default: int = 0) -> int:
    try:
        return int(integer(0).parse(os.environ.get(name, default)))
    except ValueError:
        raise UserError(
            f"environment variable {name} is {shown(os.environ[name])}; it must be an integer of at least 0, as "
            "torchrun sets it."
        ) from None


@contextmanager
def together() -> Iterator[None]:
    """End all processes if any of them raises a UserError in the with statement, and print the error once.

    The with statement must not contain collective operations.

    Raises:
        SharedError: the error of the first process that raised one; in a single process the error itself.
    """
    if world_size() == 1:
        yield
        return
    found: UserError | None = None
    try:
        yield
    except UserError as error:
        found = error
    messages: list[str | None] = [None] * world_size()
    distributed.all_gather_object(messages, str(found) if found else None)
    for message in messages:
        if message is not None:
            raise SharedError(message) from found


def one_first(build: Callable[[], T]) -> T:
    """Call `build` in one process per machine, then in the others, and return its result: it may download files.

    Raises:
        UserError: as `together`.
    """
    built: list[T] = []
    for first in (True, False):
        with together():
            if (local_rank() == 0) == first:
                built.append(build())
    return built[0]


def from_main(value: T) -> T:
    """Return the `value` of the first process, any object that can be pickled."""
    if world_size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def gathered(value: T) -> list[T]:
    """Return the `value` of every process, in the order of the ranks."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(values, value)
    return values


def numbers(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Return this process's values as numbers, by one transfer: each `item()` would make a GPU wait."""
    return dict(zip(values, _vector(values).tolist(), strict=True))


def means(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Return the mean of each value over all processes; every process must have the same names."""
    vector = _vector(values)
    if values and (world := world_size()) > 1:
        distributed.all_reduce(vector)
        vector /= world
    return dict(zip(values, vector.tolist(), strict=True))


def _vector(values: Mapping[str, float | Tensor]) -> Tensor:
    device = next((value.device for value in values.values() if isinstance(value, Tensor)), torch.device("cpu"))
    scalars = [
        value.detach().double().reshape(())
        if isinstance(value, Tensor)
        else torch.full((), float(value), dtype=torch.float64, device=device)
        for value in values.values()
    ]
    return torch.stack(scalars) if scalars else torch.empty(0, dtype=torch.float64)


def embeddings_of_all(embeddings: Tensor, identities: Tensor) -> tuple[Tensor, Tensor]:
    """Return the batches of all processes as one, (B, width) and (B,); gradients flow back to each process."""
    if world_size() == 1:
        return embeddings, identities
    others = [torch.empty_like(identities) for _ in range(world_size())]
    distributed.all_gather(others, identities)
    every_embedding = torch.cat(all_gather(embeddings))  # type: ignore[no-untyped-call]
    return every_embedding, torch.cat(others)


def share_buffers(network: nn.Module) -> None:
    """Copy the first process's buffers to all: without synchronised batch norm, running statistics differ."""
    if world_size() > 1:
        for buffer in network.buffers():
            distributed.broadcast(buffer, src=0)


def rows_of(number: int, rows: int) -> range:
    """Return the share of process `number` of `rows` rows, which are consecutive."""
    each = -(-rows // world_size())
    return range(min(rows, number * each), min(rows, (number + 1) * each))


def collect_rows(table: Tensor) -> None:
    """Copy each process's share of a table's rows into the first process's table; see `rows_of`.

    Args:
        table: (rows, width) on the CPU. In the first process it has all rows, and its own are filled in; in the other
            processes it has their own rows alone.
    """
    if not is_main():
        if len(table):
            distributed.send(table, dst=0)
        return
    for number in range(1, world_size()):
        if share := rows_of(number, len(table)):
            distributed.recv(table[share.start : share.stop], src=number)


class GlobalDropout(nn.Dropout):
    """Dropout that draws a mask for the batches of all processes and uses this process's part, as one process would."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, ...) -> (B, ...); B and the random state must be the same in every process."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        mask = nn.functional.dropout(torch.cat([torch.ones_like(input)] * world_size()), self.p)
        return input * mask.chunk(world_size())[rank()]


def draw_as_one(network: nn.Module) -> None:
    """Make the dropout layers of `network` draw as they do in one process."""
    for module in network.modules():
        if type(module) is nn.Dropout:
            module.__class__ = GlobalDropout


def is_lost(error: BaseException) -> bool:
    """Return whether `error` means that another process has ended."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    if isinstance(error, distributed.DistError):
        return True
    text = str(error)  # gloo's errors have no type of their own
    return any(word in text for word in ("gloo", "NCCL", "onnection closed", "onnection reset", "Broken pipe"))


def run_under_torchrun(command: Sequence[str], processes: int, machines: int, machine: int, address: str) -> int:
    """Start `command` in several processes on this machine, and return the exit code.

    The processes print their errors themselves; torchrun does not.

    Args:
        command: program and arguments.
        processes: the number of processes on each machine.
        machines, machine: the number of machines, and the index of this one, from 0.
        address: "tcp://HOST:PORT" of the first machine; unused for one machine.

    Raises:
        UserError: the machines cannot connect, or the processes were killed.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    words = ["--nproc-per-node", str(processes), "--no-python"]
    if machines == 1:
        words += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    else:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--dist-url '{address}' must be tcp://HOST:PORT of the first machine.")
        words += ["--nnodes", str(machines), "--node-rank", str(machine)]
        words += ["--master-addr", host, "--master-port", port]
    try:
        run.main([*words, *command])
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if code := next((code for code in codes if code > 0), 0):
            return code  # the process itself has printed the error
        raise UserError(
            f"Training stopped: its processes were killed by signal {-codes[0]}, perhaps for lack of memory; "
            "go on from the last checkpoint with --resume."
        ) from None
    except SignalException as error:
        return 128 + int(error.sigval)
    except distributed.DistError as error:
        raise UserError(
            f"--dist-url '{address}': {machines} machines cannot connect ({first_line(error)}); give all of them the "
            "address of the machine with --machine-rank 0, and a free port."
        ) from error
    return 0


def free_port() -> int:
    """Return a port of this machine on which nothing listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
