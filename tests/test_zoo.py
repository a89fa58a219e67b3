"""Every kind of model in torchreid's zoo trains with the plugin's engine, and takes attention by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchreid
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from csalr_plugin import UserError
from csalr_plugin.commands import main
from csalr_plugin.hosts.torchreid import engine as engine_module
from csalr_plugin.hosts.torchreid import model_registry, zoo
from csalr_plugin.hosts.torchreid.config import default_config, set_active_config
from csalr_plugin.hosts.torchreid.optimizer import build_optimizer
from csalr_plugin.models import recipe
from csalr_plugin.models.weights import load_weights

# The smallest model of each of the host's modules, and the image size that it needs.
SMALLEST = {
    "resnet18": (64, 32),
    "resnet50_fc512": (64, 32),
    "se_resnet50": (64, 32),
    "densenet121": (64, 32),
    "inceptionresnetv2": (80, 80),
    "inceptionv4": (80, 80),
    "xception": (64, 32),
    "resnet50_ibn_a": (64, 32),
    "resnet50_ibn_b": (64, 32),
    "nasnsetmobile": (64, 32),
    "mobilenetv2_x1_0": (64, 32),
    "shufflenet": (64, 32),
    "squeezenet1_1": (64, 32),
    "shufflenet_v2_x0_5": (64, 32),
    "mudeep": (64, 32),
    "resnet50mid": (64, 32),
    "hacnn": (160, 64),
    "pcb_p4": (64, 32),
    "mlfn": (64, 32),
    "osnet_x0_25": (64, 32),
    "osnet_ain_x0_25": (64, 32),
}
IDENTITIES = torch.tensor([0, 0, 1, 1])


def test_every_module_of_the_zoo_is_represented() -> None:
    registry = model_registry()
    modules = {registry[name].__module__ for name in zoo.host_names(registry)}
    assert modules == {registry[name].__module__ for name in SMALLEST}


def test_every_name_of_the_host_is_in_the_registry_with_each_attention() -> None:
    registry = model_registry()
    names = zoo.host_names(registry)
    assert "osnet_ain_x1_0" in names and "pcb_csalr" not in names and "resnet50_csalr" not in names
    for name in names:
        assert zoo.default_layers(registry, name), name
        assert {f"{name}_sa", f"{name}_csa", f"{name}_csalr"} <= set(registry)
    assert torchreid.models.build_model("osnet_x0_25_csa", 4, pretrained=False).attention["conv2"].groups == 2


def build(name: str) -> nn.Module:
    """A model with random weights; initialising them takes longer than the training step."""
    registry = model_registry()
    torch.manual_seed(0)
    if name.startswith("hacnn"):  # it computes a value while it is built
        model: nn.Module = registry[name](num_classes=4, loss="softmax", pretrained=False, use_gpu=False)
        return model
    with torch.device("meta"):
        model = registry[name](num_classes=4, loss="softmax", pretrained=False, use_gpu=False)
        if name.startswith("mudeep"):  # its layer for images of 256x128 has 134 million weights
            model.fc[0] = nn.Linear(256 * 4 * 2, 4096)
    model.to_empty(device="cpu")
    for key, value in model.state_dict().items():
        if value.dim() > 1:
            nn.init.normal_(value, std=0.05)
        else:
            nn.init.constant_(value, float(key.endswith(("weight", "running_var"))))
    return model


def one_step(engine: Any, images: Tensor) -> tuple[dict[str, float], dict[str, Tensor | None]]:
    """The summary and the gradients of one training step."""
    engine.model.zero_grad()
    torch.manual_seed(0)
    summary = engine.forward_backward({"img": images, "pid": IDENTITIES})
    return summary, {name: value.grad for name, value in engine.model.named_parameters()}


@pytest.mark.parametrize("name", SMALLEST)
def test_a_training_step_has_the_host_s_loss_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, images = build(name).train(), torch.randn(4, 3, *SMALLEST[name])
    monkeypatch.setattr(engine_module, "draw_from", lambda *_: None)  # both engines start from the same random state
    start = {key: value.clone() for key, value in model.state_dict().items()}
    data = SimpleNamespace(
        train_loader=DataLoader(TensorDataset(IDENTITIES), batch_size=4), test_loader={}, num_train_pids=4
    )
    losses: list[tuple[str, dict[str, float]]] = [("softmax", {}), ("triplet", {"weight_t": 0.7, "weight_x": 0.5})]
    if name == "hacnn":  # the classifiers without a loss
        losses.append(("triplet", {"weight_t": 1.0, "weight_x": 0.0}))
    for loss, options in losses:
        config = default_config()
        config.merge_from_list(["model.name", name, "loss.name", loss, "train.batch_size", 4])
        set_active_config(config)
        model.loss = loss  # type: ignore[assignment]
        host_class = getattr(torchreid.engine, f"Image{loss.capitalize()}Engine")
        steps = []
        for kind in (host_class, engine_module.plugin_engine(host_class)):
            model.load_state_dict(start)
            engine = kind(data, model, torch.optim.SGD(model.parameters(), lr=0.0), use_gpu=False, **options)
            engine.batch_idx, engine.num_batches = 0, 1
            steps.append(one_step(engine, images))
        (theirs, expected), (ours, got) = steps
        total = (
            theirs["loss"]
            if loss == "softmax"
            else sum(weight * theirs.get(f"loss_{key[-1]}", 0.0) for key, weight in options.items())
        )
        assert ours["loss"] == pytest.approx(total, rel=1e-6)
        assert "acc" not in theirs or ours["acc"] == theirs["acc"]
        for key, gradient in expected.items():
            assert (gradient is None) == (got[key] is None), key
            assert gradient is None or torch.equal(gradient, got[key]), key  # type: ignore[arg-type]


# With attention


def engine_of(name: str, model: nn.Module, loss: str, options: dict[str, float], plugin: bool, lr: float = 0.0) -> Any:
    """The host's engine, or the plugin's, for one batch."""
    config = default_config()
    config.merge_from_list(["model.name", name, "loss.name", loss, "train.batch_size", 4])
    set_active_config(config)
    model.loss = loss  # type: ignore[assignment]
    host_class = getattr(torchreid.engine, f"Image{loss.capitalize()}Engine")
    kind = engine_module.plugin_engine(host_class) if plugin else host_class
    data = SimpleNamespace(
        train_loader=DataLoader(TensorDataset(IDENTITIES), batch_size=4), test_loader={}, num_train_pids=4
    )
    engine = kind(data, model, build_optimizer(model, optim="sgd", lr=lr), use_gpu=False, **options)
    engine.batch_idx, engine.num_batches = 0, 1
    return engine


@pytest.mark.parametrize("name", SMALLEST)
def test_a_model_with_attention_has_the_plain_embeddings_and_trains_with_its_branches(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "draw_from", lambda *_: None)
    images = torch.randn(4, 3, *SMALLEST[name])
    plain, model = build(name).eval(), build(f"{name}_csalr").eval()
    left = model.load_state_dict(plain.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert {key.split(".")[0] for key in left.missing_keys} == {"attention", "supervision"}
    with torch.inference_mode():
        assert torch.equal(model(images), plain(images))
        for block in recipe.attention_blocks(model).values():
            nn.init.constant_(block.alpha, 0.5)
        assert not torch.equal(model(images), plain(images))
    blocks = recipe.attention_blocks(model)
    layers = zoo.default_layers(model_registry(), name)
    assert list(blocks) == [layer.replace(".", "_") for layer in layers]
    model.train()
    ours, gradients = one_step(engine_of(name, model, "softmax", {}, plugin=True), images)
    branches = [ours[f"L_DS_{key}"] for key in blocks]
    assert ours["loss"] == pytest.approx(ours["L_F"] + sum(branches), rel=1e-5)
    assert all(value is not None for key, value in gradients.items() if key.startswith(("attention", "supervision")))


@pytest.mark.parametrize("name", ["osnet_x0_25", "hacnn"])
@pytest.mark.parametrize(("loss", "options"), [("softmax", {}), ("triplet", {"weight_t": 0.7, "weight_x": 0.5})])
def test_the_hosts_own_engines_train_a_model_with_attention(
    name: str, loss: str, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "draw_from", lambda *_: None)
    model, images = build(f"{name}_csalr").train(), torch.randn(4, 3, *SMALLEST[name])
    start = {key: value.clone() for key, value in model.state_dict().items()}
    theirs, _ = one_step(engine_of(name, model, loss, options, plugin=False), images)
    model.load_state_dict(start)
    ours, gradients = one_step(engine_of(name, model, loss, options, plugin=True), images)
    branches = [value for key, value in ours.items() if key.startswith("L_DS_")]
    assert len(branches) == 3
    if loss == "softmax":  # the host averages classifiers and branches
        classifiers = 2 if name == "hacnn" else 1
        mean = (classifiers * ours["L_F"] + sum(branches)) / (classifiers + 3)
        assert theirs["loss"] == pytest.approx(mean, rel=1e-5)
    else:
        assert theirs["loss_t"] == pytest.approx(ours["triplet"], rel=1e-5)
    assert all(gradients[f"attention.{key}.alpha"] is not None for key in recipe.attention_blocks(model))


def test_the_layers_of_a_model_are_a_setting_and_no_weight_means_no_branch() -> None:
    config = default_config()
    config.merge_from_list(["csalr.after", "conv3,conv4.0", "csalr.supervision_weight", "0", "csalr.groups", "4"])
    set_active_config(config)
    model = torchreid.models.build_model("osnet_x0_25_csalr", 4, pretrained=False, use_gpu=False)
    assert list(model.attention) == ["conv3", "conv4_0"]
    assert model.attention["conv3"].groups == 4
    assert not hasattr(model, "supervision")


def test_the_list_of_the_zoo_has_the_layers_and_the_cost_of_each_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zoo, "host_names", lambda _: ["osnet_x0_25", "hacnn"])
    assert main(["models", "--zoo"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == ["osnet_x0_25_csalr", "conv2,conv3,conv4", "256x128", "0.88", "0.12", "512"]
    assert lines[3][:3] == ["hacnn_csalr", "inception1,inception2,inception3", "160x64"]
    assert lines[5][:3] == ["for", "751", "identities;"]


def test_pretrained_weights_of_a_file_go_into_the_model_before_its_blocks(tmp_path: Path) -> None:
    imagenet = model_registry()["osnet_x0_25"](num_classes=7, pretrained=False)  # other identities
    torch.save(imagenet.state_dict(), tmp_path / "imagenet.pth")
    config = default_config()
    config.merge_from_list(["csalr.pretrained_weights", str(tmp_path / "imagenet.pth")])
    set_active_config(config)
    model = torchreid.models.build_model("osnet_x0_25_sa", 4, pretrained=True)
    assert torch.equal(model.conv1.conv.weight, imagenet.conv1.conv.weight)
    assert model.classifier.weight.shape[0] == 4
    with pytest.raises(UserError, match=r"has no weights of this ResNet: \d+ of its \d+ tensors are missing"):
        torchreid.models.build_model("resnet18_sa", 4, pretrained=True)


def test_a_re_id_checkpoint_of_the_plain_model_loads_and_leaves_the_blocks_new(tmp_path: Path) -> None:
    plain = model_registry()["osnet_x0_25"](num_classes=7, pretrained=False).eval()
    torch.save({"state_dict": plain.state_dict(), "epoch": 3}, tmp_path / "model.pth.tar-3")
    model = torchreid.models.build_model("osnet_x0_25_csalr", 4, pretrained=False).eval()
    report = load_weights(model, tmp_path / "model.pth.tar-3")
    assert {name.split(".")[0] for name in report.left} == {"attention", "supervision", "classifier"}
    images = torch.randn(2, 3, 64, 32)
    assert torch.equal(model(images), plain(images))


def test_attention_maps_are_drawn_for_any_model_with_attention(tmp_path: Path) -> None:
    Image.new("RGB", (32, 64), "red").save(tmp_path / "person.png")
    words = ["attention-maps", "--image", str(tmp_path / "person.png"), "--out", str(tmp_path / "maps")]
    words += ["model.name", "osnet_x0_25_csalr", "model.pretrained", "False", "data.height", "64", "data.width", "32"]
    assert main(words) == 0
    assert (tmp_path / "maps" / "person.png").is_file()


def test_a_model_that_a_user_registered_has_names_with_attention_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(nn.Module):
        def __init__(self, num_classes: int, **_: Any) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).mean((2, 3))  # type: ignore[no-any-return]

    registry = vars(torchreid.models)["__model_factory"]
    monkeypatch.setattr(torchreid.models, "__model_factory", dict(registry), raising=False)
    vars(torchreid.models)["__model_factory"]["mine"] = Mine
    build_mine = model_registry()["mine_sa"]
    with pytest.raises(UserError, match=r"does not know the layers of mine; name the layers .* csalr\.after"):
        build_mine(num_classes=2, pretrained=False)
    config = default_config()
    config.merge_from_list(["csalr.after", "body"])
    set_active_config(config)
    assert list(build_mine(num_classes=2, pretrained=False).attention) == ["body"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("model.name", "osnet_x1_0_csalrr"),
            "it must be one of .* followed by _sa, _csa or _csalr.* 'osnet_x1_0_csalr'",
        ),
        (("model.name", "osnet_x1_csalr"), "Did you mean 'osnet_x1_0_csalr'"),
        (
            ("model.name", "osnet_x1_0_csalr", "csalr.stages", "3"),
            "'csalr.stages' is .*name its layers with csalr.after",
        ),
        (("model.name", "pcb_csalr", "csalr.after", "layer1"), "'csalr.after' is .* ignores it; give csalr.stages"),
        (("model.name", "osnet_x1_0", "csalr.after", "conv2"), "ignores it; give a model with attention"),
        (("csalr.after", "conv2,conv2"), "it must be a comma-separated list|distinct names of layers"),
    ],
)
def test_a_mistaken_name_or_key_is_one_line(words: tuple[str, ...], message: str) -> None:
    config = default_config()
    with pytest.raises(UserError, match=message) as error:
        config.merge_from_list(list(words))
        config.validate()
    assert "\n" not in str(error.value)


def test_layers_and_groups_that_do_not_fit_are_one_line() -> None:
    for words, message in (
        (("csalr.after", "conv7"), "OSNet has no layer 'conv7'.*conv1, .*Did you mean 'conv"),
        (("csalr.after", "fc"), "the output of layer 'fc' has the shape"),
        (("csalr.groups", "5"), "attention after layer 'conv2': groups 5 must be .* 64 channels"),
    ):
        config = default_config()
        config.merge_from_list(["model.name", "osnet_x0_25_csalr", *words])
        config.validate()
        set_active_config(config)
        with pytest.raises(UserError, match=message) as error:
            torchreid.models.build_model("osnet_x0_25_csalr", 4, pretrained=False, use_gpu=False)
        assert "\n" not in str(error.value)
