"""The eight architectures: their outputs, their layers in common with torchreid's PCB, and invalid settings."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn

import csalr_plugin
from csalr_plugin.errors import UserError
from csalr_plugin.models import MODEL_NAMES, PCB, RefinedPCB, build_model
from csalr_plugin.models.weights import load_weights

IDENTITIES = 7
SMALL = {"groups": 2, "landmarks": (3, 2)}
ATTENDED = [name for name in MODEL_NAMES if name not in ("pcb", "pcb_rpp")]
EMBEDDING = 6 * 2048


def build(name: str, *, seed: int = 0, **options: Any) -> PCB:
    """Build a model with random weights."""
    torch.manual_seed(seed)
    return build_model(name, IDENTITIES, pretrained=False, **{**SMALL, **options})


def sketch(name: str, **options: Any) -> PCB:
    """Build a model on the meta device: fast, for tests that do not depend on the weights."""
    with torch.device("meta"):
        return build(name, **options)


def images(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, 96, 48, generator=torch.Generator(reference.DEVICE).manual_seed(seed))


def embed(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        embedding: Tensor = model.eval()(x)
    return embedding


@pytest.fixture(scope="module")
def csalr() -> PCB:
    """A pcb_csalr with open gates, shared by tests that do not change its weights."""
    model = build("pcb_csalr")
    for block in model.attention.values():
        nn.init.constant_(block.alpha, 0.3)
    return model


# Outputs


@pytest.mark.parametrize("name", ["pcb", "pcb_rpp"])
def test_the_reduced_embedding_is_the_input_of_the_six_classifiers_at_unit_length(name: str) -> None:
    model = build(name).eval()
    inputs: list[Tensor] = []
    for linear in model.classifier:
        linear.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        reduced = model.reduced_embedding(images())
        model.training = True  # the layers stay in eval mode: running statistics, no dropout
        model(images())
    assert reduced.shape == (2, 6 * 256)
    torch.testing.assert_close(reduced.reshape(2, 256, 6), nn.functional.normalize(torch.stack(inputs, dim=2), dim=1))
    torch.testing.assert_close(reduced.reshape(2, 256, 6).norm(dim=1), torch.ones(2, 6))


def test_the_eight_models_build_without_importing_a_host() -> None:
    code = (
        "import sys, torch\n"
        "from csalr_plugin import MODEL_NAMES, build_model\n"
        "with torch.device('meta'):\n"
        "    models = [build_model(name, 7, pretrained=False) for name in MODEL_NAMES]\n"
        "print(len(models), 'torchreid' in sys.modules)"
    )
    root = Path(csalr_plugin.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("8 False\n", 0), done.stderr


def test_there_are_eight_names() -> None:
    heads, attentions = ("pcb", "pcb_rpp"), ("", "_sa", "_csa", "_csalr")
    assert list(MODEL_NAMES) == [head + attention for head in heads for attention in attentions]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_training_gives_the_logits_of_six_parts_and_of_one_branch_per_stage(name: str) -> None:
    outputs = sketch(name).train()(torch.empty(2, 3, 96, 48, device="meta"))
    assert isinstance(outputs, list)
    assert [tuple(logits.shape) for logits in outputs] == [(2, IDENTITIES)] * (9 if name in ATTENDED else 6)


def test_training_logits_are_the_parts_in_order_then_the_branches_in_order_of_the_stages() -> None:
    model = build("pcb_csalr", stages=(3, 1)).train()
    with torch.no_grad():  # each linear layer returns its own number
        for part, linear in enumerate(model.classifier):
            linear.weight.zero_()
            linear.bias.fill_(part)
        for stage, branch in model.supervision.items():
            branch.classifier.weight.zero_()
            branch.classifier.bias.fill_(100 * int(stage.removeprefix("stage")))
        logits = model(images())
    assert [float(output.unique()) for output in logits] == [0, 1, 2, 3, 4, 5, 100, 300]


@pytest.mark.parametrize("name", ["pcb", "pcb_csalr", "pcb_rpp_csalr"])
def test_triplet_training_gives_logits_and_the_embedding(name: str) -> None:
    outputs = sketch(name, loss="triplet").train()(torch.empty(2, 3, 96, 48, device="meta"))
    assert isinstance(outputs, tuple) and len(outputs) == 2
    logits, features = outputs
    assert isinstance(logits, list) and len(logits) == (6 if name == "pcb" else 9)
    assert features.shape == (2, EMBEDDING)


@pytest.mark.parametrize("loss", ["softmax", "triplet"])
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_evaluation_gives_an_embedding_of_12288_for_any_loss(name: str, loss: str) -> None:
    model = sketch(name, loss=loss).eval()
    assert model.feature_dim == EMBEDDING
    assert model(torch.empty(2, 3, 96, 48, device="meta")).shape == (2, EMBEDDING)


@pytest.mark.parametrize("name", ["pcb_csalr", "pcb_rpp"])
def test_each_of_the_six_parts_of_an_embedding_has_unit_length(name: str, csalr: PCB) -> None:
    embedding = embed(csalr if name == "pcb_csalr" else build(name), images())
    assert embedding.isfinite().all()
    # The six parts of a channel are adjacent, as in torchreid's PCB.
    torch.testing.assert_close(embedding.view(2, 2048, 6).norm(dim=1), torch.ones(2, 6))


def test_an_embedding_is_the_means_of_six_stripes_of_the_last_feature_map(csalr: PCB) -> None:
    csalr.eval()
    with torch.no_grad():
        features, embedding = csalr(images(), return_featuremaps=True), csalr(images())
    assert features.shape == (2, 2048, 6, 3)  # six rows: one per stripe
    stripes = [features[:, :, row].mean(2) for row in range(6)]
    wanted = torch.stack([stripe / stripe.norm(dim=1, keepdim=True) for stripe in stripes], dim=2)
    torch.testing.assert_close(embedding.view(2, 2048, 6), wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(384, 128), (96, 48), (64, 32)], ids=str)
def test_return_featuremaps_gives_the_last_map_at_one_sixteenth_of_the_image_size(
    size: tuple[int, int], training: bool
) -> None:
    model = sketch("pcb_csa").train(training)
    features = model(torch.empty(2, 3, *size, device="meta"), return_featuremaps=True)
    assert features.shape == (2, 2048, size[0] // 16, size[1] // 16)


@pytest.mark.parametrize("name", ["pcb_sa", "pcb_csa", "pcb_rpp_csalr"])
def test_every_parameter_of_a_training_model_gets_a_finite_gradient(name: str) -> None:
    model = build(name).train()
    outputs = model(images())
    target = torch.tensor([1, 2])
    torch.stack([nn.functional.cross_entropy(logits, target) for logits in outputs]).sum().backward()
    missing = [parameter for parameter, value in model.named_parameters() if value.grad is None]
    assert missing == []
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


def test_a_branch_is_stage_output_times_attention_averaged_then_one_linear_layer(csalr: PCB) -> None:
    """The attention output is that before gate and residual (section 3.3)."""
    seen: dict[str, Tensor] = {}
    branch = csalr.supervision["stage1"]
    hooks = [
        csalr.layer1.register_forward_hook(lambda *given: seen.update(x=given[-1].clone())),
        branch.register_forward_hook(lambda _, given, logits: seen.update(pooled=given[0], logits=logits)),
    ]
    state = {name: value.clone() for name, value in csalr.state_dict().items()}
    try:
        with torch.no_grad():
            csalr.train()(images())
        csalr.load_state_dict(state)
        with torch.no_grad():
            attended = csalr.attention["stage1"].attend(seen["x"])
    finally:
        for hook in hooks:
            hook.remove()
        csalr.load_state_dict(state)
    assert seen["x"].shape == (2, 256, 24, 12)
    mean = torch.stack([(seen["x"][i] * attended[i]).sum((1, 2)) / (24 * 12) for i in range(2)])
    torch.testing.assert_close(seen["pooled"], mean, rtol=1e-4, atol=1e-5)
    normal = (mean - mean.mean(0)) / (mean.var(0, unbiased=False) + branch.norm.eps).sqrt()
    normal = normal * branch.norm.weight + branch.norm.bias
    wanted = normal @ branch.classifier.weight.T + branch.classifier.bias
    torch.testing.assert_close(seen["logits"], wanted, rtol=1e-3, atol=1e-4)


# Closed gates, and torchreid's PCB


@pytest.mark.parametrize("head", ["pcb", "pcb_rpp"])
def test_with_alpha_0_every_attention_equals_its_baseline_exactly(head: str) -> None:
    baseline, x = build(head), images()
    weights = {key: value.clone() for key, value in baseline.state_dict().items()}
    wanted = embed(baseline, x)
    torch.manual_seed(5)
    with torch.no_grad():
        wanted_logits = baseline.train()(x)
    for attention in ("sa", "csa", "csalr"):
        model = build(f"{head}_{attention}", seed=1)
        left = model.load_state_dict(weights, strict=False)
        assert left.unexpected_keys == []
        assert {key.split(".")[0] for key in left.missing_keys} == {"attention", "supervision"}
        assert torch.equal(embed(model, x), wanted)
        torch.manual_seed(5)  # for dropout
        with torch.no_grad():
            logits = model.train()(x)
        assert all(torch.equal(got, want) for got, want in zip(logits[:6], wanted_logits, strict=True))


def test_an_open_gate_changes_the_embedding(csalr: PCB) -> None:
    baseline = build("pcb", seed=1)
    baseline.load_state_dict({key: value for key, value in csalr.state_dict().items() if key in baseline.state_dict()})
    assert not torch.equal(embed(csalr, images()), embed(baseline, images()))


@dataclass
class HostPCB:
    """torchreid's PCB with six parts: its weights, a checkpoint, its children and an embedding."""

    weights: dict[str, Tensor]
    checkpoint: Path
    children: set[str]
    embedding: Tensor


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostPCB:
    torchreid = pytest.importorskip("torchreid")
    torch.manual_seed(2)
    model = torchreid.models.build_model("pcb_p6", num_classes=IDENTITIES, loss="softmax", pretrained=False)
    path = tmp_path_factory.mktemp("host") / "model.pth.tar-60"
    torch.save({"state_dict": model.state_dict(), "epoch": 60, "rank1": np.float32(0.5)}, path)
    return HostPCB(model.state_dict(), path, {name for name, _ in model.named_children()}, embed(model, images()))


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_checkpoint_of_the_hosts_pcb_p6_loads_and_gives_identical_embeddings(name: str, host: HostPCB) -> None:
    model = build(name)
    report = load_weights(model, host.checkpoint)
    assert set(report.loaded) == set(host.weights)
    new = {"attention", "supervision", "part_classifier", "_extra_state"}
    assert {key.split(".")[0] for key in report.left} <= new
    if isinstance(model, RefinedPCB):
        model.refining = False
    assert torch.equal(embed(model, images()), host.embedding)


def test_shared_layers_have_the_names_and_shapes_of_the_hosts_pcb(host: HostPCB) -> None:
    shapes = {key: value.shape for key, value in sketch("pcb").state_dict().items()}
    assert shapes == {key: value.shape for key, value in host.weights.items()}
    new = {"attention", "supervision", "part_classifier"}
    for name in MODEL_NAMES:
        assert {child for child, _ in sketch(name).named_children()} - new <= host.children


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_parameter_belongs_to_a_child(name: str) -> None:
    assert dict(sketch(name).named_parameters(recurse=False)) == {}


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_last_stride_is_1(name: str) -> None:
    block = sketch(name).layer4[0]
    assert block.conv2.stride == block.downsample[0].stride == (1, 1)


# Refined part pooling


def test_refined_part_pooling_equals_six_times_the_mean_of_weight_times_feature() -> None:
    model = build("pcb_rpp")
    assert isinstance(model, RefinedPCB) and model.refining
    model.part_classifier.double()
    nn.init.normal_(model.part_classifier.weight, std=0.05)
    nn.init.normal_(model.part_classifier.bias)
    features = torch.randn(
        2, 2048, 5, 3, dtype=torch.float64, generator=torch.Generator(reference.DEVICE).manual_seed(4)
    )
    with torch.no_grad():
        pooled = model.pool_parts(features)
    assert pooled.shape == (2, 2048, 6, 1)
    wanted = reference.part_features(features, model.part_classifier.weight, model.part_classifier.bias)
    np.testing.assert_allclose(pooled[..., 0].cpu().numpy(), wanted, rtol=1e-10, atol=1e-12)


def test_equal_weights_of_all_parts_make_each_part_the_global_mean() -> None:
    model = build("pcb_rpp")
    nn.init.zeros_(model.part_classifier.weight)
    nn.init.zeros_(model.part_classifier.bias)
    features = torch.randn(2, 2048, 6, 3, generator=torch.Generator(reference.DEVICE).manual_seed(4))
    with torch.no_grad():
        pooled = model.pool_parts(features)
    torch.testing.assert_close(pooled, features.mean((2, 3))[..., None, None].expand_as(pooled))


def test_refined_pooling_with_stripes_as_weights_equals_pcb() -> None:
    model = build("pcb_rpp")
    features = torch.randn(2, 2048, 12, 3, generator=torch.Generator(reference.DEVICE).manual_seed(4))
    features[:, :6] = 0  # six channels that mark the stripe
    for stripe in range(6):
        features[:, stripe, 2 * stripe : 2 * stripe + 2] = 1
    with torch.no_grad():
        model.part_classifier.weight.zero_()
        model.part_classifier.bias.zero_()
        model.part_classifier.weight[:, :6, 0, 0] = 200 * torch.eye(6)
        refined = model.pool_parts(features)
        model.refining = False
        stripes = model.pool_parts(features)
    torch.testing.assert_close(refined, stripes)


def test_the_attribute_refining_is_saved_and_restored(tmp_path: Path) -> None:
    model = build("pcb_rpp")
    assert isinstance(model, RefinedPCB)
    for refining in (True, False):
        model.refining = refining
        torch.save(model.state_dict(), tmp_path / "model.pth")
        model.refining = not refining
        model.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
        assert model.refining is refining
        model.refining = not refining
        load_weights(model, tmp_path / "model.pth")
        assert model.refining is refining


def test_every_value_of_a_state_dict_is_a_tensor() -> None:
    assert all(isinstance(value, Tensor) for value in sketch("pcb_rpp_csalr").state_dict().values())


# Settings


def test_settings_reach_every_block() -> None:
    model = sketch("pcb_csalr", stages=(4, 2), groups=4, landmarks=(5, 3), key_ratio=0.125)
    assert list(model.attention) == list(model.supervision) == ["stage2", "stage4"]
    for stage, channels in (("stage2", 512), ("stage4", 2048)):
        block = model.attention[stage]
        assert (block.groups, block.landmarks) == (4, (5, 3))
        assert block.query.weight.shape == (channels // 8, channels, 1, 1)
        assert block.value.weight.shape == block.fuse.weight.shape == (channels, channels, 1, 1)
    assert sketch("pcb_csa", groups=4, landmarks=(5, 3)).attention["stage1"].bases.shape == (60, 64)
    outputs = model.train()(torch.empty(2, 3, 96, 48, device="meta"))
    assert len(outputs) == 8


def test_defaults_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        model = build_model("pcb_csalr", IDENTITIES, pretrained=False)
    assert model.loss == "softmax"
    assert list(model.attention) == ["stage1", "stage2", "stage3"]
    for block, channels in zip(model.attention.values(), (256, 512, 1024), strict=True):
        assert (block.groups, block.landmarks) == (2, (12, 8))
        assert (block.value.in_channels, block.query.out_channels) == (channels, channels // 4)


def test_sa_has_one_group_for_any_setting() -> None:
    block = sketch("pcb_sa", groups=4).attention["stage1"]
    assert block.groups == 1 and not hasattr(block, "fuse")


def refusal(name: str = "pcb_csalr", **options: Any) -> str:
    with pytest.raises(UserError) as error:
        sketch(name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("stages", [(0,), (5,), (1, 1), (), (1, 2, 9), "12"], ids=repr)
@pytest.mark.parametrize("name", ["pcb", "pcb_rpp_csalr"])
def test_stages_outside_1_to_4_or_repeated_or_none_are_refused(name: str, stages: Any) -> None:
    message = refusal(name, stages=stages)
    assert message.startswith(f"stages {stages!r}") and "1 to 4" in message


@pytest.mark.parametrize("stages", [1, (1.0, 2), (True,)], ids=repr)
def test_stages_that_are_not_integers_are_refused(stages: Any) -> None:
    assert refusal(stages=stages).startswith(f"stages {stages!r}")


@pytest.mark.parametrize("options", [{"groups": 3}, {"landmarks": (0, 8)}, {"key_ratio": 2}], ids=str)
def test_invalid_settings_of_blocks_are_refused(options: dict[str, Any]) -> None:
    ((key, value),) = options.items()
    assert refusal(**options).startswith(f"{key} {value!r}")


def test_an_unknown_loss_is_refused() -> None:
    message = refusal(loss="centre")
    assert "'centre'" in message and "'softmax' or 'triplet'" in message


@pytest.mark.parametrize(
    ("given", "nearest"), [("pcb_cslar", "pcb_csalr"), ("pcb_rpp_csar", "pcb_rpp_csa"), ("PCB_SA", None), ("", None)]
)
def test_an_unknown_model_is_refused_with_the_nearest_name(given: str, nearest: str | None) -> None:
    message = refusal(given)
    assert repr(given) in message and all(name in message for name in MODEL_NAMES)
    assert ("Did you mean" in message) == (nearest is not None)
    assert nearest is None or repr(nearest) in message.split("Did you mean")[1]
