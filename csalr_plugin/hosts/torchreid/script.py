"""Running an unmodified script of torchreid with the plugin loaded."""

from __future__ import annotations

import importlib
import os
import re
import sys
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

    If a ``default_config.py`` lies beside it, as beside the host's own ``scripts/main.py``, its settings get the
    plugin's node and checks, keys may be in any case, no override is lost, and the plugin's engine, optimizer and
    checkpoint loading replace those of the host during the run.

    The torchreid of the script's own repository is used, or else the installed one.

    Raises:
        UserError: there is no such script, or something that the user gave cannot be used.
        SystemExit: the script raised it.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise SharedError(
            f"torchreid's script {str(path)!r} runs in one process, and torchrun started {os.environ['WORLD_SIZE']}: "
            "run it without torchrun, or train with torchrun ... -m csalr_plugin train."
        )
    script = find_script(path)
    with ExitStack() as stack:
        stack.enter_context(interpreter_state(script.parent, "default_config"))
        if "torchreid" not in sys.modules:
            find_host("torchreid", script)
        register()
        if (script.parent / "default_config.py").is_file():
            argv = stack.enter_context(_plugin_in_place(argv))
        execute(script, [str(path), *argv])


@contextmanager
def _plugin_in_place(argv: Sequence[str]) -> Iterator[list[str]]:
    """Replace functions of the host by the plugin's; yield the script's arguments."""
    from csalr_plugin.hosts.torchreid import datasets, engine, monitor, optimizer, train

    torchreid = host()
    settings = importlib.import_module("default_config")
    host_defaults: Callable[[], Any] | None = getattr(settings, "get_default_config", None)
    host_managers = {name: getattr(torchreid.data, name) for name in _DATA_MANAGERS}
    host_set_random_seed = torchreid.utils.set_random_seed
    prepared: list[Config] = []
    arguments = parse_arguments(argv, "csalr run SCRIPT") if _only_known_flags(argv) else None

    def get_default_config(host_defaults: Callable[[], Any]) -> Config:
        config = with_plugin_keys(host_defaults())
        # The script assigns these directly, so that no merge marks them as given.
        flags = ("root", "sources", "targets", "transforms")
        config.given.update(f"data.{name}" for name in flags if arguments and getattr(arguments, name))
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
        # The host's script calls this first once its settings are merged; then it opens a log in the save folder.
        prepare()
        host_set_random_seed(seed)

    def data_manager(name: str, **options: Any) -> Any:
        config = prepare()
        with replaced(torchreid.data, host_managers):
            if config is not None and options == config.keyword_arguments(_DATA_MANAGERS[name]):
                return datasets.build_datamanager(config)
            return host_managers[name](**options)

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
                "Logger": monitor.ScriptLogger,
                "set_random_seed": set_random_seed,
                "check_isfile": train.check_isfile,
                "compute_model_complexity": train.compute_model_complexity,
                "load_pretrained_weights": train.load_pretrained_weights,
                "resume_from_checkpoint": train.resume_from_checkpoint,
            },
        ),
    )
    with ExitStack() as stack:
        stack.callback(set_active_config, set_active_config(None))  # afterwards set the previous one
        for module, functions in plugin:
            stack.enter_context(replaced(module, functions))
        if host_defaults is not None:
            vars(settings)["get_default_config"] = partial(get_default_config, host_defaults)
        yield host_argv(arguments) if arguments else list(argv)


def _only_known_flags(argv: Sequence[str]) -> bool:
    """Return whether every flag is one of the host's script; otherwise, as for ``--help``, the words stay unchanged."""
    return all(flag_of(word) in FLAGS for word in argv if re.match("--|-[A-Za-z]", word))
