"""fast-reid as a host: registry, configuration, training, evaluation, and agreement with torchreid.

With FASTREID_REPO, the path of a checkout of JDAI-CV/fast-reid, the same tests run against it, and its own train
script is run too.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fastreid_script import MISSING, SCRIPT, TINY, quiet_logs, settings  # noqa: F401  # a fixture
from PIL import Image
from torch import nn
from torch.nn import functional as F

from csalr_plugin import demo
from csalr_plugin.commands import main
from csalr_plugin.errors import UserError
from csalr_plugin.hosts import keys
from csalr_plugin.models import MODEL_NAMES, build_model

REPOSITORY = os.environ.get("FASTREID_REPO", "")
if MISSING:
    pytest.skip(f"fast-reid is not installed: there is no {MISSING[0]}", allow_module_level=True)

import csalr_plugin.hosts.fastreid as plugin
from csalr_plugin.hosts.config import flatten
from csalr_plugin.hosts.fastreid import compat
from csalr_plugin.hosts.fastreid.config import _check_shares, own_config, validate
from csalr_plugin.hosts.fastreid.datasets import data_root
from csalr_plugin.hosts.fastreid.hooks import TrainedLayers
from csalr_plugin.hosts.fastreid.meta_architecture import register
from csalr_plugin.hosts.fastreid.ranges import CHECKS, check_of
from csalr_plugin.hosts.records import METRICS, read_metrics

# isort: split
import fastreid
from fastreid.config import get_cfg
from fastreid.data import data_utils
from fastreid.data.transforms import build_transforms
from fastreid.engine import DefaultPredictor
from fastreid.engine.train_loop import SimpleTrainer
from fastreid.modeling import build_model as build_host_model
from fastreid.modeling.meta_arch import META_ARCH_REGISTRY
from fastreid.solver import build_optimizer
from fastreid.utils.checkpoint import Checkpointer
from fastreid.utils.events import CommonMetricPrinter, EventStorage


@pytest.fixture
def root(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTREID_DATASETS", str(tiny_data / "market1501"))
    return tiny_data


@pytest.fixture
def script(tmp_path: Path) -> Path:
    if REPOSITORY:
        return Path(REPOSITORY) / "tools" / "train_net.py"
    (tmp_path / "train_net.py").write_text(SCRIPT)
    return tmp_path / "train_net.py"


def test_the_tested_package_is_that_of_fastreid_repo_if_it_is_set() -> None:
    assert not REPOSITORY or Path(REPOSITORY).resolve() in Path(str(fastreid.__file__)).resolve().parents


def test_importing_the_plugin_registers_the_eight_architectures_once() -> None:
    register()
    assert set(MODEL_NAMES) <= set(META_ARCH_REGISTRY._obj_map)
    assert META_ARCH_REGISTRY.get("Baseline") is not None


def test_fastreid_keeps_its_own_model_and_the_plugins_is_built_under_another_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = META_ARCH_REGISTRY._obj_map
    monkeypatch.setitem(registry, "pcb", nn.Linear)
    with pytest.warns(UserWarning, match="fast-reid already has models named pcb and keeps them"):
        register()
    try:
        assert registry["pcb"] is nn.Linear
        cfg = settings("MODEL.META_ARCHITECTURE", "plugin_pcb", "MODEL.DEVICE", "cpu", "INPUT.SIZE_TEST", "[32]")
        with pytest.raises(UserError, match="SIZE_TEST"):  # checked as a model of the plugin
            validate(cfg)
        assert type(registry["plugin_pcb"](cfg)).__name__ == "FastReIDPCB"
    finally:
        del registry["plugin_pcb"]


def test_the_names_restored_for_importing_fastreid_are_removed_again() -> None:
    import collections

    assert not hasattr(collections, "Mapping") and "torch._six" not in sys.modules


def test_the_node_has_the_keys_and_defaults_of_the_shared_table() -> None:
    cfg = get_cfg()
    plugin.add_csalr_config(cfg)
    ours = {key: value for key, value in cfg.leaves().items() if key.startswith("CSALR.")}
    assert ours.pop("CSALR.ATTENTION") == "csalr"  # which torchreid has in the names of its models
    wanted = {f"CSALR.{key.name.upper()}": key.default for key in keys.KEYS}
    assert ours == {**wanted, "CSALR.KEEP": "all"}  # SOLVER.CHECKPOINT_PERIOD sets which epochs are saved


def test_keys_are_accepted_in_any_case_and_the_model_key_by_both_names() -> None:
    cfg = settings("model.name", "pcb_sa", "csalr.Groups", "4", "Solver.Steps", "[1, 2]")
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.CSALR.GROUPS, cfg.SOLVER.STEPS) == ("pcb_sa", 4, [1, 2])
    assert cfg.clone().CSALR == cfg.CSALR


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("CSALR.GROUP", "2"), "unknown config key 'CSALR.GROUP'. Did you mean 'CSALR.GROUPS'"),
        (("CSALR.LANDMARKS", "12"), "'CSALR.LANDMARKS' is '12'; it must be two positive integers"),
        (("CSALR.GROUPS",), "'CSALR.GROUPS' has no value"),
        (("SOLVER.AMP.ENABLED", "1"), "'SOLVER.AMP.ENABLED' is '1'; it must be true or false"),
        (("SOLVER.MAX_EPOCH", "0"), "'SOLVER.MAX_EPOCH' is '0'; it must be an integer from 1 to 1000000"),
        (("SOLVER", "1"), "'SOLVER' is a group of keys"),
        (("MODEL.LOSSES.NAME", "('Tripletloss',)"), "Did you mean 'TripletLoss'"),
        (("SOLVER.MOMENTUM", "1.5"), "it must be a number of at least 0 and less than 1"),
        (("SOLVER.BASE_LR", "nan"), "it must be a number greater than 0"),
        (("SOLVER.BASE_LR", "1_0.0"), "it must be a number greater than 0"),
        (("SOLVER.MAX_EPOCH", "1" + 22 * "0"), "it must be an integer from 1 to 1000000"),
        (("SOLVER.STEPS", "[]"), "it must be a comma-separated list of at least 1"),
        (("SOLVER.IMS_PER_BATCH", "1"), "it must be an integer from 2 to 1000000"),
        (("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norms"), "it must be one of value, norm"),
        (("MODEL.PIXEL_STD", "[0, 0, 0]"), "it must be a comma-separated list of 3, each a number greater than 0"),
        (("MODEL.PIXEL_MEAN", "[1, 2]"), "it must be a comma-separated list of 3"),
        (("MODEL.LOSSES.CE.EPSILON", "-0.5"), "a number from 0 to less than 1, or -1 for adaptive smoothing"),
        (("MODEL.DEVICE", "gpu"), "it must be cpu, cuda, or cuda:N"),
        (("MODEL.WEIGHTS", 300 * "w" + "\0"), "it must be a path"),
        (("DATALOADER.SAMPLER_TRAIN", "SetReWeightSampler"), "it must be one of TrainingSampler, Naive"),
        (("DATASETS.TESTS", "()"), "it must be a comma-separated list of at least 1"),
        (("KD.MODEL_CONFIG", 3000 * "["), "[...["),
        (("SOLVER.OPT", "SGD", "--resume"), "flag '--resume' stands after a config key"),
        (("out/model.pth", "SOLVER.OPT", "SGD"), "--resume takes no file: it resumes from the last checkpoint"),
    ],
)
def test_a_setting_that_is_not_allowed_is_refused_in_one_line(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(UserError) as error:
        settings().merge_from_list(list(overrides))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_every_number_of_the_host_has_a_range_and_every_default_is_allowed() -> None:
    defaults = dict(flatten(get_cfg()))
    for key, value in defaults.items():
        if type(value) in (int, float):
            assert key in CHECKS, key
        if (check := check_of(key, value)) is not None:
            assert check(key, value) == (list(value) if isinstance(value, tuple) else value)
    assert set(CHECKS) <= set(defaults)


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yml").write_text("OUTPUT_DIR: ~/out\n")
    (tmp_path / "given.yml").write_text("_BASE_: ~/base.yml\nMODEL: {WEIGHTS: ~/a.pth}\n")
    cfg = settings("CSALR.PRETRAINED_WEIGHTS", "~/b.pth")
    cfg.merge_from_file("~/given.yml")
    paths = (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, cfg.CSALR.PRETRAINED_WEIGHTS)
    assert paths == tuple(str(tmp_path / name) for name in ("out", "a.pth", "b.pth"))
    monkeypatch.setenv("FASTREID_DATASETS", "~/data")
    assert data_root() == str(tmp_path / "data")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("MODEL.NAME", "pcb_cslr"), "Did you mean 'pcb_csalr'"),
        (("DATASETS.NAMES", "('Market1502',)"), "Did you mean 'Market1501'"),
        (("CSALR.GROUPS", "3"), "'CSALR.GROUPS' is 3, which does not divide"),
        (("INPUT.SIZE_TRAIN", "[64]"), "must be two positive integers"),
        (("SOLVER.OPT", "Adan"), "Did you mean 'Adam'"),
        (("CSALR.ACCUMULATE", "2"), "in fast-reid it must be 1"),
        (("CSALR.AMP", "fp16"), "SOLVER.AMP.ENABLED True"),
        pytest.param(
            ("SOLVER.AMP.ENABLED", "True"),
            "mixed precision needs CUDA",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA"),
        ),
        (("SOLVER.IMS_PER_BATCH", "64"), "more than the 44 training images"),
        (
            ("DATALOADER.SAMPLER_TRAIN", "NaiveIdentitySampler", "DATALOADER.NUM_INSTANCE", "1"),
            "has 8 identities, more than the 4",
        ),
        (("SOLVER.OPT", "LBFGS"), "'SOLVER.OPT' is 'LBFGS'; it must be one of ASGD, "),
        (("SOLVER.NESTEROV", "True", "SOLVER.MOMENTUM", "0"), "'SOLVER.MOMENTUM' is 0, and SOLVER.NESTEROV True needs"),
        (("MODEL.HEADS.NUM_CLASSES", "2"), "it must be 0 or at least 4, the training identities"),
        (("TEST.AQE.ENABLED", "True", "TEST.AQE.QE_K", "64"), "'TEST.AQE.QE_K' is 64; it must be less than 64"),
        (("TEST.RERANK.ENABLED", "True", "TEST.RERANK.K1", "900"), "'TEST.RERANK.K1' is 900; it must be less than 64"),
        (("TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.DATASET", "Market"), "Did you mean 'Market1501'"),
        (("MODEL.NAME", "Baseline", "MODEL.BACKBONE.NAME", "resnet"), "'MODEL.BACKBONE.NAME' is 'resnet'; it must be"),
        (("MODEL.NAME", "Baseline", "MODEL.BACKBONE.DEPTH", "51x"), "fast-reid cannot build Baseline: '51x'"),
        (
            ("MODEL.NAME", "Baseline", "MODEL.BACKBONE.PRETRAIN", "True", "MODEL.BACKBONE.PRETRAIN_PATH", "none.pth"),
            "pretrained weights for Baseline cannot be read",
        ),
        (("MODEL.FREEZE_LAYERS", "['b1']", "SOLVER.FREEZE_ITERS", "3"), "has 'b1', which is no layer of this network"),
    ],
)
def test_a_training_that_cannot_work_is_refused_in_one_line_before_it_starts(
    overrides: tuple[str, ...], told: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        plugin.Trainer(settings(*overrides, "OUTPUT_DIR", str(tmp_path)))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_missing_dataset_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTREID_DATASETS", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"dataset root '.*nowhere' is not a folder"):
        plugin.Trainer(settings())
    monkeypatch.setenv("FASTREID_DATASETS", str(tmp_path))
    with pytest.raises(UserError, match="dataset Market1501 cannot be read"):
        plugin.Trainer(settings())


def test_an_image_that_does_not_decode_is_named_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path
) -> None:
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        place = tmp_path / "Market-1501-v15.09.15" / folder
        place.mkdir(parents=True)
        for name in ("0002_c1s1_000451_03.jpg", "0007_c2s1_000451_03.jpg", "0002_c2s1_000451_03.jpg"):
            (place / name).write_bytes(b"no image")
    monkeypatch.setenv("FASTREID_DATASETS", str(tmp_path))
    with pytest.raises(
        UserError, match=r"image '.*0002_c1s1_000451_03.jpg' cannot be read \(the content is not an image\)"
    ):
        plugin.Trainer(settings())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist"),
        ("MODEL: [", "cannot be read as YAML"),
        ("- 1", "must hold a mapping"),
        ("_BASE_: given.yml", "is its own _BASE_"),
        ("SOLVER: {MAX_EPOCH: 1, MAX_EPOCH: 2}", "key 'MAX_EPOCH' is given twice"),
        ("_BASE_: nowhere.yml", "its _BASE_ 'nowhere.yml' does not exist"),
        ("CSALR: !!python/object/apply:os.system ['touch ran']", "cannot be read as YAML"),
    ],
)
def test_an_unusable_config_file_is_reported_in_one_line_and_runs_no_code(
    content: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("given.yml").write_text(content)
    cfg = get_cfg()
    plugin.add_csalr_config(cfg)
    with pytest.raises(UserError) as error:
        cfg.merge_from_file("given.yml")
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not Path("ran").exists()


@pytest.mark.parametrize(("file", "name"), [("pcb_384x128_sgd.yml", "pcb"), ("pcb_rpp_384x128_sgd.yml", "pcb_rpp")])
def test_the_configs_have_the_settings_of_section_4_2(file: str, name: str) -> None:
    cfg = get_cfg()
    plugin.add_csalr_config(cfg)
    cfg.merge_from_file(own_config(file))
    assert f"{name}_csalr" == cfg.MODEL.META_ARCHITECTURE
    assert cfg.INPUT.SIZE_TRAIN == cfg.INPUT.SIZE_TEST == [384, 128]
    assert (cfg.INPUT.FLIP.ENABLED, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_EPOCH) == (True, 64, 100)
    assert (cfg.SOLVER.OPT, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY) == ("SGD", 0.9, 1e-4)
    assert (cfg.SOLVER.BASE_LR * cfg.SOLVER.HEADS_LR_FACTOR, cfg.SOLVER.BASE_LR) == (0.1, 0.01)
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.GAMMA, cfg.SOLVER.WARMUP_ITERS) == ([40, 80], 0.1, 0)
    assert (cfg.MODEL.LOSSES.CE.EPSILON, cfg.TEST.RERANK.ENABLED) == (0.0, False)
    assert (cfg.CSALR.LANDMARKS, cfg.CSALR.GROUPS, cfg.CSALR.RPP.PCB_EPOCHS) == ((12, 8), 2, 40)


@pytest.mark.parametrize("name", ["pcb_csalr", "pcb_rpp_csa"])
def test_the_same_weights_give_the_same_embeddings_in_both_hosts(name: str) -> None:
    torchreid = pytest.importorskip("torchreid")
    from csalr_plugin.hosts.torchreid.config import default_config, set_active_config

    config = default_config()
    config.merge_from_list(["csalr.landmarks", "2,2", "csalr.stages", "3"])
    set_active_config(config)
    theirs = torchreid.models.build_model(name, 5, pretrained=False).eval()
    for block in theirs.attention.values():
        nn.init.constant_(block.alpha, 0.3)
    ours = build_host_model(settings("MODEL.NAME", name, "MODEL.HEADS.NUM_CLASSES", 5)).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randint(256, (2, 3, 64, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(config.data[key]).view(3, 1, 1) for key in ("norm_mean", "norm_std"))
    with torch.no_grad():
        images = pixels.float()
        given = ours({"images": images})
        torch.testing.assert_close(given, theirs((pixels / 255 - mean) / std), rtol=1e-4, atol=1e-5)
    assert torch.equal(images, pixels.float())  # flip test gives the same tensor again


def test_the_losses_are_the_terms_of_equation_18() -> None:
    cfg = settings("CSALR.SUPERVISION_WEIGHT", "0.5", "MODEL.HEADS.NUM_CLASSES", 5, "CSALR.STAGES", "2,3")
    ours = build_host_model(cfg)
    alone = build_model("pcb_csalr", 5, pretrained=False, landmarks=(2, 2), stages=(2, 3))
    alone.load_state_dict(ours.state_dict())
    images, identities = torch.rand(4, 3, 64, 32) * 255, torch.tensor([0, 4, 2, 2])
    torch.manual_seed(0)
    with EventStorage() as storage:
        terms = ours({"images": images, "targets": identities})
        assert 0 <= storage.latest()["cls_accuracy"][0] <= 1
    torch.manual_seed(0)
    each = [F.cross_entropy(logits, identities) for logits in alone((images - ours.pixel_mean) / ours.pixel_std)]
    assert set(terms) == {"loss_F", "loss_DS_stage2", "loss_DS_stage3"}
    torch.testing.assert_close(terms["loss_F"], sum(each[:6]))
    torch.testing.assert_close(sum(terms.values()), sum(each[:6]) + 0.5 * sum(each[6:]))


def test_the_other_losses_of_the_host_are_computed_from_the_embedding() -> None:
    names = "('CrossEntropyLoss', 'TripletLoss', 'CircleLoss', 'Cosface')"
    model = build_host_model(settings("MODEL.LOSSES.NAME", names, "MODEL.HEADS.NUM_CLASSES", 3, "MODEL.NAME", "pcb"))
    with EventStorage():
        terms = model({"images": torch.rand(4, 3, 64, 32) * 255, "targets": torch.tensor([0, 0, 1, -1])})
    assert set(terms) == {"loss_F", "loss_triplet", "loss_circle", "loss_cosface"}
    assert all(torch.isfinite(term) for term in terms.values())


def test_the_optimizer_of_the_host_changes_the_weights() -> None:
    cfg = settings("SOLVER.BASE_LR", "0.1")
    for options, moves in (({}, True), ({"contiguous": True}, False)):  # False: without the patch
        layer = nn.Linear(3, 1)
        before = layer.weight.detach().clone()
        optimizer, _ = build_optimizer(cfg, layer, **options)
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert (not torch.equal(layer.weight, before)) == moves


def test_backbone_new_layers_blocks_and_gates_have_their_own_learning_rates() -> None:
    cfg = settings("SOLVER.BASE_LR", "0.01", "CSALR.ATTENTION_LR", "0.5", "MODEL.HEADS.NUM_CLASSES", 3)
    model = build_host_model(cfg)
    optimizer, _ = plugin.Trainer.build_optimizer(cfg, model)
    group_of = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    assert len(group_of) == len(list(model.parameters()))
    for parameter, rate, decay in (
        (model.layer1[0].conv1.weight, 0.01, 1e-4),
        (model.conv5.layers[0].weight, 0.1, 1e-4),
        (model.supervision["stage3"].classifier.weight, 0.05, 1e-4),
        (model.attention["stage3"].alpha, 0.01, 0.0),
    ):
        group = group_of[id(parameter)]
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(rate), decay)


def test_refined_part_pooling_passes_through_its_phases_and_announces_each(caplog: pytest.LogCaptureFixture) -> None:
    cfg = settings(
        "MODEL.NAME",
        "pcb_rpp_csalr",
        "CSALR.RPP.PCB_EPOCHS",
        2,
        "CSALR.RPP.PART_CLASSIFIER_EPOCHS",
        1,
        "SOLVER.MAX_EPOCH",
        6,
    )
    model = build_host_model(cfg).train()
    hook = TrainedLayers(model, cfg)
    caplog.set_level("INFO")
    logging.getLogger("fastreid").propagate = True
    seen = []
    for epoch in range(4):
        hook.trainer = SimpleNamespace(epoch=epoch, start_epoch=0, iter=5 * epoch, start_iter=0)
        hook.before_epoch()
        seen.append((model.refining, model.conv1.weight.requires_grad, model.bn1.training))
        assert model.training and all(one.requires_grad for one in model.part_classifier.parameters())
    assert seen == [(False, True, True), (False, True, True), (True, False, False), (True, True, True)]
    told = dict.fromkeys(record.getMessage() for record in caplog.records if "Epochs " in record.getMessage())
    assert [line.split(":")[0] for line in told] == ["Epochs 1 to 2", "Epochs 3 to 3", "Epochs 4 to 6"]


def test_an_error_in_the_loading_thread_is_raised_in_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda rank: None)  # there is none here

    def batches() -> Iterator[int]:
        yield 1
        raise UserError("image 'x.jpg' cannot be read")

    loader = data_utils.BackgroundGenerator(batches(), local_rank=0)
    assert next(loader) == 1
    with pytest.raises(UserError, match=r"x\.jpg"):
        next(loader)


def test_a_checkpoint_runs_no_code_and_is_never_loaded_in_part(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    model = build_host_model(settings("MODEL.NAME", "pcb", "MODEL.HEADS.NUM_CLASSES", 3))
    torchreids = build_model("pcb", 7, pretrained=False)  # of another number of identities
    files = {
        "torchreid": {"state_dict": torchreids.state_dict(), "epoch": 3, "rank1": np.float64(0.5)},
        "other": {"model": {"head.weight": torch.zeros(2)}},
        "code": {"model": {}, "metric": Runs()},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    Checkpointer(model).load(str(tmp_path / "torchreid"))
    assert torch.equal(model.layer4[2].conv3.weight, torchreids.layer4[2].conv3.weight)
    for name, told in (("other", "of another architecture"), ("code", "refused"), ("none", "is not a file")):
        with pytest.raises(UserError, match=told):
            Checkpointer(model).load(str(tmp_path / name))
    with pytest.raises(UserError, match="is no checkpoint of this training"):
        Checkpointer(model, optimizer=torch.optim.SGD(model.parameters(), lr=1)).load(str(tmp_path / "torchreid"))
    assert not (tmp_path / "ran").exists()
    with pytest.raises((pickle.UnpicklingError, UserError)):
        Checkpointer(nn.Linear(1, 1)).load(str(tmp_path / "code"))


def test_the_hosts_own_script_trains_resumes_and_evaluates_and_torchreid_agrees(
    script: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "logs" / "pcb_csalr_Market1501"  # the default names model and data set

    def run(*words: str, flags: tuple[str, ...] = ()) -> int:
        return main(
            ["run", str(script), "--config-file", str(own_config("pcb_384x128_sgd.yml")), *flags, *TINY, *words]
        )

    def results(folder: Path) -> dict[str, float]:
        return dict(json.loads((folder / "results.json").read_text()))

    assert run() == 0
    trained = torch.load(out / "model_final.pth", weights_only=True)
    assert trained["epoch"] == 0 and np.isfinite(results(out)["mAP"])
    # The forms that other programs read: the table of results in the log, and a JSON object per line.
    scores = "".join(rf"\| +{results(out)[name]:.2f} +" for name in ("Rank-1", "Rank-5", "Rank-10", "mAP"))
    assert re.search(rf"\| Market1501 +{scores}", (out / "log.txt").read_text())
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert metrics[-1]["mAP"] == pytest.approx(results(out)["mAP"])
    assert {"total_loss", "loss_F", "lr", "iteration"} <= set(metrics[-1])
    said, log = capsys.readouterr().out, (out / "log.txt").read_text()
    (line,) = (line for line in said.splitlines() if ": epoch 1/1: loss " in line)
    assert re.search(r"loss [\d.]+ \(L_DS [\d.]+\), accuracy [\d.]+ %, gates -?[\d.]+, lr [\d.]+, [\d.]+ s$", line)
    assert "CSALR.STAGES 3" in said and "Settings that differ from fast-reid's defaults" in said
    for long in ("Environment info:", "Running with full config", "SOLVER:", "Model:"):
        assert long in log and long not in said
    (epoch,), (evaluation,) = read_metrics(out / METRICS)
    assert {"loss", "L_F", "L_DS_stage3", "acc", "alpha_stage3", "lr_backbone", "lr_new", "lr_gate"} <= set(epoch)
    assert evaluation["mAP"] == pytest.approx(results(out)["mAP"] / 100)
    assert (out / "ranked_Market1501.png").is_file() and "pcb_csalr_Market1501/report.html" in said
    page = (out / "report.html").read_text()
    assert "Gates alpha" in page and "data:image/jpeg" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # nothing is loaded
    best = torch.load(out / "model_best.pth", weights_only=True)
    assert best["epoch"] == 0 and best["metric"] == pytest.approx(results(out)["mAP"])
    assert run("OUTPUT_DIR", str(out)) == 2
    assert "holds an earlier training's checkpoints" in capsys.readouterr().err

    assert run("OUTPUT_DIR", str(out), "SOLVER.MAX_EPOCH", "2", flags=("--resume",)) == 0
    resumed = torch.load(out / "model_final.pth", weights_only=True)
    assert resumed["epoch"] == 1
    moved = [name for name, one in trained["model"].items() if not torch.equal(one, resumed["model"][name])]
    assert {"conv1.weight", "attention.stage3.alpha", "supervision.stage3.classifier.weight"} <= set(moved)

    weights = ("MODEL.WEIGHTS", str(out / "model_final.pth"))
    logging.getLogger("fastreid").handlers.clear()  # as in a new process
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert run("OUTPUT_DIR", str(out), *weights, flags=("--eval-only",)) == 0
    after = {file for file in out.rglob("*") if file.is_file()}
    assert all(file.read_bytes() == content for file, content in before.items())
    assert {file.parent for file in after - set(before)} == {out / "evaluation"}
    again = results(out / "evaluation")
    scores = {name: value for name, value in again.items() if isinstance(value, float)}
    assert len(scores) == 6 and scores == pytest.approx({name: results(out)[name] for name in scores}, abs=1e-3)
    assert again["checkpoint"] == str(out / "model_final.pth") and again["epoch"] == 2
    assert (again["image_size"], again["dist_metric"], again["rerank"]) == ([128, 64], "euclidean", False)

    written = settings()
    written.merge_from_file(out / "config.yaml")
    assert str(out) == written.OUTPUT_DIR and written.CSALR == settings().CSALR
    images = torch.rand(2, 3, 64, 32) * 255
    embeddings = DefaultPredictor(settings(*weights))(images)
    assert embeddings.shape == (2, 6 * 2048)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.full((2,), 6**0.5))

    pytest.importorskip("torchreid")
    from csalr_plugin.hosts.torchreid.config import default_config
    from csalr_plugin.hosts.torchreid.train import train

    config = default_config()
    config.merge_from_file("configs/torchreid/pcb_384x128_sgd.yaml")
    config.merge_from_list(
        [
            *(
                "data.root",
                str(root),
                "data.save_dir",
                str(tmp_path / "torchreid"),
                "data.workers",
                0,
                "use_gpu",
                False,
            ),
            *("data.height", 128, "data.width", 64, "csalr.landmarks", "2,2", "csalr.stages", "3"),
            *("test.evaluate", True, "model.load_weights", str(out / "model_final.pth")),
        ]
    )
    theirs = train(config)["market1501"]
    assert 100 * theirs["mAP"] == pytest.approx(again["mAP"], abs=0.1)
    assert 100 * theirs["rank-1"] == pytest.approx(again["Rank-1"], abs=0.1)


@pytest.mark.parametrize("name", ["pcb", "pcb_sa", "pcb_csa", "pcb_rpp_csalr"])
def test_the_predictor_takes_half_precision_and_an_empty_batch(name: str, tmp_path: Path) -> None:
    weights = build_model(name, 3, pretrained=False, landmarks=(2, 2), stages=(3,))
    for block in weights.attention.values():
        nn.init.constant_(block.alpha, 0.3)
    torch.save({"model": weights.state_dict()}, tmp_path / "model.pth")
    given = ("MODEL.NAME", name, "MODEL.HEADS.NUM_CLASSES", 3, "MODEL.WEIGHTS", str(tmp_path / "model.pth"))
    predictor = DefaultPredictor(settings(*given))
    images = torch.rand(2, 3, 64, 32) * 255
    expected = predictor(images)
    assert predictor(images[:0]).shape == (0, 6 * 2048)
    for dtype in (torch.float16, torch.bfloat16):
        predictor.model.load_state_dict(weights.state_dict())
        predictor.model.to(dtype)
        embeddings = predictor(images)
        assert embeddings.dtype == torch.float32
        assert F.cosine_similarity(embeddings, expected).min() > 0.999
        predictor.model.float()


def test_a_model_of_fastreid_is_not_evaluated_with_the_weights_of_another_network(tmp_path: Path) -> None:
    torch.save({"model": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, tmp_path / "other.pth")
    cfg = settings("MODEL.NAME", "Baseline", "MODEL.HEADS.NUM_CLASSES", 3, "MODEL.WEIGHTS", str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match=r"is of another architecture: it lacks \d+ of the model's \d+ tensors"):
        DefaultPredictor(cfg)


def test_random_affine_works_with_the_current_torchvision() -> None:
    augmentation = build_transforms(settings("INPUT.AFFINE.ENABLED", "True"))
    images = {augmentation(Image.effect_noise((32, 64), 64).convert("RGB")) for _ in range(2)}
    assert {image.shape for image in images} == {(3, 64, 32)}
    assert any("RandomAffine" in repr(one) for one in augmentation.transforms)


def test_a_log_that_cannot_be_written_is_one_warning_and_a_closed_standard_output_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = sys.modules["fastreid.utils.logger"].setup_logger(str(tmp_path))
    file = logger.handlers[-1]

    def fail(error: OSError) -> Any:
        def write(_: str) -> None:
            raise error

        return write

    monkeypatch.setattr(file, "stream", SimpleNamespace(write=fail(OSError(28, "No space left on device"))))
    for _ in range(3):
        logger.info("line")
    error = capsys.readouterr().err
    assert error.count("The log cannot be written ([Errno 28] No space left on device)") == 1
    assert "Traceback" not in error
    monkeypatch.setattr(file, "stream", SimpleNamespace(write=fail(BrokenPipeError())))
    with pytest.raises(BrokenPipeError):
        logger.info("line")


def test_a_loss_that_is_not_finite_ends_the_training_in_one_line_and_changes_no_weight(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = plugin.Trainer(settings("OUTPUT_DIR", str(tmp_path), "CSALR.WARMUP", "10"))
    weight = trainer.model.layer4[0].conv1.weight
    rates = {group["role"]: group["lr"] for group in trainer.optimizer.param_groups if "role" in group}
    with torch.no_grad():
        trainer.model.conv5.layers[0].weight.fill_(float("nan"))
    before = weight.detach().clone()
    with pytest.raises(UserError) as error:
        trainer.train()
    assert "Training stopped at epoch 1, iteration 1" in str(error.value) and "\n" not in str(error.value)
    assert torch.equal(weight, before)
    assert "Exception during training" not in caplog.text
    assert rates == {group["role"]: group["lr"] for group in trainer.optimizer.param_groups if "role" in group}


def test_the_demo_trains_in_fastreid_on_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    small = f"_BASE_: {own_config(demo.FASTREID_CONFIG)}\nSOLVER: {{MAX_EPOCH: 1, IMS_PER_BATCH: 8}}\n"
    (tmp_path / "demo.yml").write_text(small + "TEST: {EVAL_PERIOD: 1}\nCSALR: {LANDMARKS: [2, 2], STAGES: [3]}\n")
    monkeypatch.setattr(demo, "FASTREID_CONFIG", str(tmp_path / "demo.yml"))
    monkeypatch.setattr(demo, "make_demo_data", lambda folder, seed: root)
    assert main(["demo", "--out", str(tmp_path / "out"), "--host", "fastreid"]) == 0
    said = capsys.readouterr().out
    table = said[said.rindex("queries, one seed") :]
    for word in (
        "pcb, untrained",
        "pcb_csalr, gates set to 0",
        "mAP",
        "rank-1",
        "rank-5",
        "rank-10",
        "gates of pcb_csalr",
    ):
        assert word in table
    assert (tmp_path / "out" / "run-1" / "pcb_csalr" / "model_final.pth").is_file()


def test_reranking_works_without_a_gpu() -> None:
    from fastreid.utils.compute_dist import build_dist

    embeddings = torch.rand(30, 8)
    distances = build_dist(embeddings[:5], embeddings[5:], metric="jaccard", k1=6, k2=2)
    assert distances.shape == (5, 25) and np.isfinite(distances).all()


@pytest.mark.parametrize(
    ("overrides", "processes", "told"),
    [
        (("SOLVER.IMS_PER_BATCH", "9"), 2, "'SOLVER.IMS_PER_BATCH' is 9, the images of all 2 processes; .* give 10"),
        (("SOLVER.IMS_PER_BATCH", "4"), 4, "'SOLVER.IMS_PER_BATCH' is 4, .* at least 8: give 8"),
        (("TEST.IMS_PER_BATCH", "1"), 2, "'TEST.IMS_PER_BATCH' is 1, less than the 2 processes"),
        (("DATALOADER.SAMPLER_TRAIN", "NaiveIdentitySampler", "DATALOADER.NUM_INSTANCE", "4"), 1, ""),
        (("DATALOADER.SAMPLER_TRAIN", "BalancedIdentitySampler", "DATALOADER.NUM_INSTANCE", "8"), 2, "divisor of 4"),
    ],
)
def test_a_batch_that_the_processes_cannot_share_is_refused_in_one_line(
    overrides: tuple[str, ...], processes: int, told: str
) -> None:
    given = settings(*overrides)
    if not told:
        _check_shares(given, processes)
        return
    with pytest.raises(UserError, match=told) as error:
        _check_shares(given, processes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("gpus", "options", "told"),
    [
        (0, {"num_machines": 2, "machine_rank": 2}, "--machine-rank 2 must be from 0 to 1: --num-machines is 2"),
        (0, {"num_machines": 2, "dist_url": "auto"}, "--dist-url 'auto' must be tcp://HOST:PORT"),
        (0, {"args": (SimpleNamespace(num_processes=0),)}, "--num-processes 0 must be an integer from 1 to 256"),
        (0, {"num_machines": 0}, "--num-machines 0 must be a positive integer"),
        (4096, {}, "--num-gpus 4096: this machine has"),
        (-1, {}, "--num-gpus -1: this machine has"),
    ],
)
def test_processes_that_cannot_be_started_are_refused_in_one_line(
    gpus: int, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        fastreid.engine.launch(lambda *_: None, gpus, **options)


def test_refined_part_pooling_that_never_begins_is_refused(root: Path, tmp_path: Path) -> None:
    cfg = settings("MODEL.NAME", "pcb_rpp_csalr", "CSALR.RPP.PCB_EPOCHS", 1, "OUTPUT_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"'SOLVER\.MAX_EPOCH' is 1, and 'CSALR\.RPP\.PCB_EPOCHS' is 1.*never begin"):
        plugin.Trainer(cfg)


def test_synchronised_batch_norm_of_the_plugin_is_refused_for_models_of_fastreid(root: Path) -> None:
    with pytest.raises(UserError, match=r"MODEL\.BACKBONE\.NORM and MODEL\.HEADS\.NORM to syncBN"):
        validate(settings("MODEL.NAME", "Baseline", "CSALR.SYNC_BATCH_NORM", "True"))


def test_the_metrics_of_one_iteration_can_be_printed_twice() -> None:
    printer = CommonMetricPrinter(max_iter=2)
    with EventStorage() as storage:
        storage.epoch = 0
        printer.write()
        printer.write()


def test_applying_the_patches_again_has_no_effect() -> None:
    before = (Checkpointer.load, data_utils.read_image, SimpleTrainer.run_step)
    compat.apply()
    assert before == (Checkpointer.load, data_utils.read_image, SimpleTrainer.run_step)
