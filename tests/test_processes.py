"""Training in several processes through torchreid gives the result of one process, and never hangs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchreid
from torch import Tensor, nn
from torch.multiprocessing import spawn

from csalr_plugin import attach
from csalr_plugin.attention import build_attention
from csalr_plugin.attention.batch_norm import synchronise
from csalr_plugin.errors import UserError
from csalr_plugin.hosts import distributed
from csalr_plugin.hosts.torchreid.config import default_config
from csalr_plugin.hosts.torchreid.loading import DrawnByPlace, TrainingShare
from csalr_plugin.hosts.torchreid.train import prepare
from csalr_plugin.models.weights import read_checkpoint

PATIENCE = 240  # seconds for a run on a busy machine


# Two processes of a test


def in_process(rank: int, port: int, work: Callable[..., None], folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with distributed.process_group(use_gpu=False):
        work(rank, folder)


def in_two_processes(work: Callable[..., None], folder: Path) -> list[Any]:
    """Return the object that each process saved."""
    spawn(in_process, (distributed.free_port(), work, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def example(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer in float64, a batch and the gradient of its output."""
    torch.manual_seed(0)
    if kind == "batch norm":
        layer: nn.Module = nn.BatchNorm2d(6)
        nn.init.normal_(layer.weight)
    else:
        layer = build_attention(kind, 16, groups=2, landmarks=(3, 2))
        nn.init.constant_(layer.alpha, 0.3)
    x = torch.randn(6, 6 if kind == "batch norm" else 16, 6, 4, dtype=torch.float64) + 3
    return layer.double().train(), x, torch.randn_like(x)


def outcome(layer: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(gradient)
    gradients = {f"gradient of {name}": one.grad for name, one in layer.named_parameters() if one.grad is not None}
    statistics = {name: value for name, value in layer.named_buffers() if value.is_floating_point()}
    return {"out": out.detach(), "gradient of x": x.grad, **gradients, **statistics}


KINDS = ("batch norm", "sa", "csa", "csalr")


def halve(rank: int, folder: Path) -> None:
    outcomes = {}
    for kind in KINDS:
        layer, x, gradient = example(kind)
        synchronise(layer)
        half = slice(3 * rank, 3 * rank + 3)
        outcomes[kind] = outcome(layer, x[half], gradient[half])
    torch.save(outcomes, folder / f"{rank}.pt")


def test_synchronised_layers_in_two_processes_are_the_layers_on_the_whole_batch(tmp_path: Path) -> None:
    first, second = in_two_processes(halve, tmp_path)
    for kind in KINDS:
        for name, expected in outcome(*example(kind)).items():
            ours, others = first[kind][name], second[kind][name]
            if name in ("out", "gradient of x"):
                ours = torch.cat([ours, others])
            elif name.startswith("gradient"):  # DistributedDataParallel's work
                ours = ours + others
            else:
                torch.testing.assert_close(ours, others)
            label = f"{name} of {kind}: "
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9, msg=lambda text, label=label: label + text)


def exchange(rank: int, folder: Path) -> None:
    torch.manual_seed(0)
    features = torch.randn(4, 3, dtype=torch.float64)
    own = features[2 * rank : 2 * rank + 2].clone().requires_grad_()
    every, identities = distributed.embeddings_of_all(own, torch.tensor([rank, 5]))
    (every * torch.arange(12.0).view(4, 3)).sum().backward()
    table = torch.full((3, 2), float(rank)) if rank == 0 else torch.full((1, 2), 1.0)
    distributed.collect_rows(table)
    dropout = nn.Sequential(nn.Dropout(0.5))
    distributed.draw_as_one(dropout)
    torch.manual_seed(7)
    dropped = dropout(torch.ones(4, 5))
    try:
        with distributed.together():
            if rank == 1:
                raise distributed.UserError("the second process's mistake")
    except distributed.SharedError as error:
        told = str(error) == "the second process's mistake"
    torch.save(
        {
            "every": every.detach(),
            "gradient": own.grad,
            "identities": identities,
            "mean": torch.tensor(distributed.means({"one": rank, "two": torch.tensor(float(rank + 4))})["two"]),
            "table": table,
            "dropped": dropped,
            "told": torch.tensor(told),
        },
        folder / f"{rank}.pt",
    )


def test_exchanged_values_and_gradients_arrive_complete_and_errors_reach_every_process(tmp_path: Path) -> None:
    first, second = in_two_processes(exchange, tmp_path)
    torch.manual_seed(0)
    torch.testing.assert_close(first["every"], torch.randn(4, 3, dtype=torch.float64))
    torch.testing.assert_close(second["every"], first["every"])
    # Each process has the same loss, so DistributedDataParallel averages twice its gradient.
    torch.testing.assert_close(first["gradient"], 2 * torch.arange(6.0, dtype=torch.float64).view(2, 3))
    assert first["identities"].tolist() == [0, 5, 1, 5]
    assert first["mean"] == second["mean"] == 4.5
    assert first["table"].tolist() == [[0, 0], [0, 0], [1, 1]]
    torch.manual_seed(7)
    whole = nn.functional.dropout(torch.ones(8, 5))
    torch.testing.assert_close(torch.cat([first["dropped"], second["dropped"]]), whole)
    assert first["told"] and second["told"]


def attended_network() -> tuple[nn.Module, Tensor, Tensor]:
    """A network with blocks and branches in float64, images and identities."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 4, 5)
    ).double()
    images = torch.randn(8, 3, 16, 8, dtype=torch.float64)
    attach(network, "csalr", "0", num_classes=5, landmarks=(3, 2), example=images)
    nn.init.constant_(network.attention["0"].alpha, 0.3)  # type: ignore[index, arg-type]
    return network.train(), images, torch.arange(8) % 5


def gradients_of(parallel: nn.Module, images: Tensor, identities: Tensor) -> dict[str, Tensor]:
    """The gradients of the sum of all cross entropies, by the name of the parameter."""
    sum(nn.functional.cross_entropy(logits, identities) for logits in parallel(images)).backward()
    return {name.removeprefix("module."): one.grad for name, one in parallel.named_parameters() if one.grad is not None}


def train_attended(rank: int, folder: Path) -> None:
    network, images, identities = attended_network()
    synchronise(network)
    half = slice(4 * rank, 4 * rank + 4)
    gradients = gradients_of(nn.parallel.DistributedDataParallel(network), images[half], identities[half])
    torch.save(gradients, folder / f"{rank}.pt")


def test_an_attended_network_in_two_processes_has_the_gradients_of_one(tmp_path: Path) -> None:
    first, second = in_two_processes(train_attended, tmp_path)
    expected = gradients_of(*attended_network())
    assert {"attention.0.alpha", "supervision.0.classifier.weight", "3.weight"} <= set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(first[name], gradient, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(second[name], gradient, rtol=1e-8, atol=1e-9)


# Shares


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """A function that sets this process's rank and the number of processes."""

    def become(rank: int, world: int) -> None:
        for name, value in (("rank", rank), ("world_size", world)):
            monkeypatch.setattr(distributed, name, lambda value=value: value)
        monkeypatch.setattr(distributed, "is_main", lambda: True)  # every process has the order
        monkeypatch.setattr(distributed, "from_main", lambda value: value)

    return become


@pytest.mark.parametrize("name", torchreid.data.sampler.AVAI_SAMPLERS)
def test_shares_of_every_sampler_are_consecutive_and_together_the_batches_of_one_process(
    name: str, as_process: Callable[[int, int], None]
) -> None:
    items = [(f"{index}.jpg", index // 6, index % 2, index % 2) for index in range(60)]
    options = {"batch_size": 16, "num_instances": 4, "num_cams": 2, "num_datasets": 2}

    def places(rank: int, world: int) -> list[tuple[int, int, int]]:
        random.seed(0)
        torch.manual_seed(0)
        torchreid.data.sampler.np.random.seed(0)
        as_process(rank, world)
        share = TrainingShare(torchreid.data.sampler.build_train_sampler(items, name, **options), 16)
        share.epoch = 3
        drawn = list(share)
        assert len(share) == share.batches * 16 // world >= len(drawn)
        return drawn

    whole = places(0, 1)
    shares = [places(rank, 2) for rank in range(2)]
    assert len(whole) >= 32
    assert sorted(shares[0] + shares[1]) == whole
    for share in shares:
        for batch in range(0, len(share), 8):
            numbers = [place for _, place, _ in share[batch : batch + 8]]
            assert numbers == list(range(numbers[0], numbers[0] + 8))
            if name == "RandomIdentitySampler":
                identities = Counter(items[index][1] for _, _, index in share[batch : batch + 8])
                assert all(count % 4 == 0 for count in identities.values())
    assert {epoch for epoch, _, _ in whole} == {3}


def test_the_augmentation_of_an_image_depends_on_its_place_alone() -> None:
    class Noise:
        def __getitem__(self, index: int) -> tuple[float, float, float]:
            return random.random(), float(torchreid.data.sampler.np.random.rand()), float(torch.rand(()))

    drawn = DrawnByPlace(Noise(), seed=1)
    first = drawn[0, 5, 2]
    random.random()
    torch.rand(3)
    assert drawn[0, 5, 9] == first
    assert drawn[0, 6, 2] != first and drawn[1, 5, 2] != first and DrawnByPlace(Noise(), seed=2)[0, 5, 2] != first


@pytest.mark.parametrize(("rows", "world"), [(7, 2), (3, 4), (8, 4), (1, 2)])
def test_rows_of_all_processes_are_all_rows_once(rows: int, world: int, as_process: Callable[[int, int], None]) -> None:
    as_process(0, world)
    assert [row for rank in range(world) for row in distributed.rows_of(rank, rows)] == list(range(rows))


def test_a_batch_that_would_split_an_identity_between_processes_is_refused(
    tiny_data: Path, tmp_path: Path, as_process: Callable[[int, int], None]
) -> None:
    config = default_config()
    config.merge_from_list(["data.root", str(tiny_data), "data.save_dir", str(tmp_path), "train.batch_size", 12])
    config.merge_from_list(["sampler.train_sampler", "RandomIdentitySampler", "sampler.num_instances", 4])
    as_process(0, 2)
    with pytest.raises(UserError, match=r"'train.batch_size' is 12, 6 images a process.*Give a multiple of 8"):
        prepare(config)


def test_a_batch_of_one_image_a_process_is_refused(
    tiny_data: Path, tmp_path: Path, as_process: Callable[[int, int], None]
) -> None:
    config = default_config()
    config.merge_from_list(["data.root", str(tiny_data), "data.save_dir", str(tmp_path), "train.batch_size", 2])
    as_process(0, 2)
    with pytest.raises(UserError, match=r"one of 2 processes gets a single image.*give 4 or more, a multiple of 2"):
        prepare(config)


# Whole trainings


class Run:
    """``csalr train`` in several processes, started by torchrun."""

    def __init__(self, data: Path, folder: Path, processes: int, *overrides: Any) -> None:
        port = distributed.free_port()
        torchrun = ["torch.distributed.run", "--nproc-per-node", processes, "--master-port", port, "-m"]
        words = [sys.executable, "-m", *(torchrun if processes > 1 else ()), "csalr_plugin", "train"]
        words += ["--config-file", "configs/torchreid/pcb_384x128_sgd.yaml", "--root", data]
        words += ["data.save_dir", folder, "data.workers", 0, "data.height", 64, "data.width", 32]
        words += ["model.pretrained", False, "csalr.stages", 3, "csalr.landmarks", "4,2", "train.batch_size", 8]
        words += ["train.lr", 0.01, "train.max_epoch", 1, "train.print_freq", 1, "MODEL.NAME", "pcb_csalr", *overrides]
        self.folder = folder
        self.output = folder.with_name(f"{folder.name}-{port}.log")
        with self.output.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, words)),
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"},
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.end()

    def wait_for(self, pattern: str) -> None:
        until = time.monotonic() + PATIENCE
        while not re.search(pattern, self.text):
            assert self.process.poll() is None and time.monotonic() < until, self.text[-3000:]
            time.sleep(0.1)

    def number_of(self, rank: int) -> int:
        """The process id of process `rank`."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == self.process.pid and f"RANK={rank}".encode() in environment:
                return int(folder.name)
        raise AssertionError(f"no process {rank}")

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture
def start(tiny_data: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(folder: str, processes: int, *overrides: Any) -> Run:
        runs.append(Run(tiny_data, tmp_path / folder, processes, *overrides))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


def assert_same_weights(ours: Path, theirs: Path) -> None:
    states = [read_checkpoint(path)["state_dict"] for path in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if value.is_floating_point():
            torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=2e-5, msg=lambda text, n=name: n + text)


def test_two_processes_train_and_evaluate_as_one_does_and_the_first_alone_prints_and_saves(
    start: Callable[..., Run],
) -> None:
    identity = ("sampler.train_sampler", "RandomIdentitySampler", "sampler.num_instances", 2)
    # A small learning rate, because every step amplifies the rounding errors of the previous one.
    options = ("csalr.sync_batch_norm", True, "train.lr", 0.0003, "loss.name", "triplet", "loss.triplet.weight_x", 1.0)
    one, two = start("one", 1, *options, *identity), start("two", 2, *options, *identity)
    assert one.wait() == 0, one.text
    assert two.wait() == 0, two.text
    assert_same_weights(one.folder / "model" / "model.pth.tar-1", two.folder / "model" / "model.pth.tar-1")
    results = [json.loads((run.folder / "results_market1501.json").read_text()) for run in (one, two)]
    scores = [{name: value for name, value in found.items() if isinstance(value, float)} for found in results]
    assert "mAP" in scores[0] and scores[0] == pytest.approx(scores[1], abs=0.02)
    metrics = [
        [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()] for run in (one, two)
    ]
    for ours, theirs in zip(*metrics, strict=True):
        if "dataset" not in ours:  # an epoch
            assert ours.pop("seconds") > 0 and theirs.pop("seconds") > 0
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    for run in (one, two):
        assert run.text.count("=> Start training") == run.text.count("** Results **") == 1
        assert len(list(run.folder.glob("train.log*"))) == len(list(run.folder.glob("events*"))) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_run_with_a_checkpoint_from_which_one_process_goes_on(
    rank: int, start: Callable[..., Run], tmp_path: Path
) -> None:
    small = ("model.name", "osnet_x0_25", "train.staged_lr", False)
    run = start("run", 2, *small, "train.max_epoch", 1000)
    run.wait_for(r"epoch 2/1000, batch 2/")
    os.kill(run.number_of(rank), signal.SIGKILL)
    began = time.monotonic()
    assert run.wait() != 0
    assert time.monotonic() - began < 60
    errors = re.findall(r"csalr: error: .*", run.text)
    assert len(errors) == 1 and "another process of it has ended" in errors[0], run.text[-3000:]
    match = re.search(r"The last checkpoint is '([^']+)'", errors[0])
    assert match and Path(match[1]).is_file()
    epochs = int(re.findall(r"epoch (\d+)/", run.text)[-1]) + 1
    resumed = start("resumed", 1, *small, "train.max_epoch", epochs, "model.resume", match[1])
    assert resumed.wait() == 0, resumed.text
    assert (resumed.folder / "model" / f"model.pth.tar-{epochs}").is_file()


def test_ctrl_c_stops_all_processes_after_the_same_batch_and_the_resumed_run_equals_one_process(
    start: Callable[..., Run],
) -> None:
    options = ("csalr.sync_batch_norm", True, "csalr.accumulate", 2)
    run = start("run", 2, *options)
    run.wait_for(r"epoch 1/1, batch 2/")
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does: torchrun and its processes
    assert run.wait() != 0
    match = re.search(r"Go on with: model.resume (\S+)", run.text)
    assert match and run.text.count("Go on with") == 1, run.text[-3000:]
    resumed, whole = start("resumed", 2, *options, "model.resume", match[1]), start("whole", 1, *options)
    assert resumed.wait() == 0, resumed.text
    assert whole.wait() == 0, whole.text
    assert_same_weights(whole.folder / "model" / "model.pth.tar-1", resumed.folder / "model" / "model.pth.tar-1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.batch_size", 7), "'train.batch_size' is 7, the images of all 2 processes together"),
        (("csalr.grups", 2), "csalr.grups"),
        (("model.resume", "missing.pth"), "missing.pth"),
    ],
    ids=["batch", "key", "checkpoint"],
)
def test_a_mistake_that_every_process_finds_is_printed_once(
    overrides: tuple[Any, ...], message: str, start: Callable[..., Run]
) -> None:
    run = start("run", 2, *overrides)
    assert run.wait() != 0
    assert run.text.count("csalr: error:") == 1 and message in run.text, run.text[-3000:]
    assert "UserError" not in run.text and "SharedError" not in run.text
    assert not (run.folder / "model").exists()
