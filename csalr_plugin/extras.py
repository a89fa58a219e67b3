"""Optional dependencies: the extras of csalr-plugin, and the error for a missing one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from csalr_plugin.errors import UserError

_EITHER_HOST = "yacs yaml PIL tabulate tqdm matplotlib tensorboard gdown h5py cv2 scipy jinja2"
# The modules that each extra of setup.cfg installs; a host comes first.
MODULES = {
    "torchreid": f"torchreid {_EITHER_HOST} filelock six".split(),
    "fastreid": f"fastreid {_EITHER_HOST} termcolor faiss sklearn".split(),
    "bench": ["tabulate", "tqdm", "matplotlib", "nystrom_attention"],
    "export": ["onnx", "onnxruntime", "onnxscript", "openvino", "onnxslim"],
}


class MissingExtraError(UserError):
    """An optional dependency is not installed.

    Args:
        module: the module that cannot be imported.
        extra: the extra of csalr-plugin whose code needs it.
        user: the command or function that needs it.
    """

    def __init__(self, module: str, extra: str, user: str = "csalr_plugin") -> None:
        self.module, self.extra = module, extra
        if module not in MODULES[extra]:  # a host has a dependency that it does not declare
            super().__init__(f"{user} needs {module}: pip install {module}")
            return
        # Where the host itself is missing, its name says more than that of its first dependency.
        main = MODULES[extra][0]
        named = main if extra in ("torchreid", "fastreid") and importlib.util.find_spec(main) is None else module
        super().__init__(f"{user} needs {named}: {install_command(extra)}")


def install_command(extra: str) -> str:
    """Return the command that installs an extra."""
    command = f"pip install 'csalr-plugin[{extra}]'"
    # fastreid requires torch 1.13, so it must be installed without its dependencies.
    return f"{command} && pip install --no-deps fastreid==1.4.0" if extra == "fastreid" else command


@contextmanager
def needs(extra: str, user: str) -> Iterator[None]:
    """Turn the failed import of a third-party module inside a with statement into a `MissingExtraError`.

    Args:
        extra: the extra that installs the modules which are imported.
        user: the command or function that imports them.

    Raises:
        MissingExtraError: a module is not installed.
    """
    try:
        yield
    except MissingExtraError as error:
        raise MissingExtraError(error.module, error.extra, user) from None
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module in ("", "csalr_plugin") or importlib.util.find_spec(module) is not None:
            raise  # a submodule is missing: nothing to install helps
        raise MissingExtraError(module, extra, user) from None
