"""Fixtures of all tests: a tiny data set, the default settings, and one thread per process, for parallel tests.

With TORCHREID_REPO or FASTREID_REPO, the paths of checkouts of the hosts' repositories, all tests run against those.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from reference import DEVICE

torch.set_num_threads(1)
if DEVICE.type != "cpu":
    torch.set_default_device(DEVICE)
    torch.backends.cudnn.allow_tf32 = False  # tolerances are those of float32
# A shell ignores SIGINT in background jobs, and processes that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

for repository in filter(None, map(os.environ.get, ("TORCHREID_REPO", "FASTREID_REPO"))):
    sys.path.insert(0, repository)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (repository, os.environ.get("PYTHONPATH"))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On another device, skip the tests of the compiled passes, and those that a default device disturbs."""
    if DEVICE.type != "cpu":
        for item in items:
            if item.get_closest_marker("on_cpu"):
                item.add_marker(pytest.mark.skip(reason="for a CPU"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the smallest demo data: enough for one or two batches per epoch."""
    from csalr_plugin.demo_data import make_demo_data

    return make_demo_data(tmp_path_factory.mktemp("tiny") / "data", train_identities=4, test_identities=3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Commands such as `csalr bench` set the number of threads, on which the rounding of later tests depends."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_active_config() -> Iterator[None]:
    """Each test starts and ends with the plugin's default settings."""
    yield
    if config := sys.modules.get("csalr_plugin.hosts.torchreid.config"):
        config.set_active_config(None)


# Modules whose trainings draw the report and the sheet of ranked results, which take up to a second of each training.
WITH_PICTURES = ("test_records", "test_fastreid", "test_demo")


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of `WITH_PICTURES` a training writes no report and no sheet of ranked results."""
    if request.module.__name__ not in WITH_PICTURES:
        for name in ("csalr_plugin.hosts.torchreid.engine", "csalr_plugin.hosts.fastreid.trainer"):
            if module := sys.modules.get(name):
                monkeypatch.setattr(module, "write_report", lambda folder, **_: folder)
                monkeypatch.setattr(module, "draw_ranked", lambda *_, **__: None)


@pytest.fixture(params=["fast", "plain"])
def either_form(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test runs twice: with the compiled passes of the attention blocks, and with their plain form."""
    from csalr_plugin.attention import set_fast
    from csalr_plugin.attention.fast.build import library

    assert library(torch.float32) is not None and library(torch.float64) is not None
    set_fast(request.param == "fast")
    yield
    set_fast(True)
