"""The plugin's models are in torchreid's registry, in either order of imports."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchreid

import csalr_plugin
import csalr_plugin.hosts
from csalr_plugin.errors import UserError
from csalr_plugin.hosts import add_models, plugin_model, register_hosts
from csalr_plugin.hosts.torchreid import dataset_names, model_registry, register, registered_name
from csalr_plugin.hosts.torchreid.config import default_config, set_active_config
from csalr_plugin.hosts.trained import load_trained
from csalr_plugin.models import MODEL_NAMES


def test_the_hosts_registry_lists_the_eight_names(capsys: pytest.CaptureFixture[str]) -> None:
    register()
    torchreid.models.show_avai_models()
    listed = capsys.readouterr().out
    assert len(MODEL_NAMES) == 8
    assert all(f"'{name}'" in listed for name in MODEL_NAMES)
    assert "'resnet50'" in listed


def test_registering_again_changes_nothing() -> None:
    register()
    before = dict(model_registry())
    register_hosts()
    register()
    assert model_registry() == before


def test_the_hosts_build_model_builds_with_the_active_settings() -> None:
    register()
    model = torchreid.models.build_model("pcb_csalr", num_classes=5, pretrained=False, use_gpu=False)
    assert [model.attention[name].groups for name in model.attention] == [2, 2, 2]
    config = default_config()
    config.merge_from_list(["csalr.groups", "4", "csalr.stages", "3"])
    previous = set_active_config(config)
    try:
        model = torchreid.models.build_model("pcb_csalr", num_classes=5, pretrained=False)
    finally:
        set_active_config(previous)
    assert [model.attention[name].groups for name in model.attention] == [4]


def test_a_host_keeps_its_own_model_and_the_plugins_is_built_under_another_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = vars(torchreid.models)["__model_factory"]
    before = dict(registry)
    for name in MODEL_NAMES:
        monkeypatch.delitem(registry, name, raising=False)
    theirs = object()
    monkeypatch.setitem(registry, "pcb_csalr", theirs)
    monkeypatch.delitem(registry, "plugin_pcb_csalr", raising=False)
    try:
        with pytest.warns(UserWarning, match="torchreid already has models named pcb_csalr") as warned:
            register_hosts()
            register()
            register_hosts()
        assert len(warned) == 1 and "plugin_pcb_csalr" in str(warned[0].message)
        assert registry["pcb_csalr"] is theirs
        assert set(MODEL_NAMES) <= set(registry) and "plugin_pcb_sa" not in registry
        model = torchreid.models.build_model("plugin_pcb_csalr", num_classes=5, pretrained=False, use_gpu=False)
        assert type(model) is csalr_plugin.PCB and list(model.attention) == ["stage1", "stage2", "stage3"]
    finally:
        registry.clear()
        registry.update(before)


def test_studies_build_the_plugins_model_whichever_name_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = model_registry()
    assert [registered_name(name) for name in ("pcb_csalr", "resnet50")] == ["pcb_csalr", "resnet50"]
    monkeypatch.setitem(registry, "plugin_pcb_csalr", registry["pcb_csalr"])
    monkeypatch.setitem(registry, "pcb_csalr", object())
    assert [registered_name(name) for name in ("pcb_csalr", "resnet50")] == ["plugin_pcb_csalr", "resnet50"]


def test_a_checkpoint_of_the_model_under_its_other_name_is_that_of_the_plugins_model(tmp_path: Path) -> None:
    model = csalr_plugin.build_model("pcb", 3, pretrained=False)
    settings = {"model.name": "plugin_pcb", "data.height": 64, "data.width": 32}
    torch.save({"state_dict": model.state_dict(), "settings": settings}, tmp_path / "model.pth")
    trained = load_trained(tmp_path / "model.pth")
    assert trained.model == "pcb" and type(trained.network) is csalr_plugin.PCB


def test_a_hosts_pcb_rpp_does_not_change_the_plugins_models_of_rpp(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = vars(torchreid.models)["__model_factory"]
    before = dict(registry)
    try:
        for name in [name for name in registry if plugin_model(registry, name)]:
            del registry[name]
        registry["pcb_rpp"] = registry["pcb_p6"]
        with pytest.warns(
            UserWarning, match=r"models named pcb_rpp and keeps them; csalr_plugin's are plugin_pcb_rpp\."
        ):
            register()
        for name in ("plugin_pcb_rpp", "pcb_rpp_csalr"):
            model = torchreid.models.build_model(name, num_classes=5, pretrained=False)
            assert type(model).__name__ == "RefinedPCB"
    finally:
        registry.clear()
        registry.update(before)


def test_a_registry_tells_the_plugins_models_from_those_of_the_host() -> None:
    registry: dict[str, Any] = {"pcb": object, "resnet50": object}
    with pytest.warns(UserWarning, match="plugin_pcb"):
        add_models("a host", registry, {name: partial(dict, name=name) for name in ("pcb", "pcb_sa")})
    assert {name: plugin_model(registry, name) for name in (*registry, "unknown")} == {
        "pcb": None,
        "resnet50": None,
        "plugin_pcb": "pcb",
        "pcb_sa": "pcb_sa",
        "unknown": None,
    }


def test_dataset_names_are_the_hosts() -> None:
    assert "market1501" in dataset_names("image")
    assert "mars" in dataset_names("video")


def test_importing_the_plugin_after_the_host_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = vars(torchreid.models)["__model_factory"]
    for name in MODEL_NAMES:
        monkeypatch.delitem(registry, name, raising=False)
    importlib.reload(csalr_plugin)
    assert set(MODEL_NAMES) <= set(registry)


def test_importing_the_plugin_before_the_host_registers() -> None:
    code = (
        "import sys, csalr_plugin\nassert 'torchreid' not in sys.modules\nimport torchreid\n"
        "from torchreid.utils import Logger\n"
        "assert 'pcb_rpp_csalr' in vars(torchreid.models)['__model_factory']"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Cython" not in done.stderr


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder on the module path, with no host imported and no import hook installed."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "torchreid"}
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "AfterImport" not in type(f).__name__])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "torchreid"]:
        del sys.modules[name]
    sys.modules.update(hidden)
    importlib.invalidate_caches()


@pytest.fixture
def registrations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(csalr_plugin.hosts, "_register_torchreid", lambda: calls.append("torchreid"))
    return calls


@pytest.mark.parametrize("layout", ["", "reid"])
def test_a_host_of_either_layout_is_registered_once_right_after_its_import(
    layout: str, imports: Path, registrations: list[str]
) -> None:
    package = imports / "torchreid"
    (package / layout).mkdir(parents=True)
    (package / layout / "__init__.py").write_text("")
    (package / "__init__.py").write_text(f"from torchreid{'.' + layout if layout else ''} import models\n")
    (package / layout / "models.py").write_text("")
    importlib.invalidate_caches()
    register_hosts()
    register_hosts()
    assert "torchreid" not in sys.modules
    assert importlib.util.find_spec("torchreid") is not None
    assert registrations == []
    module = importlib.import_module("torchreid")
    assert registrations == ["torchreid"]
    assert module.__file__ == str(package / "__init__.py")
    assert module.__spec__.loader is module.__loader__
    importlib.import_module("json.tool")
    assert registrations == ["torchreid"]


def test_without_a_host_nothing_happens(
    imports: Path, registrations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(imports)])
    register_hosts()
    importlib.invalidate_caches()
    assert importlib.util.find_spec("torchreid") is None
    with pytest.raises(ModuleNotFoundError, match="torchreid"):
        importlib.import_module("torchreid")
    assert registrations == []


def test_a_host_that_fails_to_import_raises_its_own_error(imports: Path, registrations: list[str]) -> None:
    (imports / "torchreid").mkdir()
    (imports / "torchreid" / "__init__.py").write_text("import a_module_that_is_missing\n")
    importlib.invalidate_caches()
    register_hosts()
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        importlib.import_module("torchreid")
    with pytest.raises(UserError, match="needs a_module_that_is_missing: pip install a_module_that_is_missing"):
        csalr_plugin.hosts.torchreid.host()
    assert registrations == []


def test_a_folder_with_the_name_of_the_host_is_ignored(
    imports: Path, registrations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (imports / "torchreid").mkdir()
    monkeypatch.setattr(sys, "path", [str(imports)])
    importlib.invalidate_caches()
    register_hosts()
    importlib.import_module("torchreid")
    assert registrations == []
