"""Corrections of torchreid for today's torch and NumPy: they work, and change nothing else."""

from __future__ import annotations

import io
import os
import pickle
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchreid
from PIL import Image

from csalr_plugin.errors import UserError
from csalr_plugin.hosts.torchreid import compat, register
from csalr_plugin.models.cost import count_gmacs


@pytest.fixture(autouse=True)
def mended() -> None:
    register()


def test_applying_the_corrections_twice_changes_nothing_more() -> None:
    before = [
        vars(torchreid.utils).copy(),
        vars(torchreid.metrics).copy(),
        vars(torchreid.data.datasets.dataset).copy(),
    ]
    compat.apply()
    after = [vars(torchreid.utils), vars(torchreid.metrics), vars(torchreid.data.datasets.dataset)]
    assert [part.keys() for part in before] == [part.keys() for part in after]
    assert all(one[name] is other[name] for one, other in zip(before, after, strict=True) for name in one)


def test_modules_have_the_repositorys_paths_under_either_package() -> None:
    import torchreid.utils.torchtools
    from torchreid.data.datasets import init_image_dataset
    from torchreid.utils import Logger

    assert torchreid.utils.torchtools is torchreid.utils.torchtools
    assert sys.modules["torchreid.utils"] is torchreid.utils
    assert sys.modules["torchreid.models.osnet"].osnet_x1_0 is torchreid.models.osnet_x1_0
    assert callable(Logger) and callable(init_image_dataset)


def save_as_the_host_does(folder: Path, rank1: Any) -> Path:
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler.step()
    state = {
        "state_dict": model.state_dict(),
        "epoch": 3,
        "rank1": rank1,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    torchreid.utils.save_checkpoint(state, str(folder))
    return folder / "model.pth.tar-3"


@pytest.mark.parametrize("rank1", [np.float64(0.5), np.float32(0.5), 0.5])
def test_a_checkpoint_that_the_host_saved_loads_again_by_the_hosts_own_functions(tmp_path: Path, rank1: Any) -> None:
    path = save_as_the_host_does(tmp_path, rank1)
    assert torchreid.utils.load_checkpoint(str(path))["rank1"] == 0.5
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    assert torchreid.utils.resume_from_checkpoint(str(path), model, optimizer, scheduler) == 3
    assert scheduler.last_epoch == 1


def rewritten(path: Path, rewrite: Any) -> Path:
    """Return the checkpoint with its pickle rewritten."""
    changed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, rewrite(content) if name.endswith("data.pkl") else content)
    path.write_bytes(changed.getvalue())
    return path


def test_a_checkpoint_saved_under_numpy_1_loads(tmp_path: Path) -> None:
    path = save_as_the_host_does(tmp_path, np.float64(0.5))

    def as_numpy_1(content: bytes) -> bytes:
        assert b"cnumpy._core.multiarray\nscalar\n" in content
        return content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")

    assert torchreid.utils.load_checkpoint(str(rewritten(path, as_numpy_1)))["rank1"] == 0.5


class RunsCode:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def hidden_behind_python_2_text(proof: Path) -> bytes:
    """A pickle that ends the weights-only reader at its first string; plain pickle executes all of it."""
    code = pickle.dumps(RunsCode(proof), protocol=2)[2:]  # without the header
    return b"\x80\x02" + b"U\x01\xff" + b"0" + code


@pytest.mark.parametrize("hidden", [False, True])
def test_a_checkpoint_whose_pickle_would_run_code_is_refused(tmp_path: Path, hidden: bool) -> None:
    proof, plain = tmp_path / "it ran", (pickle.load, pickle.Unpickler)
    if hidden:
        path = rewritten(save_as_the_host_does(tmp_path, 0.5), lambda _: hidden_behind_python_2_text(proof))
    else:
        path = tmp_path / "model.pth.tar-3"
        torch.save({"state_dict": {}, "epoch": RunsCode(proof)}, path)
    with pytest.raises(UserError) as error:
        torchreid.utils.load_checkpoint(str(path))
    assert not proof.exists()
    assert (pickle.load, pickle.Unpickler) == plain
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        torchreid.utils.load_pretrained_weights(torch.nn.Linear(2, 3), str(path))
    assert not proof.exists()


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0 cut off"])
def test_an_image_that_does_not_decode_stops_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "0001_c1s1_000001_00.jpg"
    path.write_bytes(content)
    dataset = torchreid.data.datasets.dataset
    for read in (torchreid.utils.read_image, torchreid.utils.tools.read_image, dataset.read_image):
        with pytest.raises(UserError, match=r"0001_c1s1_000001_00\.jpg") as error:
            read(str(path))
        assert "\n" not in str(error.value)


def test_an_image_that_is_cut_off_or_missing_stops_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.effect_noise((64, 128), 50).save(path)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(UserError, match=r"cut\.jpg"):
        torchreid.utils.read_image(str(path))
    with pytest.raises(UserError, match=r"missing\.jpg"):
        torchreid.utils.read_image(str(tmp_path / "missing.jpg"))


def test_a_sound_image_is_read_as_rgb(tmp_path: Path) -> None:
    Image.new("L", (4, 8), 7).save(tmp_path / "grey.png")
    image = torchreid.utils.read_image(str(tmp_path / "grey.png"))
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 8), (7, 7, 7))


def test_the_hosts_logger_leaves_the_console_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = io.StringIO()
    monkeypatch.setattr(sys, "stdout", console)
    logger = torchreid.utils.Logger(str(tmp_path / "train.log"))
    logger.write("a line")
    del logger
    assert not console.closed
    assert (tmp_path / "train.log").read_text() == console.getvalue() == "a line"


def test_the_host_counts_the_parameters_and_products_of_attention() -> None:
    models = [torchreid.models.build_model(name, 4, pretrained=False) for name in ("pcb", "pcb_csalr", "osnet_x0_25")]
    count = torchreid.utils.compute_model_complexity
    (pcb_size, pcb_cost), (size, cost), small = (count(model, (1, 3, 64, 32)) for model in models)
    assert size == sum(parameter.numel() for parameter in models[1].parameters()) > pcb_size
    assert cost == round(count_gmacs(models[1], 64, 32) * 1e9) > 1.05 * pcb_cost
    assert torchreid.utils.model_complexity.compute_model_complexity is count
    assert small == (203_568, 5_208_800)  # the host's own count


def literal_cmc(distances: Any, query: Any, gallery: Any) -> tuple[Any, float]:
    """Return CMC up to rank 50 and mAP by their definition, for (identity, camera) pairs."""
    curves, precisions = [], []
    for row, (identity, camera) in zip(distances, query, strict=True):
        kept = [pair for _, pair in sorted(zip(row, gallery, strict=True)) if pair != (identity, camera)]
        hits = [pair[0] == identity for pair in kept]
        if any(hits):
            curves.append([float(any(hits[: rank + 1])) for rank in range(50)])
            at = [index + 1 for index, hit in enumerate(hits) if hit]
            precisions.append(np.mean([(count + 1) / place for count, place in enumerate(at)]))
    return np.mean(curves, axis=0), float(np.mean(precisions))


@pytest.mark.parametrize("size", [6, 30, 49, 52, 200])
def test_galleries_of_any_size_are_ranked_up_to_50(size: int) -> None:
    rng = np.random.default_rng(size)
    query = [(pid, 0) for pid in range(4)]
    gallery = [(int(rng.integers(5)), int(rng.integers(3))) for _ in range(size - 4)] + [(p, 1) for p in range(4)]
    distances = rng.random((4, size)).astype(np.float32)
    arrays = [np.array(pairs).T for pairs in (query, gallery)]
    (q_pids, q_camids), (g_pids, g_camids) = arrays
    wanted_cmc, wanted_map = literal_cmc(distances, query, gallery)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cmc, mean_ap = torchreid.metrics.evaluate_rank(distances, q_pids, g_pids, q_camids, g_camids)
        cuhk03 = torchreid.metrics.evaluate_rank(distances, q_pids, g_pids, q_camids, g_camids, use_metric_cuhk03=True)
    np.testing.assert_allclose(cmc, wanted_cmc, rtol=1e-6)
    assert mean_ap == pytest.approx(wanted_map)
    assert len(cuhk03[0]) == 50
    assert cuhk03[1] == pytest.approx(wanted_map)
