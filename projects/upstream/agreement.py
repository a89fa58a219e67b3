"""Compare a model of a patched host with the plugin's: weights, embeddings, and one training step.

    PYTHONPATH=PATCHED-HOST python projects/upstream/agreement.py {torchreid,fastreid} MODEL [--dtype float32]

MODEL is `pcb_csalr`, or in torchreid `pcb_rpp`. Both models are built through the registry of the host. The script
prints one JSON object. `check.py` and the tests run it in a process of its own, because a process can import only one
version of a host.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from csalr_plugin.hosts import PREFIX
from csalr_plugin.models import PCB, recipe

IDENTITIES = 5
HEIGHT, WIDTH = 96, 40  # the maps have 24x10, 12x5 and 6x3 positions: fewer, more, and no multiple of 12x8 landmarks
BATCH = 4


def torchreid_models(name: str) -> tuple[nn.Module, nn.Module]:
    """Build the host's and the plugin's model through torchreid's registry."""
    torchreid = importlib.import_module("torchreid")
    importlib.import_module("csalr_plugin")
    host, plugin = (
        torchreid.models.build_model(key, IDENTITIES, loss="softmax", pretrained=False, use_gpu=False)
        for key in (name, PREFIX + name)
    )
    return host, plugin


def fastreid_models(name: str) -> tuple[nn.Module, nn.Module]:
    """Build the host's and the plugin's model through fast-reid's registry."""
    from csalr_plugin.hosts.fastreid import add_csalr_config  # also makes fast-reid importable on today's Python

    # isort: split
    from fastreid.config import get_cfg
    from fastreid.modeling.meta_arch import META_ARCH_REGISTRY

    cfg = get_cfg()
    add_csalr_config(cfg)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.HEADS.NUM_CLASSES", str(IDENTITIES)])
    cfg.merge_from_list(["MODEL.BACKBONE.PRETRAIN", "False", "MODEL.LOSSES.NAME", "('CrossEntropyLoss',)"])
    host, plugin = (META_ARCH_REGISTRY.get(key)(cfg) for key in (name.replace("_", "").upper(), name))
    return host, plugin


def randomise(network: nn.Module) -> None:
    """Give every weight and statistic a value that matters: open gates, and batch norms that are not the identity."""
    for name, value in network.state_dict().items():
        if name.endswith("alpha"):
            value.fill_(0.7)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif name.endswith(("running_mean", "bias")):
            value.uniform_(-0.1, 0.1)


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict as it is after saving and loading a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def torchreid_loss(network: nn.Module, images: Tensor, identities: Tensor) -> Tensor:
    """The loss of one training step. torchreid averages the terms of Eq. 18; the factor makes it their sum."""
    torchreid = importlib.import_module("torchreid")
    outputs = network(images)
    criterion = torchreid.losses.CrossEntropyLoss(IDENTITIES, use_gpu=False, label_smooth=False)
    if isinstance(network, PCB):  # the plugin's
        return recipe.loss_terms(network, outputs, lambda one: criterion(one, identities), 1.0).total()
    loss: Tensor = len(outputs) * torchreid.losses.DeepSupervision(criterion, outputs, identities)
    return loss


def fastreid_loss(network: nn.Module, images: Tensor, identities: Tensor) -> Tensor:
    """The loss of one training step, the sum of the losses that a meta-architecture returns."""
    from fastreid.utils.events import EventStorage

    with EventStorage():  # the accuracy is logged there
        losses: dict[str, Tensor] = network({"images": images, "targets": identities})
    return torch.stack(list(losses.values())).sum()


def gradients(network: nn.Module, host: str, images: Tensor, identities: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a training step and the gradient of each parameter."""
    torch.manual_seed(1)  # the same dropout
    network.train()
    loss = (torchreid_loss if host == "torchreid" else fastreid_loss)(network, images.clone(), identities)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: one.grad for name, one in network.named_parameters()}
    return loss.detach(), {name: torch.zeros(()) if one is None else one for name, one in found.items()}


def compare(host: str, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the differences between the model `name` of `host` and that of the plugin.

    Returns:
        "embeddings": the largest difference, of parts of unit length; "loss" and "gradients": the largest relative
        difference, of a gradient relative to the norm of the whole gradient; "tensors": number of tensors in the state
        dict; "warning": the plugin's message that the host keeps its model.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs, ours = (torchreid_models if host == "torchreid" else fastreid_models)(name)
    randomise(ours)
    state = reloaded(ours.state_dict())
    phase = {key: state.pop(key) for key in list(state) if key == "_extra_state"}  # of RPP, where the plugin keeps it
    theirs.load_state_dict(state, strict=True)
    randomise(theirs)
    ours.load_state_dict(reloaded(theirs.state_dict()) | phase, strict=True)
    theirs.to(dtype)
    ours.to(dtype)

    scale = 1.0 if host == "torchreid" else 255.0  # fast-reid normalises inside the network
    images = (scale * torch.rand(BATCH, 3, HEIGHT, WIDTH)).to(dtype)
    identities = torch.arange(BATCH) % IDENTITIES
    with torch.no_grad():
        embeddings = [network.eval()(images.clone()) for network in (theirs, ours)]
    (their_loss, their_gradients), (our_loss, our_gradients) = (
        gradients(network, host, images, identities) for network in (theirs, ours)
    )
    assert their_gradients.keys() == our_gradients.keys()
    assert not recipe.attention_blocks(theirs), "the plugin's engine takes the host's model for its own"
    norm = torch.stack([one.norm() for one in our_gradients.values()]).norm()
    return {
        "embeddings": (embeddings[0] - embeddings[1]).abs().max().item(),
        "loss": ((their_loss - our_loss) / our_loss).abs().item(),
        "gradients": max((their_gradients[name] - our_gradients[name]).norm() for name in our_gradients).item()
        / norm.item(),
        "tensors": len(state),
        "width": embeddings[0].shape[1],
        "warning": next((str(one.message) for one in caught if "csalr_plugin" in str(one.message)), ""),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host", choices=("torchreid", "fastreid"))
    parser.add_argument("model", choices=("pcb_csalr", "pcb_rpp"))
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    given = parser.parse_args()
    print(json.dumps(compare(given.host, given.model, getattr(torch, given.dtype))))
