"""Running an unmodified script of fast-reid with the plugin loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import fastreid.config
import fastreid.engine

from csalr_plugin.hosts.fastreid import Trainer, add_csalr_config
from csalr_plugin.hosts.script import execute, find_script, interpreter_state, replaced


def run_script(path: str | Path, argv: Sequence[str]) -> None:
    """Run a script as ``python PATH ARGV...`` would, with the plugin's models registered.

    In the script, the result of ``get_cfg()`` has the node `CSALR` and checks every value, and `DefaultTrainer` is the
    plugin's `Trainer`.

    Args:
        path: path of the script.
        argv: its arguments.

    Raises:
        UserError: there is no such script, or something that the user gave cannot be used.
        SystemExit: the script exits.
    """
    script = find_script(path)
    host_get_cfg = fastreid.config.get_cfg

    def get_cfg() -> Any:
        cfg = host_get_cfg()
        add_csalr_config(cfg)
        return cfg

    with ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":  # only the first process prints
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        stack.enter_context(interpreter_state(script.parent))
        stack.enter_context(replaced(fastreid.config, {"get_cfg": get_cfg}))
        stack.enter_context(replaced(fastreid.engine, {"DefaultTrainer": Trainer}))
        execute(script, [str(path), *argv])
