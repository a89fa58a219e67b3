"""Runs a script of the host's, unmodified, with the plugin loaded."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from csalr_plugin.errors import SharedError
from csalr_plugin.hosts.script import execute, find_host, find_script, interpreter_state, replaced
from csalr_plugin.hosts.torchreid import host, register
from csalr_plugin.hosts.torchreid.arguments import FLAGS, flag_of, host_argv, parse_arguments
from csalr_plugin.hosts.torchreid.config import (
    IMAGE_DATA,
    VIDEO_DATA,
    Config,
    active_config,
    default_config,
    set_active_config,
    with_plugin_keys,
)

_ENGINES = ("ImageSoftmaxEngine", "ImageTripletEngine", "VideoSoftmaxEngine", "VideoTripletEngine")
_DATA_MANAGERS = {"ImageDataManager": IMAGE_DATA, "VideoDataManager": VIDEO_DATA}


def run_script(path: str | Path, argv: Sequence[str]) -> None:
    """Run the script at `path` as ``python PATH ARGV...`` would, with the plugin's models registered.

    Where a ``default_config.py`` lies beside it, as beside the host's own ``scripts/main.py``, its settings
    get the plugin's node and checks, keys are taken in any case, no override is swallowed, and the plugin's
    engine, optimizer and checkpoint loading take the place of the host's for the run.

    The installed torchreid is used; where none is, the one of the script's own repository.

    Raises:
        UserError: there is no such script, or anything that the user gave cannot be used.
        SystemExit: when the script ends so.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise SharedError(
            f"torchreid's script {str(path)!r} knows one process, and torchrun started {os.environ['WORLD_SIZE']}: run "
            "it without torchrun, or train with torchrun ... -m csalr_plugin train."
        )
    script = find_script(path)
    with ExitStack() as stack:
        stack.enter_context(interpreter_state(script.parent, "default_config"))
        find_host("torchreid", script)
        register()
        if (script.parent / "default_config.py").is_file():
            argv = stack.enter_context(_plugin_in_place(argv))
        execute(script, [str(path), *argv])


@contextmanager
def _plugin_in_place(argv: Sequence[str]) -> Iterator[list[str]]:
    """Put the plugin's functions in the place of the host's; yield the script's arguments."""
    from csalr_plugin.hosts.torchreid import datasets, engine, optimizer, train

    torchreid = host()
    settings = importlib.import_module("default_config")
    host_defaults: Callable[[], Any] | None = getattr(settings, "get_default_config", None)
    host_managers = {name: getattr(torchreid.data, name) for name in _DATA_MANAGERS}
    host_set_random_seed = torchreid.utils.set_random_seed
    prepared: list[Config] = []

    def get_default_config(host_defaults: Callable[[], Any]) -> Config:
        config = with_plugin_keys(host_defaults())
        set_active_config(config)
        return config

    def prepare() -> Config | None:
        """Prepare the run once; return its config, or None for a script with a schema of its own."""
        config = active_config()
        if default_config().leaves().keys() - config.leaves().keys():
            return None
        if not prepared:
            train.prepare(config)
            prepared.append(config)
        return config

    def set_random_seed(seed: int) -> None:
        # The first thing that the host's script calls with its settings merged; then it opens a log in
        # the save folder.
        prepare()
        host_set_random_seed(seed)

    def data_manager(name: str, **arguments: Any) -> Any:
        config = prepare()
        with replaced(torchreid.data, host_managers):
            if config is not None and arguments == config.keyword_arguments(_DATA_MANAGERS[name]):
                return datasets.build_datamanager(config)
            return host_managers[name](**arguments)

    plugin: tuple[tuple[ModuleType, dict[str, Any]], ...] = (
        (
            torchreid.engine,
            {name: engine.plugin_engine(getattr(torchreid.engine, name)) for name in _ENGINES},
        ),
        (torchreid.data, {name: partial(data_manager, name) for name in _DATA_MANAGERS}),
        (torchreid.models, {"build_model": train.build_model}),
        (torchreid.optim, {"build_optimizer": optimizer.build_optimizer}),
        (
            torchreid.utils,
            {
                "set_random_seed": set_random_seed,
                "check_isfile": train.check_isfile,
                "load_pretrained_weights": train.load_pretrained_weights,
                "resume_from_checkpoint": train.resume_from_checkpoint,
            },
        ),
    )
    with ExitStack() as stack:
        stack.callback(set_active_config, set_active_config(None))  # the one before, afterwards
        for module, functions in plugin:
            stack.enter_context(replaced(module, functions))
        if host_defaults is not None:
            vars(settings)["get_default_config"] = partial(get_default_config, host_defaults)
        yield host_argv(parse_arguments(argv, "csalr run SCRIPT")) if _only_known_flags(argv) else list(argv)


def _only_known_flags(argv: Sequence[str]) -> bool:
    """Whether every flag is one of the host's script; else, as for ``--help``, the words stay as they are."""
    return all(flag_of(word) in FLAGS for word in argv if re.match("--|-[A-Za-z]", word))
