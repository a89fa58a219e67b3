"""The engine: Eq. 18, exact resuming, phases of RPP, stops and failures."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchreid
from torch import nn
from torch.nn import functional as F

from csalr_plugin.attention import build_attention
from csalr_plugin.errors import UserError
from csalr_plugin.hosts.torchreid import engine as engine_module
from csalr_plugin.hosts.torchreid import register
from csalr_plugin.hosts.torchreid.config import OPTIMIZER, Config, default_config, set_active_config
from csalr_plugin.hosts.torchreid.datasets import build_datamanager
from csalr_plugin.hosts.torchreid.engine import keep_autocast_in_threads
from csalr_plugin.hosts.torchreid.optimizer import build_optimizer
from csalr_plugin.hosts.torchreid.train import build_engine, build_network, resume_from_checkpoint, train
from csalr_plugin.hosts.training import machine_failure
from csalr_plugin.models import build_model
from csalr_plugin.models.recipe import WarmUp
from csalr_plugin.models.weights import read_checkpoint

register()


def settings(data: Path, folder: Path, *overrides: Any) -> Config:
    config = default_config()
    config.merge_from_file("configs/torchreid/pcb_384x128_sgd.yaml")
    config.merge_from_list(["data.root", str(data), "data.save_dir", str(folder), "data.workers", 0])
    config.merge_from_list(["data.height", 64, "data.width", 32, "model.pretrained", False, "csalr.stages", (3,)])
    config.merge_from_list(["train.batch_size", 8, "train.lr", 0.01, "train.max_epoch", 2, "train.print_freq", 100])
    config.merge_from_list(list(overrides))
    config.use_gpu = False
    return config


# A model of the host that trains in a second, for tests of the engine alone.
SMALL = ("model.name", "osnet_x0_25", "train.staged_lr", False)


def make_engine(config: Config) -> Any:
    set_active_config(config)
    config.validate()
    torchreid.utils.set_random_seed(config.train.seed)
    datamanager = build_datamanager(config)
    model = build_network(config, datamanager.num_train_pids)
    optimizer = build_optimizer(model, **config.keyword_arguments(OPTIMIZER))
    return build_engine(config, datamanager, model, optimizer, None)


def weights_of(folder: Path, epoch: int) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = read_checkpoint(folder / "model" / f"model.pth.tar-{epoch}")["state_dict"]
    return state


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_engine_minimises_eq_18_as_computed_by_hand(tiny_data: Path, tmp_path: Path, weight: float) -> None:
    config = settings(tiny_data, tmp_path, "csalr.supervision_weight", weight, "csalr.stages", (1, 2, 3))
    engine = make_engine(config)
    batch = next(iter(engine.train_loader))
    engine.model.train()
    state = {name: value.clone() for name, value in engine.model.state_dict().items()}
    torch.manual_seed(0)
    logits = engine.model(batch["img"])
    assert len(logits) == 6 + 3
    losses = [F.cross_entropy(one, batch["pid"]) for one in logits]
    by_hand = sum(losses[:6]) + weight * sum(losses[6:])
    engine.model.load_state_dict(state)  # the batch norms have seen the batch
    torch.manual_seed(0)
    summary = engine.iteration(batch, 0)
    assert summary["loss"] == pytest.approx(by_hand.item(), rel=1e-5)
    assert summary["L_F"] == pytest.approx(sum(losses[:6]).item(), rel=1e-5)
    for stage, loss in zip((1, 2, 3), losses[6:], strict=True):
        assert summary[f"L_DS_stage{stage}"] == pytest.approx(loss.item(), rel=1e-5)
        assert f"alpha_stage{stage}" in summary
    assert 0 <= summary["acc"] <= 100


def test_the_gradient_that_is_applied_is_that_of_eq_18(tiny_data: Path, tmp_path: Path) -> None:
    engine = make_engine(settings(tiny_data, tmp_path, "csalr.supervision_weight", 0.5, "csalr.clip_gradient", 0))
    batch = next(iter(engine.train_loader))
    engine.model.train()
    state = {name: value.clone() for name, value in engine.model.state_dict().items()}
    torch.manual_seed(0)
    losses = [F.cross_entropy(one, batch["pid"]) for one in engine.model(batch["img"])]
    weight = engine.network.supervision["stage3"].classifier.weight
    (by_hand,) = torch.autograd.grad(sum(losses[:6]) + 0.5 * losses[6], weight)
    engine.model.load_state_dict(state)
    torch.manual_seed(0)
    engine.iteration(batch, 0)
    torch.testing.assert_close(weight.grad, by_hand, rtol=1e-4, atol=1e-7)


def test_the_triplet_loss_is_weighted_and_added_to_the_sum_of_the_parts(tiny_data: Path, tmp_path: Path) -> None:
    overrides = ("loss.name", "triplet", "loss.triplet.weight_t", 0.7, "loss.triplet.weight_x", 1.0)
    sampler = ("sampler.train_sampler", "RandomIdentitySampler", "sampler.num_instances", 2)
    engine = make_engine(settings(tiny_data, tmp_path, *overrides, *sampler))
    batch = next(iter(engine.train_loader))
    summary = engine.iteration(batch, 0)
    assert summary["loss"] == pytest.approx(summary["L_F"] + summary["L_DS_stage3"], rel=1e-5)
    assert summary["L_F"] > 0.7 * summary["triplet"]


def test_blocks_and_gates_have_their_own_learning_rates_and_gates_no_weight_decay(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_data, tmp_path, "csalr.attention_lr", 0.5, "csalr.gate_lr", 0.2)
    engine = make_engine(config)
    groups = {group.get("role"): group for group in engine.optimizer.param_groups}
    assert groups["attention"]["lr"] == pytest.approx(0.005)
    assert groups["gate"]["lr"] == pytest.approx(0.002)
    assert groups["gate"]["weight_decay"] == 0
    assert [id(one) for one in groups["gate"]["params"]] == [id(engine.network.attention["stage3"].alpha)]
    assert engine.get_current_lr() == pytest.approx(0.01)  # the host prints that of new layers
    everything = [id(one) for group in engine.optimizer.param_groups for one in group["params"]]
    assert sorted(everything) == sorted(id(one) for one in engine.model.parameters())


def test_a_run_that_is_stopped_and_resumed_equals_one_without_a_stop(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    straight = train(settings(tiny_data, whole))
    iteration, seen = engine_module._PluginTraining.iteration, []

    def stop_in_the_second_epoch(self: Any, data: Any, number: int) -> dict[str, float]:
        seen.append(number)
        if number == self.num_batches + 1:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C, within a batch
        return iteration(self, data, number)

    monkeypatch.setattr(engine_module._PluginTraining, "iteration", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        train(settings(tiny_data, halves))
    monkeypatch.setattr(engine_module._PluginTraining, "iteration", iteration)
    assert len(seen) > 2
    (interrupted,) = (halves / "model").glob("model.pth.tar-1-batch2")
    resumed = train(settings(tiny_data, halves, "model.resume", str(interrupted)))
    assert resumed == straight
    expected, got = weights_of(whole, 2), weights_of(halves, 2)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_rpp_goes_through_its_phases_and_resumes_in_the_right_one(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[tuple[int, bool, bool, bool]] = []
    iteration = engine_module._PluginTraining.iteration

    def watch(self: Any, data: Any, number: int) -> dict[str, float]:
        network = self.network
        trains = network.conv1.weight.requires_grad, network.part_classifier.weight.requires_grad
        phases.append((self.epoch, network.refining, *trains))
        return iteration(self, data, number)

    monkeypatch.setattr(engine_module._PluginTraining, "iteration", watch)
    keys = ("model.name", "pcb_rpp_csalr", "csalr.rpp.pcb_epochs", 1, "csalr.rpp.part_classifier_epochs", 1)
    train(settings(tiny_data, tmp_path / "a", *keys, "train.max_epoch", 2))
    assert sorted(set(phases)) == [(0, False, True, True), (1, True, False, True)]
    phases.clear()
    checkpoint = tmp_path / "a" / "model" / "model.pth.tar-2"
    train(settings(tiny_data, tmp_path / "a", *keys, "train.max_epoch", 3, "model.resume", str(checkpoint)))
    assert sorted(set(phases)) == [(2, True, True, True)]


def test_rpp_starts_from_a_given_pcb_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    pcb = make_engine(settings(tiny_data, tmp_path)).network
    torch.save(pcb.state_dict(), tmp_path / "pcb.pth")
    keys = ("model.name", "pcb_rpp_csalr", "csalr.rpp.pcb_epochs", 0, "model.load_weights", str(tmp_path / "pcb.pth"))
    refined = make_engine(settings(tiny_data, tmp_path, *keys)).network
    assert torch.equal(refined.conv1.weight, pcb.conv1.weight)
    assert refined.refining


def test_a_loss_that_is_not_finite_stops_with_one_line_and_the_last_checkpoint_stays(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iteration = engine_module._PluginTraining.iteration

    def spoil_the_second_epoch(self: Any, data: Any, number: int) -> dict[str, float]:
        if self.epoch == 1:
            self.network.attention["stage3"].value.weight.data.fill_(float("inf"))
        return iteration(self, data, number)

    monkeypatch.setattr(engine_module._PluginTraining, "iteration", spoil_the_second_epoch)
    with pytest.raises(UserError, match=r"L_DS_stage3 = nan.*block stage3.*model\.pth\.tar-1") as error:
        train(settings(tiny_data, tmp_path))
    assert "\n" not in str(error.value)
    state = weights_of(tmp_path, 1)
    assert all(torch.isfinite(value).all() for value in state.values())
    assert not list((tmp_path / "model").glob("model.pth.tar-2*"))


def small(data: Path, folder: Path, *overrides: Any) -> Config:
    """Return settings of a training that takes a second per epoch."""
    return settings(data, folder, *SMALL, "train.max_epoch", 1, *overrides)


def last_checkpoint_in(error: BaseException) -> Path:
    """Return the checkpoint that a message names."""
    match = re.search(r"checkpoint is '([^']+)'", str(error))
    assert match, str(error)
    return Path(match[1])


def test_a_killed_worker_of_the_loader_is_one_line_with_a_checkpoint_that_resumes_exactly(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(small(tiny_data, tmp_path / "whole"))
    iteration = engine_module._PluginTraining.iteration

    def kill_a_worker(self: Any, data: Any, number: int) -> dict[str, float]:
        if number == 2:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
        return iteration(self, data, number)

    monkeypatch.setattr(engine_module._PluginTraining, "iteration", kill_a_worker)
    with pytest.raises(UserError, match=r"a data loader's worker process was killed") as error:
        train(small(tiny_data, tmp_path / "halves", "data.workers", 1))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(engine_module._PluginTraining, "iteration", iteration)
    path = last_checkpoint_in(error.value)
    assert train(small(tiny_data, tmp_path / "halves", "model.resume", str(path))) == straight
    expected, got = weights_of(tmp_path / "whole", 1), weights_of(tmp_path / "halves", 1)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.fixture
def report_of_a_death() -> Iterator[Callable[[float], None]]:
    """A function that raises, so many seconds later and wherever this process is, what torch's SIGCHLD handler does."""

    def report(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    before = signal.signal(signal.SIGALRM, report)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)  # type: ignore[func-returns-value]
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("failure", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_killed_while_a_batch_is_fetched_from_it_is_one_line_with_a_checkpoint(
    failure: Exception,
    report_of_a_death: Callable[[float], None],
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose_the_worker(self: Any, data: Any, number: int) -> dict[str, float]:
        report_of_a_death(0.05)
        raise failure

    monkeypatch.setattr(engine_module._PluginTraining, "iteration", lose_the_worker)
    with pytest.raises(UserError, match="a data loader's worker process was killed") as error:
        train(small(tiny_data, tmp_path))
    assert "\n" not in str(error.value)
    assert last_checkpoint_in(error.value).is_file()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback"),
        RuntimeError("out of resource: shared memory, Required: 278528, Hardware limit: 101376"),
        EOFError("Compressed file ended before the end-of-stream marker was reached"),
        BrokenPipeError(32, "Broken pipe"),
    ],
)
def test_an_error_in_a_worker_in_a_file_or_in_a_gpus_shared_memory_is_not_called_a_killed_worker(
    error: Exception,
) -> None:
    assert machine_failure(error) == ""


@pytest.mark.parametrize(
    "failure",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()],
    ids=["cuda", "cpu"],
)
def test_exhausted_memory_is_one_line_with_the_last_checkpoint(
    failure: Exception, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, data: Any, number: int) -> dict[str, float]:
        raise failure

    monkeypatch.setattr(engine_module._PluginTraining, "iteration", fail)
    with pytest.raises(UserError, match="memory is exhausted; a smaller batch takes less") as error:
        train(small(tiny_data, tmp_path))
    assert last_checkpoint_in(error.value).is_file()


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """A function that limits the size of files that this process writes, like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_does_not_fit_is_one_line_and_the_last_one_stays_whole(
    tiny_data: Path, tmp_path: Path, file_limit: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = engine_module._PluginTraining._save

    def save_to_a_full_disk(self: Any, name: str, *more: Any) -> Path:
        if name == "model.pth.tar-2":
            file_limit(100_000)
        return save(self, name, *more)

    monkeypatch.setattr(engine_module._PluginTraining, "_save", save_to_a_full_disk)
    with pytest.raises(
        UserError, match=r"model\.pth\.tar-2' cannot be written \(File too large\): it needs \d+ MB"
    ) as error:
        train(small(tiny_data, tmp_path, "train.max_epoch", 2))
    assert "\n" not in str(error.value)
    path = last_checkpoint_in(error.value)
    assert path.name == "model.pth.tar-1" and read_checkpoint(path)["epoch"] == 1
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["model.pth.tar-1"]


def test_a_disk_without_space_for_a_checkpoint_is_refused_before_training(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, free=1000))
    with pytest.raises(UserError, match=r"a checkpoint needs \d+ MB, and 0 MB are free"):
        train(small(tiny_data, tmp_path))
    assert not (tmp_path / "model").exists()


def test_a_save_folder_that_is_removed_during_training_is_made_again(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = engine_module._PluginTraining._save

    def remove_the_folder(self: Any, *args: Any) -> Path:
        shutil.rmtree(tmp_path / "log")
        return save(self, *args)

    monkeypatch.setattr(engine_module._PluginTraining, "_save", remove_the_folder)
    train(small(tiny_data, tmp_path / "log"))
    assert read_checkpoint(tmp_path / "log" / "model" / "model.pth.tar-1")["epoch"] == 1


def test_a_folder_that_cannot_be_written_during_training_is_one_line(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = engine_module._PluginTraining._save

    def spoil_the_folder(self: Any, *args: Any) -> Path:
        (tmp_path / "model").write_text("a file in its place")
        return save(self, *args)

    monkeypatch.setattr(engine_module._PluginTraining, "_save", spoil_the_folder)
    with pytest.raises(UserError, match=r"model\.pth\.tar-1' cannot be written \((File exists|Not a directory)\)"):
        train(small(tiny_data, tmp_path))


def test_the_unfinished_checkpoint_of_a_killed_run_is_removed_by_the_next_run(tiny_data: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "model" / ".model.pth.tar-1.unfinished"
    unfinished.parent.mkdir()
    unfinished.write_bytes(b"half of it")
    train(small(tiny_data, tmp_path))
    assert not unfinished.exists()


class ClosedConsole(io.StringIO):
    """A console that is closed by its reader after a certain text."""

    def __init__(self, last: str) -> None:
        super().__init__()
        self.last = last

    def write(self, text: str) -> int:
        if self.last in self.getvalue():
            raise BrokenPipeError
        return super().write(text)


def test_a_closed_console_ends_training_with_a_checkpoint_that_resumes_exactly(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(small(tiny_data, tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(BrokenPipeError):
        patch.setattr(sys, "stdout", ClosedConsole("batch 2/"))
        train(small(tiny_data, tmp_path / "halves", "train.print_freq", 1))
    (log,) = (tmp_path / "halves").glob("train.log*")
    match = re.search(r"Go on with: model.resume (\S+)", log.read_text())
    assert match
    assert train(small(tiny_data, tmp_path / "halves", "model.resume", match[1])) == straight


@pytest.mark.parametrize("failing", ["add_scalar", "metrics", "log", "maps"])
def test_a_record_that_cannot_be_written_never_costs_a_checkpoint(
    failing: str,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    config = small(tiny_data, tmp_path)
    if failing == "add_scalar":
        monkeypatch.setattr("torch.utils.tensorboard.writer.SummaryWriter.add_scalar", fail)
    elif failing == "metrics":
        (tmp_path / "metrics.jsonl").mkdir()
    elif failing == "maps":
        keys = ("train.max_epoch", 1, "train.batch_size", 20, "csalr.tensorboard.maps_every", 1)
        config = settings(tiny_data, tmp_path, *keys)
        monkeypatch.setattr("csalr_plugin.hosts.maps.maps_of", fail)
    else:
        whole = Path.open

        def open_log(path: Path, *args: Any, **options: Any) -> Any:
            file = whole(path, *args, **options)
            if path.name.startswith("train.log"):
                file.write = fail
            return file

        monkeypatch.setattr(Path, "open", open_log)
    results = train(config)
    assert results["market1501"]["mAP"] > 0
    assert read_checkpoint(tmp_path / "model" / "model.pth.tar-1")["epoch"] == 1
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Warning: ")]
    assert len(warnings) == (2 if failing == "metrics" else 1), warnings


def test_a_batch_size_above_the_number_of_images_is_refused_with_both_numbers(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'train.batch_size' is 64, more than the 44 training images"):
        train(small(tiny_data, tmp_path, "train.batch_size", 64))
    assert not (tmp_path / "model").exists()
    train(small(tiny_data, tmp_path, "train.batch_size", 64, "test.evaluate", True))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ("train.staged_lr", True, "train.new_layers", "clasifier"),
            r"'train\.new_layers' names 'clasifier'.*'classifier'",
        ),
        (("train.fixbase_epoch", 1, "train.open_layers", "fc,clasifier"), r"'train\.open_layers' names 'clasifier'"),
    ],
)
def test_a_layer_that_the_model_does_not_have_is_refused_with_the_nearest(
    overrides: tuple[Any, ...], complaint: str, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=complaint):
        train(small(tiny_data, tmp_path, *overrides))


def test_an_image_size_that_a_model_of_the_hosts_cannot_take_is_one_line(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mudeep cannot take images of 64x32 \(.*data\.height and data\.width"):
        train(small(tiny_data, tmp_path, "model.name", "mudeep"))


def test_a_batch_of_one_image_on_a_map_of_one_position_is_one_line(tiny_data: Path, tmp_path: Path) -> None:
    engine = make_engine(settings(tiny_data, tmp_path, "data.height", 16, "data.width", 16))
    engine.model.train()
    batch = {"img": torch.randn(1, 3, 16, 16), "pid": torch.tensor([0])}
    with pytest.raises(UserError, match=r"'train\.batch_size' is too small: batch norm"):
        engine.iteration(batch, 0)


def test_evaluating_without_a_checkpoint_says_which_weights_are_evaluated(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small(tiny_data, tmp_path, "test.evaluate", True))
    assert "the random weights of osnet_x0_25 are evaluated" in capsys.readouterr().out


def test_embeddings_that_are_not_finite_are_never_ranked(tiny_data: Path, tmp_path: Path) -> None:
    engine = make_engine(small(tiny_data, tmp_path))
    nn.init.constant_(engine.network.fc[0].weight, 3e38)  # finite, but the embeddings overflow
    with pytest.raises(UserError, match=r"the embeddings of \d+ query images are not finite"):
        engine.test()


def test_results_are_printed_in_the_form_that_the_hosts_tools_read(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tiny_data, tmp_path, "test.evaluate", True)
    results = train(config)["market1501"]
    (log,) = tmp_path.glob("test.log*")  # the name that the host's tools/parse_test_res.py looks for
    lines = log.read_text().splitlines()
    for line in (
        f"mAP: {results['mAP']:.1%}",
        f"Rank-1  : {results['rank-1']:.1%}",
        f"Rank-10 : {results['rank-10']:.1%}",
    ):
        assert line in lines
    capsys.readouterr()
    engine = make_engine(config)
    host = torchreid.engine.ImageSoftmaxEngine(engine.datamanager, engine.model, engine.optimizer, use_gpu=False)
    printed = []
    for one in (host, engine):
        one.test()
        text = capsys.readouterr().out
        printed.append(text[text.index("** Results **") :])
    assert printed[0] == printed[1]


class Tracklets(torchreid.data.VideoDataset):  # type: ignore[misc]  # torchreid carries no types
    """The tiny data as tracklets of 2 and 3 images."""

    def __init__(self, root: str = "", **options: Any) -> None:
        subsets = []
        for name in ("bounding_box_train", "query", "bounding_box_test"):
            images: dict[tuple[int, int], list[str]] = {}
            for file in sorted((Path(root) / "market1501" / "Market-1501-v15.09.15" / name).glob("0*.jpg")):
                identity, camera = int(file.name[:4]), int(file.name[6])
                if identity:
                    images.setdefault((identity, camera), []).append(str(file))
            subsets.append([(tuple(paths * 2)[: 2 + one % 2], one, camera) for (one, camera), paths in images.items()])
        labels = {identity: label for label, identity in enumerate(sorted({item[1] for item in subsets[0]}))}
        train = [(paths, labels[identity], camera) for paths, identity, camera in subsets[0]]
        super().__init__(train, *subsets[1:], **options)


@pytest.fixture
def tracklets(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Settings of a video data set."""
    monkeypatch.setitem(vars(torchreid.data.datasets)["__video_datasets"], "tracklets", Tracklets)
    names = ("data.type", "video", "data.sources", "tracklets", "data.targets", "tracklets")
    return (*names, "video.seq_len", 2, "train.batch_size", 2, "train.max_epoch", 1)


def test_attention_maps_of_videos_are_drawn_from_their_first_frames(
    tiny_data: Path, tmp_path: Path, tracklets: tuple[Any, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings(tiny_data, tmp_path, *tracklets, "train.batch_size", 8, "csalr.tensorboard.maps_every", 1))
    assert "Warning" not in capsys.readouterr().err
    assert b"Maps/stage3" in next(tmp_path.glob("events*")).read_bytes()


def test_tracklets_of_different_lengths_in_one_batch_are_refused(
    tiny_data: Path, tmp_path: Path, tracklets: tuple[Any, ...]
) -> None:
    whole = (*SMALL, *tracklets, "video.sample_method", "all")
    with pytest.raises(UserError, match=r"tracklets of 2 to 3 images do not form batches of 'train\.batch_size' 2"):
        train(settings(tiny_data, tmp_path, *whole))
    with pytest.raises(UserError, match=r"do not form batches of 'test\.batch_size' 100"):
        train(settings(tiny_data, tmp_path, *whole, "train.batch_size", 1))
    train(settings(tiny_data, tmp_path, *whole, "train.batch_size", 1, "test.batch_size", 1))


def test_results_are_a_file_that_other_programs_read(tiny_data: Path, tmp_path: Path) -> None:
    results = train(settings(tiny_data, tmp_path, "test.evaluate", True))
    written = json.loads((tmp_path / "results_market1501.json").read_text())
    assert written["mAP"] == results["market1501"]["mAP"]
    assert {"rank-1", "rank-5", "rank-10"} <= set(written)


def test_evaluation_equals_the_hosts_own(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tiny_data, tmp_path, "test.rerank", True)
    engine = make_engine(config)
    host = torchreid.engine.ImageSoftmaxEngine(engine.datamanager, engine.model, engine.optimizer, use_gpu=False)
    for options in ({}, {"rerank": True}, {"dist_metric": "cosine", "normalize_feature": True}):
        rank1 = host.test(save_dir=str(tmp_path), **options)
        assert engine.test(save_dir=str(tmp_path), **options) == rank1


def test_a_model_of_the_hosts_own_trains_with_the_hosts_loss(tiny_data: Path, tmp_path: Path) -> None:
    engine = make_engine(settings(tiny_data, tmp_path, "model.name", "osnet_x0_25", "train.staged_lr", False))
    batch = next(iter(engine.train_loader))
    engine.model.train()
    summary = engine.iteration(batch, 0)
    assert set(summary) == {"loss", "L_F", "acc"}


@pytest.mark.parametrize("engine_name", ["ImageSoftmaxEngine", "ImageTripletEngine"])
def test_a_plugin_model_trains_under_the_hosts_own_engine(tiny_data: Path, tmp_path: Path, engine_name: str) -> None:
    loss = "triplet" if "Triplet" in engine_name else "softmax"
    ours = make_engine(settings(tiny_data, tmp_path, "loss.name", loss))
    host = getattr(torchreid.engine, engine_name)(ours.datamanager, ours.model, ours.optimizer, use_gpu=False)
    ours.model.train()
    before = ours.network.conv5.layers[0].weight.clone()
    summary = host.forward_backward(next(iter(ours.train_loader)))
    assert all(torch.isfinite(torch.tensor(value)) for value in summary.values())
    assert not torch.equal(before, ours.network.conv5.layers[0].weight)


def test_the_hosts_feature_extractor_takes_a_checkpoint_of_the_plugins(tiny_data: Path, tmp_path: Path) -> None:
    config = settings(tiny_data, tmp_path)
    engine = make_engine(config)
    engine.model.eval()
    torch.save({"state_dict": engine.model.state_dict()}, tmp_path / "model.pth")
    extractor = torchreid.utils.FeatureExtractor("pcb_csalr", str(tmp_path / "model.pth"), (64, 32), device="cpu")
    loader = engine.test_loader["market1501"]["query"]
    path, *_ = loader.dataset.query[0]
    with torch.no_grad():
        expected = engine.model(loader.dataset[0]["img"][None])
    torch.testing.assert_close(extractor([path]), expected)


def same_start(engine: Any, *others: Any, mixing: bool = True) -> None:
    """Equal weights, open gates and no dropout; without `mixing`, batch norms in eval mode."""
    for block in engine.network.attention.values():
        nn.init.constant_(block.alpha, 0.3)
    for one in (engine, *others):
        one.network.load_state_dict(engine.network.state_dict())
        one.model.train()
        for module in one.network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not mixing:
                module.eval()


def assert_same_weights(engine: Any, other: Any, **tolerance: float) -> None:
    expected, got = engine.network.state_dict(), other.network.state_dict()
    assert list(expected) == list(got)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **tolerance, msg=lambda text, name=name: f"{name} {text}")


@pytest.mark.parametrize(("accumulate", "first_of"), [(2, 0), (3, 3)])  # of five batches: whole, and incomplete
def test_accumulated_batches_make_the_step_of_the_large_batch(
    tiny_data: Path, tmp_path: Path, accumulate: int, first_of: int
) -> None:
    # A limit that is exceeded: it must apply once, to the whole gradient.
    keys = ("csalr.clip_gradient", 0.02, "csalr.warmup", 0)
    large = make_engine(settings(tiny_data, tmp_path, *keys))
    small = make_engine(settings(tiny_data, tmp_path, *keys, "csalr.accumulate", accumulate))
    assert len(small.train_loader) == 5
    same_start(large, small, mixing=False)
    batch = next(iter(large.train_loader))
    before = large.network.state_dict()["attention.stage3.query.weight"].clone()
    large.iteration(batch, 0)
    first, second = ({key: batch[key][part] for key in ("img", "pid")} for part in (slice(0, 4), slice(4, 8)))
    small.iteration(first, first_of)
    assert torch.equal(small.network.state_dict()["attention.stage3.query.weight"], before)
    small.iteration(second, first_of + 1)
    query = [engine.network.attention["stage3"].query.weight for engine in (large, small)]
    assert not torch.equal(query[0], before)
    torch.testing.assert_close(query[1].grad, query[0].grad, rtol=1e-3, atol=1e-6)
    assert_same_weights(large, small, rtol=1e-4, atol=1e-6)


def test_warm_up_counts_optimizer_steps(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at, seen = WarmUp.at, []

    def watch(self: WarmUp, step: int) -> Any:
        seen.append(step)
        return at(self, step)

    monkeypatch.setattr(WarmUp, "at", watch)
    train(settings(tiny_data, tmp_path, *SMALL, "csalr.accumulate", 2))
    assert seen == [0, 1, 2, 3, 4, 5]  # two epochs of five batches


def progress(folder: Path, name: str) -> Any:
    return read_checkpoint(folder / "model" / name)["optimizer"]["param_groups"][0]


@pytest.mark.parametrize(
    ("overrides", "stopped_at", "goes_on_at"),
    [
        (("csalr.accumulate", 2), 2, 2),  # within the group of batches 2 and 3
        (("csalr.amp", "fp16", "csalr.accumulate", 2, "csalr.channels_last", True), 2, 2),
    ],
)
def test_a_stop_within_accumulated_batches_or_with_a_loss_scale_resumes_exactly(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[Any, ...],
    stopped_at: int,
    goes_on_at: int,
) -> None:
    overrides += ("train.max_epoch", 1)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    straight = train(settings(tiny_data, whole, *SMALL, *overrides))
    iteration = engine_module._PluginTraining.iteration

    def stop(self: Any, data: Any, number: int) -> dict[str, float]:
        if number == stopped_at:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C, within a batch
        return iteration(self, data, number)

    monkeypatch.setattr(engine_module._PluginTraining, "iteration", stop)
    with pytest.raises(KeyboardInterrupt):
        train(settings(tiny_data, halves, *SMALL, *overrides))
    monkeypatch.setattr(engine_module._PluginTraining, "iteration", iteration)
    interrupted = halves / "model" / f"model.pth.tar-0-batch{goes_on_at}"
    resumed = train(settings(tiny_data, halves, *SMALL, *overrides, "model.resume", str(interrupted)))
    assert resumed == straight
    expected, got = weights_of(whole, 1), weights_of(halves, 1)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert progress(whole, "model.pth.tar-1")["scaler"] == progress(halves, "model.pth.tar-1")["scaler"]
    if "fp16" in overrides:
        # Gradients that overflowed have made it smaller: a scale that is not resumed would show.
        assert 0 < progress(halves, interrupted.name)["scaler"]["scale"] < 2**16


def test_the_hosts_own_resuming_reads_a_checkpoint_with_a_loss_scale_and_carries_it_over(
    tiny_data: Path, tmp_path: Path
) -> None:
    keys = (*SMALL, "csalr.amp", "fp16")
    engine = make_engine(settings(tiny_data, tmp_path, *keys))
    engine.scaler.load_state_dict({**engine.scaler.state_dict(), "scale": 1024.0})
    engine._save_interrupted()
    fresh = make_engine(settings(tiny_data, tmp_path, *keys))
    path = str(tmp_path / "model" / "model.pth.tar-0-batch0")
    assert torchreid.utils.torchtools.resume_from_checkpoint(path, fresh.model, fresh.optimizer) == 0
    fresh.max_epoch = 1
    fresh.train(print_freq=100)
    assert fresh.scaler.get_scale() == 1024


def test_fp16_gives_the_loss_of_fp32_to_its_precision_with_the_triplet_loss_too(
    tiny_data: Path, tmp_path: Path
) -> None:
    loss = ("loss.name", "triplet", "sampler.train_sampler", "RandomIdentitySampler", "sampler.num_instances", 2)
    loss += ("train.batch_size", 4, "csalr.clip_gradient", 0.02)
    full = make_engine(settings(tiny_data, tmp_path, *loss))
    half = make_engine(settings(tiny_data, tmp_path, *loss, "csalr.amp", "fp16"))
    same_start(full, half)
    batch = next(iter(full.train_loader))
    seen: list[torch.dtype] = []
    half.network.layer3.register_forward_hook(lambda *given: seen.append(given[-1].dtype))
    expected, got = full.iteration(batch, 0), half.iteration(batch, 0)
    assert seen == [torch.float16]
    assert got.pop("loss_scale") == 2**16
    assert set(got) == set(expected)
    for name in ("loss", "L_F", "triplet", "L_DS_stage3"):
        assert got[name] == pytest.approx(expected[name], rel=5e-2), name
    # Unscaled before they are clipped: the limit takes as much of the block's gradient as in fp32.
    blocks = [engine.network.attention["stage3"] for engine in (full, half)]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in block.parameters()]).item() for block in blocks]
    assert norms == pytest.approx([0.02, 0.02], rel=0.05)
    first = [engine.network.conv1.weight.grad for engine in (full, half)]
    assert F.cosine_similarity(first[0].flatten(), first[1].flatten(), dim=0) > 0.98
    assert first[1].norm().item() == pytest.approx(first[0].norm().item(), rel=0.05)


def test_a_step_that_overflows_fp16_is_left_out_and_training_goes_on_with_half_the_scale(
    tiny_data: Path, tmp_path: Path
) -> None:
    engine = make_engine(settings(tiny_data, tmp_path, *SMALL, "csalr.amp", "fp16"))
    engine.model.train()
    batch = next(iter(engine.train_loader))
    engine.scaler.load_state_dict({**engine.scaler.state_dict(), "scale": 2.0**60})
    before = {name: value.clone() for name, value in engine.network.named_parameters()}
    summary = engine.iteration(batch, 0)
    assert summary["loss_scale"] == 2.0**59
    assert all(torch.equal(value, before[name]) for name, value in engine.network.named_parameters())
    engine.scaler.load_state_dict({**engine.scaler.state_dict(), "scale": 2.0**10})
    engine.iteration(batch, 0)
    assert not all(torch.equal(value, before[name]) for name, value in engine.network.named_parameters())


def test_a_loss_scale_that_collapses_stops_with_one_line_and_unchanged_weights(tiny_data: Path, tmp_path: Path) -> None:
    engine = make_engine(settings(tiny_data, tmp_path, *SMALL, "csalr.amp", "fp16"))
    engine.model.train()
    batch = next(iter(engine.train_loader))
    first = next(engine.network.parameters())
    first.register_hook(lambda gradient: gradient * float("inf"))
    engine.scaler.load_state_dict({**engine.scaler.state_dict(), "scale": 4.0})
    before = first.clone()
    assert [engine.iteration(batch, number)["loss_scale"] for number in range(2)] == [2.0, 1.0]
    with pytest.raises(UserError, match=r"gradient norm = (nan|inf).*csalr\.amp bf16") as error:
        engine.iteration(batch, 2)
    assert "\n" not in str(error.value)
    assert torch.equal(first, before)


def test_channels_last_changes_the_layout_and_not_the_result(tiny_data: Path, tmp_path: Path) -> None:
    plain = make_engine(settings(tiny_data, tmp_path))
    last = make_engine(settings(tiny_data, tmp_path, "csalr.channels_last", True))
    same_start(plain, last)
    layouts: list[bool] = []

    def watch(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        layouts.extend(one.is_contiguous(memory_format=torch.channels_last) for one in (inputs[0], output))

    for layer in (last.network.conv1, last.network.layer1, last.network.layer3):
        layer.register_forward_hook(watch)
    batch = next(iter(plain.train_loader))
    expected, got = plain.iteration(batch, 0), last.iteration(batch, 0)
    assert layouts == [True] * 6
    assert got == pytest.approx(expected, rel=1e-4)
    assert_same_weights(plain, last, rtol=1e-2, atol=1e-4)
    loader = plain.test_loader["market1501"]["query"]
    for engine in (plain, last):
        engine.network.load_state_dict(plain.network.state_dict())
        engine.model.eval()
    torch.testing.assert_close(last._embed(loader, "", False)[0], plain._embed(loader, "", False)[0])


@pytest.mark.parametrize(("name", "size"), [("sa", (12, 6)), ("csa", (12, 6)), ("csalr", (12, 6)), ("csalr", (13, 7))])
def test_every_block_compiles_to_one_graph(name: str, size: tuple[int, int]) -> None:
    torch._dynamo.reset()
    block = build_attention(name, 32, landmarks=(4, 2))
    nn.init.constant_(block.alpha, 0.3)
    # A break in the graph would be an error.
    supervised, plain = (torch.compile(one, backend="eager", fullgraph=True) for one in (block.supervised, block))
    x = torch.randn(2, 32, *size, requires_grad=True)
    expected, got = block.supervised(x), supervised(x)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(sum(one.square().sum() for one in pair), x)[0] for pair in (expected, got)]
    torch.testing.assert_close(gradients[1], gradients[0])
    block.eval()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
            torch.testing.assert_close(plain(x), block(x))


def test_a_network_with_refined_parts_compiles_to_one_graph_in_both_phases() -> None:
    torch._dynamo.reset()
    model = build_model("pcb_rpp_csalr", 4, pretrained=False, stages=(3,), loss="triplet")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    images, embeddings = torch.randn(2, 3, 64, 32), []
    for refining in (True, False):
        model.train().refining = refining
        logits, embedding = compiled(images)
        (sum(one.sum() for one in logits) + embedding.sum()).backward()
        embeddings.append(embedding)
    assert not torch.allclose(*embeddings)


@pytest.fixture
def compile_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """torch.compile with a backend that needs no compiler on this machine."""
    torch._dynamo.reset()
    whole = torch.compile

    def choose(backend: Any) -> None:
        monkeypatch.setattr(torch, "compile", partial(whole, backend=backend, fullgraph=True))

    return choose


def test_a_compiled_network_trains_saves_resumes_and_embeds_like_an_uncompiled_one(
    tiny_data: Path, tmp_path: Path, compile_with: Callable[..., None]
) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_with(backend)
    plain = make_engine(settings(tiny_data, tmp_path))
    compiled = make_engine(settings(tiny_data, tmp_path, "csalr.compile", True))
    assert not graphs
    same_start(plain, compiled)
    batch = next(iter(plain.train_loader))
    assert compiled.iteration(batch, 0) == pytest.approx(plain.iteration(batch, 0), rel=1e-5)
    assert len(graphs) == 1
    assert_same_weights(plain, compiled, rtol=1e-4, atol=1e-6)
    compiled._save_interrupted()
    path = str(tmp_path / "model" / "model.pth.tar-0-batch1")
    for engine in (plain, compiled):
        resume_from_checkpoint(path, engine.model, engine.optimizer)
    assert compiled.iteration(batch, 1) == pytest.approx(plain.iteration(batch, 1), rel=1e-4)
    assert len(graphs) == 1
    for engine in (plain, compiled):
        resume_from_checkpoint(path, engine.model, engine.optimizer)
        engine.model.eval()
    with torch.no_grad():
        maps = [engine.model(batch["img"], return_featuremaps=True) for engine in (plain, compiled)]
    torch.testing.assert_close(maps[1], maps[0])
    loader = plain.test_loader["market1501"]["query"]
    torch.testing.assert_close(compiled._embed(loader, "", False)[0], plain._embed(loader, "", False)[0])
    assert len(graphs) > 2
    compiled.model.train()
    compiled.network.attention["stage3"].value.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match="that of block stage3"):
        compiled.iteration(batch, 2)


def test_a_network_that_cannot_be_compiled_here_is_one_line_that_names_the_key(
    tiny_data: Path, tmp_path: Path, compile_with: Callable[..., None]
) -> None:
    def backend(*_: Any) -> Any:
        raise RuntimeError("no working C++ compiler\nand a page more")

    compile_with(backend)
    keys = ("model.name", "squeezenet1_1", "train.staged_lr", False, "csalr.compile", True)
    with pytest.raises(UserError, match=r"csalr\.compile True.*no working C\+\+.*csalr\.compile False") as error:
        train(settings(tiny_data, tmp_path, *keys))
    assert "\n" not in str(error.value)


def test_an_iteration_synchronises_with_the_device_twice_for_any_number_of_metrics(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(settings(tiny_data, tmp_path, "csalr.stages", (1, 2, 3)))
    batch = next(iter(engine.train_loader))
    waits: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        kept = getattr(torch.Tensor, name)

        def watch(self: torch.Tensor, name: str = name, kept: Any = kept) -> Any:
            waits.append(name)
            return kept(self)

        monkeypatch.setattr(torch.Tensor, name, watch)
    summary = engine.iteration(batch, 0)
    assert len(summary) == 9
    assert waits == ["tolist", "tolist"]


def test_autocast_in_the_threads_of_data_parallel_has_the_dtype_of_the_main_thread() -> None:
    network, seen = nn.Linear(2, 2), []
    keep_autocast_in_threads(network, torch.autocast("cpu", dtype=torch.float16))

    def as_data_parallel_does() -> None:
        with torch.autocast("cpu", enabled=True):
            seen.append(network(torch.ones(1, 2)).dtype)

    thread = threading.Thread(target=as_data_parallel_does)
    thread.start()
    thread.join()
    assert seen == [torch.float16]
