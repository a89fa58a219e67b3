"""attach and detach: SA, CSA or CSALR after layers of any convolutional network.

The blocks are in the new child `attention` of the network, their supervision branches in the new child `supervision`.
Forward hooks on the named layers call them, so no existing weight changes its name. Each hook is a function of this
module, and its state is an attribute of the layer: copies, pickles and replicas of the network keep their own blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from csalr_plugin.attention import AttentionBlock, build_attention
from csalr_plugin.errors import UserError, first_line, shown, suggest
from csalr_plugin.models.pcb import Supervision
from csalr_plugin.models.weights import forget_network_settings, record_network_settings

Network = TypeVar("Network", bound=nn.Module)

_ATTACHMENT = "csalr_attachment"  # an attribute of an attended network
_SITE = "csalr_site"  # an attribute of a layer with a block after it
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_MOST_NAMES = 30  # in a message


def attach(
    network: Network,
    attention: str = "csalr",
    after: str | Sequence[str] = (),
    *,
    num_classes: int | None = None,
    groups: int = 2,
    landmarks: tuple[int, int] = (12, 8),
    key_ratio: float = 0.25,
    example: Tensor | None = None,
) -> Network:
    """Insert attention blocks after layers of a network, in place.

    The blocks are ``network.attention[name]``, where the name is that of the layer with "_" for ".". New gates are 0,
    so the output in eval mode stays the same. One forward pass in eval mode finds the channels of each layer.

    Args:
        network: any module. A layer's output is its feature map (B, C, H, W), or a tuple that starts with it.
        attention: "sa", "csa" or "csalr".
        after: names of layers, for example ("layer1", "layer2"); a dotted name such as "features.3" reaches inside.
            If the network calls the members of an ``nn.Sequential`` itself, the block follows the last member.
        num_classes: number of training identities. With it, each block gets a branch of deep supervision (Eq. 18).
            In training mode the network then returns its logits as a list that ends with the branches' logits, each
            (B, num_classes); `csalr_plugin.models.recipe` computes the loss. Of an output (logits, features), the
            first item becomes that list. None builds no branches, and the output in training mode keeps its form.
        groups, landmarks: see `csalr_plugin.attention.build_attention`. A map with fewer rows than H' or fewer columns
            than W' has one landmark for each row or column.
        key_ratio: C'/C; C' is rounded to a multiple of `groups`.
        example: input of the forward pass that finds the channels; by default zeros (1, 3, 256, 128).

    Returns:
        `network`.

    Raises:
        UserError: the network already has attention or cannot be attended, a layer does not exist, does not run once
            in a forward pass or has no feature map as its output, or a block refuses its settings. The network is
            then unchanged.
    """
    _check_network(network)
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise UserError(f"num_classes {shown(num_classes)} must be a positive integer, or None for no supervision.")
    if not isinstance(after, (str, Sequence)):
        raise UserError(f"after {shown(after)} must be names of layers, such as ('layer1', 'layer2').")
    names = [after] if isinstance(after, str) else list(after)
    paths = _find_layers(network, names, example)
    blocks, branches, keys = nn.ModuleDict(), nn.ModuleDict(), {}
    for name, (path, channels) in zip(names, paths, strict=True):
        key = _key(name, blocks)
        keys[key] = path
        blocks[key] = _build(attention, name, channels, groups, landmarks, key_ratio)
        if num_classes is not None:
            branches[key] = Supervision(channels, num_classes)
    weight = next(network.parameters())
    for name, modules in (("attention", blocks), ("supervision", branches)):
        if modules:
            dtype = weight.dtype if weight.is_floating_point() else None
            added = _Container(dict(modules.items())).to(weight.device, dtype).train(network.training)
            network.add_module(name, added)
    settings: dict[str, Any] = {"attention": attention, "after": tuple(names), "key_ratio": float(key_ratio)}
    if attention != "sa":
        settings |= {"groups": groups, "landmarks": tuple(landmarks)}
    handles = record_network_settings(network, settings)
    handles.append(network.register_forward_pre_hook(_start_forward))
    handles.append(network.register_forward_hook(_end_forward))
    for key, path in keys.items():
        layer = network.get_submodule(path)
        setattr(layer, _SITE, _site_of(network, key))
        handles.append(layer.register_forward_hook(_attend, prepend=True))
    setattr(network, _ATTACHMENT, _Attachment(keys, handles))
    return network


def detach(network: Network) -> Network:
    """Remove the blocks, branches and hooks that `attach` has added, in place.

    Returns:
        `network`.

    Raises:
        UserError: `attach` has added nothing to it.
    """
    if not is_attended(network):
        raise UserError(f"{type(network).__name__} has no attention that csalr_plugin.attach has added.")
    attachment: _Attachment = vars(network).pop(_ATTACHMENT)
    forget_network_settings(network, attachment.handles)
    layers = dict(network.named_modules())
    for path in attachment.layers.values():
        if hasattr(layers.get(path), _SITE):  # or the layer was replaced or removed since
            delattr(layers[path], _SITE)
    del network.attention
    if hasattr(network, "supervision"):
        del network.supervision
    return network


def is_attended(network: nn.Module) -> bool:
    """Return whether `attach` has added attention to `network`."""
    return _ATTACHMENT in vars(network)


def take_branch_logits(network: nn.Module) -> dict[str, Tensor]:
    """Return the logits of the supervision branches in the forward pass that is running, by the name of their block.

    A network that computes its own losses calls this in its forward pass; its output then stays as it is.

    Returns:
        (B, num_classes) each. Empty in eval mode, without branches, and on a second call.
    """
    attachment: _Attachment = getattr(network, _ATTACHMENT)
    logits: dict[str, Tensor] = {}
    for key, path in attachment.layers.items():
        site: _Site = getattr(network.get_submodule(path), _SITE)
        if site.logits is not None:
            logits[key] = site.logits
            site.logits = None
    return logits


class _Container(nn.ModuleDict):
    """Blocks or branches by name. As a layer it is the identity: some networks call all of their children in turn."""

    def forward(self, x: Any) -> Any:
        return x


class _Attachment:
    """The state of an attended network: the path of each block's layer, and the handles of all hooks."""

    def __init__(self, layers: dict[str, str], handles: list[Any]) -> None:
        self.layers, self.handles = layers, handles


class _Site:
    """The state of a layer with a block after it.

    Attributes:
        block, branch: references to children of the network, which registers them.
        trains: the last forward pass of the network was in training mode. It stays set for layers that run again in
            the backward pass.
        ran: the block has run in that forward pass.
        logits: the branch's logits of the running forward pass.
    """

    def __init__(self, block: AttentionBlock, branch: Supervision | None) -> None:
        self.block, self.branch = block, branch
        self.trains = self.ran = False
        self.logits: Tensor | None = None


def _site_of(network: Any, key: str) -> _Site:
    return _Site(network.attention[key], network.supervision[key] if "supervision" in network._modules else None)


def _start_forward(network: Any, _: Any) -> None:
    """Prepare the layers for a forward pass of the network."""
    branches = network.supervision if "supervision" in network._modules else None
    attachment: _Attachment = getattr(network, _ATTACHMENT)
    for key, path in attachment.layers.items():
        layer = network.get_submodule(path)
        site = getattr(layer, _SITE, None)
        if site is None:
            raise UserError(f"layer {path!r} was replaced after attach: detach the network, then attach again.")
        # A replica of DataParallel has blocks of its own, and a user may replace a block.
        if site.block is not network.attention[key] or (branches is not None and site.branch is not branches[key]):
            site = _site_of(network, key)
            setattr(layer, _SITE, site)
        if network.training or site.trains:  # no side effects in an exported program
            site.trains, site.ran, site.logits = network.training, False, None


def _attend(layer: nn.Module, _: Any, output: Any) -> Any:
    """Apply the block to a layer's output."""
    site: _Site = getattr(layer, _SITE)
    x = output if isinstance(output, Tensor) else output[0]
    if site.trains:
        site.ran = True
    if site.trains and site.branch is not None:
        x, pooled = site.block.supervised(x)
        site.logits = site.branch(pooled)
    else:
        x = site.block(x)
    if isinstance(output, Tensor):
        return x
    return (x, *output[1:]) if isinstance(output, tuple) else [x, *output[1:]]


def _end_forward(network: Any, _: Any, output: Any) -> Any:
    """Append the branches' logits to the output in training mode."""
    if network.training:
        _require_all_blocks(network)
    branches = list(take_branch_logits(network).values())
    if not branches:
        return output
    if isinstance(output, Tensor):
        return [output, *branches]
    # torchreid's networks have the attribute `loss`; with "softmax" a tuple holds the logits of several classifiers.
    if isinstance(output, list) or (isinstance(output, tuple) and getattr(network, "loss", None) == "softmax"):
        return [*output, *branches]
    if isinstance(output, tuple):
        logits, *rest = output
        return ([logits, *branches] if isinstance(logits, Tensor) else [*logits, *branches], *rest)
    raise UserError(
        f"{type(network).__name__} returns a {type(output).__name__} in training mode, to which no logits can be "
        "appended: call csalr_plugin.models.attach.take_branch_logits in its forward, or attach without num_classes."
    )


def _require_all_blocks(network: nn.Module) -> None:
    """Check that every block has run in this forward pass; the forward pass at `attach` was in eval mode."""
    for path in getattr(network, _ATTACHMENT).layers.values():
        if not getattr(network.get_submodule(path), _SITE).ran:
            raise UserError(
                f"the block after layer {path!r} did not run in training mode, where {type(network).__name__} does not "
                "call that layer, as with gradient checkpointing; attach after another layer, such as its last member."
            )


def _check_network(network: object) -> None:
    kind = type(network).__name__
    if not isinstance(network, nn.Module):
        raise UserError(f"attach takes a torch.nn.Module, not {shown(network)}.")
    if isinstance(network, _WRAPPERS) or hasattr(network, "_orig_mod"):  # the attribute of torch.compile's wrapper
        raise UserError(f"{kind} wraps a network: attach the network first, then wrap it.")
    if isinstance(network, torch.jit.ScriptModule):
        raise UserError(f"{kind} is compiled by torch.jit: attach the network first, then script or trace it.")
    if is_attended(network):
        raise UserError(f"{kind} has attention already: detach it first with csalr_plugin.detach.")
    for name in ("attention", "supervision"):
        if hasattr(network, name):
            raise UserError(f"{kind} has an attribute {name!r} of its own, a name that attach needs; rename it.")
    if next(network.parameters(), None) is None:
        raise UserError(f"{kind} has no weights, so there is nothing to attach attention to.")


def _find_layers(network: nn.Module, names: Sequence[str], example: Tensor | None) -> list[tuple[str, int]]:
    """Return for each name the path of the layer that the block follows, and its number of channels.

    Raises:
        UserError: see `attach`.
    """
    if not names:
        raise UserError(f"after is empty: give layers of {type(network).__name__}: {_listed(network)}.")
    candidates = [_candidates(network, name) for name in names]
    if example is None:
        weight = next(network.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        example = torch.zeros(1, 3, 256, 128, device=weight.device, dtype=dtype)
    outputs = _outputs(network, {path for paths in candidates for path in paths}, example)
    found: dict[str, int] = {}
    for name, paths in zip(names, candidates, strict=True):
        path = next((one for one in paths if outputs[one]), paths[0])
        if path in found:
            raise UserError(f"after names the layer {path!r} twice; name it once.")
        if hasattr(network.get_submodule(path), _SITE):
            raise UserError(f"layer {path!r} has a block already, of another network that it is part of.")
        found[path] = _channels(name, outputs[path], example.shape)
    return list(found.items())


def _candidates(network: nn.Module, name: str) -> list[str]:
    """Return the path `name`, and for a sequence of layers also those of its last members.

    Raises:
        UserError: there is no such layer.
    """
    inside, parent = network, ""
    for part in name.split(".") if isinstance(name, str) else [shown(name)]:
        child = inside._modules.get(part)
        if child is None:
            of = f"{parent!r} of {type(network).__name__}" if parent else type(network).__name__
            near = suggest(str(name), dict.fromkeys([*inside._modules, *(path for path, _ in network.named_modules())]))
            raise UserError(f"after: {of} has no layer {shown(part)}; its layers are {_listed(inside)}.{near}")
        inside, parent = child, f"{parent}.{part}".lstrip(".")
    paths = [name]
    while isinstance(inside, (nn.Sequential, nn.ModuleList)) and len(inside):
        paths.append(f"{paths[-1]}.{list(inside._modules)[-1]}")
        inside = inside[-1]
    return paths


def _listed(module: nn.Module) -> str:
    names = [name for name, child in module.named_children()]
    return ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "") or "none"


@torch.no_grad()
def _outputs(network: nn.Module, paths: set[str], example: Tensor) -> dict[str, list[Any]]:
    """Return the outputs of the layers `paths` in a forward pass in eval mode: one for each call."""
    outputs: dict[str, list[Any]] = {path: [] for path in paths}
    modes = [(module, module.training) for module in network.modules()]
    handles = []
    for path in paths:

        def record(_: nn.Module, __: Any, output: Any, path: str = path) -> None:
            outputs[path].append(_summary(output))

        handles.append(network.get_submodule(path).register_forward_hook(record))
    network.eval()
    try:
        network(example.clone())
    except Exception as error:  # of any kind: the network is the user's
        raise UserError(
            f"{type(network).__name__} cannot take an input of {tuple(example.shape)} ({first_line(error)}): give one "
            "that it can take as `example`."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return outputs


def _summary(output: Any) -> tuple[int, ...] | str:
    """Return the shape of a layer's output, or else its type."""
    if type(output) in (tuple, list) and output:
        output = output[0]
    return tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__


def _channels(name: str, outputs: Sequence[Any], image: Sequence[int]) -> int:
    """Return the channels of a layer's output; `image` is the shape of the network's input."""
    if not outputs:
        raise UserError(f"after: layer {name!r} does not run in a forward pass in eval mode; give another layer.")
    if len(outputs) > 1:
        raise UserError(f"after: layer {name!r} runs {len(outputs)} times in a forward pass; give one that runs once.")
    (shape,) = outputs
    is_map = isinstance(shape, tuple) and len(shape) == 4 and shape[2] * shape[3] > 1
    if not is_map or _is_channels_last(shape, image):
        has = f"the shape {shape}" if isinstance(shape, tuple) else f"the type {shape}"
        raise UserError(
            f"after: the output of layer {name!r} has {has}, and attention needs a feature map (B, C, H, W) of several "
            "positions; give an earlier layer."
        )
    return int(shape[1])


def _is_channels_last(shape: Sequence[int], image: Sequence[int]) -> bool:
    """Return whether a shape is (B, H, W, C), as in Swin: dimensions 1 and 2 then have the proportions of the image."""
    if len(image) != 4:
        return False
    _, first, second, third = shape
    proportion = image[2] / image[3]
    wrong = second / third / proportion
    return first / second == proportion and not 2 / 3 < wrong < 3 / 2


def _key(name: str, blocks: Mapping[str, nn.Module] | nn.ModuleDict) -> str:
    """Return the name of a block: that of its layer, as a name that ``nn.ModuleDict`` accepts."""
    key = name.replace(".", "_")
    while hasattr(nn.ModuleDict, key) or key in blocks:
        key += "_"
    return key


def _build(
    attention: str, name: str, channels: int, groups: int, landmarks: tuple[int, int], key_ratio: float
) -> AttentionBlock:
    """Build the block of a layer; the number of key channels is rounded to a multiple of `groups`."""
    valid = isinstance(key_ratio, (int, float)) and 0 < key_ratio <= 1 and type(groups) is int and groups > 0
    if valid and channels % groups == 0 and attention != "sa":
        key_ratio = groups * max(1, round(channels * key_ratio / groups)) / channels
    try:
        return build_attention(attention, channels, groups=groups, landmarks=landmarks, key_ratio=key_ratio)
    except UserError as error:
        raise UserError(f"attention after layer {name!r}: {error}") from None
