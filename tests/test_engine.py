"""The engine: Eq. 18, resuming, the phases of RPP, stops."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torchreid
from torch.nn import functional as F

from csalr_plugin.errors import UserError
from csalr_plugin.hosts.torchreid import engine as engine_module
from csalr_plugin.hosts.torchreid import register
from csalr_plugin.hosts.torchreid.config import OPTIMIZER, Config, default_config, set_active_config
from csalr_plugin.hosts.torchreid.optimizer import WarmUp, build_optimizer
from csalr_plugin.hosts.torchreid.train import build_datamanager, build_engine, build_network, train
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


def test_the_triplet_loss_is_weighted_beside_the_sum_of_the_parts(tiny_data: Path, tmp_path: Path) -> None:
    overrides = ("loss.name", "triplet", "loss.triplet.weight_t", 0.7, "loss.triplet.weight_x", 1.0)
    sampler = ("sampler.train_sampler", "RandomIdentitySampler", "sampler.num_instances", 2)
    engine = make_engine(settings(tiny_data, tmp_path, *overrides, *sampler))
    batch = next(iter(engine.train_loader))
    summary = engine.iteration(batch, 0)
    assert summary["loss"] == pytest.approx(summary["L_F"] + summary["L_DS_stage3"], rel=1e-5)
    assert summary["L_F"] > 0.7 * summary["triplet"]


def test_blocks_and_gates_have_rates_of_their_own_and_gates_no_decay(tiny_data: Path, tmp_path: Path) -> None:
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


def test_warm_up_scales_the_blocks_rate_and_leaves_it_as_it_was() -> None:
    slow, fast = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [slow], "role": "attention"}, {"params": [fast]}], lr=1.0)
    slow.grad, fast.grad = torch.ones(1), torch.ones(1)
    WarmUp(optimizer, 4).step(optimizer, 0)
    assert (slow.item(), fast.item()) == (-0.25, -1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]


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
