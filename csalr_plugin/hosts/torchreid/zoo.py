"""torchreid's own models with attention: any name of its registry, followed by _sa, _csa or _csalr."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from csalr_plugin.errors import UserError
from csalr_plugin.hosts import plugin_model
from csalr_plugin.models import ATTENTIONS, split_attention

_STAGES = ("layer1", "layer2", "layer3")
# Layers with a block after them, by the host's module of the model: its stages with maps of about 1/4, 1/8 and 1/16 of
# the image. Stages with an odd number of channels are left out, which two groups would not divide.
_LAYERS: dict[str, tuple[str, ...]] = {
    "densenet": ("features.denseblock1", "features.denseblock2", "features.denseblock3"),
    "hacnn": ("inception1", "inception2", "inception3"),
    "inceptionresnetv2": ("conv2d_4a", "repeat", "repeat_1"),
    "inceptionv4": ("features.4", "features.9", "features.17"),
    "mlfn": ("feature.2", "feature.6", "feature.12"),
    "mobilenetv2": ("conv4", "conv6", "conv7"),
    "mudeep": ("block3", "block5"),
    "nasnet": ("cell_stem_0", "cell_3", "cell_9"),
    "osnet": ("conv2", "conv3", "conv4"),
    "osnet_ain": ("conv2", "conv3", "conv4"),
    "pcb": _STAGES,
    "resnet": _STAGES,
    "resnet_ibn_a": _STAGES,
    "resnet_ibn_b": _STAGES,
    "resnetmid": _STAGES,
    "senet": _STAGES,
    "shufflenet": ("stage2", "stage3"),
    "shufflenetv2": ("stage2", "stage3"),
    "xception": ("block1", "block2", "block11"),
}
_LAYERS_BY_NAME = {
    "squeezenet1_0": ("features.5", "features.10", "features.12"),
    "squeezenet1_0_fc512": ("features.5", "features.10", "features.12"),
    "squeezenet1_1": ("features.4", "features.7", "features.12"),
}
FIXED_SIZES = {"hacnn": (160, 64), "mudeep": (256, 128)}
"""Models of the host that accept one image size only: height and width."""


def host_names(registry: Mapping[str, Any]) -> list[str]:
    """Return the names in torchreid's registry that may be followed by _sa, _csa or _csalr."""
    return [name for name in registry if plugin_model(registry, name) is None and not split_attention(name)[1]]


def entries(registry: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return a builder for each name in `registry` followed by _sa, _csa or _csalr."""
    return {
        f"{name}_{attention}": _entry(registry, name, attention)
        for name in host_names(registry)
        for attention in ATTENTIONS
    }


def default_layers(registry: Mapping[str, Callable[..., Any]], name: str) -> tuple[str, ...]:
    """Return the layers of a host's model that blocks follow by default; empty for a model of an unknown family."""
    module = getattr(registry[name], "__module__", "")
    if not module.startswith("torchreid."):
        return ()
    return _LAYERS_BY_NAME.get(name) or _LAYERS.get(module.rpartition(".")[2], ())


def _entry(registry: Mapping[str, Callable[..., Any]], name: str, attention: str) -> Callable[..., Any]:
    def build(num_classes: int, loss: str = "softmax", pretrained: bool = True, **options: Any) -> Any:
        import torch

        from csalr_plugin.hosts.torchreid.config import active_config
        from csalr_plugin.models.attach import attach
        from csalr_plugin.models.weights import load_pretrained

        settings = active_config().csalr
        layers = tuple(settings.after) or default_layers(registry, name)
        if not layers:
            raise UserError(
                f"model.name '{name}_{attention}': csalr_plugin does not know the layers of {name}; name the layers "
                "that a block follows with csalr.after, such as csalr.after layer1,layer2,layer3."
            )
        file = settings.pretrained_weights if pretrained else ""
        network = registry[name](num_classes=num_classes, loss=loss, pretrained=pretrained and not file, **options)
        if file:
            load_pretrained(network, file)
        weight = next(network.parameters())
        return attach(
            network,
            attention,
            layers,
            num_classes=num_classes if settings.supervision_weight else None,
            groups=settings.groups,
            landmarks=settings.landmarks,
            key_ratio=settings.key_ratio,
            example=torch.zeros(1, 3, *FIXED_SIZES.get(name, (256, 128)), device=weight.device),
        )

    return build


def costs(height: int, width: int, num_classes: int) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Yield a row for each model of torchreid with CSALR: name, layers, image, parameters, GMACs and embedding.

    Args:
        height, width: size of the images; a model with a fixed size keeps it.
        num_classes: number of training identities.
    """
    import torch
    from tqdm import tqdm

    from csalr_plugin.hosts.torchreid import model_registry
    from csalr_plugin.models.cost import count_gmacs, count_parameters

    registry = model_registry()
    for name in tqdm(host_names(registry), desc="counting", unit="model", leave=False):
        if not (layers := default_layers(registry, name)):
            continue
        size = FIXED_SIZES.get(name, (height, width))
        # On "meta" nothing is computed. HACNN computes a value while it is built.
        with torch.device("cpu" if name == "hacnn" else "meta"):
            model = registry[f"{name}_csalr"](num_classes=num_classes, loss="softmax", pretrained=False, use_gpu=False)
            embedding = model.eval()(torch.zeros(1, 3, *size)).shape[1]
        costs = f"{count_parameters(model) / 1e6:.2f}", f"{count_gmacs(model, *size):.2f}", str(embedding)
        yield (f"{name}_csalr", ",".join(layers), "x".join(map(str, size)), *costs)
