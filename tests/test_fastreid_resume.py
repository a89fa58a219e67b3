"""Resuming, checkpoints, frozen layers and observers of a training in fast-reid."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastreid_script import MISSING, quiet_logs, settings  # noqa: F401  # a fixture
from torch import nn

from csalr_plugin.errors import UserError

if MISSING:
    pytest.skip(f"fast-reid is not installed: there is no {MISSING[0]}", allow_module_level=True)

from csalr_plugin.hosts.fastreid import Trainer
from csalr_plugin.hosts.fastreid.hooks import MetricsWriter, SafeWriter, TrainedLayers
from csalr_plugin.hosts.fastreid.resume import (
    default_setup,
    load_training,
    set_learning_rate,
    take_settings,
)

# isort: split
from fastreid.engine import DefaultPredictor, hooks
from fastreid.engine.train_loop import SimpleTrainer
from fastreid.modeling import build_model
from fastreid.solver import build_lr_scheduler
from fastreid.utils.checkpoint import Checkpointer
from fastreid.utils.events import EventStorage, EventWriter, JSONWriter


@pytest.fixture
def root(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTREID_DATASETS", str(tiny_data / "market1501"))
    return tiny_data


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a training of one epoch, whose settings are not the defaults."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTREID_DATASETS", str(tiny_data / "market1501"))
        patch.setattr(Trainer, "test", lambda *_: {"metric": 50.0, "mAP": 40.0})
        train("OUTPUT_DIR", folder, *("SOLVER.WARMUP_FACTOR", "0.5"), *("INPUT.REA.ENABLED", "True"))
    yield folder


def train(*overrides: Any, resume: bool = False) -> Any:
    trainer = ready(*overrides, resume=resume)
    trainer.train()
    return trainer


def ready(*overrides: Any, resume: bool = False) -> Any:
    """A trainer as the train script makes it, before its training starts."""
    cfg = settings(*map(str, overrides))
    cfg.freeze()
    default_setup(cfg, SimpleNamespace(resume=resume, eval_only=False, config_file=""))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for name in ("model_final.pth", "model_best.pth", "last_checkpoint", "metrics.jsonl"):
        os.link(folder / name, to / name)
    return to


def named(groups: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)]


def logged(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def test_a_setting_given_at_resume_counts_and_every_other_is_taken_from_the_checkpoint(
    trained: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "test", lambda *_: {"metric": 50.0, "mAP": 40.0})
    out = copy(trained, tmp_path / "out")
    given = ("SOLVER.BASE_LR", "0.0002", "SOLVER.MAX_EPOCH", "2", "SOLVER.WEIGHT_DECAY_NORM", "0.0")
    given += ("SOLVER.SCHED", "CosineAnnealingLR", "CSALR.GATE_LR", "0.5", "CSALR.ATTENTION_LR", "0.3")
    trainer = ready("OUTPUT_DIR", out, *given, "SOLVER.IMS_PER_BATCH", "16", resume=True)
    assert (trainer.start_epoch, trainer.max_epoch, trainer.iters_per_epoch) == (1, 2, 2)
    assert (trainer.cfg.SOLVER.WARMUP_FACTOR, trainer.cfg.INPUT.REA.ENABLED) == (0.5, True)
    text = logged(out)
    assert "SOLVER.BASE_LR 0.0002: given now; 0.001 in the checkpoint" in text
    assert "INPUT.REA.ENABLED True: from the checkpoint" in text
    group_of = {name: group for group in trainer.optimizer.param_groups for name in group["param_names"]}
    half = (1 + 0) / 2  # the cosine after one of two epochs
    for name, factor in (("layer1.0.conv1.weight", 1), ("conv5.layers.0.weight", 10)):
        assert group_of[name]["lr"] == pytest.approx(0.0002 * factor * half, rel=1e-3)
    assert group_of["attention.stage3.alpha"]["lr"] == pytest.approx(0.002 * 0.5 * half, rel=1e-3)
    assert group_of["supervision.stage3.classifier.weight"]["lr"] == pytest.approx(0.002 * 0.3 * half, rel=1e-3)
    assert group_of["bn1.weight"]["weight_decay"] == 0  # so the parameters are in other groups than they were
    saved = torch.load(out / "model_final.pth", weights_only=True)["optimizer"]
    momentum = {name: saved["state"][index]["momentum_buffer"] for name, index in named(saved["param_groups"])}
    for name, parameter in named(trainer.optimizer.param_groups):
        assert torch.equal(trainer.optimizer.state[parameter]["momentum_buffer"], momentum[name])
    before = trainer.model.conv1.weight.detach().clone()
    trainer.train()
    assert trainer.iter == 4 and not torch.equal(before, trainer.model.conv1.weight)  # batches of 16 from the epoch on
    checkpoint = torch.load(out / "model_final.pth", weights_only=True)
    assert checkpoint["epoch"] == 1 and checkpoint["settings"]["SOLVER.BASE_LR"] == 0.0002


def test_a_resumed_training_keeps_the_best_checkpoint(trained: Path, root: Path, tmp_path: Path) -> None:
    out = copy(trained, tmp_path / "out")
    trainer = ready("OUTPUT_DIR", out, "SOLVER.MAX_EPOCH", "2", resume=True)
    assert trainer._best == 0.4
    trainer.epoch = 1
    trainer._record_results({"mAP": 39.0})
    assert torch.load(out / "model_best.pth", weights_only=True)["epoch"] == 0
    trainer._record_results({"mAP": 41.0})
    assert torch.load(out / "model_best.pth", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("SOLVER.OPT", "Adam"), r"'SOLVER.OPT' is 'Adam', and .*model_final.pth holds the state of SGD"),
        (("CSALR.GROUPS", "4"), "was trained with groups 2, and this network has groups 4"),
        (("MODEL.NAME", "pcb_sa"), "was trained with attention csalr, and this network has attention sa"),
    ],
)
def test_resuming_with_another_optimizer_or_network_is_refused_in_one_line(
    overrides: tuple[str, ...], told: str, trained: Path, root: Path
) -> None:
    with pytest.raises(UserError, match=told) as error:
        ready("OUTPUT_DIR", trained, *overrides, resume=True)
    assert "\n" not in str(error.value)


def test_a_checkpoint_with_a_damaged_entry_is_refused_by_its_name_before_training(
    trained: Path, root: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "damaged.pth")
    content = torch.load(trained / "model_final.pth", weights_only=True)
    trainer = ready("OUTPUT_DIR", tmp_path / "out", "SOLVER.MAX_EPOCH", "2")

    def load(**change: Any) -> None:
        torch.save({**content, **change}, path)
        load_training(trainer, path)

    weights = content["model"] | {"conv1.weight": torch.full((64, 3, 7, 7), float("nan"))}
    for change, told in (
        ({"epoch": "3"}, r"epoch.*is '3', not an integer"),
        ({"epoch": None}, r"epoch.*is None, not an integer"),
        ({"optimizer": [1]}, r"optimizer.*is \[1\], not the state of an optimizer"),
        ({"model": weights}, r"conv1\.weight.*is not finite"),
    ):
        with pytest.raises(UserError, match=told) as error:
            load(**change)
        assert "\n" not in str(error.value)
    load(lr_sched="damaged", warmup_sched=[])  # the learning rate follows from the settings
    assert trainer.start_epoch == 1
    (tmp_path / "last_checkpoint").write_text("damaged.pth")
    torch.save({**content, "settings": {"TEST.METRIC": "nearest"}}, path)
    with pytest.raises(UserError, match=r"records settings that are not allowed: .*'TEST\.METRIC' is 'nearest'"):
        take_settings(settings("OUTPUT_DIR", str(tmp_path)))


@pytest.mark.parametrize("sched", ["MultiStepLR", "CosineAnnealingLR"])
def test_the_learning_rate_after_resuming_equals_that_of_an_uninterrupted_training_bit_by_bit(sched: str) -> None:
    cfg = settings("SOLVER.SCHED", sched, "SOLVER.STEPS", "2,3", "SOLVER.WARMUP_ITERS", "5", "SOLVER.MAX_EPOCH", "6")
    cfg.merge_from_list(["SOLVER.DELAY_EPOCHS", "2", "SOLVER.GAMMA", "0.3"])

    def fresh() -> Any:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0123)
        trainer = SimpleNamespace(optimizer=optimizer, iters_per_epoch=3, warmup_iters=5, delay_epochs=2)
        trainer.scheduler = build_lr_scheduler(cfg, optimizer, 3)
        trainer.storage, trainer.grad_scaler = EventStorage(), None
        return trainer

    whole = fresh()
    hook = hooks.LRScheduler(whole.optimizer, whole.scheduler)
    hook.trainer = whole
    for epoch in range(6):
        resumed = fresh()
        resumed.start_epoch = epoch
        set_learning_rate(resumed)
        assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
        for iteration in range(3 * epoch, 3 * epoch + 3):
            whole.iter, whole.epoch = iteration, epoch
            hook.before_step()
            whole.optimizer.step()
            hook.after_step()
        hook.after_epoch()


def test_a_missing_last_checkpoint_is_reported_in_one_line_that_lists_the_others(trained: Path, tmp_path: Path) -> None:
    out = copy(trained, tmp_path / "out")
    (out / "last_checkpoint").unlink()
    (out / "last_checkpoint").write_text("model_0007.pth")
    with pytest.raises(UserError, match=r"names 'model_0007.pth', which is no checkpoint .* model_final.pth"):
        ready("OUTPUT_DIR", out, resume=True)


def test_resuming_without_a_checkpoint_logs_that_the_training_starts_anew(root: Path, tmp_path: Path) -> None:
    assert ready("OUTPUT_DIR", tmp_path / "out", resume=True).start_epoch == 0
    assert "holds no checkpoint; the training starts at epoch 0" in logged(tmp_path / "out")


def test_frozen_layers_do_not_change_until_they_are_opened(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "test", lambda *_: {"metric": 50.0, "mAP": 40.0})
    names = "['backbone', 'attention.stage3.value']"
    trainer = ready("OUTPUT_DIR", tmp_path / "out", "MODEL.FREEZE_LAYERS", names, "SOLVER.FREEZE_ITERS", "3")
    network = trainer.model
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Watch(hooks.HookBase):  # type: ignore[misc]
        def after_step(self) -> None:
            seen[self.trainer.iter] = {name: one.clone() for name, one in network.state_dict().items()}

    trainer.register_hooks([Watch()])
    before = {name: one.clone() for name, one in network.state_dict().items()}
    trainer.train()
    frozen = ("conv1.weight", "bn1.running_mean", "layer4.2.bn3.bias", "attention.stage3.value.weight")
    for name in frozen:
        assert torch.equal(seen[2][name], before[name]) and not torch.equal(seen[4][name], before[name])
    assert not torch.equal(seen[2]["conv5.layers.0.weight"], before["conv5.layers.0.weight"])
    assert "Freezing" in logged(tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("['backbon']", "has 'backbon', which is no layer of this network; give some of backbone, heads, conv1, .*"),
        ("['layer']", "Did you mean 'layer"),
        ("['(']", "is no regular expression"),
        ("['backbone', 'heads', 'attention', 'supervision']", "names every layer"),
    ],
)
def test_a_wrong_name_of_a_layer_to_freeze_is_refused_in_one_line(names: str, told: str) -> None:
    cfg = settings("MODEL.FREEZE_LAYERS", names, "SOLVER.FREEZE_ITERS", "3", "MODEL.HEADS.NUM_CLASSES", 3)
    with pytest.raises(UserError, match=told) as error:
        TrainedLayers(build_model(cfg), cfg)
    assert "\n" not in str(error.value)


def test_layers_to_freeze_for_no_iteration_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    cfg = settings("MODEL.FREEZE_LAYERS", "['backbone']", "MODEL.HEADS.NUM_CLASSES", 3)
    logging.getLogger("fastreid").propagate = True
    TrainedLayers(build_model(cfg), cfg)
    assert "freezes nothing: SOLVER.FREEZE_ITERS is 0" in caplog.text


def test_failing_writers_and_a_failing_evaluation_cost_no_checkpoint(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    def no_match(*_: Any) -> None:
        raise UserError("no query has a match in the gallery.")

    monkeypatch.setattr(JSONWriter, "write", full)
    monkeypatch.setattr(Trainer, "test", no_match)
    trainer = ready("OUTPUT_DIR", tmp_path / "out")
    next(hook for hook in trainer._hooks if isinstance(hook, MetricsWriter))._period = 1
    with pytest.raises(UserError) as error:
        trainer.train()
    told = str(error.value)
    assert told.startswith("The evaluation after epoch 1 failed, and the last checkpoint is ") and "\n" not in told
    assert told.endswith("no query has a match in the gallery.") and "--resume" in told
    assert torch.load(tmp_path / "out" / "model_0000.pth", weights_only=True)["epoch"] == 0
    text = logged(tmp_path / "out")
    assert text.count("JSONWriter cannot write the metrics (No space left on device)") == 1
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        ConnectionResetError(104, "Connection reset by peer"),
        ConnectionRefusedError(111, "Connection refused"),
        EOFError(),
        RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_killed_worker_of_a_data_loader_ends_the_training_in_one_line(
    failure: Exception, trained: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: Any) -> None:
        raise failure

    monkeypatch.setattr(SimpleTrainer, "run_step", killed)
    out = copy(trained, tmp_path / "out")
    with pytest.raises(UserError) as error:
        train("OUTPUT_DIR", out, "SOLVER.MAX_EPOCH", "2", resume=True)
    told = str(error.value)
    assert told.startswith("Training stopped at epoch 2: a data loader's worker process was killed")
    assert f"the last checkpoint is {out / 'model_final.pth'}, go on from it with --resume" in told
    assert "\n" not in told and "Traceback" not in logged(out)


def test_a_closed_standard_output_is_not_hidden_by_a_writer() -> None:
    class Closed(EventWriter):  # type: ignore[misc]
        def write(self) -> None:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        SafeWriter(Closed()).write()


def test_a_full_disk_leaves_the_last_checkpoint_and_no_unfinished_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(nn.Linear(2, 1), str(tmp_path))
    checkpointer.save("model_0000", epoch=0)
    before = (tmp_path / "model_0000.pth").read_bytes()

    def half(_: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    for name in ("model_0000", "model_0001"):
        with pytest.raises(UserError) as error:
            checkpointer.save(name, epoch=1)
        told = str(error.value)
        assert f"{name}.pth' cannot be written (No space left on device): it needs" in told and "\n" not in told
        assert f"Go on from the last checkpoint, {tmp_path / 'model_0000.pth'}, with --resume." in told
    assert (tmp_path / "model_0000.pth").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model_0000.pth"]


def test_a_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    checkpointer = Checkpointer(nn.Linear(2, 1), str(tmp_path))
    checkpointer.save("model_final", epoch=0)
    before = (tmp_path / "model_final.pth").read_bytes()
    if (child := os.fork()) == 0:

        def killed(_: Any, file: Any) -> None:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = killed
        checkpointer.save("model_final", epoch=1)
    os.waitpid(child, 0)
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_final.pth")


def test_an_evaluation_without_weights_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"'MODEL.WEIGHTS' is empty"):
        DefaultPredictor(settings("MODEL.HEADS.NUM_CLASSES", 3))
