"""The sdist and the wheel: they build, pass twine's check, and work from a fresh environment without a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*words: object, cwd: Path, **variables: str) -> str:
    """Run a command, and return its output; it does not see the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "log", "logs")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source", cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of commands of a fresh environment with the wheel; other packages are those of this environment."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # As a plain path: Python does not run the .pth files there, such as that of the editable checkout.
    (Path(site) / "others.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    yield python.parent


def test_sdist_and_wheel_pass_the_check_of_twine(built: Path) -> None:
    files = sorted(built.iterdir())
    assert [file.suffix for file in files] == [".whl", ".gz"]
    assert run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=built).count("PASSED") == 2


def test_sdist_and_wheel_have_every_module_and_data_file(built: Path) -> None:
    wanted = {
        str(file.relative_to(ROOT))
        for folder in ("csalr_plugin", "projects", "configs")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".yaml", ".yml", ".md", ".html", ".cpp", ".h", ".typed")
        and "upstream" not in file.parts  # patches for the hosts' repositories, which work in a checkout alone
    }
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    in_wheel = {name if name.startswith("csalr_plugin/") else f"csalr_plugin/{name}" for name in wanted}
    assert in_wheel <= names, sorted(in_wheel - names)
    with tarfile.open(sdist) as archive:
        assert wanted <= {name.partition("/")[2] for name in archive.getnames()}


def test_every_module_of_the_wheel_is_imported_without_a_checkout(installed: Path, tmp_path: Path) -> None:
    code = (
        "import pkgutil, importlib, csalr_plugin\n"
        "names = [one.name for one in pkgutil.walk_packages(csalr_plugin.__path__, 'csalr_plugin.')]\n"
        "[importlib.import_module(name) for name in names if not name.endswith('__main__')]\n"
        "from csalr_plugin.hosts.torchreid.config import find_config\n"
        "print(len(names), csalr_plugin.__file__, find_config('configs/torchreid/pcb_384x128_sgd.yaml'))"
    )
    count, *files = run(installed / "python", "-c", code, cwd=tmp_path).splitlines()[-1].split()
    assert int(count) > 60 and all(file.startswith(str(installed.parent)) for file in files)


def test_fastreid_finds_its_config_in_the_wheel_by_name_and_trains(
    installed: Path, tmp_path: Path, tiny_data: Path
) -> None:
    small = (
        "INPUT.SIZE_TRAIN",
        "[64, 32]",
        "INPUT.SIZE_TEST",
        "[64, 32]",
        "CSALR.STAGES",
        "3",
        "SOLVER.MAX_EPOCH",
        "1",
    )
    words = ("train", "--host", "fastreid", "--config-file", "pcb_demo_64x32_adam.yml", *small)
    said = run(installed / "csalr", *words, cwd=tmp_path, FASTREID_DATASETS=str(tiny_data / "market1501"))
    assert "Settings that differ from fast-reid's defaults" in said
    assert (tmp_path / "logs" / "pcb_csalr_Market1501" / "report.html").is_file()
