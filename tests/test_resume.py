"""Resuming through torchreid: settings given now count, the rest goes on from the checkpoint, and both are checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchreid
from torch import nn

from csalr_plugin.errors import UserError
from csalr_plugin.hosts.resume import load_optimizer_state, name_parameters, replay_schedule
from csalr_plugin.hosts.torchreid import engine as engine_module
from csalr_plugin.hosts.torchreid import register
from csalr_plugin.hosts.torchreid.config import LR_SCHEDULER, OPTIMIZER, Config, default_config, set_active_config
from csalr_plugin.hosts.torchreid.optimizer import build_optimizer
from csalr_plugin.hosts.torchreid.train import build_model, build_network, prepare, resume_from_checkpoint, train
from csalr_plugin.models.weights import read_checkpoint

register()

EPOCHS = 3


def settings(data: Path, folder: Path, *overrides: Any) -> Config:
    """Small settings as a file and a command line give them."""
    config = default_config()
    config.merge_from_list(["data.root", str(data), "data.save_dir", str(folder), "data.workers", 0])
    config.merge_from_list(["data.height", 64, "data.width", 32, "model.pretrained", False])
    config.merge_from_list(["model.name", "osnet_x0_25", "train.batch_size", 8, "train.max_epoch", 2])
    config.merge_from_list(list(overrides))
    config.use_gpu = False
    return config


TRAINED = ("train.lr", 0.01, "train.stepsize", "2", "train.gamma", 0.5, "train.max_epoch", 10)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Callable[..., Path]:
    """A function that saves a checkpoint after `EPOCHS` epochs, whose settings are `TRAINED` and its arguments."""
    made: dict[tuple[Any, ...], Path] = {}

    def save(*overrides: Any) -> Path:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("trained")
            config = settings(tiny_data, folder, *TRAINED, *overrides)
            previous = set_active_config(config)
            model, optimizer, scheduler = parts(config)
            images = torch.randn(4, 3, 64, 32)
            outputs = model.train()(images)
            sum(one.sum() for one in (outputs if isinstance(outputs, list) else [outputs])).backward()
            optimizer.step()
            replay_schedule(scheduler, EPOCHS)
            for group in optimizer.param_groups:
                group["batches_done"] = 2
            recorded = {key: config.lookup(key) for key in engine_module.training_keys(config)}
            state = {"state_dict": model.state_dict(), "epoch": EPOCHS, "optimizer": optimizer.state_dict()}
            state |= {"scheduler": scheduler.state_dict(), "settings": engine_module.recordable(recorded)}
            made[overrides] = folder / "model.pth.tar-3"
            torch.save(state, made[overrides])
            set_active_config(previous)
        return made[overrides]

    return save


def parts(config: Config) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = build_model(config.model.name, 4, config.loss.name, False, False)
    optimizer = build_optimizer(model, **config.keyword_arguments(OPTIMIZER))
    return model, optimizer, torchreid.optim.build_lr_scheduler(optimizer, **config.keyword_arguments(LR_SCHEDULER))


def resumed(
    data: Path, folder: Path, path: Path, *overrides: Any, only_given: bool = True
) -> tuple[Config, nn.Module, torch.optim.Optimizer, Any]:
    """A training that is resumed from `path`; no setting but `overrides` is given, unless `only_given` is False."""
    config = default_config() if only_given else settings(data, folder)
    config.merge_from_list(["data.root", str(data), "data.save_dir", str(folder), "model.resume", str(path)])
    config.merge_from_list(list(overrides))
    set_active_config(config)
    prepare(config)
    model, optimizer, scheduler = parts(config)
    assert resume_from_checkpoint(str(path), model, optimizer, scheduler) == EPOCHS
    return config, model, optimizer, scheduler


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        ((), 0.01 * 0.5),
        (("train.lr", 0.001), 0.001 * 0.5),
        (("train.gamma", 0.1), 0.01 * 0.1),
        (("train.stepsize", "1"), 0.01 * 0.5**3),
        (("train.lr_scheduler", "multi_step", "train.stepsize", "1,2"), 0.01 * 0.5**2),
        (("train.lr_scheduler", "cosine", "train.max_epoch", 6), 0.01 / 2),
    ],
)
def test_a_rate_or_schedule_that_is_given_now_counts_and_the_rest_is_the_checkpoint_s(
    overrides: tuple[Any, ...], rate: float, checkpoint: Callable[..., Path], tiny_data: Path, tmp_path: Path
) -> None:
    config, _, optimizer, scheduler = resumed(tiny_data, tmp_path, checkpoint(), *overrides)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(rate)]
    assert scheduler.last_epoch == EPOCHS
    assert (config.model.name, config.data.height, config.train.batch_size) == ("osnet_x0_25", 64, 8)
    saved = read_checkpoint(checkpoint())["optimizer"]["state"]
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    for index, parameter in enumerate(one for group in optimizer.param_groups for one in group["params"]):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], saved[index]["exp_avg"]), names[index]


def test_the_rates_of_blocks_and_gates_that_are_given_now_count(
    checkpoint: Callable[..., Path], tiny_data: Path, tmp_path: Path
) -> None:
    path = checkpoint("model.name", "pcb_csalr", "csalr.stages", "3", "csalr.attention_lr", 0.5)
    config, _, optimizer, _ = resumed(tiny_data, tmp_path, path, "csalr.gate_lr", 0.3)
    rates = {group.get("role", "host"): group["lr"] for group in optimizer.param_groups}
    assert rates == {"host": 0.005, "attention": pytest.approx(0.0025), "gate": pytest.approx(0.0015)}
    assert config.csalr.stages == (3,)


@pytest.mark.parametrize("kind", ["single_step", "multi_step", "cosine"])
def test_a_schedule_that_is_not_changed_goes_on_to_the_last_bit(kind: str) -> None:
    def fresh() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0317)
        return optimizer, torchreid.optim.build_lr_scheduler(optimizer, kind, [3, 7], 0.3, 20)

    straight, scheduler = fresh()
    for epoch in range(15):
        optimizer, other = fresh()
        replay_schedule(other, epoch)
        assert optimizer.param_groups[0]["lr"] == straight.param_groups[0]["lr"]
        scheduler.step()


def test_the_log_names_the_source_of_each_setting_that_differs(
    checkpoint: Callable[..., Path], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed(tiny_data, tmp_path, checkpoint(), "train.lr", 0.001, "train.gamma", 0.5)
    out = capsys.readouterr().out
    assert "train.lr 0.001: given now; 0.01 in the checkpoint" in out
    assert "train.stepsize [2]: from the checkpoint" in out
    assert "train.gamma" not in out  # given now, and the same in the checkpoint
    assert "data.root" not in out and "data.save_dir" not in out


def test_a_checkpoint_without_settings_is_resumed_with_those_given_now_and_says_so(
    checkpoint: Callable[..., Path], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = read_checkpoint(checkpoint())
    del state["settings"]
    torch.save(state, tmp_path / "old.pth")
    *_, optimizer, _ = resumed(tiny_data, tmp_path, tmp_path / "old.pth", "train.lr", 0.3, only_given=False)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)
    assert "records no settings: those given now and the defaults count" in capsys.readouterr().out


def test_another_optimizer_starts_without_state_and_says_so(
    checkpoint: Callable[..., Path], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, optimizer, _ = resumed(tiny_data, tmp_path, checkpoint(), "train.optim", "sgd")
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    assert "The checkpoint's optimizer is adam: sgd starts without its state." in capsys.readouterr().out


def test_groups_of_other_learning_rates_keep_the_state_of_each_parameter(
    checkpoint: Callable[..., Path], tiny_data: Path, tmp_path: Path
) -> None:
    staged = ("train.staged_lr", True, "train.new_layers", "classifier,fc", "train.base_lr_mult", 0.1)
    _, model, optimizer, _ = resumed(tiny_data, tmp_path, checkpoint(), *staged)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.0005), pytest.approx(0.005)]
    saved = read_checkpoint(checkpoint())["optimizer"]
    index_of = dict(zip(saved["param_groups"][0]["param_names"], saved["param_groups"][0]["params"], strict=True))
    for name, parameter in model.named_parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], saved["state"][index_of[name]]["exp_avg"])


def test_groups_that_differ_and_have_no_names_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    saved = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict()
    two = torch.optim.SGD([{"params": one.parameters()} for one in model], lr=0.1, momentum=0.9)
    name_parameters(two, model)
    with pytest.raises(UserError, match=r"groups of \[4\] tensors, and this training's has \[2, 2\]"):
        load_optimizer_state(two, saved, "m.pth")


@pytest.mark.parametrize(("key", "value"), [("train.batch_size", 4), ("csalr.accumulate", 2), ("train.seed", 7)])
def test_an_epoch_whose_batches_change_begins_again_and_says_so(
    key: str,
    value: int,
    checkpoint: Callable[..., Path],
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    *_, optimizer, _ = resumed(tiny_data, tmp_path, checkpoint(), key, value)
    assert optimizer.param_groups[0]["batches_done"] == 0
    assert f"{key} changed within an epoch: epoch 4 begins again." in capsys.readouterr().out
    *_, optimizer, _ = resumed(tiny_data, tmp_path, checkpoint(), "train.lr", 1.0)
    assert optimizer.param_groups[0]["batches_done"] == 2


def test_an_epoch_trains_every_image_after_a_stop_and_another_batch_size(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_data, tmp_path, "train.max_epoch", 1, "train.batch_size", 4)
    iteration, trained = engine_module._PluginTraining.iteration, []

    def watch(self: Any, data: Any, number: int) -> dict[str, float]:
        summary: dict[str, float] = iteration(self, data, number)
        trained.append(len(data["img"]))
        self._stops = trained == [4, 4, 4]  # as on Ctrl-C
        return summary

    monkeypatch.setattr(engine_module._PluginTraining, "iteration", watch)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    path = tmp_path / "model" / "model.pth.tar-0-batch3"
    trained.clear()
    train(settings(tiny_data, tmp_path, "train.max_epoch", 1, "train.batch_size", 20, "model.resume", str(path)))
    assert trained == [20, 20]


@pytest.mark.parametrize(
    ("entry", "value", "complaint"),
    [
        ("epoch", None, "'epoch' is None"),
        ("epoch", "3", "'epoch' is '3'"),
        ("epoch", torch.ones(1), "'epoch' is tensor"),
        ("optimizer", [1], "'optimizer' is [1], not the state of an optimizer"),
        ("optimizer", "adam", "'optimizer' is 'adam'"),
        ("settings", {"train.lr": float("nan")}, "records settings that are not allowed"),
        ("settings", {"train.lr": "much"}, "records settings that are not allowed"),
    ],
)
def test_everything_that_a_checkpoint_says_is_checked_before_training(
    entry: str, value: Any, complaint: str, checkpoint: Callable[..., Path], tiny_data: Path, tmp_path: Path
) -> None:
    torch.save({**read_checkpoint(checkpoint()), entry: value}, tmp_path / "bad.pth")
    with pytest.raises(UserError) as error:
        resumed(tiny_data, tmp_path, tmp_path / "bad.pth", only_given=False)
    assert complaint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("batches_done", -1, "'batches_done' is -1"),
        ("batches_done", "3", "'batches_done' is '3'"),
        ("scaler", {"scale": float("inf")}, "'optimizer.scaler"),
        ("scaler", "big", "'optimizer.scaler'"),
    ],
)
def test_progress_that_is_no_progress_is_refused(
    key: str, value: Any, complaint: str, checkpoint: Callable[..., Path], tiny_data: Path, tmp_path: Path
) -> None:
    state = copy.deepcopy(read_checkpoint(checkpoint()))
    state["optimizer"]["param_groups"][0][key] = value
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(UserError) as error:
        resumed(tiny_data, tmp_path, tmp_path / "bad.pth")
    assert complaint in str(error.value)


def test_settings_of_another_network_are_refused_when_resuming(
    checkpoint: Callable[..., Path], tiny_data: Path, tmp_path: Path
) -> None:
    path = checkpoint("model.name", "pcb_csalr", "csalr.stages", "3", "csalr.attention_lr", 0.5)
    with pytest.raises(UserError, match=r"trained with groups 2, and this network has groups 4"):
        resumed(tiny_data, tmp_path, path, "csalr.groups", 4)


def test_a_training_from_other_weights_is_resumed_after_these_are_gone(
    checkpoint: Callable[..., Path], tiny_data: Path, tmp_path: Path
) -> None:
    config = resumed(tiny_data, tmp_path, checkpoint(), "model.load_weights", "gone.pth")[0]
    build_network(config, 4)


def test_a_training_that_is_done_is_only_evaluated_and_says_so(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings(tiny_data, tmp_path / "a", "train.max_epoch", 1))
    path = tmp_path / "a" / "model" / "model.pth.tar-1"
    before = read_checkpoint(path)["state_dict"]
    train(settings(tiny_data, tmp_path / "a", "train.max_epoch", 1, "model.resume", str(path)))
    assert "All 1 epochs are done: the model is only evaluated" in capsys.readouterr().out
    after = read_checkpoint(path)["state_dict"]
    assert all(torch.equal(before[name], after[name]) for name in before)
