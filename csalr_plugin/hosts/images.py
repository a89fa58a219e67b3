"""The image reader of both hosts, which converts every mode of Pillow to RGB."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from csalr_plugin.errors import UserError

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, ImageCms.PyCMSError)
"""Exceptions that Pillow raises for a file that is missing or does not decode."""


def read_image(path: str | Path) -> Image.Image:
    """Read an image as 8-bit RGB, rotated by its EXIF orientation.

    The alpha channel is dropped, as in torchvision and OpenCV. 16-bit grey keeps the high byte, as Pillow does for
    16-bit colour. 32-bit grey has the range from 0 to 1 (floating point only), to 255 or to 65535: the smallest of them
    that contains all of its values.

    Raises:
        UserError: the file is missing or does not decode, or its values are outside of these ranges.
    """
    try:
        with Image.open(path) as image:
            return _to_rgb(_upright(image))
    except UNREADABLE as error:
        raise unreadable(str(path), error) from None


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # malformed EXIF raises errors of many types; the pixels may be intact
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # convert("RGB") clips them at 255
        return Image.fromarray(_to_bytes(image)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return cast(Image.Image, ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"))
    if image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    elif "transparency" in image.info:  # Pillow warns about the direct conversion to RGB
        image = image.convert("RGBA")
    return image.convert("RGB")


def _to_bytes(image: Image.Image) -> np.ndarray:
    """Return 16-bit or 32-bit grey values as 8-bit values, (H, W)."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    # Pillow opens some 16-bit formats as 32-bit integers.
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM", "JPEG2000"):
        return (values.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
    if not (low >= 0 and high <= 65535):  # true for NaN
        raise ValueError(f"its values range from {low:g} to {high:g}; allowed are 0 to 1, 0 to 255 and 0 to 65535")
    if image.mode == "F" and high <= 1:
        values = values * 255
    elif high > 255:
        values = np.floor(values / 256)
    return np.rint(values).astype(np.uint8)


def unreadable(path: str, error: BaseException) -> UserError:
    """Return the `UserError` for an image for which Pillow raised `error`, one of `UNREADABLE`."""
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, UnidentifiedImageError):  # its text is only the path
        reason = "the content is not an image"
    return UserError(f"image '{path}' cannot be read ({reason}); replace it, or remove it from the dataset.")


def check_images(paths: Collection[str]) -> None:
    """Decode every image once, so that damaged files are found before training starts.

    Raises:
        UserError: an image cannot be read; the message names the first one.
    """

    def decode(path: str) -> None:
        read_image(path)

    with ThreadPoolExecutor() as pool:
        for _ in tqdm(pool.map(decode, paths), total=len(paths), desc="Checking images", unit="", mininterval=2.0):
            pass


def is_image_name(name: str) -> bool:
    """Return whether the extension of `name`, in upper or lower case, is one of an image format that Pillow reads."""
    return Path(name).suffix.lower() in _extensions()


@lru_cache(maxsize=1)
def _extensions() -> frozenset[str]:
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN)
