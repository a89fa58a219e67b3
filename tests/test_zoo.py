"""Every kind of model in the host's zoo trains with the plugin's engine as with the host's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchreid
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from csalr_plugin.hosts.torchreid import engine as engine_module
from csalr_plugin.hosts.torchreid import model_registry
from csalr_plugin.hosts.torchreid.config import default_config, set_active_config
from csalr_plugin.models import MODEL_NAMES

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
    registry = {name: build for name, build in model_registry().items() if name not in MODEL_NAMES}
    assert {build.__module__ for build in registry.values()} == {registry[name].__module__ for name in SMALLEST}


def build(name: str) -> nn.Module:
    """A model with random weights; initialising them takes longer than the training step."""
    registry = model_registry()
    if name == "hacnn":  # it computes a value while it is built
        model: nn.Module = registry[name](num_classes=4, loss="softmax", pretrained=False, use_gpu=False)
        return model
    with torch.device("meta"):
        model = registry[name](num_classes=4, loss="softmax", pretrained=False, use_gpu=False)
        if name == "mudeep":  # its layer for images of 256x128 has 134 million weights
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
