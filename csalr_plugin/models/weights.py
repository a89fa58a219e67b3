"""Weights from files and from torchvision: read as data, never as code, and never in part without a word."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights

from csalr_plugin.errors import UserError

# Children that a checkpoint of the plain PCB does not have; they stay as they were initialised.
NEW_LAYERS = ("attention", "supervision", "part_classifier", "_extra_state")
# Layers that belong to the training identities; another data set has another number of them.
IDENTITY_LAYERS = ("classifier", "supervision", "fc")


def numpy_scalar_types() -> list[Any]:
    """What a pickled NumPy scalar is made of: the host saves ``rank1`` as one (its issue #592)."""
    return [
        np._core.multiarray.scalar,  # type: ignore[attr-defined]
        (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
        np.dtype,
        *(type(np.dtype(kind)) for kind in ("float16", "float32", "float64", "int32", "int64")),
    ]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint or a bare state dict, weights-only, onto the CPU.

    Raises:
        UserError: when the file is missing, truncated, no checkpoint, or its pickle would run code.
    """
    file = Path(path).expanduser()
    if not file.is_file():
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
    except Exception as error:  # torch's reader raises anything on damaged bytes
        raise UserError(_damaged(path)) from error
    if not isinstance(content, Mapping):
        raise UserError(f"Checkpoint {str(path)!r} holds a {type(content).__name__}, not a dictionary of weights.")
    return dict(content)


def _damaged(path: str | Path) -> str:
    size = Path(path).expanduser().stat().st_size
    return (
        f"Checkpoint {str(path)!r} ({size:,} bytes) is truncated or not a checkpoint at all: "
        "copy it again, or take an earlier one."
    )


def state_dict_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights inside a checkpoint, without DataParallel's "module." and torch.compile's "_orig_mod.".

    torchreid keeps them under "state_dict", fast-reid under "model"; a bare state dict is taken as it is.
    """
    state = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    if not isinstance(state, Mapping):
        return {}
    return {
        name.removeprefix("module.").removeprefix("_orig_mod."): value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave: layer names that were loaded, and that stayed as they were initialised."""

    loaded: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        children = sorted({name.split(".")[0] for name in self.left})
        kept = f"; not in it and left as initialised: {', '.join(children)}" if children else ""
        return f"loaded {len(self.loaded)} of {len(self.loaded) + len(self.left)} tensors{kept}"


def load_weights(model: nn.Module, path: str | Path) -> LoadReport:
    """Load a checkpoint into `model` by name; all of it, or a UserError.

    Two things may be missing: what a checkpoint of the plain PCB cannot have (attention, supervision, part
    classifier), and classifiers of another number of identities. They stay as initialised.

    Raises:
        UserError: also when the checkpoint is of another architecture; says how many layers and which.
    """
    return load_state(model, state_dict_of(read_checkpoint(path)), path)


def load_state(model: nn.Module, given: Mapping[str, Tensor], path: str | Path) -> LoadReport:
    """Load the weights `given`, read from `path`, as `load_weights` does.

    Raises:
        UserError: they are of another architecture.
    """
    wanted = model.state_dict()
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
        examples = ", ".join([*wrong, *unknown][:4])
        raise UserError(
            f"Checkpoint {str(path)!r} is of another architecture: {len(wrong)} of the model's "
            f"{len(wanted)} tensors are missing or of another shape, {len(unknown)} of the checkpoint's "
            f"{len(given)} are unknown to it ({examples}, ...). Name the model that it was trained with."
        )
    model.load_state_dict(fits, strict=False)
    return LoadReport(tuple(fits), tuple(left))


def mismatches(model: nn.Module, given: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that `model` and the weights `given` do not have in common, in the same shape."""
    wanted = model.state_dict()
    wrong = [name for name in wanted if name not in given or given[name].shape != wanted[name].shape]
    return wrong + [name for name in given if name not in wanted]


def load_backbone(model: nn.Module, path: str = "") -> None:
    """Start a model's ResNet-50 from ImageNet weights, torchvision's or a file's.

    Args:
        model: a model with torchvision's names for the layers of a ResNet-50.
        path: a state dict of torchvision's ResNet-50, its classifier `fc` not needed; empty means
            torchvision's ``ResNet50_Weights.IMAGENET1K_V1``, downloaded once into torch's hub folder.

    Raises:
        UserError: when they cannot be downloaded or read, or lack layers of a ResNet-50.
    """
    if path:
        state, source = state_dict_of(read_checkpoint(path)), repr(path)
    else:
        state, source = dict(_download(ResNet50_Weights.IMAGENET1K_V1)), "torchvision's weights"
    wanted = {
        name: value
        for name, value in model.state_dict().items()
        if name.split(".")[0] in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
        and not name.endswith("num_batches_tracked")
    }
    wrong = [name for name, value in wanted.items() if name not in state or state[name].shape != value.shape]
    if wrong:
        raise UserError(
            f"csalr.pretrained_weights {source} is not a ResNet-50 of torchvision: {len(wrong)} of its "
            f"{len(wanted)} tensors are missing or of another shape ({', '.join(wrong[:3])}, ...)."
        )
    model.load_state_dict({name: state[name] for name in wanted}, strict=False)


def _download(weights: ResNet50_Weights) -> Mapping[str, Tensor]:
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        reason = (str(getattr(error, "reason", error)).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"ImageNet weights cannot be downloaded ({reason}): put {weights.url} at {str(place)!r}, or give the "
            "path of a torchvision ResNet-50 state dict as csalr.pretrained_weights, or start from random "
            "weights with model.pretrained False."
        ) from error
