"""The extras: which commands work with torch, torchvision and numpy alone, and what a missing extra prints."""

from __future__ import annotations

import configparser
import importlib
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from csalr_plugin.extras import MODULES, MissingExtraError, needs

ROOT = Path(__file__).parents[1]
FASTREID = "pip install 'csalr-plugin[fastreid]' && pip install --no-deps fastreid==1.4.0"


def python_with(folder: Path, *extras: str) -> Path:
    """The Python of a new environment with csalr_plugin and only these extras."""
    subprocess.run([sys.executable, ROOT / ".ci" / "environment.py", folder, *extras], check=True, timeout=120)
    return folder / "bin" / "python"


def run(python: Path, code: str, folder: Path) -> str:
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


ALONE = """
import contextlib, io, shlex, sys
import torch
from csalr_plugin import build_attention, build_model
from csalr_plugin.commands import main

model = build_model("pcb_csalr", 3, pretrained=False).eval()
assert model(torch.randn(1, 3, 64, 32)).shape == (1, 12288)
for name in ("sa", "csa", "csalr"):
    assert build_attention(name, 16)(torch.randn(1, 16, 4, 4)).shape == (1, 16, 4, 4)
assert not {"torchreid", "fastreid", "yaml", "yacs", "tabulate", "tqdm"} & set(sys.modules)
with contextlib.redirect_stdout(io.StringIO()) as printed:
    assert main(["models", "--height", "64", "--width", "32"]) == 0
assert "pcb_rpp_csalr" in printed.getvalue() and "csalr.landmarks" in printed.getvalue()
open("script.py", "w").write("import torchreid")
open("train_net.py", "w").write("import fastreid")
for line in COMMANDS:
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        assert main(shlex.split(line)) == 2, line
    print(printed.getvalue(), end="")
"""
COMMANDS = {
    "train --help": "csalr train needs torchreid: pip install 'csalr-plugin[torchreid]'",
    "train model.name pcb": "csalr train needs torchreid: pip install 'csalr-plugin[torchreid]'",
    "run script.py": "csalr run needs torchreid: pip install 'csalr-plugin[torchreid]'",
    "run train_net.py": f"csalr run needs fastreid: {FASTREID}",
    "demo --out out": "csalr demo needs torchreid: pip install 'csalr-plugin[torchreid]'",
    "demo --out out --host fastreid": f"csalr demo --host fastreid needs fastreid: {FASTREID}",
    "bench cost --out out": "csalr bench cost needs tabulate: pip install 'csalr-plugin[bench]'",
    "bench scale --out out": "csalr bench scale needs tabulate: pip install 'csalr-plugin[bench]'",
    "bench zoo --out out": "csalr bench zoo needs tabulate: pip install 'csalr-plugin[bench]'",
    "export --weights w.pth --output out/m.onnx": "csalr export needs onnx: pip install 'csalr-plugin[export]'",
    "reproduce all --out out": "csalr reproduce needs torchreid: pip install 'csalr-plugin[torchreid]'",
    "attention-maps --out out": "csalr attention-maps needs torchreid: pip install 'csalr-plugin[torchreid]'",
}


def test_blocks_models_and_their_list_need_torch_torchvision_and_numpy_alone_and_other_commands_name_their_extra(
    tmp_path: Path,
) -> None:
    python = python_with(tmp_path / "alone")
    printed = run(python, f"COMMANDS = {list(COMMANDS)}\n{ALONE}", tmp_path)
    assert printed.splitlines() == [f"csalr: error: {line}" for line in COMMANDS.values()]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "modules"),
    [
        ("torchreid", "hosts.torchreid.train hosts.torchreid.script demo projects.paper.study projects.paper.report"),
        ("fastreid", "hosts.fastreid hosts.fastreid.script hosts.fastreid.launch demo"),
        ("bench", "projects.benchmark.cost projects.benchmark.scale projects.benchmark.zoo"),
    ],
)
def test_an_extra_installs_what_its_commands_import(extra: str, modules: str, tmp_path: Path) -> None:
    if extra == "fastreid":
        pytest.importorskip("fastreid")
    code = "".join(f"import csalr_plugin.{module}\n" for module in modules.split())
    if extra == "bench":
        code += "from csalr_plugin.commands import main\n"
        code += "assert main(['bench', 'zoo', '--out', 'out', '--only', 'pcb']) == 2"
    python = python_with(tmp_path / "environment", extra)
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if extra == "bench":
        line = "csalr: error: csalr bench zoo needs torchreid: pip install 'csalr-plugin[torchreid]'"
        assert done.stderr.splitlines() == [line]


def test_the_modules_of_an_extra_are_those_of_its_packages_in_setup_cfg() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    distributions = packages_distributions()
    for extra, modules in MODULES.items():
        lines = config["options.extras_require"][extra].splitlines()
        packages = {Requirement(line).name.lower() for line in lines if line and not line.startswith("#")}
        installed = [module for module in modules if module in distributions and module != "fastreid"]
        named = {name.lower() for module in installed for name in distributions[module]}
        assert named <= packages, extra
        assert len(modules) - ("fastreid" in modules) == len(packages), extra


def test_a_package_that_a_host_needs_and_no_extra_installs_is_named_itself() -> None:
    line = r"^csalr train needs a_missing_one: pip install a_missing_one$"
    with pytest.raises(MissingExtraError, match=line), needs("torchreid", "csalr train"):
        importlib.import_module("a_missing_one")


def test_a_missing_module_of_an_installed_package_is_no_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"torch\.no_such_module"), needs("torchreid", "csalr train"):
        importlib.import_module("torch.no_such_module")
