"""Several processes that train one model: started by torchrun, or by what starts them alike.

A process is told its place by the variables that torchrun sets. With CUDA each has a GPU of its own and gradients go by
NCCL; without, all go by gloo. What happens in one process alone is an error of that process, and ends the others; what
every process finds is told once.
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
from csalr_plugin.errors import SharedError, UserError, first_line

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

_TIMEOUT = timedelta(minutes=30)  # the others wait so long while one re-ranks, say


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that prints, logs and saves."""
    return rank() == 0


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return _variable("LOCAL_RANK") if world_size() > 1 else 0


@contextmanager
def process_group(use_gpu: bool, backend: str = "cpu:gloo,cuda:nccl") -> Iterator[None]:
    """Meet the other processes that torchrun started, for the length of a with statement; alone it does nothing.

    Meanwhile the first process alone writes to the console; the others' errors are still told.

    Args:
        use_gpu: whether to compute on this process's GPU, where there is CUDA.
        backend: of torch.distributed with a GPU; without it is gloo.

    Raises:
        UserError: the processes cannot meet, or there are more on this machine than GPUs.
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
            f"{os.environ['WORLD_SIZE']} processes were announced (WORLD_SIZE), and they cannot meet "
            f"({first_line(error)}): start them with torchrun, and several machines with the same --rdzv-endpoint."
        ) from error
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        if is_main():
            yield
        else:
            warnings.simplefilter("ignore")
            with redirect_stdout(nowhere):
                yield
    # Not after an error: the others may not come.
    distributed.destroy_process_group()


def _variable(name: str, default: int = 0) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise UserError(
            f"environment variable {name} is {os.environ[name]!r}; it must be an integer, as torchrun sets it."
        ) from None


@contextmanager
def together() -> Iterator[None]:
    """Let a user's mistake that any process finds end all of them, and be told once.

    What is done in the with statement must not need the other processes.

    Raises:
        SharedError: of the first process that found one; in a training of one process the error itself.
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
    """What `build` returns, called by one process a machine before the others: it may download.

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
    """The first process's `value`, anything that can be pickled."""
    if world_size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def gathered(value: T) -> list[T]:
    """Every process's `value`, in the order of the processes."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(values, value)
    return values


def numbers(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Each value of this process as a number, by one transfer: each `item()` would let a GPU run dry."""
    return dict(zip(values, _vector(values).tolist(), strict=True))


def means(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """The mean of each value over all processes; every process has the same names."""
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
    """The batches of all processes as one, (B, width) and (B,) each; gradients find their way back."""
    if world_size() == 1:
        return embeddings, identities
    others = [torch.empty_like(identities) for _ in range(world_size())]
    distributed.all_gather(others, identities)
    every_embedding = torch.cat(all_gather(embeddings))  # type: ignore[no-untyped-call]
    return every_embedding, torch.cat(others)


def share_buffers(network: nn.Module) -> None:
    """Give every process the first one's buffers: running statistics differ where batch norm is not synchronised."""
    if world_size() > 1:
        for buffer in network.buffers():
            distributed.broadcast(buffer, src=0)


def rows_of(number: int, rows: int) -> range:
    """The share of process `number` of `rows` rows: consecutive ones."""
    each = -(-rows // world_size())
    return range(min(rows, number * each), min(rows, (number + 1) * each))


def collect_rows(table: Tensor) -> None:
    """Bring each process's share of a table's rows to the first one; see `rows_of`.

    Args:
        table: (rows, width) on the CPU: in the first process all rows, filled with its own, in the others theirs.
    """
    if not is_main():
        if len(table):
            distributed.send(table, dst=0)
        return
    for number in range(1, world_size()):
        if share := rows_of(number, len(table)):
            distributed.recv(table[share.start : share.stop], src=number)


class GlobalDropout(nn.Dropout):
    """Dropout that draws for the batches of all processes and takes this one's: as one process would draw."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, ...) -> the same shape; every process's batch is as large, and its random state the same."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        mask = nn.functional.dropout(torch.cat([torch.ones_like(input)] * world_size()), self.p)
        return input * mask.chunk(world_size())[rank()]


def draw_as_one(network: nn.Module) -> None:
    """Let the dropout layers of `network` draw as they do in one process."""
    for module in network.modules():
        if type(module) is nn.Dropout:
            module.__class__ = GlobalDropout


def is_lost(error: BaseException) -> bool:
    """Whether `error` says that another process is gone."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    if isinstance(error, distributed.DistError):
        return True
    text = str(error)  # gloo's errors have no type of their own
    return any(word in text for word in ("gloo", "NCCL", "onnection closed", "onnection reset", "Broken pipe"))


def run_under_torchrun(command: Sequence[str], processes: int, machines: int, machine: int, address: str) -> int:
    """Start `command` in `processes` processes on this machine, one of `machines`; return the exit code.

    Errors are told by the processes themselves, not by torchrun.

    Args:
        command: program and arguments.
        processes: on each machine.
        machines, machine: how many there are, and which this one is, from 0.
        address: "tcp://HOST:PORT" of the first machine; unused for one machine.

    Raises:
        UserError: the machines cannot meet, or the processes were killed.
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
            return code  # the process itself has said why
        raise UserError(
            f"Training stopped: its processes were killed by signal {-codes[0]}, by someone or for want of memory; "
            "go on from the last checkpoint with --resume."
        ) from None
    except SignalException as error:
        return 128 + int(error.sigval)
    except distributed.DistError as error:
        raise UserError(
            f"--dist-url '{address}': {machines} machines cannot meet there ({first_line(error)}); give all of them "
            "the address of the one with --machine-rank 0, and a free port."
        ) from error
    return 0


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
