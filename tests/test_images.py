"""One image reader for both hosts: every mode that Pillow opens becomes the right RGB pixels."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchreid
from PIL import Image, ImageCms
from torch import nn

from csalr_plugin.errors import UserError
from csalr_plugin.hosts.images import is_image_name, read_image
from csalr_plugin.hosts.torchreid import register
from csalr_plugin.models import build_model

register()
needs_fastreid = pytest.mark.skipif(importlib.util.find_spec("fastreid") is None, reason="fast-reid is not installed")


def picture() -> Image.Image:
    """A smooth colour picture of 32x64, all of its corners different."""
    y, x = np.mgrid[0:64, 0:32]
    pixels = np.stack([x * 8, y * 4, 255 - x * 4 - y * 2], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def grey_16() -> np.ndarray:
    return np.linspace(0, 65535, 64 * 32).astype(np.uint16).reshape(64, 32)


def in_mode(mode: str) -> Image.Image:
    source = picture()
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(source, srgb, lab, outputMode="LAB")
        assert converted is not None
        return converted
    return source.convert(mode)


@pytest.mark.parametrize(
    ("mode", "ending", "tolerance"),
    [
        ("RGB", "png", 0),
        ("RGBA", "png", 0),
        ("RGBX", "tiff", 0),
        ("CMYK", "tiff", 0),
        ("CMYK", "jpg", 3),
        ("YCbCr", "tiff", 2),
        ("LAB", "tiff", 2),
        ("P", "png", 20),
        ("P", "gif", 20),
        ("RGB", "webp", 5),
    ],
)
def test_every_colour_mode_gives_the_colours_of_the_picture(
    tmp_path: Path, mode: str, ending: str, tolerance: float
) -> None:
    path = tmp_path / f"image.{ending}"
    in_mode(mode).save(path)
    read = read_image(path)
    assert read.mode == "RGB"
    difference = np.abs(np.asarray(read, dtype=int) - np.asarray(picture(), dtype=int))
    assert difference.mean() <= tolerance


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm", "jp2"])
def test_16_bit_grey_keeps_its_range_in_every_format(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"image.{ending}"
    Image.fromarray(grey_16()).save(path)
    read = np.asarray(read_image(path))
    assert (read == (grey_16() >> 8)[..., None]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_modes_give_three_equal_channels(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.png"
    in_mode(mode).save(path)
    read = np.asarray(read_image(path))
    assert (read == np.asarray(in_mode(mode).convert("L"))[..., None]).all()


@pytest.mark.parametrize(("mode", "factor"), [("F", 1 / 255), ("F", 1.0), ("F", 256.0), ("I", 1), ("I", 256)])
def test_32_bit_values_are_read_by_the_range_that_they_fit(tmp_path: Path, mode: str, factor: float) -> None:
    path = tmp_path / "image.tiff"
    grey = np.asarray(picture().convert("L"))
    Image.fromarray((grey.astype(float) * factor).astype(np.float32 if mode == "F" else np.int32)).save(path)
    assert (np.asarray(read_image(path))[..., 0] == grey).all()


@pytest.mark.parametrize("value", [-1.0, 1e6, float("nan")])
def test_32_bit_values_out_of_range_are_refused_with_their_range(tmp_path: Path, value: float) -> None:
    Image.fromarray(np.full((8, 4), value, dtype=np.float32)).save(tmp_path / "image.tiff")
    with pytest.raises(UserError, match=r"image\.tiff.*values range from .* allowed are") as error:
        read_image(tmp_path / "image.tiff")
    assert "\n" not in str(error.value)


def test_transparency_is_dropped_and_the_stored_colours_stay(tmp_path: Path) -> None:
    transparent = picture()
    transparent.putalpha(0)
    transparent.save(tmp_path / "rgba.png")
    palette = picture().convert("P")
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (np.asarray(read_image(tmp_path / "rgba.png")) == np.asarray(picture())).all()
        assert (np.asarray(read_image(tmp_path / "palette.png")) == np.asarray(palette.convert("RGB"))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright_by_its_exif_orientation(tmp_path: Path, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture().transpose(undo[orientation]) if orientation in undo else picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "image.png", exif=exif)
    assert (np.asarray(read_image(tmp_path / "image.png")) == np.asarray(picture())).all()


def test_malformed_exif_does_not_keep_an_image_from_being_read(tmp_path: Path) -> None:
    picture().save(tmp_path / "image.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x00\x01")
    assert read_image(tmp_path / "image.jpg").size == (32, 64)


def test_image_files_are_known_by_their_ending_in_any_case() -> None:
    assert all(is_image_name(name) for name in ("a.jpg", "a.JPG", "b.Png", "c.tiff", "d.webp", "a.b.bmp"))
    assert not any(is_image_name(name) for name in ("a.txt", "jpg", "b.pdf", "c.heic", "Thumbs.db"))


def files_of_every_kind(folder: Path) -> list[str]:
    """16-bit grey, palette, RGBA, CMYK and EXIF-rotated files of a size that must be resized."""
    Image.fromarray(grey_16()).save(folder / "grey.png")
    for mode, ending in (("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("LA", "png"), ("LAB", "tiff")):
        in_mode(mode).save(folder / f"{mode}.{ending}")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(folder / "turned.jpg", exif=exif)
    return [str(path) for path in sorted(folder.iterdir())]


@needs_fastreid
def test_the_same_file_gives_the_same_pixels_and_embedding_in_both_hosts(tmp_path: Path) -> None:
    import csalr_plugin.hosts.fastreid as plugin

    # isort: split
    from fastreid.config import get_cfg
    from fastreid.data import build as fastreid_data
    from fastreid.data.common import CommDataset
    from fastreid.modeling import build_model as build_fastreid_model

    cfg = get_cfg()
    plugin.add_csalr_config(cfg)
    cfg.merge_from_list(["MODEL.NAME", "pcb_csalr", "MODEL.DEVICE", "cpu", "MODEL.BACKBONE.PRETRAIN", "False"])
    cfg.merge_from_list(["INPUT.SIZE_TEST", "[96, 48]", "CSALR.LANDMARKS", "2,2", "CSALR.STAGES", "3"])
    cfg.MODEL.HEADS.NUM_CLASSES = 5
    paths = files_of_every_kind(tmp_path)
    items = [(path, 0, 0) for path in paths]
    of_fastreid = CommDataset(items, fastreid_data.build_transforms(cfg, is_train=False), relabel=False)
    _, transform = torchreid.data.transforms.build_transforms(96, 48)
    of_torchreid = torchreid.data.ImageDataset(items, items, items, transform=transform, mode="query")
    raw = torch.stack([of_fastreid[place]["images"] for place in range(len(paths))])
    normalised = torch.stack([of_torchreid[place]["img"] for place in range(len(paths))])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    restored = (normalised * std.view(3, 1, 1) + mean.view(3, 1, 1)) * 255
    assert torch.equal(restored.round(), raw.float())

    network = build_fastreid_model(cfg).eval()
    other = build_model("pcb_csalr", 5, pretrained=False, landmarks=(2, 2), stages=(3,)).eval()
    for block in network.attention.values():
        nn.init.constant_(block.alpha, 0.3)
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(network({"images": raw.float()}), other(normalised), rtol=1e-4, atol=1e-6)


@needs_fastreid
def test_fastreids_own_models_keep_their_resize_filter() -> None:
    import csalr_plugin.hosts.fastreid as plugin

    # isort: split
    from fastreid.config import get_cfg
    from fastreid.data import build as fastreid_data

    cfg = get_cfg()
    plugin.add_csalr_config(cfg)
    filters = {}
    for name in ("Baseline", "pcb"):
        cfg.MODEL.META_ARCHITECTURE = name
        filters[name] = fastreid_data.build_transforms(cfg, is_train=False).transforms[0].interpolation.value
    assert filters == {"Baseline": "bicubic", "pcb": "bilinear"}


def test_the_hosts_feature_extractor_reads_with_the_same_reader(tmp_path: Path) -> None:
    extractor: Any = object.__new__(torchreid.utils.FeatureExtractor)
    _, extractor.preprocess = torchreid.data.transforms.build_transforms(64, 32, norm_mean=[0] * 3, norm_std=[1] * 3)
    extractor.to_pil = lambda array: Image.fromarray(array)
    extractor.model, extractor.device = nn.Identity(), "cpu"
    Image.fromarray(grey_16()).save(tmp_path / "grey.png")
    path = str(tmp_path / "grey.png")
    wanted = torch.from_numpy(np.asarray(read_image(path)).copy()).permute(2, 0, 1) / 255
    for given in (path, [path], tmp_path / "grey.png", np.asarray(read_image(path))):
        torch.testing.assert_close(extractor(given), wanted[None])


def test_ranked_results_are_drawn_from_every_mode_and_none_replaces_another(tmp_path: Path) -> None:
    for person in ("anna", "ben"):
        (tmp_path / person).mkdir()
        in_mode("LAB").save(tmp_path / person / "1.tiff")
        picture().save(tmp_path / person / "2.gif")
    query = [(str(tmp_path / person / "1.tiff"), number, 0, 0) for number, person in enumerate(("anna", "ben"))]
    gallery = [(str(tmp_path / person / "2.gif"), number, 1, 0) for number, person in enumerate(("anna", "ben"))]
    torchreid.utils.visualize_ranked_results(
        np.eye(2), (query, gallery), "image", width=32, height=64, save_dir=str(tmp_path / "out"), topk=2
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"1.jpg", "1-2.jpg"}
