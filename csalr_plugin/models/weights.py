"""Checkpoints and pretrained weights: reading without running code, checking every entry, loading all or nothing."""

from __future__ import annotations

import inspect
import math
import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models import ResNet50_Weights

from csalr_plugin.errors import UserError, first_line, shown

# Children that a checkpoint of the plain PCB does not have. They keep their initial weights.
NEW_LAYERS = ("attention", "supervision", "part_classifier", "_extra_state")
# Layers whose size is the number of training identities, which another data set changes.
IDENTITY_LAYERS = ("classifier", "supervision", "fc")

_NETWORK = "network_settings"  # an attribute of the model, and an entry of its state dict's metadata
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_MOST_EPOCHS = 1_000_000
_MOST_BYTES = 1_000_000_000  # of a tensor whose elements share memory


def numpy_scalar_types() -> list[Any]:
    """Return the types in a pickled NumPy scalar: torchreid saves ``rank1`` as one (its issue #592)."""
    return [
        np._core.multiarray.scalar,  # type: ignore[attr-defined]
        (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
        np.dtype,
        *(type(np.dtype(kind)) for kind in ("float16", "float32", "float64", "int32", "int64")),
    ]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint or a bare state dict, weights-only, onto the CPU.

    Raises:
        UserError: the file is missing, truncated or no checkpoint, or its pickle would run code.
    """
    file = os.path.expanduser(path)
    if not os.path.isfile(file):  # False also for a name that is too long
        raise UserError(f"Checkpoint {str(path)!r} is not a file: give the path of a checkpoint (.pth, .pth.tar-N).")
    try:
        with torch.serialization.safe_globals(numpy_scalar_types()):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error) or "GLOBAL" in str(error):
            raise UserError(
                f"Checkpoint {str(path)!r} is refused: its pickle names code that loading would run; "
                "only tensors and plain values are read. Save it again as a state dict."
            ) from error
        raise UserError(_damaged(path)) from error
    except Exception as error:  # on damaged bytes torch raises errors of any type
        raise UserError(_damaged(path)) from error
    if not isinstance(content, dict):
        raise UserError(f"Checkpoint {str(path)!r} holds a {type(content).__name__}, not a dictionary of weights.")
    return content


def _damaged(path: str | Path) -> str:
    size = os.path.getsize(os.path.expanduser(path))
    return (
        f"Checkpoint {str(path)!r} ({size:,} bytes) is truncated or not a checkpoint at all: "
        "copy it again, or take an earlier one."
    )


def state_dict_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights in a checkpoint, without the prefixes "module." and "_orig_mod." of torch's wrappers.

    torchreid keeps the weights under "state_dict", fast-reid under "model"; a bare state dict is returned as it is.
    The result carries the network settings that the state dict recorded, see `record_network_settings`.
    """
    state = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    if not isinstance(state, Mapping):
        return {}
    weights: OrderedDict[str, Tensor] = OrderedDict(
        (name.removeprefix("module.").removeprefix("_orig_mod."), value)
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    )
    if (settings := recorded_network_settings(state)) is not None:
        vars(weights)["_metadata"] = {"": {_NETWORK: settings}}
    return weights


# Network settings


def record_network_settings(model: nn.Module, settings: Mapping[str, Any]) -> list[RemovableHandle]:
    """Let every state dict of `model` carry `settings`, and let `model` refuse a state dict that carries others.

    Groups and landmarks are not visible in the shapes of the weights, and the attention not always. The settings
    travel in the metadata of the state dict, which ``torch.save`` keeps: so every way to save the weights, the
    host's own included, records them.

    Args:
        model: its ``state_dict`` and ``load_state_dict`` get a hook.
        settings: "head", "attention" and, unless that is "none", its settings; numbers, text and tuples of them.

    Returns:
        The handles of both hooks.
    """
    vars(model)[_NETWORK] = dict(settings)
    return [
        model.register_state_dict_post_hook(_record),  # type: ignore[no-untyped-call]
        model.register_load_state_dict_pre_hook(_compare),  # type: ignore[no-untyped-call]
    ]


def forget_network_settings(model: nn.Module, handles: Sequence[RemovableHandle]) -> None:
    """Undo `record_network_settings`, which returned `handles`."""
    del vars(model)[_NETWORK]
    for handle in handles:
        handle.remove()


def has_network_settings(model: nn.Module) -> bool:
    """Whether the state dicts of `model` record network settings."""
    return _NETWORK in vars(model)


def _record(model: nn.Module, _state: Any, _prefix: str, metadata: dict[str, Any]) -> None:
    metadata[_NETWORK] = dict(vars(model)[_NETWORK])


def _compare(model: nn.Module, _state: Any, _prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
    check_network_settings(model, metadata.get(_NETWORK), "The state dict")


def recorded_network_settings(state: Mapping[str, Any]) -> Any:
    """Return the network settings in the metadata of a state dict, or None."""
    metadata = getattr(state, "_metadata", None)
    entries = metadata.values() if isinstance(metadata, Mapping) else ()
    found = (entry[_NETWORK] for entry in entries if isinstance(entry, Mapping) and _NETWORK in entry)
    return next(found, None)


def check_network_settings(model: nn.Module, recorded: Any, source: str) -> None:
    """Check that weights were trained with the settings of `model`.

    A checkpoint without attention fits a model with attention, whose blocks are then new.

    Args:
        model: one with or without network settings.
        recorded: those of the checkpoint, None if it has none.
        source: the checkpoint's name, for the message.

    Raises:
        UserError: the settings differ, or are no settings.
    """
    ours = vars(model).get(_NETWORK)
    if recorded is None or ours is None:
        return
    if not isinstance(recorded, Mapping):
        raise UserError(f"{source} is damaged: its network settings are {shown(recorded)}, not a dictionary.")
    if "none" in (recorded.get("attention"), ours["attention"]):
        return
    names = ["attention"] if recorded.get("attention") != ours["attention"] else list(ours)
    wrong = [name for name in names if name != "head" and _as_list(recorded.get(name)) != _as_list(ours[name])]
    if wrong:
        theirs, mine = (
            ", ".join(f"{name} {_spelt(settings.get(name))}" for name in wrong) for settings in (recorded, ours)
        )
        raise UserError(
            f"{source} was trained with {theirs}, and this network has {mine}: give the model name and the csalr "
            "settings that it was trained with."
        )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _spelt(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else shown(value).strip("'")


# Checks of a checkpoint's entries


def check_tensors(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str | Path) -> None:
    """Check the type and the values of those tensors that a model has use for; shapes are not compared.

    Args:
        given: weights from a checkpoint.
        wanted: the model's state dict.
        path: the checkpoint, for the message.

    Raises:
        UserError: a tensor is sparse, quantised, nested or without data, its dtype is of another kind, it is not
            finite, or a running variance is negative; the message names the tensor.
    """
    for name, value in given.items():
        if name in wanted and (fault := _fault(value, wanted[name].dtype, name.endswith("running_var"))):
            _refuse(path, name, fault)


def check_epoch(checkpoint: Mapping[str, Any], path: str | Path) -> int:
    """Return the number of epochs that a checkpoint has done.

    Raises:
        UserError: it is missing, or no integer of at least 0.
    """
    if "epoch" not in checkpoint:
        raise UserError(
            f"Checkpoint {str(path)!r} says no epoch, so no training can be resumed from it; start anew from its "
            "weights, with model.load_weights (in fast-reid MODEL.WEIGHTS)."
        )
    epoch = checkpoint["epoch"]
    if not isinstance(epoch, Integral) or isinstance(epoch, bool) or not 0 <= int(epoch) <= _MOST_EPOCHS:
        _refuse(path, "epoch", f"is {shown(epoch)}, not an integer of at least 0")
    return int(epoch)


def check_optimizer_state(
    optimizer: torch.optim.Optimizer, saved: Any, path: str | Path, entry: str = "optimizer"
) -> None:
    """Check that ``optimizer.load_state_dict(saved)`` works, and that the next step does.

    Args:
        optimizer: for the model that the checkpoint is of.
        saved: the state from the checkpoint.
        path: the checkpoint, for the message.
        entry: the name of the state in the checkpoint, for the message.

    Raises:
        UserError: the state is no optimizer's, or of another optimizer or other parameters; a tensor has the wrong
            type or shape or is not finite; a hyperparameter is no finite number. The message names the entry.
    """
    groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    state = saved.get("state") if isinstance(saved, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        _refuse(path, entry, f"is {shown(saved)}, not the state of an optimizer")
    ours = optimizer.param_groups
    for number, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            _refuse(path, f"{entry}.param_groups[{number}]", f"is {shown(group)}, not a parameter group")
    sizes, wanted = ([len(group["params"]) for group in one] for one in (groups, ours))
    if sizes != wanted:
        _refuse(path, entry, f"has parameter groups of {shown(sizes)} tensors, and this training's has {shown(wanted)}")
    for number, group in enumerate(groups):
        fresh = {key: _as_float(one) for key, one in ours[number].items() if key not in ("params", "param_names")}
        check_values(group, fresh, path, f"{entry}.param_groups[{number}]")
        if group.get("lr", 0) < 0:
            _refuse(path, f"{entry}.param_groups[{number}].lr", f"is {group['lr']}, less than 0")
    parameters = dict(
        zip(
            (index for group in groups for index in group["params"]),
            (parameter for group in ours for parameter in group["params"]),
            strict=True,
        )
    )
    needed = _state_names(optimizer)
    for index, values in state.items():
        name = f"{entry}.state[{shown(index)}]"
        if index not in parameters:
            _refuse(path, name, "belongs to no parameter")
        if not isinstance(values, Mapping) or not needed <= set(values):
            _refuse(path, name, f"is {shown(values)}, not the state of {type(optimizer).__name__}")
        for key, value in values.items():
            _check_state(parameters[index], value, key, path, f"{name}.{key}")


def _check_state(parameter: Tensor, value: Any, key: Any, path: str | Path, name: str) -> None:
    """Check one value of an optimizer's state for `parameter`: a tensor of its shape, or a number."""
    not_negative = key in ("step", "exp_avg_sq", "max_exp_avg_sq", "square_avg")
    if isinstance(value, Tensor):
        if fault := _fault(value, torch.float32, not_negative):
            _refuse(path, name, fault)
        if value.shape != parameter.shape and value.numel() != 1:
            _refuse(path, name, f"has shape {shown(tuple(value.shape))}, and the parameter {tuple(parameter.shape)}")
    elif value is not None and (not _is_number(value) or (not_negative and value < 0)):
        _refuse(path, name, f"is {shown(value)}, not a tensor or a number")


def _state_names(optimizer: torch.optim.Optimizer) -> set[str]:
    """Return the names of the values that `optimizer` keeps for each parameter."""
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.zeros(1)
    accepted = inspect.signature(type(optimizer)).parameters
    twin = type(optimizer)(
        [parameter], **{key: optimizer.defaults[key] for key in optimizer.defaults if key in accepted}
    )
    twin.step()
    return set(twin.state[parameter])


def check_values(saved: Any, fresh: Any, path: str | Path, entry: str, *, complete: bool = False) -> None:
    """Check that values from a checkpoint, such as a scheduler's state, can take the place of an object's own.

    Args:
        saved: from the checkpoint: a number, text, or lists and dictionaries of these.
        fresh: the object's own values, for example ``scheduler.state_dict()``; None may become anything.
        path: the checkpoint, for the message.
        entry: the name of the values in the checkpoint, for the message.
        complete: every key of `fresh` must be in `saved`.

    Raises:
        UserError: a value has another type or another number of items, or is not finite; the message names it.
    """
    if isinstance(fresh, Mapping):
        if not isinstance(saved, Mapping):
            _refuse(path, entry, f"is {shown(saved)}, not a dictionary")
        for key, value in fresh.items():
            if key in saved:
                check_values(saved[key], value, path, f"{entry}.{key}", complete=complete)
            elif complete:
                _refuse(path, entry, f"has no {shown(key)}")
    elif isinstance(fresh, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(fresh):
            _refuse(path, entry, f"is {shown(saved)}, not a list of {len(fresh)}")
        for number, (one, value) in enumerate(zip(saved, fresh, strict=True)):
            check_values(one, _as_float(value), path, f"{entry}[{number}]", complete=complete)
    elif isinstance(fresh, (bool, str)):
        if type(saved) is not type(fresh):
            _refuse(path, entry, f"is {shown(saved)}, not such as {shown(fresh)}")
    elif isinstance(fresh, int) and not (_is_number(saved) and float(saved).is_integer()):
        _refuse(path, entry, f"is {shown(saved)}, not an integer")
    elif isinstance(fresh, float) and not _is_number(saved):
        _refuse(path, entry, f"is {shown(saved)}, not a number")


def _as_float(value: Any) -> Any:
    """Return an integer as a float: a momentum of 0 may become 0.9."""
    return float(value) if type(value) is int else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _fault(value: Tensor, wanted: torch.dtype, not_negative: bool = False) -> str:
    """Describe why `value` cannot be a tensor of dtype `wanted`; empty if it can."""
    if value.is_nested:
        return "is a nested tensor"
    if value.layout is not torch.strided:
        return f"is a sparse tensor ({value.layout})"
    if value.is_quantized:
        return "is a quantised tensor"
    if value.is_meta:
        return "is a meta tensor, which has no data"
    size = value.numel() * value.element_size()
    if size > _MOST_BYTES and size > value.untyped_storage().nbytes():
        return f"has shape {shown(tuple(value.shape))}, and the file holds fewer numbers"
    # Counters that a tool has cast to floats, together with all weights, do no harm.
    allowed = _FLOATS if wanted in _FLOATS else (*_INTEGERS, *_FLOATS) if wanted in _INTEGERS else (wanted,)
    if value.dtype not in allowed:
        return f"is of dtype {value.dtype}, not of {wanted}"
    if value.dtype in _FLOATS and not bool(torch.isfinite(value).all()):
        return "is not finite: it holds NaN or infinity"
    if not_negative and bool((value < 0).any()):
        return "holds negative numbers"
    return ""


def _refuse(path: str | Path, name: str, fault: str) -> NoReturn:
    raise UserError(f"Checkpoint {str(path)!r} cannot be used: {shown(name)} {fault}. Take an earlier checkpoint.")


# Loading


@dataclass(frozen=True)
class LoadReport:
    """The result of loading a checkpoint: names of the tensors that were loaded, and that kept their initial values.

    Attributes:
        loaded, left: the names.
        unknown_settings: whether the checkpoint does not record the network settings of a model that has them.
    """

    loaded: tuple[str, ...]
    left: tuple[str, ...]
    unknown_settings: bool = False

    def __str__(self) -> str:
        children = sorted({name.split(".")[0] for name in self.left})
        kept = f"; not in it and left as initialised: {', '.join(children)}" if children else ""
        unknown = "; it does not record its groups and landmarks, which are taken to be those given now"
        total = len(self.loaded) + len(self.left)
        return f"loaded {len(self.loaded)} of {total} tensors{kept}{unknown if self.unknown_settings else ''}"


def load_weights(model: nn.Module, path: str | Path) -> LoadReport:
    """Load a checkpoint into `model` by name: all of it, or raise a UserError and change nothing.

    Two kinds of layers may be missing: those that a checkpoint of the plain PCB cannot have (attention, supervision,
    part classifier), and classifiers of another number of identities. They keep their initial weights.

    Raises:
        UserError: also for a checkpoint of another architecture or other network settings, or with tensors that no
            model can have; the message says how many layers and which.
    """
    return load_state(model, state_dict_of(read_checkpoint(path)), path)


def load_state(model: nn.Module, given: Mapping[str, Tensor], path: str | Path) -> LoadReport:
    """Load the weights `given`, read from `path` and returned by `state_dict_of`, as `load_weights` does.

    Raises:
        UserError: as `load_weights`.
    """
    wanted = model.state_dict()
    check_network_settings(model, recorded_network_settings(given), f"Checkpoint {str(path)!r}")
    check_tensors(given, wanted, path)
    fits = {name: value for name, value in given.items() if name in wanted and value.shape == wanted[name].shape}
    given_children, wanted_children = ({name.split(".")[0] for name in names} for names in (given, wanted))

    def may_stay(name: str) -> bool:
        child = name.split(".")[0]
        if child in IDENTITY_LAYERS and name in given:
            return given[name].shape[1:] == wanted[name].shape[1:]  # another number of identities
        return (child in NEW_LAYERS and child not in given_children) or name.endswith("num_batches_tracked")

    left = [name for name in wanted if name not in fits]
    wrong = [name for name in left if not may_stay(name)]
    heads = set(IDENTITY_LAYERS) - wanted_children  # a classifier that the model has no use for
    unknown = [name for name in given if name not in wanted and name.split(".")[0] not in heads]
    if wrong or unknown:
        examples = ", ".join(shown(name).strip("'") for name in [*wrong, *unknown][:4])
        raise UserError(
            f"Checkpoint {str(path)!r} is of another architecture: {len(wrong)} of the model's "
            f"{len(wanted)} tensors are missing or of another shape, {len(unknown)} of the checkpoint's "
            f"{len(given)} are unknown to it ({examples}, ...). Name the model that it was trained with."
        )
    model.load_state_dict(fits, strict=False)
    trained_attention = any(name.split(".")[0] == "attention" for name in fits)
    return LoadReport(
        tuple(fits),
        tuple(left),
        unknown_settings=trained_attention and has_network_settings(model) and recorded_network_settings(given) is None,
    )


def load_exactly(model: nn.Module, given: Mapping[str, Tensor], path: str | Path) -> None:
    """Load the weights `given`, read from `path` and returned by `state_dict_of`, to resume a training.

    Raises:
        UserError: they are not exactly the tensors of `model`, were trained with other network settings, or hold
            tensors that no model can have.
    """
    wanted = model.state_dict()
    check_network_settings(model, recorded_network_settings(given), f"Checkpoint {str(path)!r}")
    check_tensors(given, wanted, path)
    if wrong := mismatches(model, given):
        examples = ", ".join(shown(name).strip("'") for name in wrong[:3])
        raise UserError(
            f"Checkpoint {str(path)!r} is no checkpoint of this training: {len(wrong)} tensors do not match "
            f"({examples}, ...). Give the model name, the csalr settings and the data set that it was trained with, or "
            "start anew from its weights, with model.load_weights (in fast-reid MODEL.WEIGHTS)."
        )
    model.load_state_dict(given)


def mismatches(model: nn.Module, given: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that are not in both `model` and `given` with the same shape."""
    wanted = model.state_dict()
    wrong = [name for name in wanted if name not in given or given[name].shape != wanted[name].shape]
    return wrong + [name for name in given if name not in wanted]


def load_backbone(model: nn.Module, path: str = "") -> None:
    """Load ImageNet weights into a model's ResNet-50, torchvision's or a file's.

    Args:
        model: a model with torchvision's names for the layers of a ResNet-50.
        path: a state dict of torchvision's ResNet-50, its classifier `fc` not needed; empty means
            torchvision's ``ResNet50_Weights.IMAGENET1K_V1``, downloaded once into torch's hub folder.

    Raises:
        UserError: the weights cannot be downloaded or read, or lack layers of a ResNet-50.
    """
    if path:
        state, source = state_dict_of(read_checkpoint(path)), repr(path)
    else:
        state, source = dict(_download(ResNet50_Weights.IMAGENET1K_V1)), "torchvision's weights"
    layers = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    wanted = {name: value for name, value in model.state_dict().items() if name.split(".")[0] in layers}
    _load_backbone(model, state, wanted, path or source, f"{source} is not a ResNet-50 of torchvision")


def load_pretrained(model: nn.Module, path: str) -> None:
    """Load ImageNet weights from a file into a model of a host, except the classifiers of other identities.

    Args:
        model: any model, before attention is attached.
        path: a checkpoint with the names of the model's layers.

    Raises:
        UserError: the file cannot be read, or lacks layers of the model.
    """
    state = state_dict_of(read_checkpoint(path))
    wanted = {
        name: value
        for name, value in model.state_dict().items()
        if name.split(".")[0] not in IDENTITY_LAYERS or (name in state and state[name].shape == value.shape)
    }
    _load_backbone(model, state, wanted, path, f"{path!r} has no weights of this {type(model).__name__}")


def _load_backbone(
    model: nn.Module, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str, mismatch: str
) -> None:
    """Load the tensors named in `wanted`, all of them or, with an error, none."""
    wanted = {name: value for name, value in wanted.items() if not name.endswith("num_batches_tracked")}
    check_tensors(state, wanted, path)
    wrong = [name for name, value in wanted.items() if name not in state or state[name].shape != value.shape]
    if wrong:
        raise UserError(
            f"csalr.pretrained_weights {mismatch}: {len(wrong)} of its {len(wanted)} tensors are missing or of "
            f"another shape ({', '.join(wrong[:3])}, ...)."
        )
    model.load_state_dict({name: state[name] for name in wanted}, strict=False)


def _download(weights: ResNet50_Weights) -> Mapping[str, Tensor]:
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        reason = first_line(getattr(error, "reason", error))
        raise UserError(
            f"ImageNet weights cannot be downloaded ({reason}): put {weights.url} at {str(place)!r}, or give the "
            "path of a torchvision ResNet-50 state dict as csalr.pretrained_weights, or start from random "
            "weights with model.pretrained False."
        ) from error
