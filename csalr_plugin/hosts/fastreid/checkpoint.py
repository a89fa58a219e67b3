"""Checkpoints of fast-reid: written completely or not at all, read without running code, never loaded in part."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from fastreid.utils.checkpoint import Checkpointer

from csalr_plugin.errors import UserError
from csalr_plugin.files import complete_file
from csalr_plugin.models import PCB
from csalr_plugin.models.weights import (
    check_network_settings,
    check_tensors,
    load_exactly,
    load_state,
    read_checkpoint,
    recorded_network_settings,
    state_dict_of,
)

_host_load, _host_load_model = Checkpointer.load, Checkpointer._load_model


def patch() -> None:
    """Replace the methods of fast-reid's `Checkpointer` that read and write files."""
    methods = {"save": save, "load": load, "_load_file": _load_file, "_load_model": _load_model}
    for name, method in {**methods, "tag_last_checkpoint": tag_last_checkpoint}.items():
        setattr(Checkpointer, name, method)


def save(self: Any, name: str, **more: Any) -> None:
    """Write a checkpoint: the host's method, which a kill or a full disk does not leave half a file.

    The checkpoint also holds the settings of the training, if the attribute `settings` of `self` has them.

    Args:
        self: fast-reid's `Checkpointer`.
        name: of the file, without ".pth".
        more: further entries: epoch and metric.

    Raises:
        UserError: the file cannot be written; the earlier checkpoints stay.
    """
    if not self.save_dir or not self.save_to_disk:
        return
    content = {"model": self.model.state_dict(), **more}
    content |= {key: one.state_dict() for key, one in self.checkpointables.items()}
    if settings := getattr(self, "settings", None):
        content["settings"] = settings
    path = Path(self.save_dir) / f"{name}.pth"
    self.logger.info(f"Saving checkpoint to {path}")
    last = self.get_checkpoint_file()
    then = f"Go on from the last checkpoint, {last}, with --resume" if last else "Start the training again"
    with complete_file(path, _size(content), f"{then}.") as unfinished, unfinished.open("wb") as file:
        torch.save(content, file)
    self.saved_epoch = more.get("epoch", -1)
    self.tag_last_checkpoint(path.name)


def tag_last_checkpoint(self: Any, last_filename_basename: str) -> None:
    """Name the newest checkpoint in the file that ``--resume`` reads."""
    content = last_filename_basename.encode()
    with complete_file(Path(self.save_dir) / "last_checkpoint", len(content), "Free some space.") as unfinished:
        unfinished.write_bytes(content)


def load(self: Any, path: str, checkpointables: list[str] | None = None) -> Any:
    """Load a checkpoint, as the host's method, but complete and checked.

    Args:
        self: fast-reid's `Checkpointer`.
        path: of the file. An empty path starts a training from its initial weights.
        checkpointables: names of the further states to load; None for all that `self` has.

    Raises:
        UserError: the file is missing, damaged or of another network; or an evaluation has no weights.
    """
    self.resuming = checkpointables is None and bool(self.checkpointables)
    self.evaluates = checkpointables is None and not self.checkpointables
    if self.evaluates and not path:
        raise UserError(
            "config key 'MODEL.WEIGHTS' is empty, and an evaluation of initial weights means nothing: give the path of "
            "a checkpoint."
        )
    self.loading = os.path.expanduser(path)
    if path and "://" not in path and not os.path.isfile(self.loading):
        read_checkpoint(path)  # raises the error
    return _host_load(self, self.loading, checkpointables)


def _load_file(_: Any, path: str) -> dict[str, Any]:
    content = read_checkpoint(path)
    return content if "model" in content else {"model": state_dict_of(content)}


def _load_model(self: Any, checkpoint: dict[str, Any]) -> Any:
    state = state_dict_of(checkpoint)
    if self.resuming:
        load_exactly(self.model, state, self.loading)
    elif isinstance(self.model, PCB):
        self.logger.info(str(load_state(self.model, state, self.loading)))
    else:
        wanted = self.model.state_dict()
        check_tensors(state, wanted, self.loading)
        check_network_settings(self.model, recorded_network_settings(state), f"Checkpoint {self.loading!r}")
        # A checkpoint of the plain network fits the one with attention, whose blocks are then new.
        new = {"attention", "supervision"} - {name.split(".")[0] for name in state}
        new |= {"supervision"} if self.evaluates else set()
        missing = [
            name
            for name in wanted
            if name not in state and name.split(".")[0] not in new and not name.endswith("num_batches_tracked")
        ]
        if self.evaluates and missing:
            raise UserError(
                f"Checkpoint {self.loading!r} is of another architecture: it lacks {len(missing)} of the model's "
                f"{len(wanted)} tensors ({', '.join(missing[:3])}, ...). Name the model that it was trained with."
            )
        return _host_load_model(self, checkpoint)
    del checkpoint["model"]
    return None


def _size(content: Any) -> int:
    """Return the number of bytes of all tensors in nested dictionaries and lists."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    if isinstance(content, dict):
        return sum(map(_size, content.values()))
    return sum(map(_size, content)) if isinstance(content, (list, tuple)) else 0
