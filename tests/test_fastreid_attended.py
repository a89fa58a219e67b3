"""fast-reid's Baseline and MGN with attention (MODEL.BACKBONE.WITH_CSALR): weights, losses, recipe and mistakes."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from fastreid_script import MISSING, SCRIPT, quiet_logs  # noqa: F401  # a fixture
from torch import Tensor, nn

from csalr_plugin.commands import main
from csalr_plugin.errors import UserError
from csalr_plugin.models import recipe

if MISSING:
    pytest.skip(f"fast-reid is not installed: there is no {MISSING[0]}", allow_module_level=True)

from csalr_plugin.attention.batch_norm import SynchronisedBatchNorm, synchronise
from csalr_plugin.hosts.fastreid import Trainer, add_csalr_config
from csalr_plugin.hosts.fastreid.config import validate

# isort: split
from fastreid.config import get_cfg
from fastreid.modeling import build_model
from fastreid.utils.checkpoint import Checkpointer
from fastreid.utils.events import EventStorage

REPOSITORY = os.environ.get("FASTREID_REPO", "")

# The settings of fast-reid's bag of tricks, without ImageNet weights, for tiny images on a CPU.
BAG_OF_TRICKS = (
    *("MODEL.DEVICE", "cpu", "MODEL.BACKBONE.PRETRAIN", "False", "MODEL.BACKBONE.NORM", "BN"),
    *("MODEL.BACKBONE.LAST_STRIDE", "1", "MODEL.HEADS.WITH_BNNECK", "True", "MODEL.HEADS.NUM_CLASSES", "4"),
    *("MODEL.LOSSES.NAME", "('CrossEntropyLoss','TripletLoss')", "MODEL.LOSSES.CE.EPSILON", "0.1"),
    *("INPUT.SIZE_TRAIN", "[96, 32]", "INPUT.SIZE_TEST", "[96, 32]", "DATALOADER.NUM_WORKERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "8", "DATALOADER.NUM_INSTANCE", "4", "SOLVER.MAX_EPOCH", "1"),
    *("SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "1", "DATASETS.NAMES", "('Market1501',)"),
    *("DATASETS.TESTS", "('Market1501',)"),
)
ATTENDED = ("MODEL.BACKBONE.WITH_CSALR", "True")
OSNET = (
    "MODEL.BACKBONE.NAME",
    "build_osnet_backbone",
    "MODEL.BACKBONE.DEPTH",
    "x0_25",
    "MODEL.BACKBONE.FEAT_DIM",
    "128",
)
FAMILIES: dict[str, tuple[str, ...]] = {
    "resnet": ("MODEL.BACKBONE.DEPTH", "18x", "MODEL.BACKBONE.FEAT_DIM", "512"),
    "resnet-ibn": ("MODEL.BACKBONE.WITH_IBN", "True"),
    "resnet-nl": ("MODEL.BACKBONE.WITH_NL", "True"),
    "resnet-se": ("MODEL.BACKBONE.DEPTH", "18x", "MODEL.BACKBONE.FEAT_DIM", "512", "MODEL.BACKBONE.WITH_SE", "True"),
    "resnest": ("MODEL.BACKBONE.NAME", "build_resnest_backbone"),
    "resnext": ("MODEL.BACKBONE.NAME", "build_resnext_backbone"),
    "osnet": OSNET,
    "regnet": (
        *("MODEL.BACKBONE.NAME", "build_regnet_backbone", "MODEL.BACKBONE.DEPTH", "200x"),
        *("MODEL.BACKBONE.FEAT_DIM", "368"),
    ),
    "effnet": (
        *("MODEL.BACKBONE.NAME", "build_effnet_backbone", "MODEL.BACKBONE.DEPTH", "b0"),
        *("MODEL.BACKBONE.FEAT_DIM", "1280"),
    ),
    "repvgg": (
        *("MODEL.BACKBONE.NAME", "build_repvgg_backbone", "MODEL.BACKBONE.DEPTH", "A0"),
        *("MODEL.BACKBONE.FEAT_DIM", "1280"),
    ),
    "mobilenetv2": (
        *("MODEL.BACKBONE.NAME", "build_mobilenetv2_backbone", "MODEL.BACKBONE.DEPTH", "1.0x"),
        *("MODEL.BACKBONE.FEAT_DIM", "1280"),
    ),
    "mobilenetv3-small": (
        *("MODEL.BACKBONE.NAME", "build_mobilenetv3_backbone", "MODEL.BACKBONE.DEPTH", "Small"),
        *("MODEL.BACKBONE.FEAT_DIM", "1024"),
    ),
    "mobilenetv3-large": (
        *("MODEL.BACKBONE.NAME", "build_mobilenetv3_backbone", "MODEL.BACKBONE.DEPTH", "Large"),
        *("MODEL.BACKBONE.FEAT_DIM", "1280"),
    ),
    "shufflenetv2": (
        *("MODEL.BACKBONE.NAME", "build_shufflenetv2_backbone", "MODEL.BACKBONE.DEPTH", "1.0x"),
        *("MODEL.BACKBONE.FEAT_DIM", "1024"),
    ),
    "mgn-ibn": ("MODEL.META_ARCHITECTURE", "MGN", "MODEL.BACKBONE.WITH_IBN", "True", "MODEL.HEADS.EMBEDDING_DIM", "16"),
}


@pytest.fixture
def root(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTREID_DATASETS", str(tiny_data / "market1501"))
    return tiny_data


def settings(*words: str) -> Any:
    cfg = get_cfg()
    add_csalr_config(cfg)
    cfg.merge_from_list([*BAG_OF_TRICKS, *words])
    return cfg


def build(*words: str) -> Any:
    torch.manual_seed(0)
    return build_model(settings(*words))


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"images": 255 * torch.rand(4, 3, 96, 32), "targets": torch.tensor([0, 0, 1, 1])}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_with_attention_has_the_plain_embeddings_and_one_more_loss_for_each_block(family: str) -> None:
    plain, network = build(*FAMILIES[family]).eval(), build(*FAMILIES[family], *ATTENDED).eval()
    left = network.load_state_dict(plain.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert {name.split(".")[0] for name in left.missing_keys} == {"attention", "supervision"}
    with torch.inference_mode():
        expected = plain(batch()["images"])
        assert torch.equal(network(batch()["images"]), expected)
        for block in network.attention.values():
            nn.init.constant_(block.alpha, 0.5)
        assert not torch.equal(network(batch()["images"]), expected)
    for block in network.attention.values():
        nn.init.zeros_(block.alpha)
    with EventStorage(0):
        torch.manual_seed(2)  # of dropout
        theirs = plain.train()(batch())
        torch.manual_seed(2)
        ours = network.train()(batch())
    branches = {f"loss_DS_{name}" for name in network.attention}
    assert ours.keys() - theirs.keys() == branches
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], loss)
    sum(ours.values()).backward()
    added = [value for name, value in network.named_parameters() if name.startswith(("attention", "supervision"))]
    assert all(value.grad is not None for value in added)


@pytest.mark.parametrize("attention", ["sa", "csa"])
def test_the_attention_and_its_layers_are_settings(attention: str) -> None:
    network = build(*OSNET, *ATTENDED, "CSALR.ATTENTION", attention, "CSALR.AFTER", "backbone.conv3,backbone.conv5")
    assert list(network.attention) == ["backbone_conv3", "backbone_conv5"]
    assert network.network_settings["attention"] == attention


def test_a_supervision_weight_of_0_builds_no_branch_and_lambda_weighs_the_others() -> None:
    assert not hasattr(build(*OSNET, *ATTENDED, "CSALR.SUPERVISION_WEIGHT", "0"), "supervision")
    one, half = (build(*OSNET, *ATTENDED, "CSALR.SUPERVISION_WEIGHT", weight).train() for weight in ("1", "0.5"))
    half.load_state_dict(one.state_dict())
    with EventStorage(0):
        whole, weighted = one(batch()), half(batch())
    torch.testing.assert_close(weighted["loss_DS_backbone_conv2"], 0.5 * whole["loss_DS_backbone_conv2"])


def test_bf16_computes_the_losses_in_fp32_and_channels_last_changes_no_number() -> None:
    plain = build(*OSNET, *ATTENDED).train()
    bf16, last = build(*OSNET, *ATTENDED, "CSALR.AMP", "bf16"), build(*OSNET, *ATTENDED, "CSALR.CHANNELS_LAST", "True")
    with EventStorage(0):
        expected = plain(batch())
        for network, tolerance in ((bf16.train(), 0.1), (last.train(), 1e-3)):
            for name, loss in network(batch()).items():
                assert loss.dtype is torch.float32
                torch.testing.assert_close(loss, expected[name], rtol=tolerance, atol=tolerance)
    assert bf16.eval()(batch()["images"]).dtype is torch.float32
    assert last.backbone.conv1.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_copies_and_pickles_have_blocks_of_their_own() -> None:
    network = build(*OSNET, *ATTENDED).eval()
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        for block in other.attention.values():
            nn.init.constant_(block.alpha, 0.5)
        assert not torch.equal(other(batch()["images"]), network(batch()["images"]))


def test_every_batch_norm_is_synchronised_those_of_fastreid_too() -> None:
    network = build(*OSNET, *ATTENDED)
    synchronise(network)
    norms = [one for one in network.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 20 and all(isinstance(one, SynchronisedBatchNorm) for one in norms)
    assert isinstance(network.backbone.conv1.bn, SynchronisedBatchNorm)


def test_blocks_and_gates_have_learning_rates_of_their_own() -> None:
    cfg = settings(*OSNET, *ATTENDED, "SOLVER.BASE_LR", "0.01", "SOLVER.HEADS_LR_FACTOR", "10", "CSALR.GATE_LR", "0.1")
    network = build_model(cfg)
    optimizer, _ = Trainer.build_optimizer(cfg, network)
    rates = {value: group["lr"] for group in optimizer.param_groups for value in group["params"]}
    decay = {value: group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
    block = network.attention["backbone_conv2"]
    assert rates[network.backbone.conv1.conv.weight] == pytest.approx(0.01)
    assert rates[network.heads.weight] == rates[block.query.weight] == pytest.approx(0.1)
    assert rates[block.alpha] == pytest.approx(0.01) and decay[block.alpha] == 0
    assert recipe.applies_to(network)


# Checkpoints


def test_a_plain_checkpoint_evaluates_and_starts_a_training_with_attention(tmp_path: Path) -> None:
    plain, network = build(*OSNET), build(*OSNET, *ATTENDED).eval()
    nn.init.normal_(plain.heads.bottleneck[0].running_mean)
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    Checkpointer(network).load(str(tmp_path / "plain.pth"))
    assert torch.equal(network(batch()["images"]), plain.eval()(batch()["images"]))
    torch.save({"model": network.state_dict()}, tmp_path / "attended.pth")
    other = build(*OSNET, *ATTENDED, "CSALR.GROUPS", "4")
    with pytest.raises(UserError, match="was trained with groups 2, and this network has groups 4"):
        Checkpointer(other).load(str(tmp_path / "attended.pth"))


@pytest.mark.usefixtures("root")
def test_a_script_trains_resumes_and_evaluates_with_two_words_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script = Path(REPOSITORY) / "tools" / "train_net.py" if REPOSITORY else tmp_path / "train_net.py"
    if not REPOSITORY:
        script.write_text(SCRIPT)
    (tmp_path / "empty.yml").write_text("MODEL: {}")
    words = [*BAG_OF_TRICKS, *OSNET, *ATTENDED, "OUTPUT_DIR", "out", "MODEL.HEADS.NUM_CLASSES", "0"]
    run = ["run", str(script), "--config-file", "empty.yml"]
    assert main([*run, *words]) == 0
    said = capsys.readouterr().out
    assert "million parameters" in said
    assert "L_DS_backbone_conv4" in Path("out/metrics.jsonl").read_text()
    assert main([*run, "--resume", *words, "SOLVER.MAX_EPOCH", "2"]) == 0
    assert "1 epochs are done" in capsys.readouterr().out
    assert main([*run, "--eval-only", *words, "MODEL.WEIGHTS", "out/model_final.pth"]) == 0
    assert "mAP" in capsys.readouterr().out


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*ATTENDED, "MODEL.META_ARCHITECTURE", "pcb_csalr"), "'pcb_csalr' is not one of Baseline, MGN"),
        ((*ATTENDED, "MODEL.BACKBONE.NAME", "build_vit_backbone"), "'build_vit_backbone' is a transformer"),
        ((*ATTENDED, "CSALR.STAGES", "3"), r"'CSALR.STAGES' is \[3\], and Baseline is no PCB"),
        (
            ("CSALR.AFTER", "backbone.layer1"),
            r"'CSALR.AFTER' is \['backbone.layer1'\], and MODEL.BACKBONE.WITH_CSALR is",
        ),
        (("CSALR.ATTENTION", "csalt"), "'CSALR.ATTENTION' is 'csalt'; it must be one of sa, csa, csalr"),
        (
            ("MODEL.BACKBONE.WITH_CSALR", "perhaps"),
            "'MODEL.BACKBONE.WITH_CSALR' is 'perhaps'; it must be true or false",
        ),
    ],
)
def test_a_mistaken_setting_is_one_line(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        validate(settings(*words))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("root")
def test_images_too_small_for_mgn_are_one_line() -> None:
    mgn = ("MODEL.META_ARCHITECTURE", "MGN", "MODEL.HEADS.EMBEDDING_DIM", "16", "INPUT.SIZE_TEST", "[32, 32]")
    with pytest.raises(UserError, match=r"MGN cannot take images of 32x32 .*: give a larger INPUT\.SIZE_TEST") as error:
        Trainer.build_model(settings(*mgn, *ATTENDED))
    assert "\n" not in str(error.value)


def test_layers_and_groups_that_do_not_fit_are_one_line() -> None:
    for words, message in (
        (("CSALR.AFTER", "layer1"), "AttendedBaseline has no layer 'layer1'; its layers are backbone, heads"),
        (("CSALR.AFTER", "heads.pool_layer"), "the output of layer 'heads.pool_layer' has the shape"),
        (("CSALR.GROUPS", "5"), "attention after layer 'backbone.conv2': groups 5 must be"),
    ):
        with pytest.raises(UserError, match=message) as error:
            build(*OSNET, *ATTENDED, *words)
        assert "\n" not in str(error.value)
