"""The demo command on the smallest settings, from data to table, through a dataset `folder:PATH`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import yaml

from csalr_plugin import demo
from csalr_plugin.commands import main
from csalr_plugin.demo_data import make_demo_data
from csalr_plugin.hosts.torchreid.config import find_config


def test_the_demo_prints_pcb_beside_pcb_csalr_with_and_without_its_gates_and_where_its_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(find_config(demo.CONFIG).read_text())
    content["train"] |= {"max_epoch": 1, "batch_size": 8, "stepsize": [1]}
    content["data"] |= {"height": 64, "width": 32}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(demo, "CONFIG", str(tmp_path / "demo.yaml"))
    monkeypatch.setattr(demo, "make_demo_data", partial(make_demo_data, train_identities=4, test_identities=3))
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    table = said[said.rindex("queries, one seed") :]
    for word in (
        "mAP",
        "rank-1",
        "rank-5",
        "rank-10",
        "pcb, untrained",
        "pcb_csalr, gates set to 0",
        "gates of pcb_csalr",
    ):
        assert word in table
    for model in ("pcb", "pcb_csalr"):
        assert (out / "run-1" / model / "model" / "model.pth.tar-1").is_file()
        assert list((out / "run-1" / model).glob("events.out.tfevents.*"))
    (drawn,) = (out / "run-1" / "pcb_csalr").glob("ranked_folder_*.png")
    assert str(drawn) in table
    assert said.count(f"folder:{out}") >= 3 and "identities" in said  # the report of the dataset
