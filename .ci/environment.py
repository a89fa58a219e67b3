"""Make a virtual environment with csalr_plugin and only the packages of some of its extras.

    python .ci/environment.py FOLDER [EXTRA ...]

Packages are linked from the environment of this Python, which must have all of them. Without an extra, FOLDER has
torch, torchvision, numpy and their dependencies alone. The extra "fastreid" includes fastreid itself.
"""

from __future__ import annotations

import configparser
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement


def main(folder: Path, extras: list[str]) -> None:
    """Make the environment."""
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    lists = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    wanted = [line for lines in lists for line in lines.splitlines() if line and not line.startswith("#")]
    venv.create(folder, clear=True, symlinks=True)
    site = subprocess.check_output(
        [folder / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    names = with_dependencies(wanted) | {"csalr-plugin"} | ({"fastreid"} if "fastreid" in extras else set())
    for name in names:
        link(name, Path(site.strip()))


def with_dependencies(requirements: list[str]) -> set[str]:
    """Return the names of the packages that `requirements` name, and of all their dependencies."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        needed = [Requirement(line) for line in distribution(name).requires or ()]
        waiting += [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def link(name: str, site: Path) -> None:
    """Link the files of a package into the folder `site`."""
    package = distribution(name)
    for entry in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
        target = site / entry
        if not target.exists():
            target.symlink_to(Path(str(package.locate_file(entry))).absolute())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
