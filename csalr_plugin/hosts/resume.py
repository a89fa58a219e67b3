"""Resuming a training: the state of an optimizer without its hyperparameters, and the learning rates of an epoch."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from csalr_plugin.models.weights import check_optimizer_state


def name_parameters(optimizer: torch.optim.Optimizer, network: torch.nn.Module) -> None:
    """Write the names of its parameters into each group of `optimizer`, where torch keeps them: "param_names".

    A resumed training then finds the state of each parameter, also when its groups are others.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for group in optimizer.param_groups:
        group["param_names"] = [names[id(parameter)] for parameter in group["params"]]


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, saved: Any, path: str | Path, progress: Collection[str] = ()
) -> None:
    """Load the state of each parameter from a checkpoint; hyperparameters stay those that `optimizer` was built with.

    Parameters are matched by name where the checkpoint has their names (see `name_parameters`), otherwise by order.

    Args:
        optimizer: a new one, for the model that the checkpoint is of.
        saved: the optimizer's state from the checkpoint.
        path: the checkpoint, for messages.
        progress: entries of a parameter group that describe the progress of the training; they are loaded.

    Raises:
        UserError: the state cannot be loaded, see `check_optimizer_state`.
    """
    saved = _in_the_groups_of(optimizer, saved)
    check_optimizer_state(optimizer, saved, path)
    groups = []
    for ours, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        done = {key: theirs[key] for key in progress if key in theirs}
        groups.append({**ours, **done, "params": theirs["params"]})
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _in_the_groups_of(optimizer: torch.optim.Optimizer, saved: Any) -> Any:
    """Return `saved` in the groups of `optimizer`, or unchanged if names are missing or differ."""
    theirs, ours = _names(saved), _names({"param_groups": optimizer.param_groups})
    if not theirs or sorted(theirs) != sorted(ours):
        return saved
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    if len(indices) != len(theirs):
        return saved
    index_of = dict(zip(theirs, indices, strict=True))
    first = {key: value for key, value in saved["param_groups"][0].items() if key not in ("params", "param_names")}
    groups = [
        {**first, "params": [index_of[name] for name in group["param_names"]]} for group in optimizer.param_groups
    ]
    return {"state": saved.get("state"), "param_groups": groups}


def _names(state: Any) -> list[str]:
    """Return the names of all parameters in an optimizer's state, in order; empty if one is missing."""
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    names: list[str] = []
    for group in groups if isinstance(groups, list) else []:
        given = group.get("param_names") if isinstance(group, Mapping) else None
        if not isinstance(given, list) or not isinstance(group.get("params"), list):
            return []
        names += map(str, given)
    return names


def replay_schedule(scheduler: Any, epochs: int) -> None:
    """Set the learning rates that `scheduler`, a new one, gives after `epochs` epochs.

    Rates depend on the settings alone, so a setting that was changed applies as if it had held from the start, and
    one that was not gives the rates of a run without a stop, bit by bit.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # before optimizer.step()
        for _ in range(epochs):
            scheduler.step()
